"""Whether gradients change by noise, or because the weights move."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import holders, is_sharded, shard_like, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.quantities.scales import Scale, scaled

ENTRIES = 64  # of each gradient that are sampled, at equal distances


class Trends:
    r"""Compares the change of each gradient with the change at the reading before.

    With :math:`d_k` the change at reading k, on a sample of the entries, :math:`c = \cos(d_k, d_{k-1})`. Noise that is
    new in each gradient gives -1/2 where readings are of successive steps, and 0 where they are further apart. A
    gradient that changes because the weights move continues (1) or oscillates (-1). Where a reading had nothing to
    compare, the change before it is kept.

    Sharded gradients are sampled on the processes that hold the entries.

    Args:
        likes: L tensors, real and laid out as the gradients.
        ranks: The processes of the run; all where None. Tensors that are whole need none.

    Memory: 128 numbers per gradient, 192 where it is sharded; at the first reading of sharded gradients one byte per
    entry of the largest. Cost: some ten small operations on ``[L, 64]``.
    """

    def __init__(self, likes: Sequence[Tensor], ranks: Ranks | None = None) -> None:
        """Begin without a change."""
        self._ranks = holders(likes, ranks)
        self._device = to_local(likes[0]).device
        self._sampled = [_Sampled(like) for like in likes]
        self._changes: Tensor | None = None  # [L, 64]
        self._squares: Tensor | None = None  # [L], of whole changes; zero where none is known
        self._now: Tensor | None = None
        self._places: tuple[tuple[int, ...], Tensor | None] = ((), None)
        self._columns: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0))
        self._padding = torch.zeros(ENTRIES, device=self._device)
        self._seen: tuple[tuple[int, ...], Tensor] | None = None  # entries of the gradients of the last call

    def products(
        self,
        indices: Sequence[int],
        current: Sequence[Tensor],
        previous: Sequence[Tensor] | None,
        scale: Scale = 1.0,
    ) -> Tensor:
        """Sum :math:`d_k^2` and :math:`d_k d_{k-1}` over the entries here, ``[2, P]``, and keep :math:`d_k`.

        Args:
            indices: Which P gradients these are, in their order.
            current: They, or their shards here.
            previous: Those of the step before; None where those are what the last call was given as ``current``, of the
                same indices (:meth:`has_seen`).
            scale: Factor on the current ones.
        """
        if tuple(indices) != self._places[0]:
            all_there = len(indices) == len(self._sampled)
            rows = None if all_there else torch.tensor(list(indices), dtype=torch.int64, device=self._device)
            self._places = tuple(indices), rows
        entries = scaled(self._entries(indices, current), scale)
        if previous is None:
            assert self._seen is not None
            self._now = entries - self._seen[1]
        else:
            self._now = entries - self._entries(indices, previous)
        self._seen = tuple(indices), entries
        before = torch.zeros_like(self._now) if self._changes is None else self._rows(self._changes)
        return (torch.stack([self._now, before]) * self._now).sum(2)

    def has_seen(self, indices: Sequence[int]) -> bool:
        """Whether the last call was of these gradients."""
        return self._seen is not None and self._seen[0] == tuple(indices)

    def cosines(self, products: Tensor, alike: Tensor | None = None) -> Tensor:
        """Turn what :meth:`products` returned, summed over the processes, into c ``[P]``; 0 where it is not known.

        Args:
            products: The sums, the same on every process.
            alike: ``[P]`` or ``[1]``: whether this was a change between gradients that can be compared; None where all
                were.
        """
        assert self._now is not None
        change, (squares, inner) = self._now, products.to(self._now)
        if self._changes is None or self._squares is None:
            self._changes = change.new_zeros(len(self._sampled), ENTRIES)
            self._squares = squares.new_zeros(len(self._sampled))
        known = self._rows(self._squares)
        cosines = inner / (squares.sqrt() * known.sqrt()).clamp_min(1e-37)
        tells = squares < torch.inf  # a gradient that is not finite hides a change, and is none
        if alike is not None:
            tells &= alike
        cosines = torch.where(tells, cosines, 0.0)
        change = torch.where(tells[:, None], change, self._rows(self._changes))
        squares = torch.where(tells, squares, known)
        self._changes, self._squares = self._with(self._changes, change), self._with(self._squares, squares)
        self._now = None
        return cosines

    def _rows(self, table: Tensor) -> Tensor:
        places = self._places[1]
        return table if places is None else table.index_select(0, places)

    def _with(self, table: Tensor, rows: Tensor) -> Tensor:
        places = self._places[1]
        return rows if places is None else table.index_copy(0, places, rows)

    def _entries(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """Sample some of the gradients, ``[P, 64]``, with zeros for entries that a gradient or its shard lacks."""
        chosen = [self._sampled[i] for i in indices]
        self._padding = self._padding.to(tensors[0])  # of one dtype, as the device's fast path wants it
        pieces: list[Tensor] = []
        # At each step for every layer: a call only where it is not a plain view.
        for one, tensor in zip(chosen, tensors, strict=True):
            view = one.view if tensor.is_contiguous() else None
            pieces.append(one.of(tensor) if view is None else tensor.as_strided(*view))
            if one.is_first and len(one.columns) < ENTRIES:
                pieces.append(self._padding[len(one.columns) :])
        flat = torch.cat(pieces).float()
        if len(flat) == len(indices) * ENTRIES:
            return flat.view(-1, ENTRIES)
        if tuple(indices) != self._columns[0]:
            filled = [range(ENTRIES) if one.is_first else one.columns for one in chosen]
            columns = [row * ENTRIES + column for row, columns in enumerate(filled) for column in columns]
            self._columns = tuple(indices), torch.tensor(columns, dtype=torch.int64, device=self._device)
        return flat.new_zeros(len(indices) * ENTRIES).index_copy(0, self._columns[1], flat).view(-1, ENTRIES)

    def _held(self) -> Tensor:
        """Mark each entry that is here by 1, ``[L, 64]``."""
        held = [[float(column in sampled.columns) for column in range(ENTRIES)] for sampled in self._sampled]
        return torch.tensor(held, device=self._device)

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the kept changes and their squares by layer name, of whole gradients.

        Of sharded ones every process must call this. Cost: an all-reduce of 128 L numbers.
        """
        if self._changes is None or self._squares is None:
            return {}
        changes, squares = self._changes, self._squares[:, None].to(self._changes)
        if self._ranks.is_distributed:
            held = self._held()
            both = self._ranks.sum_or_nan(lambda: torch.stack([changes, held]), 2 * held.numel())
            entries, holders = both.view(2, *held.shape)
            changes = (entries / holders.clamp_min(1.0)).to(changes)
        return {name: row.clone() for name, row in zip(names, torch.cat([changes, squares], 1), strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Load the changes of the layers that are still there."""
        self._changes = self._squares = self._now = None
        if state.keys() & set(names):
            like = next(iter(state.values()))
            rows = [state.get(name, torch.zeros_like(like)).to(self._device) for name in names]
            table = torch.stack(rows)
            self._changes, self._squares = table[:, :-1] * self._held(), table[:, -1]


class _Sampled:
    """The sampled entries of one gradient that are here.

    Attributes:
        columns: Which of the sampled entries these are.
        is_first: Whether they are the first of the sampled entries, so that zeros behind them fill the row.
        view: Size and stride of the view of a contiguous tensor that holds them; None where it begins further on.
    """

    def __init__(self, like: Tensor) -> None:
        self._start, self._step = 0, max(1, like.numel() // ENTRIES)
        self._chosen: Tensor | None = None  # positions in the shard, where they are not evenly spaced
        self.columns: Sequence[int] = range(min(like.numel(), ENTRIES))
        if is_sharded(like):
            self._find(like)
        self.is_first = list(self.columns) == list(range(len(self.columns)))
        plain = self._chosen is None and not self._start
        self.view = ((len(self.columns),), (self._step,)) if plain else None

    def _find(self, like: Tensor) -> None:
        marks = torch.zeros(like.shape, dtype=torch.int8, device=to_local(like).device)
        marks.view(-1)[:: self._step][:ENTRIES].copy_(torch.arange(1, len(self.columns) + 1, dtype=torch.int8))
        shard = shard_like(marks, like).reshape(-1)
        found = shard.nonzero()[:, 0]
        self.columns, places = (shard[found].long() - 1).tolist(), found.tolist()
        steps = {after - before for before, after in zip(places, places[1:], strict=False)} or {1}
        if len(steps) > 1:
            self._chosen = found
        self._start, self._step = places[0] if places else 0, steps.pop()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the entries of any tensor."""
        if self._chosen is not None:
            return tensor.reshape(-1)[self._chosen]
        return tensor.reshape(-1)[self._start : self._start + len(self.columns) * self._step : self._step]
