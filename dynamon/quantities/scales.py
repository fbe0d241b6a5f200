"""Factors that undo a gradient scaler, without reading them from the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamon.kernels.gradient_stats import Scale as Scale


def scaled(tensor: Tensor, scale: Scale) -> Tensor:
    """Multiply a tensor by a factor; return the tensor itself where that is the number 1."""
    return tensor if not isinstance(scale, Tensor) and scale == 1.0 else tensor * scale


def all_scaled(tensors: Sequence[Tensor], scale: Scale) -> list[Tensor]:
    """Multiply tensors by a factor in one call; return them as they are where that is the number 1."""
    if not tensors or not isinstance(scale, Tensor) and scale == 1.0:
        return list(tensors)
    return list(torch._foreach_mul(list(tensors), without_dimensions(scale)))


def without_dimensions(scale: Scale) -> Scale:
    """Return a factor as operators on lists take it: a number, or a tensor without dimensions."""
    return scale.detach().reshape(()) if isinstance(scale, Tensor) else scale


def inverse_scale(scaler: Any) -> Scale:
    """Return the factor that brings gradients scaled by a ``torch.amp.GradScaler`` to their true size.

    A tensor of its own on the scaler's device, which later changes of the scale do not reach. A number where the scaler
    has none yet, or hides it; only then may this wait for a device.
    """
    ask = getattr(scaler, "_get_scale_async", None)
    scale = None if ask is None else ask()
    return scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / float(scaler.get_scale())
