"""Walk through the entries of many tensors in few device calls, however many tensors there are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device, to_device
from dynamon.kernels.devices import reads_are_free

_LEAST, _MOST = 2**16, 2**25  # entries of a chunk on a device
_LEAST_ON_CPU, _MOST_ON_CPU = 2**12, 2**17  # there, what fits into its cache


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
        parts = [tensors[i].reshape(-1)[start:stop] for i, start, stop in self.pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    def spread(self, numbers: Tensor) -> Tensor:
        """Return the number of its tensor for each entry: from ``[K, T]`` to ``[K, C]``, or ``[K, 1]`` for one."""
        if len(self.pieces) == 1:
            return numbers[:, self.pieces[0][0], None]
        own = numbers.index_select(1, on_device([i for i, *_ in self.pieces], self.device, torch.int64))
        lengths = to_device(torch.tensor(self._lengths, device="cpu"), self.device)
        return own.repeat_interleave(lengths, dim=1, output_size=sum(self._lengths))

    def totals(self, rows: Sequence[Tensor]) -> Tensor:
        """Sum rows ``[C]`` without negative entries over each piece, ``[K, P]`` in the widest dtype."""
        views = [view for row in rows for view in row.split(self._lengths)]
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
        measure: From a chunk of C entries to K rows ``[C]`` of floats that are not negative.

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
    least, most = (_LEAST_ON_CPU, _MOST_ON_CPU) if reads_are_free(device) else (_LEAST, _MOST)
    room = most = min(max(sum(sizes) // 4, least), most)
    pieces: list[tuple[int, int, int]] = []
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append((i, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield Chunk(pieces, device)
                room, pieces = most, []
    if pieces:
        yield Chunk(pieces, device)


def table_of(rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy K rows of T numbers to a device without waiting for it, ``[K, T]``."""
    return to_device(torch.tensor(rows, dtype=dtype, device="cpu"), device)
