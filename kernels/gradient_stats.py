"""One pass over a list of gradients, and over their difference to the previous ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels.devices import reads_are_free
from dynamon.kernels.lengths import l2_norms

_SMALL = 2.0**-40  # from here downwards products of entries lose digits in float32

Lines = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class GradientStats:
    r"""Sums over each of T gradients :math:`g`, and over its difference :math:`d = g - g'` to the previous one.

    Fields have shape ``[T]``. Those over single rows and columns are tuples of T tensors, of shapes ``[..., m]`` and
    ``[..., n]`` for a gradient ``[..., m, n]``, with None in place of a gradient of fewer than two dimensions.

    Attributes:
        l1: :math:`\sum_i |g_i|`.
        sum_squares: :math:`\sum_i g_i^2`.
        max_abs: :math:`\max_i |g_i|`.
        nonfinite: Number of entries that are NaN or infinite.
        difference_l1: :math:`\sum_i |d_i|`, or None.
        difference_sum_squares: :math:`\sum_i d_i^2`, or None.
        difference_max_abs: :math:`\max_i |d_i|`, or None.
        difference_nonfinite: Number of entries of the difference that are NaN or infinite, because one of either
            gradient is or because they are too far apart; or None.
        inner: :math:`\langle g, g' \rangle`, or None.
        row_squares: :math:`\sum_j g_{ij}^2`, over the last dimension, or None.
        column_squares: :math:`\sum_i g_{ij}^2`, over the last dimension but one, or None.
        difference_row_squares: :math:`\sum_j d_{ij}^2`, or None.
        difference_column_squares: :math:`\sum_i d_{ij}^2`, or None.
    """

    l1: Tensor
    sum_squares: Tensor
    max_abs: Tensor
    nonfinite: Tensor
    difference_l1: Tensor | None = None
    difference_sum_squares: Tensor | None = None
    difference_max_abs: Tensor | None = None
    difference_nonfinite: Tensor | None = None
    inner: Tensor | None = None
    row_squares: Lines | None = None
    column_squares: Lines | None = None
    difference_row_squares: Lines | None = None
    difference_column_squares: Lines | None = None


def gradient_stats(
    gradients: Sequence[Tensor],
    previous: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    *,
    axes: bool = False,
) -> GradientStats:
    """Norms of every gradient and of its change, in one pass, refreshing the stored gradient.

    Args:
        gradients: T dense tensors on one device, in float64, float32, bfloat16 or float16; none may be empty.
        previous: Storage of the same shapes in any of these dtypes, or None. The difference is taken in float32
            (float64 where a gradient is float64), after which ``previous`` holds ``gradients``, rounded to its dtype.
        dtype: Of the sums. float32 by default (float64 where a gradient is float64), which cannot hold the squares of
            entries above 1.8e19 or below 1e-22; float64 holds those of any.
        axes: Whether to add the sums of squares of every row and column.

    Returns:
        A :class:`GradientStats` in ``dtype``, on the gradients' device. NaN and infinity reach the sums of their
        tensor, their row and their column.

    Raises:
        ValueError: If the two lists differ in length or shape, or a tensor is empty or not floating point.

    Cost: a few passes over the tensors, three more with ``axes``; one temporary of the size of the largest (of all of
    them where a dtype differs); on a GPU no host synchronisation. With ``dtype=torch.float64`` temporaries of a GPU are
    twice as large, and a CPU takes tensors again whose squares leave float32.
    """
    gradients = [g.detach() for g in gradients]
    stored = None if previous is None else [p.detach() for p in previous]
    check_lists(gradients, stored)
    work = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    dtype = work if dtype is None else dtype
    if not gradients:
        return no_stats(dtype, stored is not None, axes)
    own, lines = _sums(gradients, dtype), _lines(gradients, dtype, axes)
    if stored is None:
        return GradientStats(*own, row_squares=lines[0], column_squares=lines[1])
    current = [g.to(work) for g in gradients]
    change = [p.to(work) for p in stored]  # the storage itself where the dtypes agree: it is refilled below
    inner = _inner(current, change, own[2], dtype)
    torch._foreach_sub_(change, current)
    difference, difference_lines = _sums(change, dtype), _lines(change, dtype, axes)
    torch._foreach_copy_(stored, gradients)
    return GradientStats(*own, *difference, inner, *lines, *difference_lines)


def check_lists(gradients: list[Tensor], previous: list[Tensor] | None) -> None:
    """Raise where the two lists are not what the statistics are taken of."""
    if any(g.numel() == 0 for g in gradients):
        raise ValueError("gradient_stats cannot take an empty tensor; leave it out.")
    if previous is not None and [g.shape for g in gradients] != [p.shape for p in previous]:
        raise ValueError("gradients and previous must hold the same shapes in the same order.")
    for tensor in (*gradients, *(previous or ())):
        if not tensor.is_floating_point():
            raise ValueError(f"gradient_stats needs floating point tensors, got {tensor.dtype}.")


def no_stats(dtype: torch.dtype, compare: bool, axes: bool = False) -> GradientStats:
    """The statistics of an empty list."""
    nothing = torch.zeros(0, dtype=dtype)
    change, lines = (nothing if compare else None), (() if axes else None)
    return GradientStats(
        *(nothing, nothing, nothing, nothing),
        *(change, change, change, change, change),
        *(lines, lines),
        *((lines, lines) if compare else (None, None)),
    )


def _inner(current: list[Tensor], previous: list[Tensor], largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner products of pairs of tensors; ``largest`` are the largest magnitudes in ``current``."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(current, previous, strict=True)]
    if not reads_are_free(largest.device) and dtype == torch.float64:
        return torch.stack([torch.dot(a.to(dtype), b.to(dtype)) for a, b in pairs])
    found = torch.stack([torch.dot(a, b) for a, b in pairs]).to(dtype)
    if dtype == torch.float64:
        unsafe = ~torch.isfinite(found) & torch.isfinite(largest) | (largest > 0) & (largest < _SMALL)
        for i in torch.nonzero(unsafe).flatten().tolist():
            found[i] = torch.dot(pairs[i][0].double(), pairs[i][1].double())
    return found


def _sums(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The l1 norm, sum of squares, largest magnitude and non-finite count of every tensor, each stacked to ``[T]``."""
    extremes = [torch.stack(torch.aminmax(t)).abs().amax() for t in tensors]
    l1, largest = _l1(tensors, dtype), torch.stack(extremes).to(dtype)
    return l1, l2_norms(tensors).to(dtype).square(), largest, _nonfinite(tensors, l1)


