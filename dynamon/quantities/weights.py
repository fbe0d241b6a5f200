"""Sizes of weights and of the steps they take, in the norm of each layer's role."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynamon.distributed.dtensor import any_sharded, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.work_sharing import measure_gathered, share_work
from dynamon.kernels import l2_along
from dynamon.kernels.constants import on_device
from dynamon.kernels.gram import warm_up
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import operator_norm, rms_factors, sigma_factor
from dynamon.quantities import quantities_of
from dynamon.quantities.updates import angles, compare_steps, differences, wide_lengths
from dynamon.spectra import WeightSpectrum, extremes_of, largest_per_stack, reduce_blocks, weight_spectra

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
        cosine: Cosine between the last two steps (:func:`dynamon.quantities.updates.compare_updates`); NaN where one is
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
    layers: Sequence[Layer], before: Mapping[str, Tensor] | None = None, earlier: Mapping[str, Tensor] | None = None
) -> WeightReadings:
    """Measure the weights of some layers, and the steps since earlier copies of them.

    Args:
        layers: The layers, on one device.
        before: Earlier weights by layer name; layers that are not in it get NaN for the step.
        earlier: Weights before the step that preceded; layers that are not in both get NaN where two steps compare.

    Returns:
        :class:`WeightReadings` in float32.

    Layers of several blocks (:class:`dynamon.layers.Layer`) report the norm and the singular value of the largest
    block and the mean of their stable ranks. Spectral norms of steps are estimates without bounds
    (:func:`dynamon.spectra.largest_singular_values`).

    Cost: some passes over the weights, and for matrices two Gram iterations batched by shape, of which that of the
    steps is in bfloat16 where this pays. For the 148 tensors of GPT-2 124M fewer than 400 device calls. Memory: besides
    the copies given, 5 of the parameters. No host synchronisation.
    """
    weights = [as_real(layer.parameter.detach()) for layer in layers]
    plan = _plan(layers)
    found = _extremes(plan, layers, weights)
    lengths = wide_lengths(weights)
    operator = _by_role(plan, layers, weights, lengths, found["sigma_max"])
    stepping = _steps(layers, weights, lengths, before or {}, earlier or {})
    roots = on_device([layer.size**-0.5 for layer in layers], lengths.device, lengths.dtype)
    factors = on_device(plan.rms_factors, lengths.device, torch.float32)
    return WeightReadings(
        operator=operator,
        frobenius=lengths.float(),
        rms=(lengths * roots).float(),
        ratio=torch.where(operator > 0, stepping["update"] / operator, torch.nan),
        log2_spectral_condition=log2_or_nan(found["sigma_max"] * factors),
        **stepping,
        **found,
    )


def warm_up_spectra(layers: Sequence[Layer]) -> None:
    """Compile what the first reading of these layers would have to, before training begins."""
    matrices = [layer for layer in layers if layer.role != "vector"]
    if matrices:
        warm_up(matrices[0].parameter.device, [min(layer.matrix_shape[1:]) for layer in matrices])


def guess_seconds(layers: Sequence[Layer]) -> tuple[float, float]:
    """Guess what a reading of some layers and their full spectra take, from those of a part of the largest matrix.

    Args:
        layers: The layers, as this process holds them.

    Returns:
        Seconds of :func:`weight_readings` with steps, and of :func:`layer_spectra`; 0 where no layer is a matrix.

    Cost: about a tenth of both.
    """
    matrices = [
        layer.matrices(as_real(to_local(layer.parameter.detach()))) for layer in layers if layer.role != "vector"
    ]
    stacks = [stack for stack in matrices if stack.numel()]
    if not stacks:
        return 0.0, 0.0
    costs = [len(stack) * _products(*stack.shape[1:]) for stack in stacks]
    largest = max(stacks, key=lambda stack: _products(*stack.shape[1:]))[:1]
    rows, columns = largest.shape[1:]
    part = min(1.0, (sum(costs) / _products(rows, columns) / _PARTS) ** (1 / 3))
    tiny = _single(largest[:, :_SIDE, :_SIDE])
    sample = _single(largest[:, : max(int(rows * part), _SIDE), : max(int(columns * part), _SIDE)])
    times = sum(costs) / _products(*sample.shape[1:])

    def seconds(measure: Callable[[list[Tensor]], Any]) -> float:
        fixed, whole = (_seconds(partial(measure, [stack])) for stack in (tiny, sample))
        return fixed + times * max(whole - fixed, 0.0)

    return 2 * seconds(extremes_of), seconds(weight_spectra)


_PARTS, _SIDE = 32, 16  # a part of the largest matrix costs one of so many of a reading; its sides are not below


def _products(rows: int, columns: int) -> float:
    """Multiplications of Gram iteration: of the matrix with itself, then of squares of the smaller side."""
    small, large = min(rows, columns), max(rows, columns)
    return float(small * small * (large + 7 * small))


def _seconds(measure: Callable[[], Any]) -> float:
    """The shortest time that something takes: other processes of the machine only add to it."""
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
    """What follows from the names, roles and shapes of some layers alone."""

    matrices: tuple[int, ...]  # positions of those that are not vectors
    spectral: tuple[int, ...]  # of those whose norm by role is a multiple of sigma_max
    factors: tuple[float, ...]  # of these
    others: tuple[int, ...]  # of those that are not multiples of l2 either
    length_factors: tuple[float, ...]  # what multiplies l2 of all, 1 where that is not the norm by role
    rms_factors: tuple[float, ...]  # of all, NaN for vectors


def _plan(layers: Sequence[Layer]) -> _Plan:
    """The plan of some layers; asking them takes milliseconds for a large model, so that it is kept."""
    key = tuple((la.role, la.parameter.shape, la.blocks, la.rows_are_tokens, la.inputs_first, la.conv) for la in layers)
    if key not in _PLANS:
        if len(_PLANS) >= _PLANS_KEPT:
            _PLANS.clear()
        factors = [sigma_factor(layer) for layer in layers]
        norms = [operator_norm(layer) for layer in layers]
        from_lengths = [norm.reduces == "sum" for norm in norms]
        spectral = tuple(i for i, factor in enumerate(factors) if factor is not None)
        matrices = tuple(i for i, layer in enumerate(layers) if layer.role != "vector")
        _PLANS[key] = _Plan(
            matrices=matrices,
            spectral=spectral,
            factors=tuple(factor for factor in factors if factor is not None),
            others=tuple(i for i, from_length in enumerate(from_lengths) if not from_length and factors[i] is None),
            length_factors=tuple(
                norm.primal_factor(1, layer.size) if from_length else 1.0
                for layer, norm, from_length in zip(layers, norms, from_lengths, strict=True)
            ),
            rms_factors=tuple(rms_factors(layers)),
        )
    return _PLANS[key]


_PLANS: dict[tuple[object, ...], _Plan] = {}
_PLANS_KEPT = 64


def _extremes(plan: _Plan, layers: Sequence[Layer], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Spectra of the layers that are matrices, NaN for vectors, by field."""
    if not plan.matrices:
        nothing = torch.full((len(layers),), torch.nan, device=weights[0].device if weights else "cpu")
        return dict.fromkeys(_SPECTRAL, nothing.float())
    stacks = [layers[i].matrices(weights[i]) for i in plan.matrices]
    found = reduce_blocks(extremes_of([_single(stack) for stack in stacks]), [len(stack) for stack in stacks])
    table = torch.stack([getattr(found, name).float() for name in _SPECTRAL])
    return dict(zip(_SPECTRAL, _spread(table, plan.matrices, len(layers)), strict=True))


