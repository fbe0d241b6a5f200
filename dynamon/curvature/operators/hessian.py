"""The Hessian of a loss as an operator, with a backend chosen by trying."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dynamon.curvature.operators.backends import (
    DIFFERENCE_STEP,
    DoubleBackward,
    FiniteDifference,
    ForwardDifference,
    NoSecondDerivativeError,
    compare,
    fit_differences,
)
from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.blocks import BlockOperator
from dynamon.curvature.operators.parameters import FlatParameters, Parameters
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.isolation.evaluations import Evaluations
from dynamon.layers.complex_pairs import real_dtype

_BACKENDS = ("auto", "double_backward", "finite_difference", "forward_difference")
_Engine = DoubleBackward | FiniteDifference | ForwardDifference


class HessianOperator(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L(\theta)` of a scalar loss as an operator.

    ``"double_backward"`` evaluates the loss once, at construction, and keeps the graph of its gradient. A product
    :math:`H v = \nabla_\theta \langle \nabla_\theta L, v \rangle` then costs about two gradients instead of three and a
    half. Attention uses the math kernel and compiled code runs uncompiled: fused and compiled kernels have no second
    derivative.

    ``"finite_difference"`` evaluates two gradients per product, at weights perturbed in either direction, with the same
    random numbers each time. It works where second derivatives do not exist, as with reentrant checkpointing and custom
    autograd functions. Recurrent layers run without cuDNN, which has none either. :meth:`product_error` compares two
    step sizes.

    ``"forward_difference"`` evaluates one gradient per product, at weights perturbed in one direction, and one at
    construction that all share. Its error is of first order in the step: it is meant for solves whose products were
    compared with exact ones shortly before (:meth:`dynamon.curvature.EigenTracker.compare`).

    ``"auto"`` uses double backward, and finite differences where double backward fails: in the graph, in the first
    product, or because the two disagree on a graph with a custom autograd function. Differences are then computed in
    full precision, without autocast, where the loss allows that. ``.backend`` and ``.reason`` hold the choice and its
    reason. Where differences are too noisy to tell whether such a function drops out, ``.doubt`` says so, and solves
    with the operator do not converge.

    ``.grad`` and the weights are restored bit for bit. Random streams advance as for one evaluation of the loss at
    most. A loss that changes buffers in each evaluation (spectral normalisation) needs
    :func:`dynamon.isolation.preserve.preserve_state` around it, which restores them after each evaluation. Without it
    differences of such a loss do not converge, since the gradient at the same weights changes.

    Args:
        loss_fn: Called without arguments; returns the scalar loss, differentiable in ``params``.
        params: The parameters to differentiate in, in the order of the flat vectors, or a mapping from their names.
            Those that do not take part in the loss get zero rows.
        backend: ``"auto"``, ``"double_backward"``, ``"finite_difference"`` or ``"forward_difference"``.
        error: Relative error of one-sided differences, where it is known; None has :meth:`product_error` compare two
            step sizes.

    Attributes:
        loss: The value of the loss, a 0-d tensor without graph.
        gradient: The flat gradient ``[n]`` without graph.
        backend: The backend in use.
        reason: Why ``"auto"`` did not use double backward, else None.
        doubt: Why products may miss a part, where that could not be decided, else None.

    Raises:
        TypeError: On parameters or a loss that are not tensors.
        ValueError: On an unknown backend, no parameters, a loss that is not a scalar or does not depend on any of the
            parameters, parameters on several devices or in several dtypes, differences in half precision, or
            one-sided ones under autocast.
        NoSecondDerivativeError: (a RuntimeError) with ``"double_backward"``, where an operation has none.
        RuntimeError: In a product where a parameter changed after construction.

    Memory: the graph of one forward and backward pass at the size of the batch in ``loss_fn``; with differences two
    vectors of length n and the memory of a gradient, with one-sided ones a third for the gradient that is shared.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import HessianOperator
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianOperator(lambda: w[0] ** 2 * w[1], {"w": w})
        >>> hessian @ torch.tensor([1.0, 0.0])
        tensor([4., 2.])
        >>> hessian
        HessianOperator(2 x 2, float32 on cpu, double_backward)
    """

    def __init__(
        self,
        loss_fn: Callable[[], Tensor],
        params: Parameters | FlatParameters,
        *,
        backend: str = "auto",
        error: float | None = None,
    ) -> None:
        """Evaluate the loss and choose a backend."""
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}.")
        self.parameters = FlatParameters.of(params)
        device = self.parameters.tensors[0].device
        super().__init__(self.parameters.size, self.parameters.dtype, device, self.parameters.space)
        self._loss_fn, self._may_change, self._error = loss_fn, backend == "auto", error
        self.reason: str | None = None
        self.doubt: str | None = None
        self._evaluations = Evaluations()
        self._use(self._choose(backend))
        self.loss, self.gradient = self._engine.loss, self._engine.gradient

    def _use(self, engine: _Engine) -> None:
        """Take products with an engine from now on."""
        self._engine = engine
        self.parameters.mark_unchanged()  # a loss may write to parameters of its own, an averaged teacher's say
        self.backend, self.rounding = engine.name, engine.rounding

    @property
    def has_gradient(self) -> list[bool]:
        """For each parameter, whether it takes part in the loss; others have zeros in the flat gradient."""
        return self._engine.has_gradient

    def _choose(self, backend: str, again: bool = False) -> _Engine:
        if backend == "finite_difference":
            return FiniteDifference(self._loss_fn, self.parameters, self._evaluations)
        if backend == "forward_difference":
            return ForwardDifference(self._loss_fn, self.parameters, self._evaluations, self._error)
        try:
            exact = DoubleBackward(self._loss_fn, self.parameters, self._evaluations, again)
            return self._checked(exact) if self._may_change and exact.suspects else exact
        except NoSecondDerivativeError as error:
            reason = self._reason_of(error)
        return self._fall_back(reason)

    def _checked(self, exact: DoubleBackward) -> DoubleBackward | FiniteDifference:
        """Compare products on the graph with differences, repeated in full precision under autocast."""
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
        """Return whether products on the graph agree with differences, and whether they certainly do not.

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
        """Return the error's message; the error itself would keep a graph alive through its frames."""
        if not self._may_change:
            raise error
        return str(error)

    def _fall_back(self, reason: str) -> FiniteDifference:
        self.reason, self._may_change = reason, False
        return self._differences()

    def _differences(self) -> FiniteDifference:
        """Take differences without autocast where the loss allows: half precision loses them in rounding."""
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

    def make_exact(self) -> None:
        """Replace one-sided differences by what ``"auto"`` chooses, at the cost of its gradient."""
        if self.backend == ForwardDifference.name:
            self._may_change = True
            self._use(self._choose("auto", again=True))

    @contextmanager
    def one_sided(self) -> Iterator[bool]:
        """Take products by one-sided differences inside, where those on the graph are exact; yield whether it does."""
        kept = self._engine
        is_exact = isinstance(kept, DoubleBackward) and not kept.suspects and self.rounding == 0
        if not is_exact or not fit_differences(self.parameters, bool(self._evaluations.autocast)):
            yield False
            return
        self._engine = ForwardDifference(self._loss_fn, self.parameters, self._evaluations, self._error)
        self.parameters.mark_unchanged()  # as in :meth:`_use`
        try:
            yield True
        finally:
            self._engine = kept

    @property
    def is_coarse(self) -> bool:
        """True where products are differences of gradients computed in half precision."""
        return self._engine.name == "finite_difference" and bool(self._evaluations.autocast)

    def _product(self, vector: Tensor) -> Tensor:
        return self.block_product(vector)

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``H_bb v`` for the parameters at some positions; see :meth:`block`."""
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
            self._use(DoubleBackward(self._loss_fn, self.parameters, self._evaluations, again=True))
        else:
            self._use(self._fall_back(reason))
        return self._engine.product(vector, block)

    def block(self, chosen: str | Sequence[str] | Sequence[Tensor]) -> "BlockOperator":
        """Return the diagonal block of some parameters on the same graph.

        Args:
            chosen: A glob of names or several (where ``params`` was a mapping), or the parameters themselves.
        """
        return BlockOperator(self, self.parameters.block(chosen))

    def product_error(self, vector: Tensor) -> float:
        """Return the relative difference between two step sizes; 0 with double backward, infinity in doubt.

        With one-sided differences it is the ``error`` that was given, where there is one.
        """
        return self._engine.error(vector) if self.doubt is None else math.inf

    def initial_direction(self) -> Tensor:
        """Return the gradient, most of which lies in the top eigenspace (Gur-Ari et al., arXiv 1812.04754)."""
        return self.gradient
