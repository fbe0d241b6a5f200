"""Factors on gradients that a gradient scaler has multiplied, without asking the device for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamon.kernels.gradient_stats import Scale as Scale


def scaled(tensor: Tensor, scale: Scale) -> Tensor:
    """The tensor times a factor; itself where that is the number 1."""
    return tensor if not isinstance(scale, Tensor) and scale == 1.0 else tensor * scale


def all_scaled(tensors: Sequence[Tensor], scale: Scale) -> list[Tensor]:
    """Tensors times a factor, in one call; themselves where that is the number 1."""
    if not tensors or not isinstance(scale, Tensor) and scale == 1.0:
        return list(tensors)
    return list(torch._foreach_mul(list(tensors), without_dimensions(scale)))


def without_dimensions(scale: Scale) -> Scale:
    """A factor as operators on lists take it."""
    return scale.detach().reshape(()) if isinstance(scale, Tensor) else scale


def inverse_scale(scaler: Any) -> Scale:
    """What brings gradients that a ``torch.amp.GradScaler`` has scaled to their true size.

    A tensor of its own on the scaler's device, which later changes of the scale do not reach. A number where the scaler
    has none yet, or hides it; only then may this wait for a device.
    """
    ask = getattr(scaler, "_get_scale_async", None)
    scale = None if ask is None else ask()
    return scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / float(scaler.get_scale())
