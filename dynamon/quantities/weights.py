"""Sizes of weights and of the steps they take, in the norm of each layer's role."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynamon.distributed.dtensor import has_whole_rows, holders_section, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.distributed.work_sharing import share_work
from dynamon.kernels import l2_along
from dynamon.kernels.constants import on_device
from dynamon.kernels.gram import warm_up
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import operator_norm, rms_factors, sigma_factor
from dynamon.quantities import quantities_of
from dynamon.quantities.primal_norms import (
    BY_MAXIMUM,
    BY_WHOLE,
    length_factors,
    maxima_of_shards,
    norms_from,
    spread,
    statistic_of,
)
from dynamon.quantities.updates import angles, cosines, differences, primal_norms, wide_lengths
from dynamon.spectra import WeightSpectrum, extremes_of, reduce_blocks, weight_spectra

FIELDS = {one.tag: one.field for one in quantities_of("weight") if one.field and one.every == 1}  # of WeightReadings
ENTRYWISE = [one for one in quantities_of("weight") if one.entrywise is not None]
FULL_SPECTRUM = tuple(one.field for one in quantities_of("weight") if one.field and one.every > 1)  # of WeightSpectrum


@dataclass(frozen=True)
class WeightReadings:
    r"""Per-layer readings, each ``[L]`` on the weights' device; NaN where a quantity has no meaning.

    Attributes:
        operator: Norm by role, see :func:`dynamon.norms.operator_norm`.
        frobenius: Euclidean norm.
        rms: Euclidean norm over the square root of the size.
        update: The last step in the norm by role.
        ratio: ``update / operator``; NaN for a zero weight.
        rotation: Angle between the weight before and after the step, in radians; NaN where one of them is zero.
        cosine: Cosine between the last two steps (:func:`dynamon.quantities.updates.cosines`); NaN where one is
            zero or 1e5 times the other.
        last: Euclidean norm of the last step, where the one before is known too.
        previous: That of the one before.
        sigma_max: Largest singular value (of the flattening for a convolution); NaN for vectors.
        sigma_lower: Certified lower bound on it.
        sigma_upper: Certified upper bound on it.
        stable_rank: Squared Frobenius norm over squared ``sigma_max``; NaN for vectors and for a zero matrix.
        log2_spectral_condition: Logarithm to base 2 of the RMS-to-RMS norm of any matrix: 0 where the spectral
            condition :math:`\sigma_1 = \sqrt{out / in}` (Yang et al., arXiv 2310.17813) holds with a constant of one,
            and the same number at every width where it holds with another; NaN for vectors and for a zero matrix.
    """

    operator: Tensor
    frobenius: Tensor
    rms: Tensor
    update: Tensor
    ratio: Tensor
    rotation: Tensor
    cosine: Tensor
    last: Tensor
    previous: Tensor
    sigma_max: Tensor
    sigma_lower: Tensor
    sigma_upper: Tensor
    stable_rank: Tensor
    log2_spectral_condition: Tensor


def weight_readings(
    layers: Sequence[Layer],
    before: Mapping[str, Tensor] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> WeightReadings:
    """Measure the weights of some layers, and the steps since earlier copies of them.

    Where weights are sharded, sums and maxima over entries and rows come from the shards, and each matrix is gathered
    on one process, with its step where the norm of that takes the whole matrix. Every process must then call this.

    Args:
        layers: L layers, on one device.
        before: Earlier weights by layer name, of sharded ones the shards here; layers that are not in it get NaN for
            the step.
        earlier: Weights before the step that preceded; layers that are not in both get NaN where two steps compare.
        ranks: The processes of the run, inside their :meth:`dynamon.distributed.ranks.Ranks.collective_section`; None
            for a section of its own where weights are sharded.

    Returns:
        :class:`WeightReadings` in float32, the same on every process.

    Layers of several blocks (:class:`dynamon.layers.Layer`) report the norm and the singular value of the largest
    block and the mean of their stable ranks. Spectral norms of steps are estimates without bounds
    (:func:`dynamon.spectra.largest_singular_values`).

    Cost: some passes over the weights, and for matrices two Gram iterations batched by shape, of which that of the
    steps is in bfloat16 where this pays. For the 148 tensors of GPT-2 124M fewer than 400 device calls, and no host
    synchronisation. Memory: besides the copies given, 5 of the parameters. Sharded: one all-reduce of
    ``(8 + 2 R) L + 6 M`` numbers for M matrices and R processes, and a gather of each matrix and of each step of a
    hidden weight or a convolution.
    """
    likes, plan = [layer.parameter for layer in layers], _plan(layers)
    with holders_section(likes, ranks) as holding:
        here = _Here(layers, before or {}, earlier or {}, holding)
        stats = PartialStats(
            lengths=here.lengths(),
            maxima=here.maxima(plan),
            known=here.known(),
            owned=_of_matrices(plan, here, holding).reshape(-1),
        )
        reduction = ShardReduction(likes, holding, lengths=5, maxima=2, known=2, owned=_OWNED * len(plan.matrices))
        return _readings(plan, here, reduction.reduce(stats))


def warm_up_spectra(layers: Sequence[Layer]) -> None:
    """Compile what the first reading of these layers would have to, before training begins."""
    matrices = [layer for layer in layers if layer.role != "vector"]
    if matrices:
        warm_up(matrices[0].parameter.device, [min(layer.matrix_shape[1:]) for layer in matrices])


def guess_seconds(layers: Sequence[Layer], most: float, is_full: bool = False) -> float:
    """Guess what a reading of some layers takes, from that of growing parts of the largest matrix.

    Args:
        layers: The layers, as this process holds them.
        most: Seconds after which no larger part is tried.
        is_full: Whether full spectra are meant (:func:`layer_spectra`), not a plain reading with its steps
            (:func:`weight_readings`).

    Returns:
        Seconds; 0 where no layer is a matrix.

    Cost: at most about a tenth of the reading; of small matrices, a millisecond.
    """
    matrices = [
        layer.matrices(as_real(to_local(layer.parameter.detach()))) for layer in layers if layer.role != "vector"
    ]
    stacks = [stack for stack in matrices if stack.numel()]
    if not stacks:
        return 0.0
    measure, times = (weight_spectra, 1) if is_full else (extremes_of, 2)
    cost = sum(len(stack) * _products(*stack.shape[1:]) for stack in stacks)
    largest = max(stacks, key=lambda stack: _products(*stack.shape[1:]))[:1]
    begin, fixed, slope, side = time.perf_counter(), math.inf, 0.0, _SIDE
    while True:
        part = _single(largest[:, :side, :side])
        products = _products(*part.shape[1:])
        seconds = _seconds(partial(measure, [part]))
        fixed, slope = min(fixed, seconds), max(seconds - fixed, 0.0) / products if fixed < math.inf else 0.0
        is_whole, is_next_too_large = side >= max(largest.shape[1:]), 8 * products > cost / _PARTS
        if is_whole or is_next_too_large or time.perf_counter() - begin > most:
            return times * (fixed + cost * slope)
        side *= 2


_PARTS, _SIDE = 32, 16  # a part costs at most one of so many of a reading; sides of the smallest part


def _products(rows: int, columns: int) -> float:
    """Multiplications of Gram iteration: of the matrix with itself, then of squares of the smaller side."""
    small, large = min(rows, columns), max(rows, columns)
    return float(small * small * (large + 7 * small))


def _seconds(measure: Callable[[], Any]) -> float:
    """The shortest time that something takes: first calls and other processes of the machine only add to it."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        found = measure()
        float(next(iter(vars(found).values())).sum())  # waits for the device
        times.append(time.perf_counter() - begin)
    return min(times)


