"""Compute histograms of many tensors at once, with bins that suit weights: fine around zero, relative beyond."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.distributed.dtensor import holders
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.kernels import widest_dtype

_SHIFT = 20  # the first 3 of a float32's 23 mantissa bits select the bin: 8 bins per octave
_LEVELS = 128  # bins on each side of zero: 16 octaves below the largest magnitude
_BINS = 2 * _LEVELS + 1
_COPIES = 64  # of the bins on a GPU
_CHUNK = 2**22  # entries at a time, so that temporaries stay small compared to a large embedding
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Histogram:
    """The distribution of the finite entries of a tensor.

    Attributes:
        edges: ``[257 + 1]`` bin edges in float64; a bin includes its left edge.
        counts: ``[257]`` integers.
        minimum: Smallest entry; NaN if there is none.
        maximum: Largest entry; NaN if there is none.
        total: Sum of the entries.
        squares: Sum of their squares.
        nonfinite: Number of entries that are NaN or infinite, which are in no bin.
    """

    edges: NDArray[Any]
    counts: NDArray[Any]
    minimum: float
    maximum: float
    total: float
    squares: float
    nonfinite: int

    def __repr__(self) -> str:
        """Summarise the entries."""
        extent = f"minimum={self.minimum:.6g}, maximum={self.maximum:.6g}"
        return f"Histogram(count={self.count}, {extent}, nonfinite={self.nonfinite})"

    @property
    def count(self) -> int:
        """Number of entries in all bins."""
        return int(self.counts.sum())

    def buckets(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return right edges and counts of the informative bins: adjacent empty ones are merged, outer ones dropped."""
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return self.edges[:0], self.counts[:0]
        counts, limits = (a[filled[0] : filled[-1] + 1] for a in (self.counts, self.edges[1:]))
        kept = (counts > 0) | np.append(counts[1:] > 0, False)  # the last bin of a gap stays, as its right edge
        return limits[kept], counts[kept]


def histogram_table(tensors: Sequence[Tensor]) -> Tensor:
    """Bin tensors on their device; :func:`read_histograms` reads the table on the host.

    The bins of a tensor are symmetric around zero. On each side they are eighths of octaves, so 6 to 12 % wide, over
    the 16 octaves below the largest magnitude; one bin around zero holds smaller entries, including zeros. Edges are
    multiples of powers of two and so coincide from step to step. Bulk and tails are resolved alike at any scale, and
    neither an outlier nor many zeros spoil the rest.

    Args:
        tensors: T tensors of any floating dtype and shape on one device, binned as float32.

    Returns:
        ``[T, 264]`` in float64 (float32 on MPS).

    Cost: about fifteen passes over the tensors. No host synchronisation on a GPU.
    """
    return torch.stack([_row(tensor.detach().reshape(-1)) for tensor in tensors])


