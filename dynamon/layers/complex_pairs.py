"""Handle complex tensors as pairs of real numbers, as losses, norms and optimizers do."""

import torch
from torch import Tensor

COMPLEX = (torch.complex64, torch.complex128)  # torch supports hardly any operation in complex32


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor ``[...]`` as real numbers ``[..., 2]`` in the same memory; return a real one unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def from_real(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Give real numbers the shape of ``tensor``, complex if it is; the inverse of :func:`as_real` on a flat vector.

    Args:
        numbers: :func:`real_numel` numbers in any shape.
        tensor: The tensor that they belong to.
    """
    if not tensor.is_complex():
        return numbers.view_as(tensor)
    return torch.complex(*numbers.view(*tensor.shape, 2).unbind(-1))


def real_numel(tensor: Tensor) -> int:
    """Count the real numbers in a tensor: two for a complex entry."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def real_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of these numbers."""
    return tensor.dtype.to_real()