def log2_or_nan(values: Tensor) -> Tensor:
    """The logarithm to base 2; NaN where there is none, for zero too."""
    return torch.where(values > 0, values, torch.nan).log2()


@dataclass(frozen=True)
class _Plan:
    """What follows from the roles, shapes and layouts of some layers alone."""

    matrices: tuple[int, ...]  # positions of those that are not vectors
    sigma_factors: tuple[float | None, ...]  # of the matrices, what multiplies sigma_max to give the norm by role
    statistics: tuple[int, ...]  # what the norm by role of each layer is taken from
    length_factors: tuple[float, ...]  # what multiplies l2 of all, 1 where that is not the norm by role
    roots: tuple[float, ...]  # of the sizes of all, inverted
    rms_factors: tuple[float, ...]  # of all, NaN for vectors


def _plan(layers: Sequence[Layer]) -> _Plan:
    """Return the plan of some layers; asking them takes milliseconds for a large model, so that it is kept."""
    shapes = [(la.role, la.parameter.shape, la.blocks, la.rows_are_tokens, la.inputs_first, la.conv) for la in layers]
    key = tuple(zip(shapes, [has_whole_rows(layer.parameter) for layer in layers], strict=True))
    if key not in _PLANS:
        if len(_PLANS) >= _PLANS_KEPT:
            _PLANS.clear()
        norms = [operator_norm(layer) for layer in layers]
        statistics = tuple(statistic_of(layer, norm) for layer, norm in zip(layers, norms, strict=True))
        matrices = tuple(i for i, layer in enumerate(layers) if layer.role != "vector")
        _PLANS[key] = _Plan(
            matrices,
            sigma_factors=tuple(sigma_factor(layers[i]) for i in matrices),
            statistics=statistics,
            length_factors=tuple(length_factors(layers, norms, statistics)),
            roots=tuple(layer.size**-0.5 for layer in layers),
            rms_factors=tuple(rms_factors(layers)),
        )
    return _PLANS[key]


