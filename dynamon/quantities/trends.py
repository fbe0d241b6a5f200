"""Whether gradients change by noise, or because the weights move."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynamon.quantities.scales import Scale, scaled

ENTRIES = 64  # of each gradient that are looked at, spread evenly


class Trends:
    r"""Compares the change of each gradient with the one that was read before it.

    With :math:`d_k` the change at reading k, on some of its entries, :math:`c = \cos(d_k, d_{k-1})`. Noise that is new
    in each gradient gives -1/2 where readings are of successive steps, and 0 where they are further apart. A gradient
    that changes because the weights move goes on as it did (1), or swings to and fro (-1). Where a reading had nothing
    to compare, the change before it is kept.

    Args:
        count: L, the number of gradients.
        device: Where they are.

    Memory: 128 numbers a gradient. Cost: some ten small operations on ``[L, 64]``.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        """No change read."""
        self._count, self._device = count, device
        self._changes: Tensor | None = None  # [L, 64]
        self._squares: Tensor | None = None  # [L], of whole changes; zero where none is known
        self._now: Tensor | None = None
        self._places: tuple[tuple[int, ...], Tensor | None] = ((), None)
        self._seen: tuple[tuple[int, ...], Tensor] | None = None  # entries of the gradients of the last call
        self._padding = torch.zeros(ENTRIES, device=device)

    def products(
        self,
        indices: Sequence[int],
        current: Sequence[Tensor],
        previous: Sequence[Tensor] | None,
        scale: Scale = 1.0,
    ) -> Tensor:
        """Sums over entries of :math:`d_k^2` and :math:`d_k d_{k-1}`, ``[2, P]``, and keep :math:`d_k`.

        Args:
            indices: Which P gradients these are, in their order.
            current: They, or what is here of them.
            previous: Those of the step before; None where those are what the last call was given as ``current``, of the
                same indices (:meth:`has_seen`).
            scale: Factor on the current ones.
        """
        if tuple(indices) != self._places[0]:
            all_there = len(indices) == self._count
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
        """What :meth:`products` gave, of whole gradients by now, as c ``[P]``; 0 where it is not known.

        Args:
            products: The sums, in any process the same.
            alike: ``[P]`` or ``[1]``: 0 where it has turned out that this was no change between alike gradients, else
                1; None for 1.
        """
        assert self._now is not None
        change, (squares, inner) = self._now, products.to(self._now)
        if self._changes is None or self._squares is None:
            self._changes = change.new_zeros(self._count, ENTRIES)
            self._squares = squares.new_zeros(self._count)
        known = self._rows(self._squares)
        cosines = inner / (squares.sqrt() * known.sqrt()).clamp_min(1e-37)
        tells = squares < torch.inf  # a gradient that is not finite hides a change, and is none
        if alike is not None:
            tells &= alike > 0
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
        """Entries of some of the gradients, ``[P, 64]``, zeros behind those of small ones."""
        self._padding = self._padding.to(tensors[0])  # of one dtype, as the device's fast path wants it
        # At each step for every layer: no call that can be saved.
        pieces: list[Tensor] = []
        for tensor in tensors:
            size = tensor.numel()
            if size < ENTRIES:
                pieces += tensor.reshape(-1), self._padding[size:]
            elif tensor.is_contiguous():
                pieces.append(tensor.as_strided((ENTRIES,), (size // ENTRIES,)))
            else:
                step = size // ENTRIES
                pieces.append(tensor.reshape(-1)[: step * ENTRIES : step])
        return torch.cat(pieces).float().view(len(tensors), ENTRIES)

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The change that is kept, and its square, by layer name."""
        if self._changes is None or self._squares is None:
            return {}
        rows = torch.cat([self._changes, self._squares[:, None].to(self._changes)], 1)
        return {name: row.clone() for name, row in zip(names, rows, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Take it up; layers that are not there any more are left out."""
        self._changes = self._squares = self._now = None
        if state.keys() & set(names):
            like = next(iter(state.values()))
            rows = [state.get(name, torch.zeros_like(like)).to(self._device) for name in names]
            table = torch.stack(rows)
            self._changes, self._squares = table[:, :-1], table[:, -1]


def stride(size: int) -> int:
    """How far apart the entries are that are looked at."""
    return max(1, size // ENTRIES)
