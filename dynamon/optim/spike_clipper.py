"""Clip each layer's gradient by its own recent level, inside the optimizer's step."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded, to_local, to_local_as
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.kernels import l2_norms, widest_dtype
from dynamon.kernels.devices import reads_are_free
from dynamon.optim.skipping import Skipping
from dynamon.optim.spike_arguments import check_arguments, check_devices, check_running
from dynamon.optim.spike_levels import SpikeLevels
from dynamon.optim.steering import steerable_layers, steering_of
from dynamon.optim.stepping import Closure, Nesting, closure_of, runs_hooks, with_closure, wrapped_optimizers
from dynamon.optim.views import are_same
from dynamon.quantities.host_copy import HostCopy
from dynamon.quantities.scales import Scale

_NORM, _LOSS = "(norm)", "(loss)"  # series that are of no layer
_LARGEST = np.finfo(np.float64).max


@dataclass
class GuardCounts:
    """Counts of steps, of all so far and since they were last asked for.

    Attributes:
        steps: Steps that were looked at.
        clipped: Steps at which a layer was clipped.
        skipped: Steps that were skipped.
        in_a_row: Steps clipped or skipped one after the other, up to the last one.
        steps_since: Steps since :meth:`SpikeClipper.recent`.
        clipped_since: Steps since then at which a layer was clipped.
    """

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    in_a_row: int = 0
    steps_since: int = 0
    clipped_since: int = 0


class _Pending(NamedTuple):
    """A step whose norms are on their way to the host.

    Attributes:
        copy: Norms of the I layers, of all and the loss where they are followed; whether a gradient scaler skips the
            step, whether it is far beyond its limit.
        present: Series that these are of.
        limits: Limits of the I layers.
        is_scaled: Whether there is a gradient scaler.
    """

    copy: HostCopy
    present: NDArray[np.intp]
    limits: NDArray[np.float64]
    is_scaled: bool


class SpikeClipper:
    r"""Clips the gradient of each layer to a limit that its own recent norms set, and skips steps far beyond it.

    Inside ``optimizer.step()``, after whatever else has clipped or read the gradients, the gradient of layer l with
    norm :math:`n_l` is multiplied by

    .. math:: f_l = \min(1, \max(\text{limit}_l / n_l, \text{floor}))

    on its device and in place. The limit follows from the norms of the steps before, see
    :class:`dynamon.optim.spike_levels.SpikeLevels`: k deviations of the log norm above its level, at least twice the
    level. A factor of 1 changes no bit. Gradients with NaN or infinity cannot be mended by a factor and are left alone;
    ``skip`` is for them.

    With ``skip``, a step is skipped whose total norm, or whose loss where :meth:`observe_loss` tells it, lies more than
    ``skip`` times as far above its level (in logarithms) as its limit, or is not finite. A skipped step leaves weights
    and optimizer state as they are; schedulers go on, as they do when a gradient scaler skips a step. Fused optimizers
    skip on the device (``found_inf``). For others the host waits for one number each step.

    Args:
        optimizer: Any optimizer whose steps run hooks.
        model: The module whose layers are guarded. Complex weights and those of no layer are not clipped.
        deviations: k, above 0.
        memory: Steps over which the level is averaged.
        warmup: Steps at which a layer is only observed, at least 1.
        floor: Smallest factor, in (0, 1].
        skip: None for no skipping, or a number above 1.
        apply: False for a dry run: everything is computed and counted, and nothing is changed.

    Attributes:
        layers: The guarded layers.
        levels: Their levels, with those of the total norm and the loss.
        counts: What was done.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, if the optimizer cannot be guarded (the message has the reason), or
            if the weights are on several devices.
        RuntimeError: In a step that is compiled or captured in a CUDA graph.

    Processes: under DDP gradients are reduced already, so that all decide the same. Sharded gradients (FSDP2) take one
    all-reduce of a number per layer each step.

    Cost: one pass for the norms and one for the factors, eight device calls a step for any number of layers. On a GPU
    the factors differ by tensor, so that the last of these calls launches one kernel per tensor. Norms reach the host
    one step later, without a wait. On a CPU only layers out of line are multiplied.

    Reference: per-layer relatives are adaptive gradient clipping (arXiv 2102.06171), which compares with the weight,
    and ZClip (arXiv 2504.02507), which does this for the total norm.

    Example:
        >>> import torch
        >>> from dynamon.optim import SpikeClipper
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipper = SpikeClipper(optimizer, model, warmup=8)
        >>> for step in range(10):
        ...     loss = model(torch.ones(2, 4)).sum() * (1000.0 if step == 9 else 1.0)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> {name: round(factor, 6) for name, factor in clipper.factors.items()}  # clipped to twice the level
        {'weight': 0.002, 'bias': 0.002}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        deviations: float = 4.0,
        memory: int = 100,
        warmup: int = 25,
        floor: float = 1e-3,
        skip: float | None = None,
        apply: bool = True,
    ) -> None:
        """Attach to the optimizer's step."""
        check_arguments(optimizer, model, deviations, memory, warmup, floor, skip)
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), SpikeClipper) for hook in hooks):
            raise ValueError(f"this {type(optimizer).__name__} is guarded already; remove the other guard first.")
        self.optimizer, self.model, self.apply = optimizer, model, apply
        self.deviations, self.memory, self.warmup, self.floor, self.skip = deviations, memory, warmup, floor, skip
        self._skipping = Skipping(optimizer)
        self.counts = GuardCounts()
        self._attach()
        if not self.layers and not self._lazy:
            raise ValueError("the optimizer holds no parameter of the model: there is nothing to guard.")
        self._loss: Tensor | None = None
        self._pending: _Pending | None = None
        self._nesting = Nesting()
        self._evaluation, self._evaluations, self._acted_at = 0, 1, -1
        hooked = list(filter(runs_hooks, (optimizer, *wrapped_optimizers(optimizer))))
        self._hooks: list[tuple[Any, Any]] = []
        for each in hooked:
            self._hooks += [
                (each._optimizer_step_pre_hooks, each.register_step_pre_hook(self._before_step)),
                (each._optimizer_step_post_hooks, each.register_step_post_hook(self._after_step)),
            ]

    def _attach(self) -> None:
        """Find the layers of the optimizer's parameters."""
        self._held = self._parameters()
        self._lazy = [p for p in self._held if is_lazy(p)]  # they get their shape in a first batch
        self.layers = steerable_layers(self.model, self.optimizer)
        self._is_sharded = any_sharded([layer.parameter for layer in self.layers])
        self._names = [layer.name for layer in self.layers]
        extra = [] if self.skip is None else [_NORM, _LOSS]
        self.levels = SpikeLevels([*self._names, *extra], self.deviations, self.memory, self.warmup)
        self._last = np.ones(len(self._names))  # factors of the last step
        self._smallest = np.ones(len(self._names))
        self._reduction: tuple[list[int], ShardReduction] | None = None
        check_devices(layer.parameter for layer in self.layers)

    def _parameters(self) -> list[Tensor]:
        """Return the optimizer's parameters in the order of its own groups, also where steering shows it others."""
        steering = steering_of(self.optimizer)
        groups = self.optimizer.param_groups if steering is None else steering.groups
        return [parameter for group in groups for parameter in group["params"]]

    def _follow_optimizer(self) -> None:
        """Attach again if parameters joined, left, were replaced or got a shape; other layers keep their state."""
        if are_same(self._parameters(), self._held) and all(map(is_lazy, self._lazy)):
            return
        self.settle()
        state = self.state_dict()
        self._attach()
        self.load_state_dict(state)

    @property
    def factors(self) -> dict[str, float]:
        """The factor of each layer in the last step, by parameter name; in a dry run the one it would have had."""
        self.settle()
        return dict(zip(self._names, self._last.tolist(), strict=True))

    @property
    def limits(self) -> dict[str, float]:
        """The limit of each layer's norm in the next step, by parameter name; infinite while it is only observed."""
        self.settle()
        return dict(zip(self._names, self.levels.limits().tolist(), strict=False))

    def __repr__(self) -> str:
        """Name the optimizer, and what was done."""
        what = f"{len(self.layers)} layers of {type(self.optimizer).__name__}"
        done = f"{self.counts.clipped} of {self.counts.steps} steps clipped, {self.counts.skipped} skipped"
        return f"SpikeClipper({what}, {done}{'' if self.apply else ', dry run'})"

    @property
    def has_acted(self) -> bool:
        """Whether a step was looked at whose norms have not been taken up yet."""
        return self._pending is not None

    def recent(self) -> tuple[int, int, dict[str, float]]:
        """Return steps, clipped steps and the smallest factor of each layer since the last call."""
        self.settle()
        found = dict(zip(self._names, self._smallest.tolist(), strict=True))
        steps, clipped = self.counts.steps_since, self.counts.clipped_since
        self.counts.steps_since = self.counts.clipped_since = 0
        self._smallest = np.ones(len(self._names))
        return steps, clipped, found

    def observe_loss(self, loss: Tensor, scale: Scale = 1.0) -> None:
        """Tell the loss of the coming step, for ``skip``; several calls before one step add up.

        Args:
            loss: The loss, or this batch's share of it where gradients are accumulated. With several processes their
                mean: all must decide the same. Losses that are not positive are not judged.
            scale: Factor on it, if an AMP scaler has scaled it.
        """
        if self.skip is not None:
            value = loss.detach().to(widest_dtype(loss.device)).reshape(1) * scale
            self._loss = value if self._loss is None else self._loss + value

    def act_last(self) -> None:
        """Let hooks that joined the optimizer since see gradients before clipping, and which step is skipped."""
        for hooks, handle in self._hooks:
            if next(reversed(hooks)) != handle.id:
                hooks.move_to_end(handle.id)

    def restore(self) -> None:
        """Give hidden gradients back where a step raised."""
        self._nesting.clear()
        self._skipping.end()

    def remove(self) -> None:
        """Detach from the optimizer."""
        self.restore()
        for _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return levels, counts and factors since the last report, as numbers by name."""
        self.settle()
        smallest = dict(zip(self._names, self._smallest.tolist(), strict=True))
        counts = {**asdict(self.counts), "evaluations": self._evaluations}
        return {"levels": self.levels.state_dict(), "counts": counts, "smallest": smallest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`; layers that it does not have begin anew."""
        self._pending, self._loss = None, None
        self.levels.load_state_dict(state["levels"])
        counts = dict(state["counts"])
        self._evaluations = counts.pop("evaluations")
        self.counts = GuardCounts(**counts)
        self._smallest = np.array([state["smallest"].get(name, 1.0) for name in self._names])

    def settle(self) -> None:
        """Take up the norms of the last step, once they have arrived."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values, flags = np.split(pending.copy.wait().double().numpy(), [len(pending.present)])
        if pending.is_scaled and flags[0] > 0:  # the gradient scaler has skipped the step
            return
        measured = np.full(len(self.levels.names), np.nan)
        measured[pending.present] = values
        own = pending.present[: len(pending.limits)]
        self._last = np.ones(len(self._names))
        self._last[own] = _factors(pending.limits, values[: len(own)], self.floor)
        self._smallest = np.minimum(self._smallest, self._last)
        self.levels.take(measured)
        self._count(bool((self._last < 1).any()), self.skip is not None and bool(flags[-1] > 0))

    def _count(self, clipped: bool, skipped: bool) -> None:
        counts = self.counts
        counts.steps += 1
        counts.clipped += clipped
        counts.skipped += skipped
        counts.in_a_row = counts.in_a_row + 1 if clipped or skipped else 0
        counts.steps_since += 1
        counts.clipped_since += clipped

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        check_running(optimizer)
        is_outer = self._nesting.begins(sys._getframe(1))
        if is_outer:
            self._skipping.end()  # left over where the last step raised
            self._evaluation, self._acted_at = 0, -1
            self._follow_optimizer()
            self.settle()
        if closure_of(optimizer, args, kwargs) is None:
            self._act()
            return None
        return with_closure(optimizer, args, kwargs, self._then_act) if is_outer else None

    def _then_act(self, closure: Closure) -> Callable[[], Any]:
        def closure_then_act() -> Any:
            self._evaluation += 1
            result = closure()
            if self._evaluation >= self._evaluations:  # as often as in the last step: its gradient is the one used
                self._act()
            return result

        return closure_then_act

    def _after_step(self, *_: Any) -> None:
        if self._nesting.ends(sys._getframe(1)):
            self._evaluations = max(self._evaluation, 1)
            self._loss = None
            self._skipping.end()

    @torch.no_grad()
    def _act(self) -> None:
        """Measure the gradients of the step, clip them, and skip the step if it must be."""
        if self._acted_at == self._evaluation:
            return  # a step inside of the one that was handled
        self._acted_at = self._evaluation
        at = [i for i, layer in enumerate(self.layers) if layer.parameter.grad is not None]
        if not at:
            return
        norms = self._norms(at)
        limits = self.levels.limits()[at]
        present, tail = np.array(at), norms[:0]
        if self.skip is not None:
            total = torch.linalg.vector_norm(norms).reshape(1)
            tail = total if self._loss is None else torch.cat([total, self._loss.to(total)])
            present = np.append(present, len(self._names) + np.arange(len(tail)))
        refused = getattr(self.optimizer, "found_inf", None)  # by a gradient scaler, which lets the optimizer skip
        flags = [] if refused is None else [refused.to(norms).reshape(1)]
        skipped = None if self.skip is None else self._is_far(tail)
        rows = [norms, tail, *flags, *([] if skipped is None else [skipped])]
        self._pending = _Pending(HostCopy(torch.cat(rows) if len(rows) > 2 else norms), present, limits, bool(flags))
        if self.apply:
            self._multiply(at, norms, limits)
            if skipped is not None:
                self._skipping.begin(skipped)

    def _norms(self, at: list[int]) -> Tensor:
        """Return the norms of some layers' gradients, the same on every process, without a gradient scaler's scale."""

        def measure() -> Tensor:
            return l2_norms(self._gradients(at, summed=True))

        if self._is_sharded:
            parameters = [self.layers[i].parameter for i in at]
            if self._reduction is None or self._reduction[0] != at:
                ranks = Ranks(to_local(parameters[0]).device)
                self._reduction = at, ShardReduction(parameters, ranks, lengths=1)
            norms = self._reduction[1].reduce_or_nan(lambda: PartialStats(lengths=measure()[None])).lengths[0]
        else:
            norms = measure()
        scale = getattr(self.optimizer, "grad_scale", None)
        return norms if scale is None else norms / scale.to(norms)

    def _is_far(self, tail: Tensor) -> Tensor:
        """Return 1 where the total norm or the loss is far beyond its limit or not finite, ``[1]`` on the device."""
        assert self.skip is not None
        far = np.minimum(self.levels.limits(self.skip)[-2:][: len(tail)], _LARGEST)  # infinity is beyond any limit
        return (tail <= _on_device(far, tail)).all().logical_not().to(tail).reshape(1)

    def _multiply(self, at: list[int], norms: Tensor, limits: NDArray[np.float64]) -> None:
        """Multiply the gradients by their factors; on a CPU only those that change."""
        if np.isinf(limits).all():
            return
        if reads_are_free(norms.device):
            factors = _factors(limits, norms.double().numpy(), self.floor)
            where = np.flatnonzero(factors < 1)
            for gradient, factor in zip(self._gradients([at[i] for i in where]), factors[where].tolist(), strict=True):
                gradient.mul_(factor)
            return
        factor = (_on_device(limits, norms) / norms.nan_to_num(0.0, 0.0, 0.0)).clamp_(self.floor, 1.0)
        torch._foreach_mul_(self._gradients(at), list(factor.unbind()))

    def _gradients(self, at: list[int], summed: bool = False) -> list[Tensor]:
        """Return the numbers of gradients on this process, in their memory; with ``summed``, sparse ones coalesced."""
        found: list[Tensor] = []
        for i in at:
            parameter = self.layers[i].parameter
            gradient = parameter.grad
            assert gradient is not None
            if gradient.is_sparse:
                gradient = (gradient.coalesce() if summed else gradient)._values()
            found.append(to_local_as(gradient.detach(), parameter) if self._is_sharded else gradient.detach())
        return found


def _factors(limits: NDArray[np.float64], norms: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Return the factors of layers; 1 where a norm is 0 or not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.clip(limits / norms, floor, 1.0)
    return np.where(np.isfinite(norms), np.nan_to_num(factors, nan=1.0), 1.0)


def _on_device(numbers: NDArray[np.float64], like: Tensor) -> Tensor:
    """Bring numbers to a device without a wait: from pinned memory, which stays until the copy has been made."""
    host = torch.from_numpy(numbers).to(like.dtype)
    return host.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else host.to(like.device)
