"""Factors on gradients that a gradient scaler has multiplied, without asking the device for them."""

from typing import Any

from torch import Tensor

Scale = float | Tensor  # a tensor of no dimensions, on the gradients' device


def scaled(tensor: Tensor, scale: Scale) -> Tensor:
    """The tensor times a factor; itself where that is the number 1."""
    return tensor if not isinstance(scale, Tensor) and scale == 1.0 else tensor * scale


def inverse_scale(scaler: Any) -> Scale:
    """What brings gradients that a ``torch.amp.GradScaler`` has scaled to their true size.

    A tensor of its own on the scaler's device, which later changes of the scale do not reach. A number where the scaler
    has none yet, or hides it; only then may this wait for a device.
    """
    ask = getattr(scaler, "_get_scale_async", None)
    scale = None if ask is None else ask()
    return scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / float(scaler.get_scale())