def _l1(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    # On a CPU the norms of order one and infinity are several times slower than what they stand for.
    if not reads_are_free(tensors[0].device):
        return torch.stack(torch._foreach_norm(tensors, 1, dtype=dtype))
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found = torch.stack([t.abs().sum(dtype=work) for t in tensors]).to(dtype)
    if work != dtype:
        for i in torch.nonzero(found.isinf()).flatten().tolist():
            found[i] = tensors[i].abs().sum(dtype=dtype)
    return found


def _nonfinite(tensors: list[Tensor], l1: Tensor) -> Tensor:
    """How many entries of each tensor are NaN or infinite."""
    # A finite l1 norm has no such entry; on a CPU, where asking costs nothing, that saves a pass.
    if reads_are_free(l1.device) and bool(torch.isfinite(l1).all()):
        return torch.zeros_like(l1)
    return torch.stack([t.numel() - torch.isfinite(t).sum() for t in tensors]).to(l1.dtype)


def _lines(tensors: list[Tensor], dtype: torch.dtype, axes: bool) -> tuple[Lines | None, Lines | None]:
    """The sums of squares of every row, and of every column."""
    if not axes:
        return None, None
    squares = (t.to(dtype).square() if t.ndim >= 2 else None for t in tensors)  # one tensor's at a time
    pairs = [(None, None) if s is None else (s.sum(-1), s.sum(-2)) for s in squares]
    rows, columns = zip(*pairs, strict=True)
    return rows, columns
