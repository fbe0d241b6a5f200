"""How gradients of a loss are differentiated once more: on a retained graph, or by differences."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamon.curvature.parameters import FlatParameters

DIFFERENCE_STEP = {torch.float32: 1e-3, torch.float64: 1e-6}  # of a unit vector: truncation and rounding about equal
_SUSPICION = 0.05  # relative disagreement with differences above which a graph with custom functions is not believed


class NoSecondDerivativeError(RuntimeError):
    """Something in the loss cannot be differentiated twice."""


class RandomState:
    """The random state of torch at construction, CUDA's included, to evaluate a loss with the same numbers again."""

    def __init__(self) -> None:
        """Read the state."""
        self._host = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers are those that came after construction; outside nothing has changed."""
        with torch.random.fork_rng(list(range(len(self._devices)))):
            torch.set_rng_state(self._host)
            if self._devices:
                torch.cuda.set_rng_state_all(self._devices)
            yield


@contextmanager
def twice_differentiable(params: FlatParameters) -> Iterator[None]:
    """Attention by the math kernel, compiled code run eagerly, parameter hooks off, gradients on."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(params.hooks_off())
        yield


def check_scalar_loss(loss: object) -> None:
    """Say in one sentence what is wrong with a loss that cannot be differentiated.

    Raises:
        ValueError: If ``loss`` is not a tensor, not a scalar, or carries no graph.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss must be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar tensor, got shape {tuple(loss.shape)}; reduce it first.")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter (it carries no graph).")


class DoubleBackward:
    r"""Products :math:`\nabla \langle \nabla L, v \rangle` on one retained graph.

    Attributes:
        name: ``"double_backward"``.
        loss: The value of the loss, without graph.
        gradient: The flat gradient ``[n]``, without graph.
        has_gradient: Which parameters take part in the loss; the others have zeros in the flat gradient.

    Raises:
        NoSecondDerivativeError: Where an operation in the graph has none, at construction or in a product.
    """

    name = "double_backward"

    def __init__(self, loss_fn: Callable[[], Tensor], params: FlatParameters) -> None:
        """Evaluate the loss and keep the graph of its gradient."""
        self._params = params
        with twice_differentiable(params):
            loss = loss_fn()
            check_scalar_loss(loss)
            refuse_nodes([loss])
            with second_derivatives():
                gradients = params.differentiate(loss, create_graph=True)
        if all(g is None for g in gradients):
            raise ValueError("the loss does not depend on any of the parameters.")
        refuse_nodes([g for g in gradients if g is not None])
        self.has_custom_functions = has_custom_functions([loss])
        self.loss = loss.detach()
        self.gradient = params.flatten([None if g is None else g.detach() for g in gradients])
        self._gradients, self.has_gradient = gradients, [g is not None for g in gradients]

    def product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """``H v``; for a block, ``vector`` and the result are those of the block alone."""
        part = self._params if block is None else self._params.subset(block)
        gradients = self._gradients if block is None else [self._gradients[i] for i in block]
        # A gradient that is constant in the parameters (a linear layer's last bias, say) has no graph.
        pairs = zip(gradients, part.split(vector), strict=True)
        curved = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]
        if not curved:
            return torch.zeros_like(vector)
        with twice_differentiable(self._params), second_derivatives():
            products = part.differentiate(*zip(*curved, strict=True))
        return part.flatten(products)

    def error(self, vector: Tensor) -> float:
        """Exact up to rounding."""
        return 0.0


class FiniteDifference:
    r"""Products :math:`(\nabla L(\theta + \epsilon v) - \nabla L(\theta - \epsilon v)) / 2 \epsilon`, v of unit length.

    Two gradients a product, at the same random numbers each time (those of torch; others are the loss's own
    matter). Works where second derivatives do not exist. Under reentrant checkpointing, ``backward`` reaches every
    parameter inside: ``.grad`` of those left out adds up, unless :func:`dynamon.probe.undisturbed` is around it.

    Attributes:
        name: ``"finite_difference"``.
        loss: The value of the loss, without graph.
        gradient: The flat gradient ``[n]``.
        has_gradient: As above.

    Raises:
        ValueError: For parameters in half precision, whose neighbours are too far apart.
    """

    name = "finite_difference"

    def __init__(self, loss_fn: Callable[[], Tensor], params: FlatParameters, random: RandomState) -> None:
        """Take the gradient, with the random numbers that every evaluation will see."""
        dtype = params.dtype
        if dtype not in DIFFERENCE_STEP:
            raise ValueError(
                f"finite differences need float32 or float64 parameters, these are {dtype}; "
                "measure a float32 copy of the model."
            )
        self._loss_fn, self._params, self._random, self._step = loss_fn, params, random, DIFFERENCE_STEP[dtype]
        with random.replayed():
            self.loss, self.gradient = self._evaluate()

    def product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """``H v``; for a block, ``vector`` and the result are those of the block alone."""
        if block is None:
            return self._difference(vector, self._step)
        product = self._difference(self._params.embed(vector, block), self._step)
        return self._params.extract(product, block)

    def error(self, vector: Tensor) -> float:
        """Relative difference between two step sizes, the second one half of the first."""
        one, other = (self._difference(vector, step) for step in (self._step, self._step / 2))
        norm = self._params.space.norm
        return float(norm(one - other) / norm(other).clamp_min(1e-30))

    def _difference(self, vector: Tensor, step: float) -> Tensor:
        norm = self._params.space.norm(vector)
        if not norm > 0:
            return torch.zeros_like(vector)
        ahead, behind = (self._gradient_at(sign * step / norm * vector) for sign in (1, -1))
        return (ahead - behind) * (norm / (2 * step))

    def _gradient_at(self, step: Tensor) -> Tensor:
        with self._random.replayed(), self._params.moved(step):
            return self._evaluate()[1]

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient; by ``backward`` where reentrant checkpointing insists on it, with ``.grad`` borrowed.

        Elsewhere nothing is accumulated, which would call the hooks that DDP reduces gradients in.
        """
        tensors = self._params.tensors
        kept = [p.grad for p in tensors]
        try:
            for p in tensors:
                p.grad = None
            with torch.enable_grad(), self._params.hooks_off():
                loss = self._loss_fn()
                check_scalar_loss(loss)
                if _has_reentrant_checkpoint(loss):
                    loss.backward()
                    gradients = [p.grad for p in tensors]
                else:
                    gradients = self._params.differentiate(loss, keep_graph=False)
            if all(g is None for g in gradients):
                raise ValueError("the loss does not depend on any of the parameters.")
            self.has_gradient = [g is not None for g in gradients]
            return loss.detach(), self._params.flatten(gradients).clone()
        finally:
            for p, grad in zip(tensors, kept, strict=True):
                p.grad = grad


