"""Decoupled weight decay: which optimizers have it, and what it leaves of the initial weights."""

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
# Of classes that are not torch's, as whole words of their names, and in this order.
_WORDS = {"adamw": True, "sgdw": True, "muon": True, "lanton": True, "lion": True, "lars": False}


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> Any:
    """The decay of a parameter group where a step multiplies its weights by ``1 - rate x decay``, else 0.

    Args:
        optimizer: Any optimizer; a class derived from one of torch's counts as that one.
        group: One of its groups; ``decoupled_weight_decay`` in it decides where it is there.
    """
    return group.get("weight_decay", 0.0) if is_decoupled(optimizer, group) else 0.0


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay, if there is any, multiplies the weights; see :func:`decoupled_decay`.

    What is not known is taken to do so; see :func:`decay_assumption`.
    """
    known = _known(optimizer)
    return bool(group.get("decoupled_weight_decay", True if known is None else known))


def decay_assumption(optimizer: Optimizer) -> str | None:
    """What is assumed of an unknown optimizer that decays weights, and how to state it; None where it is known."""
    decays = any(g.get("weight_decay") and "decoupled_weight_decay" not in g for g in optimizer.param_groups)
    if not decays or _known(optimizer) is not None:
        return None
    return (
        f"{type(optimizer).__name__} is taken to multiply its weights by 1 - rate x weight_decay, as AdamW does: "
        "weight/initial_fraction and weight/constraint_usage rest on that. Put decoupled_weight_decay=False into its "
        "groups if it adds the decay to the gradient."
    )


def _least_decays(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[torch.dtype, float]:
    """The rate x decay below which no weight of a dtype changes, for those of half precision.

    The largest weights of a binade have neighbours at a distance of half the dtype's eps, and come to themselves from
    half of that. Fused steps add decay and update before they round; of optimizers from elsewhere nothing is known.
    """
    if group.get("fused") or not any(cls in _CLASSES for cls in type(optimizer).__mro__):
        return {}
    return {dtype: torch.finfo(dtype).eps / 4 for dtype in (torch.float16, torch.bfloat16)}


def _known(optimizer: Optimizer) -> bool | None:
    """Whether decay is decoupled, by torch's class that this is or derives from, or by its name; None: not known."""
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
    """The layers of a parameter group, and what all of them have lost together since somebody asked.

    Attributes:
        params: The parameters, as many as there were.
        names: The layers among them.
        least: Rate x decay below which a layer's weights do not change, of those in half precision.
        left: What is left, as a factor; None before the first step.
    """

    params: list[Tensor]
    names: tuple[str, ...]
    least: dict[str, float]
    left: float | None = None


class DecayRetention:
    """The product of ``1 - rate x ratio x decay`` over all steps, by layer: what decay leaves of the initial weights.

    Call :meth:`note` as a step begins and :meth:`take` when it has come to its end. Where all layers of a group have
    gradients, one rate and no ratio of their own, a step costs one multiplication a group. Rates may be
    tensors on a device: the product is then kept there, nothing waits, and what tensors there are is kept for up to 64
    steps until somebody asks, so that a step costs at most a call a group. Layers that never decayed are not in it.
    A parameter without a gradient does not decay, as in torch's optimizers.
    Where the product of a weight in half precision and ``1 - rate x decay`` rounds to the weight,
    whatever it is, nothing decays: torch's optimizers multiply in place.
    """

    def __init__(self) -> None:
        """Nothing has decayed."""
        self._left: dict[str, float | Tensor] = {}
        self._noted: dict[int, list[tuple[int, list[Tensor], Any]]] = {}
        self._groups: dict[tuple[int, int], _Decaying] = {}
        self._classes: dict[type, bool] = {}
        self._least: dict[str, float] = {}  # rate x decay below which a layer's weights do not change
        # What only the device knows, by layers and their ratios: rate x decay, and whether the step was skipped.
        self._deferred: dict[_Group, list[tuple[Any, Tensor | None]]] = {}

    def note(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Note rates and decays as they are, before a scheduler moves on.

        Args:
            optimizer: What is about to step. A step that is announced twice counts once.
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
    ) -> None:
        """Count the step that was noted last.

        Args:
            optimizer: What has stepped.
            names: Gives layer names by the ``id`` of the parameter; asked for where the groups have changed.
            ratios: Factor on the rate by layer name; 1 for those that are not in it.
            skipped: A tensor that is not zero where the device has left the weights alone, or None.
        """
        for index, params, shrink in self._noted.pop(id(optimizer), ()):
            group = self._groups.get((id(optimizer), index))
            if group is None or len(group.params) != len(params) or group.params[0] is not params[0]:
                self.regroup()
                group = self._groups[id(optimizer), index] = self._decaying(optimizer, index, params, names())
            is_whole = True
            for parameter in params:  # at every step: without a call for each
                if parameter.grad is None:
                    is_whole = False
                    break
            if is_whole and not ratios and skipped is None and not group.least and not isinstance(shrink, Tensor):
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
        """Look at the layers anew at the next step."""
        self._settle()
        self._groups = {}

    def _is_decoupled(self, optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
        known = self._classes.get(type(optimizer))
        if known is None:
            known = self._classes[type(optimizer)] = is_decoupled(optimizer, {})
        return bool(group.get("decoupled_weight_decay", known))

    @staticmethod
    def _decaying(optimizer: Optimizer, index: int, params: Sequence[Tensor], names: Mapping[int, str]) -> _Decaying:
        """The layers of a group as they are now."""
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
        scales = [ratios.get(name, 1.0) for name in names]
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
        """Multiply what was put off: some ten calls for all steps of a group, instead of as many at each step."""
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
        """In float64 if possible: half of it loses a factor of 1 - 1e-6."""
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
        return on_device((value,), device, dtype)[0]  # one tensor for the many that never decayed

    def row(self, names: Iterable[str]) -> Tensor:
        """What is left by layer ``[L]`` in float32, NaN for those that never decayed.

        Args:
            names: L layer names.

        Returns:
            On the host, or where rates are tensors on their device.
        """
        self._settle()
        values = [self._left.get(name, math.nan) for name in names]
        known = [value for value in values if isinstance(value, Tensor)]
        if not known:
            return torch.tensor(values, dtype=torch.float32, device="cpu")
        device, wide = known[0].device, known[0].dtype
        return torch.stack([self._on_device(value, device, wide) for value in values]).float()

    def state_dict(self) -> dict[str, float]:
        """What is left by layer name."""
        self._settle()
        known = {name: left for name, left in self._left.items() if isinstance(left, Tensor)}
        like = next(iter(known.values()), torch.empty(0))
        same = [left.to(like.device, like.dtype) for left in known.values()]
        numbers = torch.stack(same).tolist() if same else []  # parts of a vector would be saved whole
        return {**self._left, **dict(zip(known, numbers, strict=True))}

    def load_state_dict(self, state: Mapping[str, float | Tensor]) -> None:
        """Go on from it."""
        self._left, self._noted, self._groups, self._deferred = dict(state), {}, {}, {}
