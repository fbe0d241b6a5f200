"""Abilities of devices: some have no float64, and most have no eigenvalue solvers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DECOMPOSE = ("cpu", "cuda")  # kinds of devices with LAPACK, or what stands for it
_TIMED = ("cpu", "meta", "cuda")  # kinds that queue nothing, or have events that tell times


def reads_are_free(device: torch.device) -> bool:
    """Return whether reading a number needs no wait, so that asking is cheaper than a second pass: on a CPU."""
    return device.type == "cpu"


def waiter(device: torch.device) -> Callable[[], Any] | None:
    """Return a function that waits for a device's queue; None without one, and for CUDA, whose events are cheaper."""
    if device.type in _TIMED:
        return None
    return getattr(getattr(torch, device.type, None), "synchronize", None)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for devices without float64: Apple's, Gaudi's, and some GPUs of Intel's.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import widest_dtype
        >>> widest_dtype(torch.device("cpu")), widest_dtype(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_capability(device).get("has_fp64", True) else torch.float32
    return torch.float32 if device.type in ("mps", "hpu") else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Convert a tensor to the widest dtype of its device.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import widened
        >>> widened(torch.ones(1)).dtype
        torch.float64
    """
    return tensor.to(widest_dtype(tensor.device))


def in_double(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64: on its device where that has it, else on the host.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import in_double
        >>> in_double(torch.ones(1, dtype=torch.bfloat16))
        tensor([1.], dtype=torch.float64)
    """
    return (tensor if widest_dtype(tensor.device) == torch.float64 else tensor.cpu()).double()


def decomposable(tensor: Tensor) -> Tensor:
    """Move a tensor to where decompositions exist: it stays on a CPU or CUDA, else it goes to the host.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import decomposable
        >>> torch.linalg.eigvalsh(decomposable(torch.eye(2)))
        tensor([1., 1.])
    """
    return tensor if tensor.device.type in _DECOMPOSE else tensor.cpu()
