"""What several processes find in their parts of some tensors, brought together by one reduction."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widest_dtype


class PartialStats(NamedTuple):
    """Readings of L tensors, in float64; of the parts on one process before the reduction, of the wholes after it.

    Attributes:
        sums: Sums over entries, ``[S, L]``.
        maxima: Largest ones over entries, none negative, ``[M, L]``.
        owned: What one process has of a tensor and the others have zeros for, ``[D, L]``.
    """

    sums: Tensor
    maxima: Tensor
    owned: Tensor


class ShardReduction:
    """The reduction for L tensors of which each process holds a part.

    An entry that several processes hold counts once, in whatever way it is laid out: the number of entries that all of
    them hold is reduced along with the sums, and what it has above the size of the tensor is how often each is held.
    A maximum is found by every process in a place of its own, so that one sum brings everything together.

    Args:
        likes: L tensors with the layout of those that are measured, the parameters say.
        ranks: The processes.
        sums: S, the number of rows of sums.
        maxima: M, that of rows of maxima.
        owned: D, that of rows that are dealt out.

    Cost: one all-reduce of ``(S + R M + D + 1) L`` numbers for R processes.
    """

    def __init__(self, likes: Sequence[Tensor], ranks: Ranks, sums: int, maxima: int = 0, owned: int = 0) -> None:
        """Count what is held here."""
        parts = [to_local(like.detach()) for like in likes]
        self.device = parts[0].device
        self._wide = widest_dtype(self.device)
        self._held = torch.tensor([float(part.numel()) for part in parts], dtype=self._wide, device=self.device)
        sizes = [float(like.numel()) for like in likes]
        self._sizes = torch.tensor(sizes, dtype=self._wide, device=self.device)
        self._ranks, self._shape = ranks, (sums, maxima, owned)

    def empty(self) -> PartialStats:
        """Zeros, to be filled with what is found here."""
        shape = [(rows, len(self._sizes)) for rows in self._shape]
        return PartialStats(*(torch.zeros(each, dtype=self._wide, device=self.device) for each in shape))

    def reduce(self, found: PartialStats) -> PartialStats:
        """Sum what all processes have found; inside of :meth:`dynamon.distributed.ranks.Ranks.collective_section`."""
        return self._unpacked(self._ranks.sum(self._packed(found)))

    def reduce_or_nan(self, find: Callable[[], PartialStats]) -> PartialStats:
        """The same anywhere and without a host read; NaN where another process failed to find anything.

        Args:
            find: Finds what is here; what it raises is raised when the others have been told.
        """
        return self._unpacked(self._ranks.sum_or_nan(lambda: self._packed(find()), self._length))

    @property
    def _length(self) -> int:
        sums, maxima, owned = self._shape
        return (sums + self._ranks.size * maxima + owned + 1) * len(self._sizes)

    def _packed(self, found: PartialStats) -> Tensor:
        places = torch.zeros(self._ranks.size, *found.maxima.shape, dtype=self._wide, device=self.device)
        places[self._ranks.rank] = found.maxima
        return torch.cat([part.reshape(-1) for part in (self._held, found.sums, found.owned, places)])

    def _unpacked(self, packed: Tensor) -> PartialStats:
        sums, maxima, owned = self._shape
        table = packed.view(-1, len(self._sizes))
        held, sums_of, dealt_of, places = table.split([1, sums, owned, self._ranks.size * maxima])
        largest = places.view(self._ranks.size, maxima, len(self._sizes)).amax(0)
        return PartialStats(sums_of / (held / self._sizes), largest, dealt_of)
