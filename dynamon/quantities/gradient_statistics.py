"""Statistics of gradients, of their change, and of the difference of two parts of their window, in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.kernels import gradient_stats, widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.quantities.dual_norms import DualNorms
from dynamon.quantities.scales import Scale, all_scaled, without_dimensions
from dynamon.quantities.updates import differences

_COMPARED = 3  # the gradient, its change, the difference of two parts of its window
_SUMS = 2 * _COMPARED + 4  # l1 and squares of these; entries that are not finite, inner product, products of changes


@dataclass(frozen=True)
class Step:
    """The gradients of one step, and those that they are compared with, as far as they are here.

    Attributes:
        indices: Positions of the I layers that are read: those that have a gradient; where several processes hold
            shards of the layers, all of them, since the processes must agree.
        current: Their gradients, zeros where there is none.
        compared: Whether each has a gradient, and one of the step before, over a window like this one.
        previous: Those of the step before, zeros where there is none; None where all are missing.
        parted: Whether each has a gradient, and one of the first part of the window.
        halves: Those of that part, zeros where there is none; None where all are missing.
        share: The share of that part in the window.
    """

    indices: list[int]
    current: list[Tensor]
    compared: list[bool]
    previous: list[Tensor] | None
    parted: list[bool]
    halves: list[Tensor] | None
    share: float


class GradientStatistics:
    """Measures the gradients of some layers on this process and reduces over those that hold shards of them.

    Args:
        layers: L layers, on one device.
        norms: The norm of each whose dual is taken.
        ranks: The processes that hold the layers: one alone where they are whole.

    Cost: where gradients are sharded, an all-reduce of ``13 L + 3 S`` numbers for S layers whose dual norm takes the
    matrix, and for these a gather of each gradient, of its change and of the difference of parts of windows.
    """

    def __init__(self, layers: Sequence[Layer], norms: Sequence[Norm], ranks: Ranks) -> None:
        """Prepare the reduction."""
        self._layers, self._ranks = list(layers), ranks
        self._duals = DualNorms(layers, norms, ranks)
        self._owned = _COMPARED * len(self._duals.places(range(len(layers))))

    @cached_property
    def _reduction(self) -> ShardReduction:
        likes = [layer.parameter for layer in self._layers]
        return ShardReduction(likes, self._ranks, sums=_SUMS, known=2, owned=self._owned)

    def takes_matrices(self, indices: Sequence[int]) -> bool:
        """Whether the dual norm of one of these layers takes the matrix."""
        return bool(self._duals.places(indices))

    def measure(self, step: Step, scale: Scale, dual: bool, products: Tensor | None) -> PartialStats:
        """Measure what is here; ``step.previous`` then holds the current gradients.

        Args:
            step: The gradients.
            scale: Factor on the current ones.
            dual: Whether the dual norms of the gradients themselves are wanted: else NaN where they take the matrix.
            products: What :meth:`dynamon.quantities.trends.Trends.products` returned; None for nothing.
        """
        owned = self._of_matrices(step, scale, dual)
        current = _filled(step.current)
        device = self._layers[0].parameter.device
        wide = widest_dtype(device)
        own = gradient_stats(current, None if step.previous is None else _filled(step.previous), wide, scale=scale)
        zero = torch.zeros_like(own.l1)
        l1s, squares, inner = [own.l1, zero, zero], [own.sum_squares, zero, zero], zero
        if step.previous is not None:
            assert own.difference_l1 is not None and own.difference_sum_squares is not None and own.inner is not None
            l1s[1], squares[1], inner = own.difference_l1, own.difference_sum_squares, own.inner
        if step.halves is not None:
            parts = gradient_stats(current, _filled(step.halves), wide, scale=without_dimensions(scale) * step.share)
            assert parts.difference_l1 is not None and parts.difference_sum_squares is not None
            l1s[2], squares[2] = _unit(step) * parts.difference_l1, _unit(step) ** 2 * parts.difference_sum_squares
        trend = (zero, zero) if products is None else products.to(zero)
        sums = torch.stack([*l1s, *squares, own.nonfinite, inner, *trend]).to(device)
        known = on_device([*step.compared, *step.parted], device, torch.bool).view(2, len(current))
        return PartialStats(sums=sums, known=known, owned=owned.reshape(-1))

    def reduce(self, measure: Callable[[], PartialStats]) -> PartialStats:
        """Reduce what :meth:`measure` returns on each process, by one message.

        Where matrices are gathered, the processes first check that none has failed, which is a host read. Else a
        process that failed tells the others by NaN.
        """
        if not self._owned:
            return self._reduction.reduce_or_nan(measure)
        with self._ranks.collective_section():
            return self._reduction.reduce(measure())

    def norms(self, indices: Sequence[int], found: PartialStats) -> tuple[Tensor, Tensor, Tensor]:
        """Turn reduced statistics into l1, Euclidean and dual norms, each ``[3, I]``: own, of change and parts."""
        l1, l2 = found.sums[:_COMPARED], found.sums[_COMPARED : 2 * _COMPARED].sqrt()
        matrices = found.owned.view(_COMPARED, len(self._duals.places(indices)))
        return l1, l2, self._duals.of(indices, l1, l2, matrices)

    def own_duals(
        self, indices: Sequence[int], current: Sequence[Tensor], scale: Scale, l1: Tensor, l2: Tensor
    ) -> Tensor:
        """Take the dual norms ``[I]`` of the gradients alone, given their other norms."""
        with self._ranks.collective_section():
            own = all_scaled([current[place] for place in self._duals.places(indices)], scale)
            matrices = self._ranks.sum(self._duals.of_matrices(indices, [own]))
        return self._duals.of(indices, l1, l2, matrices[0])

    def of_tensors(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Take the dual and Euclidean norms ``[2, L]`` of whole tensors; zero where there is none."""
        indices = [i for i, tensor in enumerate(tensors) if tensor is not None]
        given = [tensor for tensor in tensors if tensor is not None]
        device = self._layers[0].parameter.device
        found = torch.zeros(2, len(tensors), dtype=widest_dtype(device), device=device)
        if given:
            stats = gradient_stats(given, None, found.dtype)
            l2 = stats.sum_squares.sqrt()
            matrices = self._duals.of_matrices(indices, [[given[place] for place in self._duals.places(indices)]])
            duals = self._duals.of(indices, stats.l1, l2, matrices[0])
            found.index_copy_(1, on_device(indices, device, torch.int64), torch.stack([duals, l2]).to(found))
        return found

    def _of_matrices(self, step: Step, scale: Scale, dual: bool) -> Tensor:
        """Take the dual norms ``[3, S]`` that need the matrix; NaN for those that are not wanted, or not there."""
        places = self._duals.places(step.indices)
        if not places:
            return torch.empty(_COMPARED, 0, device=self._layers[0].parameter.device)
        own = all_scaled([step.current[place] for place in places], scale)
        tensors = {0: own} if dual else {}
        if step.previous is not None:
            tensors[1] = differences(own, [step.previous[place] for place in places])
        if step.halves is not None:
            tensors[2] = differences(all_scaled(own, step.share), [step.halves[place] for place in places])
        rows = dict(zip(tensors, self._duals.of_matrices(step.indices, list(tensors.values())), strict=True))
        if 2 in rows:
            rows[2] = _unit(step) * rows[2]
        missing = own[0] if len(rows) == _COMPARED else torch.full((len(places),), torch.nan, device=own[0].device)
        return torch.stack([rows.get(row, missing) for row in range(_COMPARED)])


def _unit(step: Step) -> float:
    """Return what brings the difference of a part and its share of the whole to that of two full batches."""
    return float((2 / (step.share * (1 - step.share))) ** 0.5)


def _filled(shards: Sequence[Tensor]) -> list[Tensor]:
    """Return shards that can be measured: one without entries has a zero in it."""
    return [shard if shard.numel() else shard.new_zeros(1) for shard in shards]