_PLANS: dict[tuple[object, ...], _Plan] = {}
_PLANS_KEPT = 64
_SPECTRAL = ("sigma_max", "sigma_lower", "sigma_upper", "stable_rank")
_OWNED = len(_SPECTRAL) + 2  # and the norms by role of weight and step, where these take the whole matrix


class _Here:
    """What this process holds of L layers and of their last two steps.

    A process alone takes the steps that it knows. Several take those of all layers, zeros where they know none, since
    they must agree on what is reduced.

    Attributes:
        layers: The layers.
        weights: Their weights.
        starts: Weights before the last step, by position.
        steps: Last steps, by position.
        is_whole: Whether a process holds all there is.
    """

    def __init__(
        self, layers: Sequence[Layer], before: Mapping[str, Tensor], earlier: Mapping[str, Tensor], ranks: Ranks
    ) -> None:
        self.layers, self.weights = layers, [as_real(to_local(layer.parameter)) for layer in layers]
        self.is_whole = not ranks.is_distributed
        names = [layer.name for layer in layers]
        starts = {i: as_real(before[name]) for i, name in enumerate(names) if name in before}
        ends = {i: as_real(earlier[names[i]]).to(start.device) for i, start in starts.items() if names[i] in earlier}
        ends = {i: end for i, end in ends.items() if end.shape == self.weights[i].shape}
        self._has_step, self._has_two = set(starts), set(ends)
        if not self.is_whole:
            starts = {i: starts.get(i, weight) for i, weight in enumerate(self.weights)}
            ends = {i: ends.get(i, start) for i, start in starts.items()}
        self.starts = starts
        steps = differences([self.weights[i] for i in starts], list(starts.values()))
        self.steps = dict(zip(starts, steps, strict=True))
        self._previous = dict(zip(ends, differences([starts[i] for i in ends], list(ends.values())), strict=True))

    def lengths(self) -> Tensor:
        """Take Euclidean norms ``[5, L]``: of weight, weight before, step, step before, the difference of these.

        Forgets the step before, which nothing else needs: a copy of the weights less beside the spectra.
        """
        two, previous = list(self._previous), list(self._previous.values())
        self._previous = {}
        last = [self.steps[i] for i in two]
        found = wide_lengths([*self.weights, *self.starts.values()])
        if self.steps:
            apart = torch._foreach_sub(last, previous) if last else ()
            found = torch.cat([found, wide_lengths([*self.steps.values(), *previous, *apart])])
        count = len(self.weights)
        places = [list(range(count)), list(self.starts), list(self.steps), two, two]
        rows = found.split([len(place) for place in places])
        return torch.stack([spread(row, place, count, torch.nan) for row, place in zip(rows, places, strict=True)])

    def maxima(self, plan: _Plan) -> Tensor:
        """Take norms by role ``[2, L]`` of the shards of weight and step, where the largest is that of the whole."""
        count, chosen = len(self.weights), [i for i, s in enumerate(plan.statistics) if s == BY_MAXIMUM]
        stepping = [i for i in chosen if i in self.steps]
        if not chosen:
            return torch.zeros(2, count, device=self.weights[0].device)
        layers = [self.layers[i] for i in (*chosen, *stepping)]
        shards = [self.weights[i] for i in chosen] + [self.steps[i] for i in stepping]
        found = maxima_of_shards(layers, [operator_norm(layer) for layer in layers], shards)
        return spread(found, [*chosen, *(count + i for i in stepping)], 2 * count, 0.0).view(2, count)

    def known(self) -> Tensor:
        """Tell whether the last step is known, and whether the last two are, ``[2, L]``."""
        flags = [i in known for known in (self._has_step, self._has_two) for i in range(len(self.weights))]
        return on_device(flags, self.weights[0].device, torch.bool).view(2, -1)

    def rotations(self, lengths: Tensor) -> Tensor:
        """Take the angles between weights and what they were, from the lengths of weight, weight before and step."""
        if lengths.dtype == torch.float64 or not self.is_whole or not self.starts:
            return angles(lengths[1], lengths[0], lengths[2])
        found = torch.stack([_angle(start, self.weights[i]) for i, start in self.starts.items()])
        return spread(found, list(self.starts), len(self.weights), torch.nan)  # in float32 lengths would cancel out


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Angle between two tensors, exact for small ones too: twice the arc sine of half the distance of unit vectors."""
    one, other = (t if t.dtype == torch.float64 else t.float() for t in (one, other))
    distance = torch.linalg.vector_norm(one / l2_along(one, None) - other / l2_along(other, None))
    return 2 * torch.asin((distance / 2).clamp_max(1.0)).float()


def _single(stack: Tensor) -> Tensor:
    return stack.float() if stack.dtype == torch.float64 else stack


def _of_matrices(plan: _Plan, here: _Here, ranks: Ranks) -> Tensor:
    """Measure spectra and norms by role ``[6, M]`` of M matrices, of several processes each on one of them."""
    layers = [here.layers[i] for i in plan.matrices]
    takes_whole = [plan.statistics[i] == BY_WHOLE for i in plan.matrices]
    if not layers:
        return torch.zeros(_OWNED, 0, device=here.weights[0].device)

    def measure(chosen: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
        stacks = [_single(layers[i].matrices(tensors[0])) for i, tensors in zip(chosen, wholes, strict=True)]
        spectra = reduce_blocks(extremes_of(stacks), [len(stack) for stack in stacks])
        rows = [getattr(spectra, name).float() for name in _SPECTRAL]
        at = [position for position, i in enumerate(chosen) if takes_whole[i]]
        stepping = [position for position in at if len(wholes[position]) > 1]
        factors = [plan.sigma_factors[chosen[position]] for position in at]
        weights, steps = (
            _by_role([layers[chosen[p]] for p in at], factors, [wholes[p][0] for p in at], rows[0], at),
            rows[0][:0],
        )
        if stepping:
            own = [layers[chosen[position]] for position in stepping]
            steps = primal_norms(own, [operator_norm(layer) for layer in own], [wholes[p][1] for p in stepping]).float()
        norms = ((weights, at), (steps, stepping))
        return torch.stack([*rows, *(spread(values, places, len(chosen), 0.0) for values, places in norms)])

    items = [
        [here.weights[i], here.steps[i]] if whole and i in here.steps else [here.weights[i]]
        for i, whole in zip(plan.matrices, takes_whole, strict=True)
    ]
    likes = [layer.parameter for layer in layers]
    costs = [like.numel() * min(layer.matrix_shape[1:]) for like, layer in zip(likes, layers, strict=True)]
    return share_work(measure, items, likes, costs, _OWNED, ranks)


def _by_role(
    layers: Sequence[Layer],
    factors: Sequence[float | None],
    tensors: Sequence[Tensor],
    sigmas: Tensor,
    at: Sequence[int],
) -> Tensor:
    """Take the norms of whole weights, as multiples of the largest singular values ``at`` their places or afresh."""
    if len(at) < len(sigmas):
        sigmas = sigmas.index_select(0, on_device(at, sigmas.device, torch.int64))
    found = sigmas * on_device([factor or 1.0 for factor in factors], sigmas.device, sigmas.dtype)
    others = [i for i, factor in enumerate(factors) if factor is None]
    if others:
        own = [layers[i] for i in others]
        values = primal_norms(own, [operator_norm(layer) for layer in own], [tensors[i] for i in others])
        found = found.index_copy(0, on_device(others, found.device, torch.int64), values.to(found))
    return found


def _readings(plan: _Plan, here: _Here, found: PartialStats) -> WeightReadings:
    """Turn the statistics of the whole tensors into readings."""
    lengths, maxima, known = found.lengths, found.maxima, found.known
    count, device = len(here.weights), lengths.device
    owned = spread(found.owned.view(_OWNED, len(plan.matrices)), plan.matrices, count, torch.nan)
    operator, update = norms_from(plan.statistics, plan.length_factors, lengths[0:3:2], maxima, owned[4:])
    weight, _, step, previous, apart = lengths
    update, rotation = torch.where(known[0], torch.stack([update, here.rotations(lengths).to(update)]), torch.nan)
    compared = torch.where(known[1], torch.stack([cosines(step, previous, apart), step, previous]), torch.nan)
    rms = weight * on_device(plan.roots, device, weight.dtype)
    ratio = torch.where(operator > 0, update / operator, torch.nan)
    deviation = log2_or_nan(owned[0] * on_device(plan.rms_factors, device, owned.dtype))
    rows = [operator, weight, rms, update, ratio, rotation, *compared, *owned[:4], deviation]
    return WeightReadings(*torch.stack([row.float() for row in rows]))


def layer_spectra(
    layers: Sequence[Layer], exact: bool = False, ranks: Ranks | None = None
) -> tuple[list[str], WeightSpectrum | None]:
    """Compute the full spectra of those layers that are matrices; a convolution is taken by its flattening.

    Args:
        layers: The layers, on one device. Several blocks of one layer are put together by
            :func:`dynamon.spectra.reduce_blocks`.
        exact: Compute in float64.
        ranks: Processes that all hold these weights or shards of them, inside their
            :meth:`dynamon.distributed.ranks.Ranks.collective_section`: each takes a part of the layers. None: this
            process takes all where weights are whole; of sharded ones those that hold them, in a section of their own.

    Returns:
        N names and statistics ``[N]``; None where no layer is a matrix.

    Cost: as :func:`dynamon.spectra.weight_spectrum`, batched by shape; waits for the device. Sharded weights are
    gathered, each on the process that takes it, and all processes must call this.
    """
    layers = [layer for layer in layers if layer.role != "vector"]
    if not layers:
        return [], None
    likes, names = [layer.parameter for layer in layers], [field.name for field in fields(WeightSpectrum)]

    def measure(chosen: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
        stacks = [layers[i].matrices(tensors[0]) for i, tensors in zip(chosen, wholes, strict=True)]
        found = reduce_blocks(weight_spectra(stacks, exact), [len(stack) for stack in stacks])
        return torch.stack([getattr(found, name).double() for name in names])

    shards = [to_local(like) for like in likes]
    costs = [like.numel() * min(layer.matrix_shape[1:]) for like, layer in zip(likes, layers, strict=True)]
    with holders_section(likes, ranks) as holding:
        group = ranks or holding
        table = group.sum(share_work(measure, [[s] for s in shards], likes, costs, len(names), group))
    wide = exact or any(shard.dtype == torch.float64 for shard in shards)
    return [layer.name for layer in layers], WeightSpectrum(*(table if wide else table.float()))
