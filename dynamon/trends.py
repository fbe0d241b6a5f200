"""Whether gradients change by noise, or go on changing as they did."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ENTRIES = 128  # of each gradient that are looked at, spread evenly


class Trends:
    r"""Compares the change of each gradient with the two changes that were read before it.

    With :math:`d_k` the change at reading k, on some of its entries, :math:`c_j = \cos(d_k, d_{k-j})` for j = 1, 2.
    Noise that is new in each gradient gives :math:`c_1 = -1/2` where readings are of successive steps, 0 where they are
    further apart, and :math:`c_2 = 0`. A gradient that changes because the weights move goes on as it did (1 and 1), or
    swings to and fro (-1 and 1).

    Memory: 256 numbers a layer. Cost: some ten small operations on ``[L, 128]``.
    """

    def __init__(self) -> None:
        """No change read."""
        self._before: list[tuple[tuple[int, ...], Tensor, Tensor]] = []  # layers, entries, their squares; newest first

    def products(self, indices: Sequence[int], current: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
        """Sums over entries of :math:`d_k^2, d_k d_{k-1}, d_k d_{k-2}`, ``[3, P]``, and keep :math:`d_k`.

        Args:
            indices: Which P layers these are.
            current: Their gradients, or parts of them.
            previous: Those of the step before.
        """
        key = tuple(indices)
        change = _entries(current) - _entries(previous)
        known = [entries for layers, entries, _ in self._before if layers == key]
        if len(known) < len(self._before):  # other layers have gradients now
            self._before, known = [], []
        rows = [(change * other).sum(1) for other in (change, *known)]
        rows += [torch.zeros_like(rows[0])] * (3 - len(rows))
        self._before = [(key, change, rows[0]), *self._before[:2]]
        return torch.stack(rows)

    def cosines(self, products: Tensor, alike: Tensor | None = None) -> Tensor:
        """What :meth:`products` gave, of whole gradients by now, as :math:`c_1, c_2` ``[2, P]``; 0 where unknown.

        Args:
            products: The sums, in any process the same.
            alike: 1, or 0 where it has turned out that this was no change between alike gradients; None for 1.
        """
        key, change, _ = self._before[0]
        if alike is not None:
            change, products = change * alike, products * alike
        squares = [before for _, _, before in self._before[1:]] + [torch.zeros_like(products[0])] * 2
        self._before = [(key, change, products[0]), *self._before[1:2]]
        return products[1:] / (products[:1] * torch.stack(squares[:2])).sqrt().clamp_min(1e-37)

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """The changes kept, by layer name."""
        found = [
            {names[i]: torch.cat([row, square.reshape(1).to(row)]) for i, row, square in zip(*kept, strict=True)}
            for kept in self._before
        ]
        return {str(age): rows for age, rows in enumerate(found)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], names: Sequence[str], device: Any) -> None:
        """Take them up; where layers are missing, begin anew."""
        self._before = []
        index = {name: i for i, name in enumerate(names)}
        for age in sorted(state):
            rows = {index[name]: row.to(device) for name, row in state[age].items() if name in index}
            if not rows:
                return
            table = torch.stack(list(rows.values()))
            self._before.append((tuple(rows), table[:, :-1], table[:, -1]))


def _entries(tensors: Sequence[Tensor]) -> Tensor:
    """Entries of each tensor, ``[P, 128]``, zeros behind those of small ones."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        taken = flat[:: max(1, flat.numel() // _ENTRIES)][:_ENTRIES].float()
        pieces.append(taken)
        if taken.numel() < _ENTRIES:
            pieces.append(taken.new_zeros(_ENTRIES - taken.numel()))
    return torch.cat(pieces).view(len(tensors), _ENTRIES)