def disagreement(exact: DoubleBackward, differences: FiniteDifference) -> float:
    """Relative difference of the two backends along the gradient, where differences are themselves steady.

    A custom autograd function whose backward builds no graph drops out of the Hessian without a word; this is
    where it shows. 0 where differences cannot tell.
    """
    one, other = exact.product(exact.gradient), differences.product(exact.gradient)
    size = torch.linalg.vector_norm(other)
    distance = float(torch.linalg.vector_norm(one - other) / size.clamp_min(1e-30))
    steady = differences.error(exact.gradient) < distance / 4
    return distance if distance > _SUSPICION and steady else 0.0


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Turn what torch says about an operation without a second derivative into one kind of error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NoSecondDerivativeError(f"the loss has no second derivative: {first_line}") from error


_DECORATORS = torch.autograd.function.__file__
_SHARDING = "torch.distributed.fsdp."
_REFUSED = {
    "torch::autograd::Error": "the loss uses an operation marked once_differentiable, which has no second derivative.",
    "CheckpointFunctionBackward": "the loss uses reentrant activation checkpointing, which has no second derivative; "
    "use checkpoint(..., use_reentrant=False).",
}


def refuse_nodes(tensors: Sequence[Tensor]) -> None:
    """Refuse operations whose part of a product would silently be zero.

    Raises:
        NoSecondDerivativeError: Naming the operation.
    """
    for node in _nodes(tensors):
        name = "torch::autograd::Error" if _is_once_differentiable(node) else node.name()
        if name in _REFUSED:
            raise NoSecondDerivativeError(_REFUSED[name])


def has_custom_functions(tensors: Sequence[Tensor]) -> bool:
    """Whether a ``torch.autograd.Function`` of Python took part, FSDP2's own left out: they pass gradients through."""
    own = (node for node in _nodes(tensors) if isinstance(node, torch.autograd.function.BackwardCFunction))
    return any(not getattr(node, "_forward_cls", type(node)).__module__.startswith(_SHARDING) for node in own)


def _is_once_differentiable(node: torch.autograd.graph.Node) -> bool:
    """Whether a custom function's backward wears that decorator, which shows in the graph only where it is reached."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return hasattr(backward, "__wrapped__") and code is not None and code.co_filename == _DECORATORS


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes([loss]))


def _nodes(tensors: Sequence[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graph behind some tensors, once."""
    seen, waiting = set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node
