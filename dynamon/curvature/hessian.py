"""Hessian products, by whichever way the loss allows."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dynamon.curvature.backends import (
    DIFFERENCE_STEP,
    DoubleBackward,
    FiniteDifference,
    NoSecondDerivativeError,
    compare,
)
from dynamon.curvature.blocks import BlockOperator
from dynamon.curvature.operators import LinearOperator
from dynamon.curvature.parameters import FlatParameters, Parameters
from dynamon.evaluations import Evaluations
from dynamon.pairs import real_dtype
from dynamon.ranks import ran_out_of_memory

_BACKENDS = ("auto", "double_backward", "finite_difference")


class HessianOperator(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L(\theta)` of a scalar loss, as products :math:`H v`.

    ``"double_backward"`` evaluates the loss once, at construction, and keeps its gradient's graph:
    :math:`H v = \nabla_\theta \langle \nabla_\theta L, v \rangle` then costs about two gradients a product
    instead of three and a half. Attention runs through the math kernel, because the fused ones have no
    second derivative, and compiled code runs uncompiled, for the same reason.

    ``"finite_difference"`` evaluates two gradients a product, at weights moved a little to either side, with the
    same random numbers each time. It works where second derivatives do not exist: reentrant checkpointing and
    custom autograd functions. Recurrent layers run without cuDNN, which has none either. :meth:`product_error`
    compares two step sizes.

    ``"auto"`` takes the first, and the second where the first is refused: by the graph, in the first product, or
    because a custom autograd function in the graph makes the two disagree. ``.backend`` and ``.reason`` say what
    was taken and why. Where differences are too noisy to tell whether such a function drops out, ``.doubt`` says so,
    and nothing that is solved with the operator converges.

    ``.grad`` is what it was afterwards, and so are the weights, bit for bit. Random streams move as for one
    evaluation of the loss at most. A loss that moves buffers in each evaluation (spectral normalisation) belongs inside
    of :func:`dynamon.probe.undisturbed`, which puts them back between any two and at the end; elsewhere differences
    of such a loss do not converge, since the same weights have another gradient each time.

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
        doubt: Why products may miss a part, where that could not be found out, else None.

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
        self.doubt: str | None = None
        self._engine = self._choose(backend)
        self.parameters.mark_unchanged()  # a loss may write to parameters of its own, an averaged teacher's say
        self.backend, self.rounding = self._engine.name, self._engine.rounding
        self.loss, self.gradient = self._engine.loss, self._engine.gradient

    @property
    def has_gradient(self) -> list[bool]:
        """Which parameters take part in the loss; the others have zeros in the flat gradient."""
        return self._engine.has_gradient

    def _choose(self, backend: str) -> DoubleBackward | FiniteDifference:
        self._evaluations = Evaluations()
        if backend == "finite_difference":
            return FiniteDifference(self._loss_fn, self.parameters, self._evaluations)
        try:
            exact = DoubleBackward(self._loss_fn, self.parameters, self._evaluations)
            return self._checked(exact) if self._may_change and exact.suspects else exact
        except NoSecondDerivativeError as error:
            return self._fall_back(error)

    def _checked(self, exact: DoubleBackward) -> DoubleBackward | FiniteDifference:
        """Compare products on the graph with differences, under autocast in full precision too."""
        names = ", ".join(exact.suspects)
        found = self._compared(exact)
        if not any(found[1:]) and self._evaluations.autocast:  # rounding hides what differences would show
            found = self._compared(None)
        differences, agrees, drops_out = found
        if drops_out:
            assert differences is not None
            self.reason = f"a custom autograd function ({names}) drops out of the second derivative."
            return differences
        if not agrees:
            self.doubt = (
                f"a custom autograd function ({names}) may drop out of the second derivative, and differences of "
                "gradients are too noisy to tell; measure a float32 copy of the model, or a loss without that function."
            )
        return exact

    def _compared(self, exact: DoubleBackward | None) -> tuple[FiniteDifference | None, bool, bool]:
        """Differences; whether products on the graph agree with them; whether they surely do not.

        Without a graph both are made in full precision.
        """
        if real_dtype(self.parameters.tensors[0]) not in DIFFERENCE_STEP:
            return None, False, False
        evaluations = self._evaluations if exact is not None else self._evaluations.in_full_precision()
        try:
            one = exact or DoubleBackward(self._loss_fn, self.parameters, evaluations, again=True)
            differences = FiniteDifference(self._loss_fn, self.parameters, evaluations)
            found = compare(one, differences)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if exact is not None or ran_out_of_memory(error):
                raise
            return None, False, False  # a function that knows half precision only
        return differences, found.agrees, found.drops_out

    def _fall_back(self, error: NoSecondDerivativeError) -> FiniteDifference:
        if not self._may_change:
            raise error
        self.reason, self._may_change = str(error), False
        return FiniteDifference(self._loss_fn, self.parameters, self._evaluations)

    def _product(self, vector: Tensor) -> Tensor:
        return self.block_product(vector)

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """``H_bb v`` for the parameters in some places; see :meth:`block`."""
        self.parameters.check_unchanged()
        try:
            return self._engine.product(vector, block)
        except NoSecondDerivativeError as error:
            self._engine = self._fall_back(error)
        except OverflowError as error:
            self.reason = f"{error} Products are computed in full precision."
            self._evaluations = self._evaluations.in_full_precision()
            self._engine = DoubleBackward(self._loss_fn, self.parameters, self._evaluations, again=True)
        self.parameters.mark_unchanged()
        self.backend, self.rounding = self._engine.name, self._engine.rounding
        return self._engine.product(vector, block)

    def block(self, chosen: str | Sequence[str] | Sequence[Tensor]) -> "BlockOperator":
        """The diagonal block of some parameters, on the same graph.

        Args:
            chosen: A glob of names or several (where ``params`` was a mapping), or the parameters themselves.
        """
        return BlockOperator(self, self.parameters.block(chosen))

    def product_error(self, vector: Tensor) -> float:
        """Relative difference of the product between two step sizes; 0 with double backward, infinite in doubt."""
        return self._engine.error(vector) if self.doubt is None else math.inf

    def likely_direction(self) -> Tensor:
        """The gradient, most of which lies in the top eigenspace (Gur-Ari et al., arXiv 1812.04754)."""
        return self.gradient
