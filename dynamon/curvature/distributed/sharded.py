"""Curvature of a module that stays sharded: each process holds its part of every vector."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynamon.curvature.distributed.fsdp import at_rest, compute_dtypes, full_gradients
from dynamon.curvature.operators.backends import FiniteDifference, Gradients, check_scalar_loss
from dynamon.curvature.operators.hessian import HessianOperator
from dynamon.curvature.operators.parameters import FlatParameters, Parameters, names_and_tensors
from dynamon.curvature.operators.scaling import LARGEST, LOWER, is_whole
from dynamon.curvature.operators.vector_space import ShardedSpace, Shards
from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import widest_dtype


class ShardedParameters(FlatParameters):
    """The local shards of some parameters as one flat vector; the other processes hold the rest.

    Args:
        module: The module that ``fully_shard`` was applied to.
        params: Some of its parameters, or a mapping from their names. All must be sharded over all processes.
        ranks: The processes.

    Attributes:
        module: The module.
        ranks: The processes.
    """

    def __init__(self, module: nn.Module, params: Parameters, ranks: Ranks) -> None:
        """Find the local shards."""
        self.module, self.ranks = module, ranks
        names, self._owners = names_and_tensors(params)
        shards = [to_local(p) for p in self._owners]
        space = ShardedSpace(Shards(self._owners, ranks), ranks)
        super().__init__(shards if names is None else dict(zip(names, shards, strict=True)), space)

    def subset(self, places: Sequence[int]) -> "ShardedParameters":
        """Return the parameters at some positions."""
        owners = [self._owners[i] for i in places]
        named = owners if self.names is None else dict(zip([self.names[i] for i in places], owners, strict=True))
        return ShardedParameters(self.module, named, self.ranks)

    @contextmanager
    def perturbed(self, step: Tensor, factor: float = 1.0) -> Iterator[None]:
        """Set the shards to ``theta + factor * step`` inside the context, in place; restore them bitwise at exit."""
        pairs = zip(self.tensors, self.split(step), strict=True)
        with self.placed([torch.add(p, piece, alpha=factor) for p, piece in pairs]):
            yield

    @contextmanager
    def placed(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Set the shards to some values inside the context, in place; restore them bit for bit at exit."""
        kept = [p.clone() for p in self.tensors]
        try:
            with at_rest(self.module):
                self._write(values)
                yield
        finally:
            self._write(kept)
            torch.clear_autocast_cache()

    def _write(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.tensors, values, strict=True):
                p.data.copy_(value)  # past the version counter: graphs built before stay valid

    def _hooked(self) -> list[Tensor]:
        return self._owners

    def loss_and_gradient(self, loss_fn: Callable[[], Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compute the local loss and the local part of the mean gradient by an ordinary backward pass.

        ``.grad`` of the module's parameters, and gradients that wait to be reduced, are restored. The gradient is that
        of the loss times ``scale``.
        """
        kept = [(p, p.grad) for p in self.module.parameters()]
        try:
            for p, _ in kept:
                p.grad = None
            with at_rest(self.module), full_gradients(self.module), torch.enable_grad(), self.hooks_off():
                loss = loss_fn()
                check_scalar_loss(loss)
                with full_precision():
                    loss.backward(None if scale == 1 else torch.full_like(loss, scale))
            gradients = [None if p.grad is None else to_local(p.grad) for p in self._owners]
            flat = self.flatten(gradients).clone()
        finally:
            for p, gradient in kept:
                p.grad = gradient
        return loss.detach(), flat


class ShardedHessian(HessianOperator):
    r"""Hessian of the mean of the processes' losses, by differences of gradients, without gathering vectors.

    Each product perturbs the shards in either direction and takes two ordinary gradients, at the cost and communication
    of two training steps. Vectors are parts of length n / R; solvers compute inner products through ``space``. A loss
    that fails on one process alone leaves the others waiting, as in training, since it fails between FSDP2's own
    messages.

    Args:
        loss_fn: This process's loss, called without arguments.
        params: The parameters.

    Attributes:
        loss: The mean of the losses.
        gradient: This process's part ``[length]`` of its gradient.
        backend: ``"finite_difference"``.
        reason: Why differences are used.

    Raises:
        ValueError: For parameters in half precision, whose spacing is too coarse for differences.

    Memory: two parts of vectors, one copy of the shards, and that of a training step.
    """

    def __init__(self, loss_fn: Callable[[], Tensor], params: ShardedParameters) -> None:
        """Compute the gradient."""
        super().__init__(loss_fn, params, backend="finite_difference")
        self.loss = params.ranks.mean(self.loss, 1.0)
        self.reason = "the parameters stay sharded."

    def _choose(self, backend: str, again: bool = False) -> FiniteDifference:
        return _ShardedDifference(self._loss_fn, self.parameters, self._evaluations)


class ShardedGradients(Gradients):
    """The same of the mean of the processes' losses: this process's loss, and its part of the flat gradient."""

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Compute both by an ordinary backward pass of FSDP2."""
        params = self._params
        assert isinstance(params, ShardedParameters)
        half = torch.float16 in {*self._evaluations.autocast.values(), *compute_dtypes(params.module)}
        scale = LARGEST if half else 1.0
        while True:
            with self._evaluations.another():
                loss, flat = params.loss_and_gradient(self._loss_fn, scale)
            if scale == 1:
                return loss, flat
            overflow = float(not is_whole(flat) and is_whole(loss))
            if not params.ranks.maximum(torch.tensor(overflow, dtype=widest_dtype(flat.device), device=flat.device)):
                return loss, flat / scale
            scale /= LOWER


class _ShardedDifference(ShardedGradients, FiniteDifference):
    """Differences of these."""
