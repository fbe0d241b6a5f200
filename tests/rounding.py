"""Tensor cores played on a CPU: products of float32 whose entries keep ten bits of mantissa."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution", "convolution_backward"}


class TensorFloat32(TorchDispatchMode):
    """While it is on, what products and convolutions of float32 multiply is rounded to TensorFloat-32.

    Args:
        truncates: Whether the bits are cut off, as tensor cores may do, instead of rounded to nearest.
    """

    def __init__(self, truncates: bool) -> None:
        """Off yet."""
        super().__init__()
        self.truncates = truncates

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round, and compute."""
        if func.overloadpacket.__name__ in _PRODUCTS:
            args = tree_map(lambda x: self.rounded(x) if isinstance(x, Tensor) else x, args)
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor) -> Tensor:
        """Entries with ten bits of mantissa."""
        if x.dtype == torch.complex64:
            return torch.view_as_complex(self.rounded(torch.view_as_real(x.resolve_conj())).contiguous())
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        bits = bits if self.truncates else bits + (1 << 12)
        return torch.where(x.isfinite(), (bits & ~((1 << 13) - 1)).view(torch.float32), x)
