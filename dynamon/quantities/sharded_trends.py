"""Whether gradients that several processes hold in parts change by noise, or because the weights move."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dynamon.distributed.dtensor import shard_like, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.quantities.trends import ENTRIES, Trends, stride


class ShardedTrends(Trends):
    """Compare the entries that :class:`dynamon.quantities.trends.Trends` compares, each where it is held.

    What it is given are parts, and what it gives are sums over those entries that are here; of all processes together
    they are those of one.

    Args:
        likes: L tensors, real and laid out as the gradients.
        ranks: The processes.

    Memory: 64 numbers a gradient; where the first ones are looked at, once a byte an entry of the largest.
    """

    def __init__(self, likes: Sequence[Tensor], ranks: Ranks) -> None:
        """No change read."""
        super().__init__(len(likes), to_local(likes[0].detach()).device)
        self._likes, self._ranks = list(likes), ranks

    @cached_property
    def _here(self) -> tuple[list[slice | Tensor], Tensor]:
        """What is looked at of each part, and the places of all of it in the table ``[L, 64]``."""
        places: list[slice | Tensor] = []
        columns = []
        for row, like in enumerate(self._likes):
            marks = torch.zeros(like.shape, dtype=torch.int8, device=self._device)
            looked_at = marks.view(-1)[:: stride(like.numel())][:ENTRIES]
            looked_at.copy_(torch.arange(1, len(looked_at) + 1, dtype=torch.int8))
            part = shard_like(marks, like).reshape(-1)
            found = part.nonzero()[:, 0]
            places.append(_slice(found.tolist()) or found)
            columns.append(part[found].long() - 1 + row * ENTRIES)
        return places, torch.cat(columns)

    @cached_property
    def _held(self) -> Tensor:
        """1 for each entry that is here, ``[L, 64]``."""
        held = torch.zeros(self._count * ENTRIES, device=self._device)
        return held.index_fill(0, self._here[1], 1.0).view(-1, ENTRIES)

    def _entries(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        places, columns = self._here
        flat = torch.cat([tensor.reshape(-1)[place].float() for place, tensor in zip(places, tensors, strict=True)])
        return flat.new_zeros(self._count * ENTRIES).index_copy(0, columns, flat).view(-1, ENTRIES)

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of whole gradients. Every process must call this. Cost: an all-reduce of 128 L numbers."""
        if self._changes is None or self._squares is None:
            return {}
        changes, held = self._changes, self._held
        both = self._ranks.sum_or_nan(lambda: torch.stack([changes, held]), 2 * held.numel())
        entries, holders = both.view(2, *held.shape)
        rows = torch.cat([entries / holders.clamp_min(1.0), self._squares[:, None]], 1).to(changes)
        return {name: row.clone() for name, row in zip(names, rows, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Take up what is here of it; layers that are not there any more are left out."""
        super().load_state_dict(state, names)
        if self._changes is not None:
            self._changes = self._changes * self._held


def _slice(places: Sequence[int]) -> slice | None:
    """The same as a slice, which takes no call of the device; None where the places are not evenly apart."""
    steps = {after - before for before, after in zip(places, places[1:], strict=False)} or {1}
    return slice(places[0], places[-1] + 1, steps.pop()) if places and len(steps) == 1 else None
