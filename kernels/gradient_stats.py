"""One pass over a list of gradients, and over their difference to the previous ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientStats:
    r"""Per-tensor sums of a list of T gradients; every field has shape ``[T]``.

    Attributes:
        l1: :math:`\sum_i |g_i|`.
        sum_squares: :math:`\sum_i g_i^2`.
        max_abs: :math:`\max_i |g_i|`.
        nonfinite: Number of entries that are NaN or infinite.
        difference_l1: :math:`\sum_i |g_i - g'_i|` with :math:`g'` the previous gradient, or None.
        difference_sum_squares: :math:`\sum_i (g_i - g'_i)^2`, or None.
        difference_max_abs: :math:`\max_i |g_i - g'_i|`, or None.
        inner: :math:`\langle g, g' \rangle`, or None.
    """

    l1: Tensor
    sum_squares: Tensor
    max_abs: Tensor
    nonfinite: Tensor
    difference_l1: Tensor | None = None
    difference_sum_squares: Tensor | None = None
    difference_max_abs: Tensor | None = None
    inner: Tensor | None = None


def gradient_stats(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None = None) -> GradientStats:
    """Norms of every gradient and of its change, in one pass, refreshing the stored gradient.

    Args:
        gradients: T dense tensors on one device, any floating dtype; none may be empty.
        previous: Storage of the same shapes (any floating dtype), or None. The difference is taken in
            float32 (float64 for float64 gradients), after which ``previous`` holds ``gradients``.

    Returns:
        A :class:`GradientStats` in float32 (float64 where a gradient is float64), on the gradients' device.

    Raises:
        ValueError: If the two lists differ in length or shape, or a tensor is empty.

    Cost: a few passes over the tensors, one temporary of the size of the largest (of all of them where a dtype
    differs from the result's); on a GPU no host synchronisation.
    """
    gradients = list(gradients)
    if any(g.numel() == 0 for g in gradients):
        raise ValueError("gradient_stats cannot take an empty tensor; leave it out.")
    if previous is not None and [g.shape for g in gradients] != [p.shape for p in previous]:
        raise ValueError("gradients and previous must hold the same shapes in the same order.")
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    if not gradients:
        nothing = torch.zeros(0, dtype=dtype)
        return GradientStats(nothing, nothing, nothing, nothing, *(4 * [nothing if previous is not None else None]))
    gradients = [g.detach() for g in gradients]
    l1, squares, largest = _norms(gradients, dtype)
    own = (l1, squares, largest, _nonfinite(gradients, l1))
    if previous is None:
        return GradientStats(*own)
    current = [g.to(dtype) for g in gradients]
    change = [p.to(dtype) for p in previous]  # the storage itself where the dtypes agree: it is refilled below
    inner = torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(current, change, strict=True)])
    torch._foreach_sub_(change, current)
    difference = _norms(change, dtype)
    torch._foreach_copy_(list(previous), gradients)
    return GradientStats(*own, *difference, inner)


def _nonfinite(tensors: list[Tensor], l1: Tensor) -> Tensor:
    """How many entries of each tensor are NaN or infinite."""
    # A finite l1 norm has no such entry; on a CPU, where asking costs nothing, that saves a pass.
    if not l1.is_cuda and bool(torch.isfinite(l1).all()):
        return torch.zeros_like(l1)
    return torch.stack([t.numel() - torch.isfinite(t).sum() for t in tensors]).to(l1.dtype)


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The l1 norm, sum of squares and largest magnitude of every tensor, each stacked to ``[T]``."""
    l2 = torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))
    # On a CPU the norms of order one and infinity are several times slower than what they stand for.
    if l2.is_cuda:
        l1 = torch.stack(torch._foreach_norm(tensors, 1, dtype=dtype))
    else:
        l1 = torch.stack([t.abs().sum(dtype=dtype) for t in tensors])
    extremes = [torch.stack(torch.aminmax(t)).abs().amax() for t in tensors]
    return l1, l2.square(), torch.stack(extremes).to(dtype)
