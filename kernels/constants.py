"""Small constant tensors cached on their device: creating them anew would synchronise at each call."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers known to the host as a vector on a device; cached, not to be written to.

    A copy from pageable host memory waits for the device's queue. Here it happens once for the same numbers, from
    pinned memory, which does not wait.

    Args:
        values: The numbers.
        device: Device of the result.
        dtype: Dtype of the result.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = tuple(values), device, dtype
    kept = _KEPT.get(key)
    if kept is not None:
        return kept
    with torch.inference_mode(False):
        made = to_device(torch.tensor(key[0], dtype=dtype, device="cpu"), device)
    if type(made) is Tensor:  # what a tracing mode makes must not outlive it
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = made
    return made


_KEPT: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}
_MOST = 512


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device, without waiting for a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
