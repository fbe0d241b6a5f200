"""Shared parts of the Triton twins: imports without Triton, and errors where they cannot run."""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the modules still import, and calling them says what is missing
    triton = tl = None

__all__ = ["can_run", "interpreted", "jit", "require", "tl", "triton"]


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Apply ``triton.jit`` with its options, or return the plain function where Triton is not installed."""
    if triton is None:
        return (lambda plain: plain) if function is None else function
    return triton.jit(function, **options)


def interpreted() -> bool:
    """Return whether Triton runs kernels in Python, as with ``TRITON_INTERPRET=1``."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def can_run(device: torch.device) -> bool:
    """Return whether the kernels run on this device: a GPU, or a CPU where they are interpreted."""
    return triton is not None and (device.type == "cuda" or interpreted())


def require(device: torch.device, name: str) -> None:
    """Raise an error where the kernels cannot run on this device."""
    if triton is None:
        raise ImportError(f"{name} needs Triton, which is not installed: pip install triton.")
    if not can_run(device):
        raise ValueError(f"{name} needs tensors on a GPU, got {device}; TRITON_INTERPRET=1 runs it on a CPU, slowly.")
