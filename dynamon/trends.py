"""Whether gradients change by noise, or because the weights move."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_ENTRIES = 64  # of each gradient that are looked at, spread evenly


class Trends:
    r"""Compares the change of each gradient with the one that was read before it.

    With :math:`d_k` the change at reading k, on some of its entries, :math:`c = \cos(d_k, d_{k-1})`. Noise that is new
    in each gradient gives -1/2 where readings are of successive steps, and 0 where they are further apart. A gradient
    that changes because the weights move goes on as it did (1), or swings to and fro (-1).

    Memory: 64 numbers a layer. Cost: some ten small operations on ``[L, 64]``.
    """

    def __init__(self) -> None:
        """No change read."""
        self._layers: tuple[int, ...] = ()
        self._before: tuple[Tensor, Tensor] | None = None  # entries of the change, and their squares
        self._now: Tensor | None = None

    def products(self, indices: Sequence[int], current: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
        """Sums over entries of :math:`d_k^2` and :math:`d_k d_{k-1}`, ``[2, P]``, and keep :math:`d_k`.

        Args:
            indices: Which P layers these are.
            current: Their gradients, or parts of them.
            previous: Those of the step before.
        """
        if tuple(indices) != self._layers:
            self._follow(indices)  # other layers have gradients now
        self._now = _entries(current) - _entries(previous)
        before = torch.zeros_like(self._now) if self._before is None else self._before[0]
        return torch.stack([self._now.square().sum(1), (self._now * before).sum(1)])

    def cosines(self, products: Tensor, alike: Tensor | None = None) -> Tensor:
        """What :meth:`products` gave, of whole gradients by now, as c ``[P]``; 0 where it is not known.

        Args:
            products: The sums, in any process the same.
            alike: 1, or 0 where it has turned out that this was no change between alike gradients; None for 1.
        """
        assert self._now is not None
        change, (squares, inner) = self._now, products
        if alike is not None:
            change, squares, inner = change * alike, squares * alike, inner * alike
        before = torch.zeros_like(squares) if self._before is None else self._before[1]
        cosines = inner / (squares.sqrt() * before.sqrt()).clamp_min(1e-37)
        if self._before is not None:  # a change that is not finite, or none, says nothing: the one before it is kept
            is_known = torch.isfinite(squares) & (squares > 0)
            change = torch.where(is_known[:, None], change, self._before[0])
            squares = torch.where(is_known, squares, before)
        is_finite = torch.isfinite(squares)
        self._before = torch.where(is_finite[:, None], change, 0.0), torch.where(is_finite, squares, 0.0)
        self._now = None
        return cosines

    def _follow(self, indices: Sequence[int]) -> None:
        """Take up these layers; of those that were there before, the change is kept."""
        place = {layer: position for position, layer in enumerate(self._layers)}
        kept, self._layers = self._before, tuple(indices)
        self._before = None
        both = [(position, place[layer]) for position, layer in enumerate(indices) if layer in place]
        if kept is not None and both:
            new, old = ([pair[i] for pair in both] for i in (0, 1))
            change, squares = kept[0].new_zeros(len(indices), kept[0].shape[1]), kept[1].new_zeros(len(indices))
            change[new], squares[new] = kept[0][old], kept[1][old]
            self._before = change, squares

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The change that is kept, and its square, by layer name."""
        if self._before is None:
            return {}
        rows = torch.cat([self._before[0], self._before[1][:, None].to(self._before[0])], 1)
        return {names[i]: row.clone() for i, row in zip(self._layers, rows, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> None:
        """Take it up; layers that are not there any more are left out."""
        index = {name: i for i, name in enumerate(names)}
        rows = {index[name]: row.to(device) for name, row in state.items() if name in index}
        self._layers, self._before = tuple(rows), None
        if rows:
            table = torch.stack(list(rows.values()))
            self._before = table[:, :-1], table[:, -1]


def _entries(tensors: Sequence[Tensor]) -> Tensor:
    """Entries of each tensor, ``[P, 64]``, zeros behind those of small ones."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        taken = flat[:: max(1, flat.numel() // _ENTRIES)][:_ENTRIES].float()
        pieces.append(taken)
        if taken.numel() < _ENTRIES:
            pieces.append(taken.new_zeros(_ENTRIES - taken.numel()))
    return torch.cat(pieces).view(len(tensors), _ENTRIES)
