"""Euclidean norms over the whole range of a dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.kernels.devices import reads_are_free, widest_dtype

# A root mean square above the one, a norm below the other: float32 is enough.
L2_SAFE = _SMALL, _LARGE = 2.0**-48, 2.0**60


def l2_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of each tensor, also where squares of its entries overflow or vanish.

    In float32 squares overflow for entries above 1.8e19 and lose digits for entries below 1e-19.

    Args:
        tensors: T real floating point tensors on one device, empty ones included.

    Returns:
        ``[T]`` in float64 (float32 on devices without it), computed in float32 where that is enough. NaN and infinity
        propagate.

    Cost: one pass. On a CPU tensors out of float32's range take a second one in float64; on a GPU sums are float64 from
    the start, so that nothing waits for the device.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import l2_norms
        >>> l2_norms([torch.tensor([3.0, 4.0]), torch.tensor([3e30, 4e30])])
        tensor([5.0000e+00, 5.0000e+30], dtype=torch.float64)
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    wide = widest_dtype(tensors[0].device)
    if not reads_are_free(tensors[0].device) or torch.float64 in [t.dtype for t in tensors]:
        return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide))
    found = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).to(wide)
    sizes = torch.tensor([float(max(t.numel(), 1)) for t in tensors], dtype=wide, device="cpu")
    safe = (found > _SMALL * sizes.sqrt()) & (found < _LARGE)
    for i in torch.nonzero(~safe).flatten().tolist():  # zeros and NaN too
        found[i] = torch.linalg.vector_norm(tensors[i], dtype=wide)
    return found


def l2_on_host(tensor: Tensor, least: torch.dtype = torch.float32) -> float:
    """Compute the norm of one tensor on a CPU as a float: in ``least``, in float64 where that is not enough."""
    found = torch.linalg.vector_norm(tensor, dtype=least).item()
    if least == torch.float64 or _SMALL * max(tensor.numel(), 1) ** 0.5 < found < _LARGE:
        return float(found)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).item())  # zeros and NaN too


def l2_along(tensor: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """Compute norms along some dimensions of one tensor, or all: in float32, or float64 for float64.

    Args:
        tensor: A real floating point tensor.
        dim: Dimensions to sum over; None for all.

    Returns:
        Norms without these dimensions. Differentiable.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import l2_along
        >>> l2_along(torch.tensor([[3.0, 4.0], [6e30, 8e30]]), dim=1)
        tensor([5.0000e+00, 1.0000e+31])
    """
    wide = widest_dtype(tensor.device)
    if dim is None and not reads_are_free(tensor.device) and not tensor.requires_grad:  # without a copy in float64
        return l2_norms([tensor])[0].to(torch.promote_types(tensor.dtype, torch.float32))
    narrow = torch.promote_types(tensor.dtype, torch.float32)
    if narrow == wide or tensor.numel() == 0:
        return torch.linalg.vector_norm(tensor, dim=dim, dtype=narrow)
    if reads_are_free(tensor.device):
        found = torch.linalg.vector_norm(tensor, dim=dim, dtype=narrow)
        size = tensor.numel() / max(found.numel(), 1)
        if bool(((found.detach() > _SMALL * size**0.5) & (found.detach() < _LARGE)).all()):
            return found
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=wide).to(narrow)
