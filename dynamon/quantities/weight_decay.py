"""Decoupled weight decay: which optimizers have it, and what it leaves of the initial weights."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
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


class DecayRetention:
    """The product of ``1 - rate x ratio x decay`` over all steps, by layer: what decay leaves of the initial weights.

    Call :meth:`before_step` before each step and :meth:`after_steps` when the ratios in force are known. Rates may be
    tensors on a device: the product is then kept there, nothing waits, and what tensors there are is kept for up to 64
    steps until somebody asks, so that a step costs at most a call a group. Layers that never decayed are not in it.
    A parameter without a gradient does not decay, as in torch's optimizers. A step that was not taken does not count.
    Where the product of a weight in half precision and ``1 - rate x decay`` rounds to the weight,
    whatever it is, nothing decays: torch's optimizers multiply in place.
    """

    def __init__(self) -> None:
        """Nothing has decayed."""
        self._left: dict[str, float | Tensor] = {}
        self._pending: dict[int, dict[Hashable, list[tuple[list[str], Any]]]] = {}
        self._least: dict[str, float] = {}  # rate x decay below which a layer's weights do not change
        # What only the device knows, by layers and their ratios: rate x decay, and whether the step was skipped.
        self._deferred: dict[_Group, list[tuple[Any, Tensor | None]]] = {}

    def before_step(self, optimizer: Optimizer, names: Mapping[int, str], key: Hashable = None) -> None:
        """Note rates and decays as they are, before a scheduler moves on.

        Args:
            optimizer: What is about to step.
            names: Layer names by the ``id`` of the parameter.
            key: Names the step, since an optimizer that evaluates its closure twice says so twice. Without a key
                every call is a new step.
        """
        step = self._pending.setdefault(id(optimizer), {})[object() if key is None else key] = []
        for group in optimizer.param_groups:
            decay = decoupled_decay(optimizer, group)
            if isinstance(decay, Tensor) or decay:
                decaying = [p for p in group["params"] if p.grad is not None and id(p) in names]
                moving = [names[id(p)] for p in decaying]
                least = _least_decays(optimizer, group)
                self._least |= {names[id(p)]: least[p.dtype] for p in decaying if p.dtype in least}
                step.append((moving, group.get("lr", math.nan) * decay))  # a new tensor, where the rate is one

    def after_steps(
        self, ratios: Mapping[str, float], outcomes: Mapping[Optimizer, Sequence[Tensor | None]] | None = None
    ) -> None:
        """Take up the steps noted since the last call.

        Args:
            ratios: Factor on the rate by layer name; 1 for those that are not in it.
            outcomes: For each optimizer the steps that were taken, with a tensor that is not zero where the device has
                skipped one (:attr:`dynamon.optim.stepping.StepWatch.outcomes`); None where all of them were.
        """
        pending, self._pending = self._pending, {}
        found = None if outcomes is None else {id(optimizer): list(taken) for optimizer, taken in outcomes.items()}
        for optimizer, steps in pending.items():
            taken = [None] * len(steps) if found is None else found.get(optimizer, [])
            # Of several in one batch those that were skipped are not known apart; their decay is the same.
            for step, skipped in zip(reversed(steps.values()), reversed(taken), strict=False):
                self._take(step, ratios, skipped)

    def _take(self, step: list[tuple[list[str], Any]], ratios: Mapping[str, float], skipped: Tensor | None) -> None:
        for names, shrink in step:
            scales = [ratios.get(name, 1.0) for name in names]
            if skipped is not None or isinstance(shrink, Tensor):
                group = tuple(names), tuple(scales), (skipped is not None, isinstance(shrink, Tensor))
                self._deferred.setdefault(group, []).append((shrink, skipped))
                continue
            for name, scale in zip(names, scales, strict=True):
                lost = shrink * scale if abs(shrink * scale) >= self._least.get(name, 0.0) else 0.0
                self._left[name] = self._left.get(name, 1.0) * (1.0 - lost)
        if sum(map(len, self._deferred.values())) >= _MOST_DEFERRED:
            self._settle()

    def _settle(self) -> None:
        """Multiply what was put off: some ten calls for all steps of a group, instead of as many at each step."""
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

    @property
    def is_waiting(self) -> bool:
        """Whether steps are noted that have not been taken up."""
        return any(self._pending.values())

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
        self._left, self._pending, self._deferred = dict(state), {}, {}
