"""Primal norms of tensors from their shards: which follow from those, and which take the whole tensor."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dynamon.distributed.dtensor import has_whole_rows, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.distributed.work_sharing import share_work
from dynamon.kernels import l2_norms, widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import Norm
from dynamon.quantities.updates import primal_norms

BY_LENGTH, BY_MAXIMUM, BY_WHOLE = range(3)  # what a primal norm is taken from


def statistic_of(layer: Layer, norm: Norm) -> int:
    """Return what a primal norm follows from.

    Args:
        layer: The layer.
        norm: The norm, fitted to it.

    Returns:
        ``BY_LENGTH``: a multiple of the Euclidean norm. ``BY_MAXIMUM``: the largest of the norms of the shards, over
        entries, or over rows that are not cut. ``BY_WHOLE``: the whole tensor.
    """
    if norm.reduces == "sum":
        return BY_LENGTH
    if norm.reduces == "max over entries":
        return BY_MAXIMUM
    stored_as_rows = "max over columns" if layer.rows_are_tokens or layer.inputs_first else "max over rows"
    plain = layer.parameter.ndim == 2 and layer.blocks == 1
    return BY_MAXIMUM if norm.reduces == stored_as_rows and plain and has_whole_rows(layer.parameter) else BY_WHOLE


def maxima_of_shards(layers: Sequence[Layer], norms: Sequence[Norm], shards: Sequence[Tensor]) -> Tensor:
    """Take the norms ``[T]`` of shards, for layers that are ``BY_MAXIMUM``: 0 for an empty one.

    Args:
        layers: T layers.
        norms: The norm of each.
        shards: What this process holds of a tensor of each.
    """
    there = [i for i, shard in enumerate(shards) if shard.numel()]
    values = primal_norms([layers[i] for i in there], [norms[i] for i in there], [shards[i] for i in there])
    return spread(values, there, len(shards), 0.0)


def length_factors(layers: Sequence[Layer], norms: Sequence[Norm], statistics: Sequence[int]) -> list[float]:
    """Return what multiplies the Euclidean norm of each layer to give its norm; 1 where that follows from another."""
    return [
        norm.primal_factor(1, layer.size) if statistic == BY_LENGTH else 1.0
        for layer, norm, statistic in zip(layers, norms, statistics, strict=True)
    ]


def norms_from(
    statistics: Sequence[int], factors: Sequence[float], lengths: Tensor, maxima: Tensor, wholes: Tensor
) -> Tensor:
    """Put primal norms ``[..., T]`` together from what they are taken from, each ``[..., T]``.

    Args:
        statistics: T times what :func:`statistic_of` returns.
        factors: What multiplies the Euclidean norm of each, where that is what counts.
        lengths: Euclidean norms.
        maxima: The largest norms of shards.
        wholes: Norms of whole tensors.
    """
    found = lengths * on_device(factors, lengths.device, lengths.dtype)
    for statistic, values in ((BY_MAXIMUM, maxima), (BY_WHOLE, wholes)):
        if statistic in statistics:
            found = torch.where(
                on_device([s == statistic for s in statistics], found.device, torch.bool), values, found
            )
    return found


def spread(values: Tensor, positions: Sequence[int], count: int, fill: float) -> Tensor:
    """Put values ``[..., P]`` at their positions among ``count``, with a number elsewhere."""
    if len(positions) == count:
        return values
    out = torch.full((*values.shape[:-1], count), fill, dtype=values.dtype, device=values.device)
    return out.index_copy_(-1, on_device(positions, values.device, torch.int64), values) if positions else out


class StepNorms:
    """The norms of the steps of L layers, as far as they follow from what is here.

    Shards of steps whose norm takes the whole matrix are kept until :func:`reduce_steps` gathers them.

    Args:
        layers: L layers, on one device.
        norms: The norm of each in which its step is measured.
        steps: What this process holds of the steps that are known, by position.
        ranks: The processes that hold the layers: one alone where those are whole.
    """

    def __init__(
        self, layers: Sequence[Layer], norms: Sequence[Norm], steps: Mapping[int, Tensor], ranks: Ranks
    ) -> None:
        """Measure what is here."""
        self.layers, self.norms = list(layers), list(norms)
        self.known = [i in steps for i in range(len(layers))]
        self.statistics = [statistic_of(layer, norm) for layer, norm in zip(layers, norms, strict=True)]
        if ranks.is_distributed:  # the processes must agree on which steps there are
            weights = [as_real(to_local(layer.parameter)) for layer in layers]
            steps = {i: steps[i] if i in steps else torch.zeros_like(weight) for i, weight in enumerate(weights)}
        device = layers[0].parameter.device
        nothing = torch.zeros(len(layers), dtype=widest_dtype(device), device=device)
        self.lengths = self._row(BY_LENGTH, steps, lambda _, __, tensors: l2_norms(tensors), nothing)
        self.maxima = self._row(BY_MAXIMUM, steps, maxima_of_shards, nothing)
        self.wholes, self.kept = nothing, {i: step for i, step in steps.items() if self.statistics[i] == BY_WHOLE}
        if not ranks.is_distributed:
            self.wholes, self.kept = self._row(BY_WHOLE, steps, primal_norms, nothing), {}

    def _row(
        self, statistic: int, steps: Mapping[int, Tensor], measure: Callable[..., Tensor], nothing: Tensor
    ) -> Tensor:
        """Take one statistic of the steps whose norm follows from it, zeros for the others."""
        chosen = [i for i in steps if self.statistics[i] == statistic]
        if not chosen:
            return nothing
        layers, norms = [self.layers[i] for i in chosen], [self.norms[i] for i in chosen]
        return spread(measure(layers, norms, [steps[i] for i in chosen]).to(nothing), chosen, len(nothing), 0.0)


def reduce_steps(sets: Sequence[StepNorms], gradients: Tensor, ranks: Ranks) -> Tensor:
    """Put together the norms of the steps of several sets of layers, and the Euclidean norms of their gradients.

    Every process must call this, inside :meth:`dynamon.distributed.ranks.Ranks.collective_section`.

    Args:
        sets: The sets of layers, T layers together.
        gradients: Euclidean norms ``[T]`` of what this process holds of their gradients.
        ranks: The processes that hold the layers: one alone where those are whole.

    Returns:
        ``[2, T]``: the norms of the gradients, and those of the steps, NaN where a step is not known.

    Cost: of several processes, one all-reduce of ``(5 + R) T`` numbers and a gather of each step that takes the whole
    matrix.
    """
    layers, norms = [la for one in sets for la in one.layers], [norm for one in sets for norm in one.norms]
    statistics, known = [s for one in sets for s in one.statistics], [flag for one in sets for flag in one.known]
    stats = PartialStats(
        lengths=torch.stack([gradients, _joined([one.lengths for one in sets])]),
        maxima=_joined([one.maxima for one in sets])[None],
        known=on_device(known, gradients.device, torch.bool)[None],
        owned=_wholes(sets, layers, norms, ranks),
    )
    likes = [layer.parameter for layer in layers]
    found = ShardReduction(likes, ranks, lengths=2, maxima=1, known=1, owned=len(layers)).reduce(stats)
    factors = length_factors(layers, norms, statistics)
    steps = norms_from(statistics, factors, found.lengths[1], found.maxima[0], found.owned)
    return torch.stack([found.lengths[0], torch.where(found.known[0], steps, torch.nan)])


def _wholes(sets: Sequence[StepNorms], layers: Sequence[Layer], norms: Sequence[Norm], ranks: Ranks) -> Tensor:
    """Return the norms ``[T]`` of whole steps: those gathered on this process, zeros for the others."""
    offsets = [0, *accumulate(len(one.layers) for one in sets)]
    kept = {first + i: step for first, one in zip(offsets, sets, strict=False) for i, step in one.kept.items()}
    if not ranks.is_distributed:
        return _joined([one.wholes for one in sets])
    places = list(kept)

    def measure(chosen: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
        own = [places[i] for i in chosen]
        return primal_norms([layers[i] for i in own], [norms[i] for i in own], [found[0] for found in wholes])[None]

    likes = [layers[i].parameter for i in places]
    costs = [layers[i].parameter.numel() * min(layers[i].matrix_shape[1:]) for i in places]
    return spread(share_work(measure, [[kept[i]] for i in places], likes, costs, 1, ranks)[0], places, len(layers), 0.0)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Join rows; a single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
