"""Hessian products, by whichever way the loss allows."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dynamon.curvature.backends import (
    DIFFERENCE_STEP,
    DoubleBackward,
    FiniteDifference,
    NoSecondDerivativeError,
    RandomState,
    disagreement,
)
from dynamon.curvature.blocks import BlockOperator
from dynamon.curvature.operators import LinearOperator
from dynamon.curvature.parameters import FlatParameters, Parameters

_BACKENDS = ("auto", "double_backward", "finite_difference")


class HessianOperator(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L(\theta)` of a scalar loss, as products :math:`H v`.

    ``"double_backward"`` evaluates the loss once, at construction, and keeps its gradient's graph:
    :math:`H v = \nabla_\theta \langle \nabla_\theta L, v \rangle` then costs about two gradients a product
    instead of three and a half. Attention runs through the math kernel, because the fused ones have no
    second derivative, and compiled code runs uncompiled, for the same reason.

    ``"finite_difference"`` evaluates two gradients a product, at weights moved a little to either side, with the
    same random numbers each time. It works where second derivatives do not exist: reentrant checkpointing,
    custom autograd functions, cuDNN's recurrent layers. :meth:`product_error` compares two step sizes.

    ``"auto"`` takes the first, and the second where the first is refused: by the graph, in the first product, or
    because a custom autograd function in the graph makes the two disagree. ``.backend`` and ``.reason`` say what
    was taken and why.

    ``.grad`` is what it was afterwards, and so are the weights, bit for bit. Random streams move as for one
    evaluation of the loss at most, buffers as for every evaluation; :func:`dynamon.probe.undisturbed` puts both back.

    Args:
        loss_fn: Called without arguments; returns the scalar loss, differentiable in ``params``.
        params: The parameters to differentiate in, in the order of the flat vectors, or a mapping from their names.
            Those that do not take part in the loss get zero rows.
        backend: ``"auto"``, ``"double_backward"`` or ``"finite_difference"``.

    Attributes:
        loss: The value of the loss, a 0-d tensor without graph.
        gradient: The flat gradient ``[n]`` without graph.
        backend: How the products are made.
        reason: Why double backward was not taken by ``"auto"``, else None.

    Raises:
        ValueError: On an unknown backend, no parameters, a loss that is not a scalar tensor or does not
            depend on any of the parameters, parameters on several devices or in several dtypes, or finite
            differences in half precision.
        NoSecondDerivativeError: (a RuntimeError) with ``"double_backward"``, where an operation has none.
        RuntimeError: In a product where a parameter changed after construction.

    Memory: the graph of one forward and backward pass at the size of the batch in ``loss_fn``; with differences two
    vectors of length n and what a gradient takes.
    """

    def __init__(
        self, loss_fn: Callable[[], Tensor], params: Parameters | FlatParameters, *, backend: str = "auto"
    ) -> None:
        """Evaluate the loss and settle on a backend."""
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}.")
        self.parameters = FlatParameters.of(params)
        device = self.parameters.tensors[0].device
        super().__init__(self.parameters.size, self.parameters.dtype, device, self.parameters.space)
        self._loss_fn, self._may_change = loss_fn, backend == "auto"
        self.reason: str | None = None
        self._engine = self._choose(backend)
        self.parameters.mark_unchanged()  # a loss may write to parameters of its own, an averaged teacher's say
        self.backend = self._engine.name
        self.loss, self.gradient = self._engine.loss, self._engine.gradient

    @property
    def has_gradient(self) -> list[bool]:
        """Which parameters take part in the loss; the others have zeros in the flat gradient."""
        return self._engine.has_gradient

    def _choose(self, backend: str) -> DoubleBackward | FiniteDifference:
        self._random = RandomState()
        if backend == "finite_difference":
            return FiniteDifference(self._loss_fn, self.parameters, self._random)
        try:
            exact = DoubleBackward(self._loss_fn, self.parameters)
            if self._may_change and exact.has_custom_functions and exact.gradient.dtype in DIFFERENCE_STEP:
                differences = FiniteDifference(self._loss_fn, self.parameters, self._random)
                distance = disagreement(exact, differences)
                if distance:
                    self.reason = (
                        f"a custom autograd function drops out of the second derivative ({distance:.0%} of a product)."
                    )
                    return differences
            return exact
        except NoSecondDerivativeError as error:
            return self._fall_back(error)

    def _fall_back(self, error: NoSecondDerivativeError) -> FiniteDifference:
        if not self._may_change:
            raise error
        self.reason, self._may_change = str(error), False
        return FiniteDifference(self._loss_fn, self.parameters, self._random)

    def _product(self, vector: Tensor) -> Tensor:
        return self.block_product(vector)

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """``H_bb v`` for the parameters in some places; see :meth:`block`."""
        self.parameters.check_unchanged()
        try:
            return self._engine.product(vector, block)
        except NoSecondDerivativeError as error:
            self._engine = self._fall_back(error)
            self.parameters.mark_unchanged()
            self.backend = self._engine.name
            return self._engine.product(vector, block)

    def block(self, chosen: str | Sequence[str] | Sequence[Tensor]) -> "BlockOperator":
        """The diagonal block of some parameters, on the same graph.

        Args:
            chosen: A glob of names or several (where ``params`` was a mapping), or the parameters themselves.
        """
        return BlockOperator(self, self.parameters.block(chosen))

    def product_error(self, vector: Tensor) -> float:
        """Relative difference of the product between two step sizes; 0 with double backward."""
        return self._engine.error(vector)

    def likely_direction(self) -> Tensor:
        """The gradient, most of which lies in the top eigenspace (Gur-Ari et al., arXiv 1812.04754)."""
        return self.gradient
