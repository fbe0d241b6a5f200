"""Decoupled weight decay: which optimizers have it, and what fraction of the initial weights it leaves."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device, to_device
from dynamon.quantities.names import word_runs

_COUPLED = "SGD Adam NAdam RAdam RMSprop Adagrad Adadelta Adamax Rprop ASGD LBFGS"  # add decay to the gradients
_DECOUPLED = "AdamW Adafactor Muon"
_CLASSES = {
    getattr(torch.optim, name): is_decoupled
    for names, is_decoupled in ((_COUPLED, False), (_DECOUPLED, True))
    for name in names.split()
    if hasattr(torch.optim, name)
}
# Whole words in the names of classes that are not torch's, in this order.
_WORDS = {"adamw": True, "sgdw": True, "muon": True, "lanton": True, "lion": True, "lars": False}


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> Any:
    """Return the decay of a group if a step multiplies its weights by ``1 - rate x decay``, else 0.

    Args:
        optimizer: Any optimizer; a class derived from one of torch's counts as that one.
        group: One of its groups; ``decoupled_weight_decay`` in it decides, if present.
    """
    return group.get("weight_decay", 0.0) if is_decoupled(optimizer, group) else 0.0


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether weight decay multiplies the weights, see :func:`decoupled_decay`.

    Unknown optimizers are assumed to do so, see :func:`decay_assumption`.
    """
    known = _known(optimizer)
    return bool(group.get("decoupled_weight_decay", True if known is None else known))


def decay_assumption(optimizer: Optimizer) -> str | None:
    """Return what is assumed of an unknown optimizer with weight decay, and how to state it; None if it is known."""
    decays = any(g.get("weight_decay") and "decoupled_weight_decay" not in g for g in optimizer.param_groups)
    if not decays or _known(optimizer) is not None:
        return None
    return (
        f"{type(optimizer).__name__} is assumed to multiply its weights by 1 - rate x weight_decay, as AdamW does: "
        "weight/initial_fraction and weight/constraint_usage depend on that. If it adds the decay to the "
        "gradient, put decoupled_weight_decay=False into its groups."
    )


