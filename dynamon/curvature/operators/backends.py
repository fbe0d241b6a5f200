"""Ways to differentiate gradients of a loss: on a retained graph, or by central or one-sided differences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamon.curvature.operators.custom import CustomFunctions
from dynamon.curvature.operators.graphs import nodes_behind, rounding_behind
from dynamon.curvature.operators.layer_norm import FewerCalls
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.curvature.operators.scaling import LOWER, is_whole, length_scale, loss_scale, relative
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.isolation.evaluations import Evaluations, force_eager, full_precision
from dynamon.layers.complex_pairs import real_dtype

DIFFERENCE_STEP = {torch.float32: 1e-3, torch.float64: 1e-6}  # of a unit vector: truncation and rounding about equal
FORWARD_STEP = {torch.float32: 1e-4, torch.float64: 1e-8}  # ... one-sided, whose truncation falls with the step alone
_SUSPICION = 0.05  # relative disagreement with differences above which a graph with custom functions is not believed


class NoSecondDerivativeError(RuntimeError):
    """An operation in the loss cannot be differentiated twice."""


@contextmanager
def twice_differentiable(params: FlatParameters) -> Iterator[None]:
    """Set up a pass that can be differentiated twice: math attention, no compiled code, no parameter hooks."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), force_eager(), FewerCalls(), params.hooks_off():
        yield


def check_scalar_loss(loss: object) -> None:
    """Raise an error in one sentence where a loss cannot be differentiated.

    Raises:
        TypeError: If ``loss`` is not a tensor.
        ValueError: If it is not a scalar, or carries no graph.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar tensor, got shape {tuple(loss.shape)}; reduce it first.")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter (it carries no graph).")


class DoubleBackward:
    r"""Products :math:`\nabla \langle \nabla L, v \rangle` on one retained graph.

    Where the graph computes in float16, loss and vector are multiplied by powers of two and products divided by them,
    as gradient scalers do: gradients of a mean over many entries are too small for that dtype.

    Attributes:
        name: ``"double_backward"``.
        loss: The value of the loss, without graph.
        gradient: The flat gradient ``[n]``, without graph.
        rounding: See :class:`dynamon.curvature.LinearOperator`.
        suspects: Names of custom autograd functions whose part of a product may be missing.
        has_gradient: For each parameter, whether it takes part in the loss; others have zeros in the flat gradient.

    Raises:
        NoSecondDerivativeError: Where an operation in the graph has none, at construction or in a product.
        OverflowError: Where a product does not fit into float16 at any scale.
    """

    name = "double_backward"

    def __init__(
        self, loss_fn: Callable[[], Tensor], params: FlatParameters, evaluations: Evaluations, again: bool = False
    ) -> None:
        """Evaluate the loss, for the first time or ``again``, and keep the graph of its gradient."""
        self._params = params
        with evaluations.another() if again else evaluations.first(), twice_differentiable(params):
            loss = loss_fn()
            self._as_after_loss = evaluations.mark()
            check_scalar_loss(loss)
            refuse_nodes([loss])
            custom = CustomFunctions([loss])
            self._loss, self._scale, self.rounding = loss, loss_scale([loss]), rounding_behind([loss])
            self._in_float16 = self._scale > 1
            with custom.watched():
                self._differentiate()
        self.suspects = custom.suspects
        self.loss = loss.detach()

    def _differentiate(self) -> None:
        """Compute the gradient and its graph at the largest loss scale that does not overflow."""
        while True:
            with second_derivatives():
                gradients = self._params.differentiate(self._loss, self._weight(), create_graph=True)
            if all(g is None for g in gradients):
                raise ValueError("the loss does not depend on any of the parameters.")
            refuse_nodes([g for g in gradients if g is not None])
            self._gradients, self.has_gradient = gradients, [g is not None for g in gradients]
            flat = self._params.flatten([None if g is None else g.detach() for g in gradients])
            if self._scale == 1 or is_whole(flat) or not is_whole(self._loss):
                break
            self._scale /= LOWER
        self.gradient = flat if self._scale == 1 else flat / self._scale

    def _weight(self) -> Tensor | None:
        return None if self._scale == 1 else torch.full_like(self._loss, self._scale)

    def product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``H v``; for a block, ``vector`` and the result belong to the block alone."""
        if not self._in_float16:
            return self._product(vector, block)
        length = length_scale(vector)
        while True:
            product = self._product(vector * length, block)
            if is_whole(product) or not is_whole(vector) or not is_whole(self.gradient):
                return product / (self._scale * length)
            if self._scale == 1:
                raise OverflowError("a second derivative overflows in float16.")
            self._scale, length = self._scale / LOWER, length / LOWER
            self._as_after_loss()
            with twice_differentiable(self._params):
                self._differentiate()

    def _product(self, vector: Tensor, block: Sequence[int] | None) -> Tensor:
        part = self._params if block is None else self._params.subset(block)
        gradients = self._gradients if block is None else [self._gradients[i] for i in block]
        # A gradient that is constant in the parameters (a linear layer's last bias, say) has no graph.
        pairs = zip(gradients, part.split(vector), strict=True)
        curved = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]
        if not curved:
            return torch.zeros_like(vector)
        self._as_after_loss()
        with twice_differentiable(self._params), second_derivatives():
            products = part.differentiate(*zip(*curved, strict=True))
        return part.flatten(products)

    def error(self, vector: Tensor) -> float:
        """Return 0: products are exact up to rounding."""
        return 0.0


