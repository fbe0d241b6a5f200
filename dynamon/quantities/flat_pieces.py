"""Walk through the entries of many tensors in few device calls, however many tensors there are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device, to_device
from dynamon.kernels.devices import reads_are_free

_LEAST, _MOST = 2**16, 2**25  # entries of a chunk on a device
_LEAST_ON_CPU, _MOST_ON_CPU = 2**12, 2**17  # there, what fits into its cache
_ALONE_ON_CPU = 2**14  # entries there from which a tensor shares no chunk, so that its numbers need not be repeated


@dataclass(frozen=True)
class Chunk:
    """Some entries of some tensors, one after another.

    Attributes:
        pieces: For each piece the position of its tensor, its first entry and the one after its last.
        device: Where the tensors are.
    """

    pieces: Sequence[tuple[int, int, int]]
    device: torch.device

    def flat(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the entries of T tensors that are in this chunk, ``[C]``."""
        parts = [tensors[i].detach().reshape(-1)[start:stop] for i, start, stop in self.pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    def spread(self, numbers: Tensor) -> Tensor:
        """Return the number of its tensor for each entry: from ``[K, T]`` to ``[K, C]``, or ``[K, 1]`` for one.

        Numbers ``[K, 1]`` are those of all tensors.
        """
        if numbers.shape[1] == 1:
            return numbers
        if len(self.pieces) == 1:
            return numbers[:, self.pieces[0][0], None]
        own = numbers.index_select(1, on_device([i for i, *_ in self.pieces], self.device, torch.int64))
        lengths = to_device(torch.tensor(self._lengths, device="cpu"), self.device)
        return own.repeat_interleave(lengths, dim=1, output_size=sum(self._lengths))

    def totals(self, rows: Sequence[Tensor]) -> Tensor:
        """Sum rows ``[C]``, bools or numbers that are not negative, over each piece, ``[K, P]`` in the widest dtype."""
        if reads_are_free(self.device):  # conversion of bools takes longer there than all the rest
            return torch.tensor([_sums(row, self._lengths) for row in rows], dtype=widest_dtype(self.device))
        views = [view for row in rows for view in row.to(_least_float(row)).split(self._lengths)]
        wide = widest_dtype(self.device)
        return torch.stack(torch._foreach_norm(views, 1, dtype=wide)).view(len(rows), len(self.pieces))

    @property
    def _lengths(self) -> list[int]:
        return [stop - start for _, start, stop in self.pieces]


def sum_over_entries(tensors: Sequence[Tensor], rows: int, measure: Callable[[Chunk], Sequence[Tensor]]) -> Tensor:
    """Sum functions of the entries over each of some tensors.

    Args:
        tensors: T tensors on one device, whose shapes count.
        rows: K, the number of sums.
        measure: From a chunk of C entries to K rows ``[C]`` of bools, or of floats that are not negative.

    Returns:
        ``[K, T]`` in the widest dtype of the device.

    Cost: what ``measure`` calls, and K + 8 calls, for each chunk. A chunk is a quarter of all entries, 2^25 at most, so
    that the number of calls does not depend on the number of tensors. Memory: what ``measure`` needs for a chunk.
    """
    device = tensors[0].device
    total = torch.zeros(rows, len(tensors), dtype=widest_dtype(device), device=device)
    for chunk in _chunks(tensors):
        found = chunk.totals(measure(chunk))
        total.index_add_(1, on_device([i for i, *_ in chunk.pieces], device, torch.int64), found)
    return total


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Chunk]:
    device, sizes = tensors[0].device, [tensor.numel() for tensor in tensors]
    on_cpu = reads_are_free(device)
    least, most = (_LEAST_ON_CPU, _MOST_ON_CPU) if on_cpu else (_LEAST, _MOST)
    most = min(max(sum(sizes) // 4, least), most)
    alone = [i for i, size in enumerate(sizes) if on_cpu and size >= _ALONE_ON_CPU]
    for i in alone:
        yield from (Chunk([(i, start, min(start + most, sizes[i]))], device) for start in range(0, sizes[i], most))
    room, pieces = most, list[tuple[int, int, int]]()
    for i in sorted(set(range(len(sizes))) - set(alone)):
        start = 0
        while start < sizes[i]:
            stop = min(sizes[i], start + room)
            pieces.append((i, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield Chunk(pieces, device)
                room, pieces = most, []
    if pieces:
        yield Chunk(pieces, device)


def is_equal(one: Tensor, other: Tensor | float) -> Tensor:
    """Compare entries of float32 or float64; on a CPU by numpy, which takes a tenth of torch's time."""
    if reads_are_free(one.device):
        return torch.from_numpy(np.asarray(one.numpy() == _on_host(other)))
    return one == other


def is_below(one: Tensor, bound: Tensor | float) -> Tensor:
    """Return where entries of float32 or float64 are not above a bound; on a CPU by numpy, as :func:`is_equal`."""
    if reads_are_free(one.device):
        return torch.from_numpy(np.asarray(one.numpy() <= _on_host(bound)))
    return one <= bound


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each of T tensors with entries, ``[T]`` in the widest dtype; NaN propagates."""
    wide = widest_dtype(tensors[0].device)
    if reads_are_free(tensors[0].device):  # a norm takes ten times as long there
        ends = [torch.stack(torch.aminmax(tensor)).to(wide) for tensor in tensors]
        return torch.stack(ends).abs().amax(1)
    return torch.stack(torch._foreach_norm(list(tensors), torch.inf, dtype=wide))


def _on_host(other: Tensor | float) -> Any:
    return other.numpy() if isinstance(other, Tensor) else other


def _sums(row: Tensor, lengths: Sequence[int]) -> list[float]:
    """Sum each piece of a row on a CPU."""
    if row.dtype == torch.bool:
        return [float(np.count_nonzero(view.numpy())) for view in row.split(lengths)]
    return [float(view.sum()) for view in row.split(lengths)]


def _least_float(row: Tensor) -> torch.dtype:
    return torch.float32 if row.dtype == torch.bool else row.dtype


def table_of(rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy K rows of T numbers to a device without waiting for it, ``[K, T]``."""
    return to_device(torch.tensor(rows, dtype=dtype, device="cpu"), device)