def decays_first(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether decoupled decay is sure to be multiplied to the weights, and rounded, before the step is added.

    Torch's optimizers and Lanton do; fused steps add decay and update before rounding; other optimizers are unknown.
    """
    in_place = any(cls in _CLASSES or cls.__name__ == "Lanton" for cls in type(optimizer).__mro__)
    return in_place and not group.get("fused") and is_decoupled(optimizer, group)


def _least_decays(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[torch.dtype, float]:
    """Return, for half-precision dtypes, the rate x decay below which no weight changes.

    The largest weights of a binade have neighbours at a distance of half the dtype's eps, and round back from half of
    that.
    """
    if not decays_first(optimizer, group):
        return {}
    return {dtype: torch.finfo(dtype).eps / 4 for dtype in (torch.float16, torch.bfloat16)}


def _known(optimizer: Optimizer) -> bool | None:
    """Return whether decay is decoupled, by the torch class that this derives from, or by name; None if unknown."""
    for cls in type(optimizer).__mro__:
        if cls in _CLASSES:
            return _CLASSES[cls]
        if cls.__name__.lower() in _WORDS:
            return _WORDS[cls.__name__.lower()]
    runs = {run for cls in type(optimizer).__mro__ for run in word_runs(cls.__name__)}
    return next((decoupled for word, decoupled in _WORDS.items() if word in runs), None)


_MOST_DEFERRED = 64  # steps
_Group = tuple[tuple[str, ...], tuple[float, ...], tuple[bool, bool]]


@dataclass
class _Decaying:
    """The layers of a parameter group, and the fraction that all of them have kept since the last read.

    Attributes:
        params: The parameters, as many as there were.
        names: The layers among them.
        least: Rate x decay below which a layer's weights do not change, of those in half precision.
        left: The fraction that is left; None before the first step.
    """

    params: list[Tensor]
    names: tuple[str, ...]
    least: dict[str, float]
    left: float | None = None


class DecayRetention:
    """The fraction of the initial weights that decay leaves: the product of ``1 - rate x ratio x decay`` by layer.

    Call :meth:`note` before each step and :meth:`take` after it. Where all layers of a group have gradients, one rate
    and no ratio of their own, a step costs one multiplication per group. Rates may be tensors on a device: the product
    is then kept there, nothing waits, and tensors are collected for up to 64 steps, so that a step costs at most one
    call per group. Layers that never decayed are not included. A parameter without a gradient does not decay, as in
    torch's optimizers. Where the product of a half-precision weight and ``1 - rate x decay`` always rounds to the
    weight, nothing decays: torch's optimizers multiply in place. Where decay and step are rounded together (fused
    steps), the share that a reading found lost is taken off until the next reading.

    Attributes:
        lost: That share by layer; layers that lose nothing are left out.
    """

    def __init__(self) -> None:
        """Start before any decay."""
        self.lost: dict[str, float] = {}
        self._left: dict[str, float | Tensor] = {}
        self._noted: dict[int, list[tuple[int, list[Tensor], Any]]] = {}
        self._groups: dict[tuple[int, int], _Decaying] = {}
        self._classes: dict[type, bool] = {}
        self._least: dict[str, float] = {}  # rate x decay below which a layer's weights do not change
        # Known to the device only, by layers and their ratios: rate x decay, and whether the step was skipped.
        self._deferred: dict[_Group, list[tuple[Any, Tensor | None]]] = {}

    def note(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Record rates and decays before a scheduler changes them.

        Args:
            optimizer: The optimizer that is about to step. A step that is announced twice counts once.
            groups: Its groups, where steering shows it others.
        """
        noted = []
        for index, group in enumerate(optimizer.param_groups if groups is None else groups):
            decay = group.get("weight_decay", 0.0)
            if (isinstance(decay, Tensor) or decay) and self._is_decoupled(optimizer, group):
                noted.append((index, group["params"], group.get("lr", math.nan) * decay))
        self._noted[id(optimizer)] = noted

    def take(
        self,
        optimizer: Optimizer,
        names: Callable[[], Mapping[int, str]],
        ratios: Mapping[str, float] | None = None,
        skipped: Tensor | None = None,
        read_names: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        """Apply the step that was recorded last.

        Args:
            optimizer: The optimizer that has stepped.
            names: Returns layer names by the ``id`` of the parameter, as they were read last.
            ratios: Factor on the rate by layer name; 1 for layers not in it.
            skipped: A tensor that is not zero where the step was skipped on the device, or None.
            read_names: Reads the names again; called where the groups have changed. None for ``names``.
        """
        for index, params, shrink in self._noted.pop(id(optimizer), ()):
            group = self._groups.get((id(optimizer), index))
            if group is None or len(group.params) != len(params) or group.params[0] is not params[0]:
                self.regroup()
                group = self._groups[id(optimizer), index] = self._decaying(
                    optimizer, index, params, (read_names or names)()
                )
            is_whole = True
            for parameter in params:  # at every step: without a call for each
                if parameter.grad is None:
                    is_whole = False
                    break
            is_exact = not group.least and not self.lost
            if is_whole and not ratios and skipped is None and is_exact and not isinstance(shrink, Tensor):
                group.left = (1.0 if group.left is None else group.left) * (1.0 - shrink)
                continue
            known = {} if is_whole else names()
            moving = (
                group.names
                if is_whole
                else tuple(known[id(p)] for p in params if p.grad is not None and id(p) in known)
            )
            self._multiply_each(moving, shrink, group.least, ratios or {}, skipped)

    def regroup(self) -> None:
        """Read the layers again at the next step."""
        self._settle()
        self._groups = {}

    def _is_decoupled(self, optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
        known = self._classes.get(type(optimizer))
        if known is None:
            known = self._classes[type(optimizer)] = is_decoupled(optimizer, {})
        return bool(group.get("decoupled_weight_decay", known))

    @staticmethod
    def _decaying(optimizer: Optimizer, index: int, params: Sequence[Tensor], names: Mapping[int, str]) -> _Decaying:
        """Return the present layers of a group."""
        known = [p for p in params if id(p) in names]
        least = _least_decays(optimizer, optimizer.param_groups[index])
        of_half = {names[id(p)]: least[p.dtype] for p in known if p.dtype in least}
        return _Decaying(list(params), tuple(names[id(p)] for p in known), of_half)

    def _multiply_each(
        self,
        names: tuple[str, ...],
        shrink: Any,
        least: Mapping[str, float],
        ratios: Mapping[str, float],
        skipped: Tensor | None,
    ) -> None:
        scales = [ratios.get(name, 1.0) * (1.0 - self.lost.get(name, 0.0)) for name in names]
        if skipped is not None or isinstance(shrink, Tensor):
            self._least |= least
            group = names, tuple(scales), (skipped is not None, isinstance(shrink, Tensor))
            self._deferred.setdefault(group, []).append((shrink, skipped))
            if sum(map(len, self._deferred.values())) >= _MOST_DEFERRED:
                self._settle()
            return
        for name, scale in zip(names, scales, strict=True):
            lost = shrink * scale if abs(shrink * scale) >= least.get(name, 0.0) else 0.0
            self._left[name] = self._left.get(name, 1.0) * (1.0 - lost)

    def _settle(self) -> None:
        """Multiply the deferred factors: some ten calls for all steps of a group, instead of as many per step."""
        for whole in self._groups.values():
            left, whole.left = whole.left, None
            if left is not None:
                self._left |= {name: self._left.get(name, 1.0) * left for name in whole.names}
        deferred, self._deferred = self._deferred, {}
        for (names, scales, _), steps in deferred.items():
            if names:
                self._multiply(names, scales, *zip(*steps, strict=True))

    def _multiply(
        self, names: Sequence[str], scales: Sequence[float], shrinks: Sequence[Any], skipped: Sequence[Tensor | None]
    ) -> None:
        """Multiply in float64 if possible: float16 and bfloat16 lose a factor of 1 - 1e-6."""
        flags = [flag.detach().reshape(()) for flag in skipped if flag is not None]
        device = next(t.device for t in (*flags, *shrinks) if isinstance(t, Tensor))
        wide = widest_dtype(device)
        if isinstance(shrinks[0], Tensor):
            lost = torch.stack([shrink.detach().reshape(()) for shrink in shrinks]).to(device, wide)
        else:
            lost = to_device(torch.tensor(shrinks, dtype=wide, device="cpu"), device)
        if flags:
            lost = lost * torch.stack(flags).eq(0)
        table = lost[:, None] * on_device(scales, device, wide)
        if any(name in self._least for name in names):
            table = table * (table.abs() >= on_device([self._least.get(name, 0.0) for name in names], device, wide))
        left = torch.stack([self._on_device(self._left.get(name, 1.0), device, wide) for name in names])
        self._left |= zip(names, (left * (1 - table).prod(0)).unbind(), strict=True)

    @staticmethod
    def _on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, dtype)
        return on_device((value,), device, dtype)[0]  # one tensor shared by all that never decayed

    def row(self, names: Iterable[str]) -> Tensor:
        """Return the remaining fraction by layer ``[L]`` in float32, NaN for layers that never decayed.

        Args:
            names: L layer names.

        Returns:
            On the host, or if rates are tensors on their device.
        """
        self._settle()
        values = [self._left.get(name, math.nan) for name in names]
        known = [value for value in values if isinstance(value, Tensor)]
        if not known:
            return torch.tensor(values, dtype=torch.float32, device="cpu")
        device, wide = known[0].device, known[0].dtype
        return torch.stack([self._on_device(value, device, wide) for value in values]).float()

    def state_dict(self) -> dict[str, float]:
        """Return the remaining fraction by layer name."""
        self._settle()
        known = {name: left for name, left in self._left.items() if isinstance(left, Tensor)}
        like = next(iter(known.values()), torch.empty(0))
        same = [left.to(like.device, like.dtype) for left in known.values()]
        numbers = torch.stack(same).tolist() if same else []  # views of a vector would be saved with all of it
        return {**self._left, **dict(zip(known, numbers, strict=True))}

    def load_state_dict(self, state: Mapping[str, float | Tensor]) -> None:
        """Restore a state."""
        self._left, self._noted, self._groups, self._deferred = dict(state), {}, {}, {}