class Gradients:
    """Evaluates a loss and its gradient again and again, from the same random numbers and module state.

    Where the graph computes in float16 the loss is multiplied by a power of two meanwhile. Under reentrant
    checkpointing ``backward`` reaches every parameter inside, and ``.grad`` of those not in ``params`` accumulates
    unless :func:`dynamon.isolation.preserve.preserve_state` is active.

    Args:
        loss_fn: The loss, called without arguments.
        params: The parameters.
        evaluations: What every evaluation starts from.

    Attributes:
        has_gradient: For each parameter, whether it takes part in the loss; others have zeros in the flat gradient.
    """

    has_gradient: list[bool]

    def __init__(self, loss_fn: Callable[[], Tensor], params: FlatParameters, evaluations: Evaluations) -> None:
        """Evaluate nothing yet."""
        self._loss_fn, self._params, self._evaluations = loss_fn, params, evaluations

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Compute the loss, without graph, and its flat gradient ``[n]``."""
        with self._evaluations.another(), torch.enable_grad(), self._params.hooks_off():
            return self._loss_and_gradient()

    def _loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Compute both, by ``backward`` where reentrant checkpointing requires it, borrowing ``.grad``.

        Elsewhere nothing is accumulated: accumulation would call the hooks in which DDP reduces gradients.
        """
        loss = self._loss_fn()
        check_scalar_loss(loss)
        scale = loss_scale([loss])
        while True:
            gradients = self._gradients(loss, scale)
            if all(g is None for g in gradients):
                raise ValueError("the loss does not depend on any of the parameters.")
            self.has_gradient = [g is not None for g in gradients]
            flat = self._params.flatten(gradients)
            if scale == 1:
                return loss.detach(), flat
            if is_whole(flat) or not is_whole(loss):
                return loss.detach(), flat / scale
            scale /= LOWER

    def _gradients(self, loss: Tensor, scale: float) -> Sequence[Tensor | None]:
        weight, keep = (None, False) if scale == 1 else (torch.full_like(loss, scale), True)
        if not _has_reentrant_checkpoint(loss):
            return self._params.differentiate(loss, weight, keep_graph=keep)
        tensors = self._params.tensors
        kept = [p.grad for p in tensors]
        try:
            for p in tensors:
                p.grad = None
            with full_precision():
                loss.backward(weight, retain_graph=keep)
            return [p.grad for p in tensors]
        finally:
            for p, grad in zip(tensors, kept, strict=True):
                p.grad = grad


