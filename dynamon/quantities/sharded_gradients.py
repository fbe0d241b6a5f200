"""Reading gradients that several processes hold in parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.distributed.dtensor import any_sharded, gather_for_checkpoint, shard_like, to_local, to_local_as
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.distributed.work_sharing import measure_gathered
from dynamon.kernels import gradient_stats, widest_dtype
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import dual_norms
from dynamon.quantities.gradient_reader import GradientReader, plain
from dynamon.quantities.readings import Known, PendingReadings
from dynamon.quantities.scales import Scale, all_scaled
from dynamon.quantities.sharded_trends import ShardedTrends
from dynamon.quantities.updates import differences
from dynamon.quantities.windows import Window

# l1, squares, nonfinite; l1, squares, inner product of the change; l1, squares between parts of a window; products of
# the change with itself and with the one before
_SUMS = 10
_FLAGS, _DUALS = 2, 3  # where there is a change, where there are two parts; duals of gradient, change, and between them

_MOST_CONSTANTS = 16  # sets of layers that have gradients, in turns


def gradient_reader(layers: Sequence[Layer], family: str) -> GradientReader:
    """A reader for some layers: :class:`ShardedGradientReader` where several processes hold them in parts.

    Args:
        layers: As for :class:`dynamon.quantities.gradient_reader.GradientReader`.
        family: Likewise.
    """
    kind = ShardedGradientReader if any_sharded([layer.parameter for layer in layers]) else GradientReader
    return kind(layers, family)


@dataclass(frozen=True)
class _Parts:
    """What one process holds at one step, by layer.

    Attributes:
        layers: L layers.
        gradients: Parts of their gradients.
        stored: Those of one step before.
        halves: Those of the first part of an accumulation window.
        share: Its share of the window.
    """

    layers: Sequence[Layer]
    gradients: Sequence[Tensor | None]
    stored: Mapping[int, Tensor]
    halves: Mapping[int, Tensor]
    share: float

    @property
    def present(self) -> NDArray[Any]:
        return np.array([g is not None for g in self.gradients], bool)

    @property
    def compared(self) -> NDArray[Any]:
        return self.present & np.array([i in self.stored for i in range(len(self.gradients))], bool)

    @property
    def parted(self) -> NDArray[Any]:
        return self.present & np.array([i in self.halves for i in range(len(self.gradients))], bool)

    @property
    def factor(self) -> float:
        return float((2 / (self.share * (1 - self.share))) ** 0.5)

    def own(self, i: int) -> Tensor:
        """The gradient, zeros where there is none: others may be waiting for this part."""
        gradient = self.gradients[i]
        return torch.zeros_like(as_real(to_local(self.layers[i].parameter.detach()))) if gradient is None else gradient

    def before(self, i: int) -> Tensor:
        return self.stored[i] if i in self.stored else torch.zeros_like(self.own(i))

    def tensor(self, i: int, row: int) -> Tensor:
        """The gradient, its change, or the difference of two parts of the window."""
        if row == 0:
            return self.own(i)
        return self.between(i) if row == 2 else differences([self.own(i)], [self.before(i)])[0]

    def between(self, i: int) -> Tensor:
        """The first part of the window less its share of the whole, to the scale of two full batches."""
        half = self.halves[i] if i in self.halves else torch.zeros_like(self.own(i))
        return self.factor * differences([half], [self.share * self.own(i)])[0]


class ShardedGradientReader(GradientReader):
    """Reads gradients of which each process holds a part (DTensor, as FSDP2 and tensor parallelism make them).

    Sums over entries are taken of the parts and brought together by one packed all-reduce, in which a process that
    failed says so, without a host read. Dual norms that need the matrix (a nuclear norm, under optimizers that
    orthogonalise) are taken of whole matrices, each gathered on one process; the processes then check first that all
    of them are well, which is a host read. Every process reads and stores at the same steps. What is kept from step
    to step are parts.

    The gradients of one process before they are summed cannot be had: :meth:`watch_ranks` raises.

    Cost: an all-reduce of ``13 L + 1`` numbers for L layers. For nuclear norms, ``16 L`` and a gather of each gradient,
    of its change and of the difference of parts of windows.
    """

    def __init__(self, layers: Sequence[Layer], family: str) -> None:
        """Choose norms, and find the processes."""
        super().__init__(layers, family)
        parameters = [layer.parameter for layer in self.layers]
        self._ranks = Ranks(to_local(parameters[0].detach()).device)
        self._everything = list(range(len(parameters)))
        self._special = sorted(self._need_matrix)
        dealt = _FLAGS + (_DUALS if self._special else 0)
        self._totals = ShardReduction(parameters, self._ranks, sums=_SUMS, owned=dealt)
        self._constants: dict[tuple[float, ...], Tensor] = {}

    def follow_trends(self) -> None:
        """From here on tell changes that go on from noise."""
        self.trends = ShardedTrends([layer.parameter for layer in self.layers], self._ranks)

    def watch_ranks(self, group: Any = None) -> None:
        """Not here.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "gradients of sharded parameters are summed over the processes as they arrive, and no process sees its "
            "own: compare successive gradients, or parts of an accumulation window."
        )

    def _gradients(self) -> list[Tensor | None]:
        """The parts of this process."""
        found: list[Tensor | None] = []
        for layer in self.layers:
            g = layer.parameter.grad
            if g is not None:
                g = plain(to_local_as(g.detach().to_dense() if g.is_sparse else g.detach(), layer.parameter))
            found.append(g)
        return found

    def _true_gradients(self, scale: Scale) -> list[Tensor | None]:
        found = self._gradients()
        there = iter(all_scaled([g for g in found if g is not None], scale))
        return [None if g is None else next(there) for g in found]

    def _measure(self, scale: Scale, dual: bool, local_scale: Scale, window: Window | None) -> PendingReadings:
        seen: list[_Parts] = []

        def find() -> PartialStats:
            seen.append(self._parts_here(scale, window))
            return self._found(seen[0], dual, window)

        if self._special:
            with self._ranks.collective_section():
                found = self._totals.reduce(find())
        else:
            found = self._totals.reduce_or_nan(find)
        here = seen[0]
        rows = self._rows(found, dual).index_select(1, self._places(here.present))
        known = Known(here.present, here.compared, here.parted, self._rounding(), self._frozen(), window)
        return PendingReadings(rows, known, dual or not self._special)

    def _parts_here(self, scale: Scale, window: Window | None) -> _Parts:
        stored = self._comparable(window)
        step, share, halves = self._part or (-1, 0.5, {})
        self._part = None
        return _Parts(self.layers, self._true_gradients(scale), stored, halves if step == self.step else {}, share)

    def _found(self, here: _Parts, dual: bool, window: Window | None) -> PartialStats:
        """What is in the parts here; they take the place of those of one step before."""
        found = self._totals.empty()
        if self._special:
            wanted = [0] * dual + [1] + [2] * bool(here.halves)
            where = self._positions(tuple(self._special), found.owned)
            found.owned[_FLAGS:].index_copy_(1, where, self._dealt_duals(here, wanted).to(found.owned))
        flags = np.concatenate([here.compared, here.parted]).astype(float)
        found.owned[:_FLAGS] = self._on_device(flags).view(_FLAGS, -1)
        indices, places = np.flatnonzero(here.present).tolist(), self._places(here.present)
        current, previous = [_filled(here.own(i)) for i in indices], [_filled(here.before(i)) for i in indices]
        if self.trends is not None:  # of all layers: the processes must agree on which ones
            own, before = [[t(i) for i in self._everything] for t in (here.own, here.before)]
            found.sums[8:] = self.trends.products(self._everything, own, before).to(found.sums)
        stats = gradient_stats(current, previous, dtype=widest_dtype(self._totals.device))
        kept = [p if here.own(i).numel() else here.own(i) for i, p in zip(indices, previous, strict=True)]
        frozen = self._frozen()
        self._keep({i: p for i, p in zip(indices, kept, strict=True) if not frozen[i]}, window)
        assert stats.difference_l1 is not None and stats.difference_sum_squares is not None and stats.inner is not None
        own = [stats.l1, stats.sum_squares, stats.nonfinite]
        change = [stats.difference_l1, stats.difference_sum_squares, stats.inner]
        found.sums[:6].index_copy_(1, places, torch.stack([*own, *change]).to(found.sums))
        if here.halves:
            stats = gradient_stats([_filled(here.between(i)) for i in indices], dtype=widest_dtype(self._totals.device))
            found.sums[6:8].index_copy_(1, places, torch.stack([stats.l1, stats.sum_squares]).to(found.sums))
        return found

    def _places(self, chosen: NDArray[Any]) -> Tensor:
        """Positions of the layers chosen, on the device."""
        return self._on_device(np.flatnonzero(chosen)).long()

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        """Numbers in float64 that seldom change: copied once, since a copy to the device waits for what is queued."""
        key = tuple(values.tolist())
        if key not in self._constants:
            if len(self._constants) > _MOST_CONSTANTS:
                self._constants.clear()
            self._constants[key] = torch.tensor(
                key, dtype=widest_dtype(self._totals.device), device=self._totals.device
            )
        return self._constants[key]

    def _dealt_duals(self, here: _Parts, wanted: Sequence[int]) -> Tensor:
        """Dual norms ``[3, S]`` of the S layers that need the matrix, of those that are gathered on this process."""
        items = [[here.tensor(i, row) for row in wanted] for i in self._special]

        def measure(chosen: list[int], wholes: list[list[Tensor]]) -> Tensor:
            layers = [self.layers[self._special[i]] for i in chosen]
            norms = [self.norms[self._special[i]] for i in chosen]
            rows = torch.zeros(_DUALS, len(chosen), dtype=widest_dtype(self._totals.device), device=self._totals.device)
            for position, row in enumerate(wanted):
                rows[row] = torch.stack(dual_norms(layers, norms, [tensors[position] for tensors in wholes])).to(rows)
            return rows

        layers = [self.layers[i] for i in self._special]
        likes = [layer.parameter for layer in layers]
        costs = [layer.parameter.numel() * min(layer.matrix_shape[1:]) for layer in layers]
        return measure_gathered(measure, items, likes, costs, _DUALS, self._ranks)

    def _rows(self, found: PartialStats, dual: bool) -> Tensor:
        """What :class:`PendingReadings` takes, of all layers."""
        l1, squares, nonfinite, change_l1, change_squares, inner, between_l1, between_squares = found.sums[:8]
        l2, change_l2, between_l2 = squares.sqrt(), change_squares.sqrt(), between_squares.sqrt()
        duals: Sequence[Tensor | None] = [None] * _DUALS
        if self._special:
            special = found.owned[_FLAGS:].index_select(1, self._positions(tuple(self._special), l1))
            if not dual:
                special[0] = torch.nan
            duals = special.unbind()
        own, change, between = (
            self._duals(self._everything, sums, lengths, special_duals)
            for sums, lengths, special_duals in zip(
                (l1, change_l1, between_l1), (l2, change_l2, between_l2), duals, strict=True
            )
        )
        agreed = [(flags == self._ranks.size).to(l1) for flags in found.owned[:_FLAGS]]
        trend = found.sums[8] * 0.0 if self.trends is None else self.trends.cosines(found.sums[8:], agreed[0])
        return torch.stack([l1, l2, own, nonfinite, change, change_l2, inner, between, between_l2, trend, *agreed])

    def _with_dual(self, pending: PendingReadings, scale: Scale) -> PendingReadings:
        """The same readings with the dual norms of the gradients, which are still there."""
        here = _Parts(self.layers, self._true_gradients(scale), {}, {}, 0.5)
        with self._ranks.collective_section():
            table = self._ranks.sum(self._dealt_duals(here, [0]))
        places = {i: position for position, i in enumerate(self._special)}
        indices = np.flatnonzero(pending.known.present).tolist()
        rows = pending.rows.clone()
        special = [table[0, places[i]] for i in indices if i in places]
        rows[2] = self._duals(indices, rows[0], rows[1], torch.stack(special) if special else None)
        return PendingReadings(rows, pending.known)

    def state_dict(self, everywhere: bool = True) -> dict[str, Any]:
        """The stored gradient by parameter name, if it is this step's: whole, in main memory.

        Every process must call this. Cost: a gather of each gradient, one after the other.

        Args:
            everywhere: False for a checkpoint, which the first process writes: the others need no whole gradient.
        """
        if self._stored_at != self.step:
            return {"previous": {}}
        parts = {self.layers[i].name: g for i, g in self._previous.items()}
        whole = gather_for_checkpoint(parts, {layer.name: layer.parameter for layer in self.layers}, everywhere)
        return {"previous": whole, "windows": self._saved_windows(), **self._saved_trends()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up this process's part of a stored gradient; names and shapes that no longer exist are left out."""
        super().load_state_dict(state)
        self._previous = {i: shard_like(g, self.layers[i].parameter) for i, g in self._previous.items()}


def _filled(part: Tensor) -> Tensor:
    """A part that can be measured: one without entries has a zero in it."""
    return part if part.numel() else part.new_zeros(1)
