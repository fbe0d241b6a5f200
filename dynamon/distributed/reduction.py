"""The reduction that turns statistics of the shards on each process into statistics of the tensors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widest_dtype

_NONE = torch.empty(0, device="cpu")


class PartialStats(NamedTuple):
    """Statistics of L tensors: of the shards here before the reduction, of the whole tensors after it.

    A process alone holds the whole tensors, so that its statistics are what the reduction would return.

    Attributes:
        sums: Sums over entries, ``[S, L]``.
        lengths: Euclidean norms, ``[N, L]``.
        maxima: Maxima over entries, none negative, ``[M, L]``.
        known: Whether something is known here; after the reduction, whether it is on all processes. ``[K, L]``, bool.
        owned: Numbers ``[D]`` that were measured on one process and are zero on the others.
    """

    sums: Tensor = _NONE
    lengths: Tensor = _NONE
    maxima: Tensor = _NONE
    known: Tensor = _NONE
    owned: Tensor = _NONE


class ShardReduction:
    """Reduces the statistics of L tensors over the processes that hold shards of them, in one message.

    Replicated entries are counted once: the number of local entries is reduced with the sums, and its ratio to the
    tensor's size is the replication factor that sums are divided by. Each process sends its maxima in a place of its
    own, so that one sum serves all statistics.

    Args:
        likes: L tensors with the layout of those that are measured, such as the parameters.
        ranks: The processes. One alone sends nothing, and its statistics stay as they are.
        sums: S, the number of rows of sums.
        lengths: N, that of Euclidean norms.
        maxima: M, that of maxima.
        known: K, that of flags.
        owned: D, the number of numbers that one process measures.

    Cost: one all-reduce of ``(S + N + R M + K + 1) L + D`` numbers for R processes.
    """

    def __init__(
        self,
        likes: Sequence[Tensor],
        ranks: Ranks,
        *,
        sums: int = 0,
        lengths: int = 0,
        maxima: int = 0,
        known: int = 0,
        owned: int = 0,
    ) -> None:
        """Count the local entries."""
        self._ranks = ranks
        if not ranks.is_distributed:
            return
        parts = [to_local(like) for like in likes]
        device, wide = parts[0].device, widest_dtype(parts[0].device)
        self._held = torch.tensor([float(part.numel()) for part in parts], dtype=wide, device=device)
        self._sizes = torch.tensor([float(like.numel()) for like in likes], dtype=wide, device=device)
        self._rows, self._maxima, self._owned = (sums, lengths, known), maxima, owned

    def reduce(self, stats: PartialStats) -> PartialStats:
        """Reduce the statistics of all processes; inside :meth:`dynamon.distributed.ranks.Ranks.collective_section`."""
        return self._unpacked(self._ranks.sum(self._packed(stats))) if self._ranks.is_distributed else stats

    def reduce_or_nan(self, measure: Callable[[], PartialStats]) -> PartialStats:
        """Reduce them without a host read, inside a section or outside: NaN where another process failed.

        Args:
            measure: Returns the statistics of the shards here; what it raises is raised when the others have been told.
        """
        if not self._ranks.is_distributed:
            return measure()
        rows = 1 + sum(self._rows) + self._ranks.size * self._maxima
        count = rows * len(self._sizes) + self._owned
        return self._unpacked(self._ranks.sum_or_nan(lambda: self._packed(measure()), count))

    def _packed(self, stats: PartialStats) -> Tensor:
        places = self._held.new_zeros(self._ranks.size, *stats.maxima.shape)
        places[self._ranks.rank] = stats.maxima
        sent = (self._held, stats.sums, stats.lengths.to(self._held).square(), stats.known, places, stats.owned)
        return torch.cat([part.to(self._held).reshape(-1) for part in sent])

    def _unpacked(self, packed: Tensor) -> PartialStats:
        table, owned = packed.tensor_split([len(packed) - self._owned])
        rows = [1, *self._rows, self._ranks.size * self._maxima]
        held, sums, squares, known, places = table.view(sum(rows), len(self._sizes)).split(rows)
        copies = held / self._sizes
        largest = places.view(self._ranks.size, self._maxima, len(self._sizes)).amax(0)
        return PartialStats(sums / copies, (squares / copies).sqrt(), largest, known == self._ranks.size, owned)