class FiniteDifference(Gradients):
    r"""Products :math:`(\nabla L(\theta + \epsilon v) - \nabla L(\theta - \epsilon v)) / 2 \epsilon`, v of unit length.

    A product takes two gradients, with the same random numbers each time. It works where second derivatives do not
    exist.

    Attributes:
        name: ``"finite_difference"``.
        loss: The value of the loss, without graph.
        gradient: The flat gradient ``[n]``.
        has_gradient: As in :class:`DoubleBackward`.

    Raises:
        ValueError: For parameters in half precision, whose spacing is too coarse for differences.
    """

    name = "finite_difference"
    rounding = 0.0  # it shows in the error

    def __init__(self, loss_fn: Callable[[], Tensor], params: FlatParameters, evaluations: Evaluations) -> None:
        """Compute the gradient and remember the state that every evaluation starts from."""
        dtype = real_dtype(params.tensors[0])
        if dtype not in DIFFERENCE_STEP:
            raise ValueError(
                f"finite differences need float32 or float64 parameters, these are {dtype}; "
                "measure a float32 copy of the model."
            )
        super().__init__(loss_fn, params, evaluations)
        self._step = DIFFERENCE_STEP[dtype]
        self.loss, self.gradient = self.evaluate()

    def product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``H v``; for a block, ``vector`` and the result belong to the block alone."""
        if block is None:
            return self._difference(vector, self._step)
        product = self._difference(self._params.embed(vector, block), self._step)
        return self._params.extract(product, block)

    def error(self, vector: Tensor) -> float:
        """Return the relative difference between two step sizes, the second half of the first.

        It includes the drift of a stateful loss, whose gradient at the same weights changes.
        """
        one, other = (self._difference(vector, step) for step in (self._step, self._step / 2))
        norm = self._params.space.norm
        again = self.evaluate()[1]
        drift = norm(again - self.gradient) * norm(vector) / (2 * self._step)
        return relative(torch.maximum(norm(one - other), drift), norm(other))

    def norm(self, vector: Tensor) -> Tensor:
        """Return the length of a flat vector, also where its square leaves the dtype."""
        return self._params.space.norm(vector)

    def usual_direction(self) -> Tensor:
        """Return the unit vector along which products are compared: the gradient, or a random one where it is zero.

        A unit length keeps products within the dtype at any scale of the loss.
        """
        length = self.norm(self.gradient)
        if length > 0:
            return self.gradient / length
        generator = self._params.space.generator(0, length.device)
        noise = torch.randn(self.gradient.shape, generator=generator, device=length.device, dtype=length.dtype)
        return noise / self.norm(noise)

    def _difference(self, vector: Tensor, step: float) -> Tensor:
        norm = self._params.space.norm(vector)
        if not norm > 0:
            return torch.zeros_like(vector)
        ahead, behind = (self._gradient_at(sign * step / norm * vector) for sign in (1, -1))
        return (ahead - behind) * (norm / (2 * step))

    def _gradient_at(self, step: Tensor) -> Tensor:
        with self._params.perturbed(step):
            return self.evaluate()[1]


class ForwardDifference(Gradients):
    r"""Products :math:`(\nabla L(\theta + \epsilon v) - \nabla L(\theta)) / \epsilon`, v of unit length.

    A product takes one gradient, with the same random numbers each time; all share the gradient at :math:`\theta`. The
    error is of first order in the step, and another at other weights and along other directions: products are to be
    used where they were compared with exact ones, as :meth:`dynamon.curvature.EigenTracker.compare` does.

    Attributes:
        name: ``"forward_difference"``.
        loss: The value of the loss, without graph.
        gradient: The flat gradient ``[n]``.
        has_gradient: As in :class:`DoubleBackward`.

    Raises:
        ValueError: For parameters in half precision, and under autocast.
    """

    name = "forward_difference"
    rounding = 0.0  # it is part of the error

    def __init__(
        self, loss_fn: Callable[[], Tensor], params: FlatParameters, evaluations: Evaluations, error: float | None
    ) -> None:
        """Compute the gradient that all products share; None for an error that is not known."""
        if not fit_differences(params, bool(evaluations.autocast)):
            raise ValueError("one-sided differences need float32 or float64 parameters, and no autocast.")
        super().__init__(loss_fn, params, evaluations)
        self._step, self._error, self._is_first = FORWARD_STEP[real_dtype(params.tensors[0])], error, True
        self.loss, self.gradient = self.evaluate()

    def _loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Compute both, without another search of the graph after the first."""
        if self._is_first:
            self._is_first = False
            return super()._loss_and_gradient()
        loss = self._loss_fn()
        return loss.detach(), self._params.flatten(self._params.differentiate(loss, keep_graph=False))

    def product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``H v``; for a block, ``vector`` and the result belong to the block alone."""
        if block is not None:
            return self._params.extract(self.product(self._params.embed(vector, block)), block)
        return self._difference(vector, self._step)

    def _difference(self, vector: Tensor, step: float) -> Tensor:
        norm = float(self._params.space.norm(vector))
        if not norm > 0:
            return torch.zeros_like(vector)
        with self._params.perturbed(vector, step / norm):
            ahead = self.evaluate()[1]
        return ahead.sub_(self.gradient).mul_(norm / step)

    def error(self, vector: Tensor) -> float:
        """Return the relative error that was given, else twice the difference between the step and its half."""
        if self._error is not None:
            return self._error
        one, other = (self._difference(vector, step) for step in (self._step, self._step / 2))
        norm = self._params.space.norm
        return relative(2 * norm(one - other), norm(other))


def fit_differences(params: FlatParameters, autocast: bool) -> bool:
    """Return whether gradients are precise enough for one-sided differences: single precision, and no autocast."""
    return real_dtype(params.tensors[0]) in FORWARD_STEP and not autocast


@dataclass(frozen=True)
class Comparison:
    """Result of comparing products on a graph with finite differences, along the gradient.

    A custom autograd function whose backward builds no graph drops out of the Hessian without an error; the comparison
    detects that.

    Attributes:
        distance: Relative difference of the two products.
        agrees: True where it is small.
        drops_out: True where it is large while differences are steady. Where both are False, differences are too noisy.
    """

    distance: float
    agrees: bool
    drops_out: bool


def compare(exact: DoubleBackward, differences: FiniteDifference) -> Comparison:
    """Compare products of the two backends along the gradient."""
    norm = differences.norm
    direction = differences.usual_direction()
    one, other = exact.product(direction), differences.product(direction)
    distance = relative(norm(one - other), norm(other))
    agrees = distance <= _SUSPICION
    return Comparison(distance, agrees, not agrees and differences.error(direction) < distance / 4)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Convert torch's errors about missing second derivatives into :class:`NoSecondDerivativeError`."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if ran_out_of_memory(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NoSecondDerivativeError(f"the loss has no second derivative: {first_line}") from error


_DECORATORS = torch.autograd.function.__file__
_REFUSED = {
    "FlexAttentionAutogradOpBackward": "the loss uses flex_attention, which has no second derivative.",
    "torch::autograd::Error": "the loss uses an operation marked once_differentiable, which has no second derivative.",
    "CheckpointFunctionBackward": "the loss uses reentrant activation checkpointing, which has no second derivative; "
    "use checkpoint(..., use_reentrant=False).",
}


def refuse_nodes(tensors: Sequence[Tensor]) -> None:
    """Raise where the graph holds an operation whose part of a product would silently be zero.

    Raises:
        NoSecondDerivativeError: Naming the operation.
    """
    for node in nodes_behind(tensors):
        name = "torch::autograd::Error" if _is_once_differentiable(node) else node.name()
        if name in _REFUSED:
            raise NoSecondDerivativeError(_REFUSED[name])


def _is_once_differentiable(node: torch.autograd.graph.Node) -> bool:
    """Return whether a custom function's backward is decorated; the graph shows that only where it is reached."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return hasattr(backward, "__wrapped__") and code is not None and code.co_filename == _DECORATORS


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes_behind([loss]))