_SPECTRAL = ("sigma_max", "sigma_lower", "sigma_upper", "stable_rank")


def _single(stack: Tensor) -> Tensor:
    return stack.float() if stack.dtype == torch.float64 else stack


def _steps(
    layers: Sequence[Layer],
    weights: Sequence[Tensor],
    lengths: Tensor,
    before: Mapping[str, Tensor],
    earlier: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Norms of the last step, how far it turned the weights, and how it compares with the one before, by field."""
    count, names = len(layers), [layer.name for layer in layers]
    table = torch.full((_STEP_ROWS, count), torch.nan, dtype=torch.float32, device=lengths.device)
    moved = [i for i, name in enumerate(names) if name in before]
    if moved:
        own, starts = [layers[i] for i in moved], [as_real(before[names[i]]) for i in moved]
        steps = differences([weights[i] for i in moved], starts)
        step_lengths = wide_lengths(steps)
        updates = _update_norms(own, steps, step_lengths)
        turned = _rotations([weights[i] for i in moved], starts, _chosen(lengths, moved, count), step_lengths)
        table = _put(table, 0, torch.stack([updates, turned.float()]), moved)
        known = [
            (position, i)
            for position, i in enumerate(moved)
            if names[i] in earlier and earlier[names[i]].shape == layers[i].parameter.shape
        ]
        if known:
            ends = [as_real(earlier[names[i]]).to(weights[i].device) for _, i in known]
            previous = differences([starts[position] for position, _ in known], ends)
            compared = compare_steps([steps[position] for position, _ in known], previous)
            table = _put(table, 2, compared.float(), [i for _, i in known])
    return dict(zip(("update", "rotation", "cosine", "last", "previous"), table, strict=True))


_STEP_ROWS = 5


def _update_norms(layers: Sequence[Layer], steps: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Norms by role of steps; no bounds, and no spectra of those whose norm is another."""
    plan = _plan(layers)
    sigma = None
    if plan.spectral:
        stacks = [_single(layers[i].matrices(steps[i])) for i in plan.spectral]
        sigma = _spread(largest_per_stack(stacks)[None].float(), plan.spectral, len(layers))[0]
    return _by_role(plan, layers, steps, lengths, sigma)


def _by_role(
    plan: _Plan, layers: Sequence[Layer], tensors: Sequence[Tensor], lengths: Tensor, sigma: Tensor | None
) -> Tensor:
    """Norms by role ``[L]`` in float32, from Euclidean and spectral norms where they are multiples of these."""
    norms = (lengths * on_device(plan.length_factors, lengths.device, lengths.dtype)).float()
    if plan.spectral and sigma is not None:
        factors = on_device(plan.factors, sigma.device, sigma.dtype)
        norms = _put(norms[None], 0, (_chosen(sigma, plan.spectral, len(layers)) * factors)[None], plan.spectral)[0]
    if plan.others:
        values = [operator_norm(layers[i]).primal(tensors[i]) for i in plan.others]
        norms = _put(norms[None], 0, torch.stack(values)[None].float(), plan.others)[0]
    return norms


def _rotations(weights: Sequence[Tensor], starts: Sequence[Tensor], lengths: Tensor, step_lengths: Tensor) -> Tensor:
    """Angles between weights and what they were."""
    if lengths.dtype == torch.float64:
        return angles(wide_lengths(starts), lengths, step_lengths)
    return torch.stack([_angle(a, b) for a, b in zip(starts, weights, strict=True)])  # float32 would cancel out


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Angle between two tensors, exact for small ones too: twice the arc sine of half the distance of unit vectors."""
    one, other = (t if t.dtype == torch.float64 else t.float() for t in (one, other))
    distance = torch.linalg.vector_norm(one / l2_along(one, None) - other / l2_along(other, None))
    return 2 * torch.asin((distance / 2).clamp_max(1.0)).float()


def _chosen(values: Tensor, positions: Sequence[int], count: int) -> Tensor:
    """Values ``[count]`` at some positions."""
    if len(positions) == count:
        return values
    return values.index_select(0, on_device(positions, values.device, torch.int64))


def _spread(values: Tensor, positions: Sequence[int], count: int) -> Tensor:
    """Rows ``[F, P]`` at their positions among ``[F, count]``, NaN elsewhere."""
    out = torch.full((len(values), count), torch.nan, dtype=values.dtype, device=values.device)
    return _put(out, 0, values, positions)


def _put(table: Tensor, first: int, values: Tensor, positions: Sequence[int]) -> Tensor:
    """Rows ``[F, P]`` written into a table, from row ``first`` on, at some columns."""
    rows = table[first : first + len(values)]
    if len(positions) == table.shape[1]:
        rows.copy_(values)
    else:
        rows.index_copy_(1, on_device(positions, table.device, torch.int64), values)
    return table


def layer_spectra(
    layers: Sequence[Layer], exact: bool = False, group: Any = None
) -> tuple[list[str], WeightSpectrum | None]:
    """Names and full spectra of those layers that are matrices; a convolution is taken by its flattening.

    Args:
        layers: The layers, on one device. Several blocks of one layer are put together by
            :func:`dynamon.spectra.reduce_blocks`.
        exact: Compute in float64.
        group: Processes that all hold these weights and call this together: each takes a part of the layers, and
            one reduction brings the results to all. Where weights are sharded, who holds a part is known without it;
            given as :class:`dynamon.distributed.ranks.Ranks`, this is part of their measurement.

    Returns:
        N names and statistics ``[N]``; None where no layer is a matrix.

    Cost: as :func:`dynamon.spectra.weight_spectrum`, batched by shape; waits for the device. Sharded weights are
    gathered, each on the process that takes it, and all processes must call this.
    """
    if any_sharded([layer.parameter for layer in layers]):
        return _sharded_spectra([layer for layer in layers if layer.role != "vector"], exact, group)
    own = {layer.name: layer.matrices(layer.parameter.detach()) for layer in layers if layer.role != "vector"}
    if not own:
        return [], None
    stacks = list(own.values())

    def measure(chosen: list[int]) -> Tensor:
        return _spectra([stacks[i] for i in chosen], exact)

    if group is None:
        table = measure(list(range(len(stacks))))
    else:
        costs = [len(s) * s.shape[1] * s.shape[2] * min(s.shape[1:]) for s in stacks]
        table = share_work(measure, costs, len(fields(WeightSpectrum)), stacks[0].device, group)
    wide = exact or any(stack.dtype == torch.float64 for stack in stacks)
    return list(own), WeightSpectrum(*(table if wide else table.float()))


def _spectra(stacks: Sequence[Tensor], exact: bool) -> Tensor:
    found = reduce_blocks(weight_spectra(stacks, exact), [len(stack) for stack in stacks])
    return torch.stack([getattr(found, field.name).double() for field in fields(found)])


def _sharded_spectra(layers: Sequence[Layer], exact: bool, group: Any) -> tuple[list[str], WeightSpectrum | None]:
    """The same of matrices of which each process holds a part."""
    if not layers:
        return [], None
    parts = [to_local(layer.parameter.detach()) for layer in layers]
    ranks = group if isinstance(group, Ranks) else Ranks(parts[0].device, group)

    def measure(chosen: list[int], wholes: list[list[Tensor]]) -> Tensor:
        return _spectra([layers[i].matrices(tensors[0]) for i, tensors in zip(chosen, wholes, strict=True)], exact)

    likes = [layer.parameter for layer in layers]
    costs = [layer.parameter.numel() * min(layer.matrix_shape[1:]) for layer in layers]
    with nullcontext() if ranks is group else ranks.collective_section():
        own = measure_gathered(measure, [[part] for part in parts], likes, costs, len(fields(WeightSpectrum)), ranks)
        table = ranks.sum(own)
    wide = exact or any(part.dtype == torch.float64 for part in parts)
    return [layer.name for layer in layers], WeightSpectrum(*(table if wide else table.float()))
