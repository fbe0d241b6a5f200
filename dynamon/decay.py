"""Decoupled weight decay: which optimizers have it, and what it leaves of the initial weights."""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Optimizers that add decay to the gradients. What is not known is taken to shrink the weights by rate x decay.
_COUPLED = {"SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop", "ASGD", "LBFGS"}
_DECOUPLED = {"AdamW", "Adafactor", "Muon", "Lanton"}
_KNOWN = _COUPLED | _DECOUPLED


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> Any:
    """The decay of a parameter group where a step multiplies its weights by ``1 - rate x decay``, else 0.

    Args:
        optimizer: Any optimizer; a class derived from one of torch's counts as that one.
        group: One of its groups; ``decoupled_weight_decay`` in it decides where it is there.
    """
    return group.get("weight_decay", 0.0) if is_decoupled(optimizer, group) else 0.0


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay, if there is any, multiplies the weights; see :func:`decoupled_decay`."""
    known = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in _KNOWN), "")
    return bool(group.get("decoupled_weight_decay", known not in _COUPLED))


class DecayMemory:
    """The product of ``1 - rate x ratio x decay`` over all steps, by layer: what decay leaves of the initial weights.

    Call :meth:`before_step` before each step and :meth:`after_steps` when the ratios in force are known. Rates may be
    tensors on a device: the product is then kept there, and nothing waits. Layers that never decayed are not in it.
    A parameter without a gradient does not decay, as in torch's optimizers. A step that a gradient scaler skips
    counts as a step.
    """

    def __init__(self) -> None:
        """Nothing has decayed."""
        self._left: dict[str, float | Tensor] = {}
        self._pending: dict[Hashable, list[tuple[list[str], Any]]] = {}

    def before_step(self, optimizer: Optimizer, names: Mapping[int, str], key: Hashable = None) -> None:
        """Note rates and decays as they are, before a scheduler moves on.

        Args:
            optimizer: What is about to step.
            names: Layer names by the ``id`` of the parameter.
            key: Names the step, since an optimizer that evaluates its closure twice says so twice. Without a key
                every call is a new step.
        """
        step = self._pending[object() if key is None else (id(optimizer), key)] = []
        for group in optimizer.param_groups:
            decay = decoupled_decay(optimizer, group)
            if isinstance(decay, Tensor) or decay:
                moving = [names[id(p)] for p in group["params"] if p.grad is not None and id(p) in names]
                step.append((moving, group.get("lr", math.nan) * decay))  # a new tensor, where the rate is one

    def after_steps(self, ratios: Mapping[str, float]) -> None:
        """Take up the steps noted since the last call.

        Args:
            ratios: Factor on the rate by layer name; 1 for those that are not in it.
        """
        pending, self._pending = self._pending, {}
        for names, shrink in (part for step in pending.values() for part in step):
            scales = [ratios.get(name, 1.0) for name in names]
            if isinstance(shrink, Tensor):
                self._multiply(names, shrink.detach().reshape(()), scales)
            else:
                for name, scale in zip(names, scales, strict=True):
                    self._left[name] = self._left.get(name, 1.0) * (1.0 - shrink * scale)

    def _multiply(self, names: list[str], shrink: Tensor, scales: list[float]) -> None:
        """A few launches for all layers of a group; in float64, since a factor of 1 - 1e-6 is lost in half of it."""
        if not names:
            return
        wide = torch.float32 if shrink.device.type == "mps" else torch.float64
        factors = list(torch._foreach_mul([shrink.to(wide)] * len(names), scales))
        torch._foreach_neg_(factors)
        torch._foreach_add_(factors, 1.0)
        left = [self._on_device(self._left.get(name, 1.0), shrink.device, wide) for name in names]
        self._left |= zip(names, torch._foreach_mul(left, factors), strict=True)

    @staticmethod
    def _on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, dtype)
        return torch.full((), value, device=device, dtype=dtype)

    @property
    def is_waiting(self) -> bool:
        """Whether steps are noted that have not been taken up."""
        return any(self._pending.values())

    def row(self, names: Iterable[str], device: torch.device) -> Tensor:
        """What is left by layer ``[L]`` in float32 on a device, NaN for those that never decayed.

        Args:
            names: L layer names.
            device: Where to.
        """
        values = [self._left.get(name, math.nan) for name in names]
        if not any(isinstance(value, Tensor) for value in values):
            return torch.tensor(values, dtype=torch.float32, device=device)
        return torch.stack([self._on_device(value, device, torch.float32) for value in values])

    def state_dict(self) -> dict[str, float | Tensor]:
        """What is left by layer name."""
        return dict(self._left)

    def load_state_dict(self, state: Mapping[str, float | Tensor]) -> None:
        """Go on from it."""
        self._left, self._pending = dict(state), {}