def reduce_tables(table: Tensor, likes: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Combine the tables of the shards that several processes hold into that of whole tensors, which stay as they are.

    Every process must call this, inside :meth:`dynamon.distributed.ranks.Ranks.collective_section`. Bins of a shard
    below those of the whole are added to the one around zero.

    Args:
        table: The result of :func:`histogram_table` for the local shards of T tensors ``[T, 264]``.
        likes: Tensors with the layout of those.
        ranks: The processes of the run.

    Returns:
        ``[T, 264]`` in float64, the same on every process.

    Cost: where tensors are sharded two reductions, of the extremes and of the counts.
    """
    ranks = holders(likes, ranks)
    if not ranks.is_distributed:
        return table
    counts, (base, low, high, *moments) = table[:, :_BINS].double(), table[:, _BINS:].double().unbind(1)
    known = moments[2] > 0
    base, low = torch.where(known, base, 0.0), torch.where(known, low, torch.inf)
    high = torch.where(known, high, -torch.inf)
    top = ranks.maximum(torch.stack([base, -low, high]))
    stats = PartialStats(sums=torch.cat([_rebased(counts, top[0] - base).T, torch.stack(moments)]))
    sums = ShardReduction(likes, ranks, sums=_BINS + len(moments)).reduce(stats).sums
    return torch.cat([sums[:_BINS], torch.stack([top[0], -top[1], top[2]]), sums[_BINS:]]).T


def _rebased(counts: Tensor, shift: Tensor) -> Tensor:
    """Widen the bin around zero by ``shift`` ``[T]`` levels on each side, in counts ``[T, 257]``."""
    level = torch.arange(_BINS, device=counts.device) - _LEVELS
    kept = level.sign() * (level.abs() - shift.long()[:, None]).clamp_min(0)
    return torch.zeros_like(counts).scatter_add_(1, kept + _LEVELS, counts)


def read_histograms(table: Tensor) -> list[Histogram]:
    """Read the T rows of a table from :func:`histogram_table`."""
    return [_read(row) for row in table.cpu().double().numpy()]


def _row(entries: Tensor) -> Tensor:
    wide = widest_dtype(entries.device)
    if not entries.numel():
        return torch.zeros(_BINS + 7, dtype=wide, device=entries.device)
    chunks = [chunk.float() for chunk in entries.split(_CHUNK)]
    parts = torch.stack([_moments(chunk, wide) for chunk in chunks])
    low, high = parts[:, 0].amin(), parts[:, 1].amax()
    peak = torch.maximum(low.abs(), high.abs()).float()
    base = ((peak.view(torch.int32) >> _SHIFT) - _LEVELS).clamp_min(0)
    counts = torch.stack([_counts(chunk, base) for chunk in chunks]).sum(0)
    return torch.cat([counts.to(wide), torch.stack([base.to(wide), low, high]), parts[:, 2:].sum(0)])


def _moments(x: Tensor, wide: torch.dtype) -> Tensor:
    """Return minimum, maximum, sum, sum of squares, and the numbers of finite and of other entries."""
    finite = torch.isfinite(x)
    clean = torch.where(finite, x, 0.0)
    low = torch.where(finite, x, torch.inf).amin()
    high = torch.where(finite, x, -torch.inf).amax()
    squares = torch.linalg.vector_norm(clean, dtype=wide).square()
    known = finite.sum()
    found = [low, high, clean.sum(dtype=wide), squares, known, x.numel() - known]
    return torch.stack([value.to(wide) for value in found])


def _counts(x: Tensor, base: Tensor) -> Tensor:
    """Count entries per bin. A float32's bits grow with its magnitude, so a shift finds the bin without rounding."""
    below = x < 0
    # One bit less on the negative side, so that there, too, the left edge belongs to the bin.
    level = (((x.abs().view(torch.int32) - below.int()) >> _SHIFT) - base).clamp_(0, _LEVELS)
    index = torch.where(below, _LEVELS - level, _LEVELS + level)
    index = torch.where(torch.isfinite(x), index, _BINS).long()  # one more bin for entries that are not finite
    if not x.is_cuda:
        return torch.bincount(index, minlength=_BINS + 1)[:_BINS]
    return _spread_counts(index)


def _spread_counts(index: Tensor) -> Tensor:
    """Count like :func:`torch.bincount`, which waits for a GPU; adjacent entries count in different copies of the bins.

    Weights fall into few bins, and additions to one address are serialised.
    """
    lane = torch.arange(len(index), device=index.device) % _COPIES
    counts = torch.zeros((_BINS + 1) * _COPIES, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index * _COPIES + lane, torch.ones_like(index))
    return counts.view(_BINS + 1, _COPIES).sum(1)[:_BINS]


def _read(row: NDArray[Any]) -> Histogram:
    counts, (base, low, high, total, squares, known, nonfinite) = row[:_BINS].astype(np.int64), row[_BINS:]
    bits = (int(base) + 1 + np.arange(_LEVELS + 1, dtype=np.int64)) << _SHIFT
    # The last edge may be infinity, or beyond for a table without a finite entry.
    positive = np.minimum(bits, 0x7F800000).astype(np.int32).view(np.float32).astype(np.float64)
    positive = np.minimum(positive, _FLOAT32_MAX)
    edges = np.concatenate([-positive[::-1], positive])
    low, high = (float(low), float(high)) if known else (float("nan"), float("nan"))
    return Histogram(edges, counts, low, high, float(total), float(squares), int(nonfinite))
