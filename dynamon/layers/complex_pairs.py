"""Complex tensors as pairs of real numbers, which is how losses, norms and optimizers count them."""

import torch
from torch import Tensor

COMPLEX = (torch.complex64, torch.complex128)  # torch calculates with hardly anything in half of the former


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor ``[...]`` as real numbers ``[..., 2]``, in the same memory; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def from_real(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Real numbers in the shape of ``tensor``, complex where it is; the inverse of :func:`as_real`, of a flat piece.

    Args:
        numbers: :func:`real_numel` numbers in any shape.
        tensor: What they belong to.
    """
    if not tensor.is_complex():
        return numbers.view_as(tensor)
    return torch.complex(*numbers.view(*tensor.shape, 2).unbind(-1))


def real_numel(tensor: Tensor) -> int:
    """How many real numbers a tensor holds: two for a complex entry."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of these numbers."""
    return tensor.dtype.to_real()
