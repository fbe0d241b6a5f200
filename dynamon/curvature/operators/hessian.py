"""Hessian products, by whichever way the loss allows."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dynamon.curvature.operators.backends import (
    DIFFERENCE_STEP,
    DoubleBackward,
    FiniteDifference,
    NoSecondDerivativeError,
    compare,
)
from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.blocks import BlockOperator
from dynamon.curvature.operators.parameters import FlatParameters, Parameters
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.isolation.evaluations import Evaluations
from dynamon.layers.complex_pairs import real_dtype

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
    because a custom autograd function in the graph makes the two disagree. Differences are then those of the loss in
    full precision, without autocast, where it can be computed so. ``.backend`` and ``.reason`` say what
    was taken and why. Where differences are too noisy to tell whether such a function drops out, ``.doubt`` says so,
    and nothing that is solved with the operator converges.

    ``.grad`` is what it was afterwards, and so are the weights, bit for bit. Random streams move as for one
    evaluation of the loss at most. A loss that moves buffers in each evaluation (spectral normalisation) belongs inside
    of :func:`dynamon.isolation.preserve.preserve_state`, which puts them back between any two and at the end; elsewhere
    differences of such a loss do not converge, since the same weights have another gradient each time.

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
            reason = self._reason_of(error)
        return self._fall_back(reason)

    def _checked(self, exact: DoubleBackward) -> DoubleBackward | FiniteDifference:
        """Compare products on the graph with differences, under autocast in full precision too."""
        names = ", ".join(exact.suspects)
        found = self._compared(exact)
        if not any(found) and self._evaluations.autocast:  # rounding hides what differences would show
            found = self._compared(None)
        agrees, drops_out = found
        if drops_out:
            self.reason = f"a custom autograd function ({names}) drops out of the second derivative."
            return self._differences()
        if not agrees:
            self.doubt = (
                f"a custom autograd function ({names}) may drop out of the second derivative, and differences of "
                "gradients are too noisy to tell; measure a float32 copy of the model, or a loss without that function."
            )
        return exact

    def _compared(self, exact: DoubleBackward | None) -> tuple[bool, bool]:
        """Whether products on the graph agree with differences; whether they surely do not.

        Without a graph both are made in full precision.
        """
        if real_dtype(self.parameters.tensors[0]) not in DIFFERENCE_STEP:
            return False, False
        evaluations = self._evaluations if exact is not None else self._evaluations.in_full_precision()
        try:
            one = exact or DoubleBackward(self._loss_fn, self.parameters, evaluations, again=True)
            differences = FiniteDifference(self._loss_fn, self.parameters, evaluations)
            found = compare(one, differences)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if exact is not None or ran_out_of_memory(error):
                raise
            return False, False  # a function that knows half precision only
        return found.agrees, found.drops_out

    def _reason_of(self, error: NoSecondDerivativeError) -> str:
        """Its words, without the frames that keep a graph alive."""
        if not self._may_change:
            raise error
        return str(error)

    def _fall_back(self, reason: str) -> FiniteDifference:
        self.reason, self._may_change = reason, False
        return self._differences()

    def _differences(self) -> FiniteDifference:
        """Without autocast where the loss allows that: in half precision differences are lost in rounding."""
        if self._evaluations.autocast:
            whole = self._evaluations.in_full_precision()
            try:
                found = FiniteDifference(self._loss_fn, self.parameters, whole)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                if ran_out_of_memory(error):
                    raise
            else:
                self._evaluations = whole
                return found
        return FiniteDifference(self._loss_fn, self.parameters, self._evaluations)

    @property
    def is_coarse(self) -> bool:
        """Whether products are differences of gradients that are computed in half precision."""
        return self._engine.name == "finite_difference" and bool(self._evaluations.autocast)

    def _product(self, vector: Tensor) -> Tensor:
        return self.block_product(vector)

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """``H_bb v`` for the parameters in some places; see :meth:`block`."""
        self.parameters.check_unchanged()
        try:
            return self._engine.product(vector, block)
        except NoSecondDerivativeError as error:
            reason, overflows = self._reason_of(error), False
        except OverflowError as error:
            reason, overflows = f"{error} Products are computed in full precision.", True
        del self._engine  # its graph makes room for the next
        if overflows:
            self.reason, self._evaluations = reason, self._evaluations.in_full_precision()
            self._engine = DoubleBackward(self._loss_fn, self.parameters, self._evaluations, again=True)
        else:
            self._engine = self._fall_back(reason)
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

    def initial_direction(self) -> Tensor:
        """The gradient, most of which lies in the top eigenspace (Gur-Ari et al., arXiv 1812.04754)."""
        return self.gradient
