"""Small constant tensors that stay on their device: making them anew would wait for it at each call."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A vector of numbers known to the host, on a device; the same tensor for the same numbers, not to be written.

    A copy from ordinary host memory waits for everything the device has been given to do. It happens once for the same
    numbers, and from pinned memory does not wait.

    Args:
        values: The numbers.
        device: Where to.
        dtype: Of the result.
    """
    if torch._C._len_torch_dispatch_stack():  # what a mode makes may be no plain tensor, and must not outlive it
        return _made(tuple(values), device, dtype)
    return _kept(tuple(values), device, dtype)


@lru_cache(maxsize=256)
def _kept(values: tuple[Hashable, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return _made(values, device, dtype)


def _made(values: tuple[Hashable, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return moved(torch.tensor(values, dtype=dtype, device="cpu"), device)


def moved(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
