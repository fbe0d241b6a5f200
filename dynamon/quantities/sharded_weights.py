"""Sizes of weights and of their steps where several processes hold them in parts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.distributed.work_sharing import measure_gathered
from dynamon.kernels import widened, widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import operator_norm, rms_factors, sigma_factor
from dynamon.quantities.sharded_norms import largest_here, needs_whole, primal
from dynamon.quantities.updates import angles, cosines, wide_lengths
from dynamon.quantities.weights import WeightReadings, log2_or_nan
from dynamon.spectra import extremes_of, largest_per_stack, reduce_blocks

_SUMS = 5  # squares of weight, weight before, step, step before, and the difference of these two
_FLAGS = 2  # where a step is known, where two are
_OWNED = 6  # sigma_max with its bounds, stable rank; the norms by role of weight and step


def sharded_weight_readings(
    layers: Sequence[Layer], before: Mapping[str, Tensor], earlier: Mapping[str, Tensor], ranks: Ranks
) -> WeightReadings:
    """What :func:`dynamon.quantities.weights.weight_readings` finds, from parts.

    Every process must call this, inside of :meth:`dynamon.distributed.ranks.Ranks.collective_section`. Sums and maxima
    over entries and rows come from the parts. Matrices are dealt out, and each, with its step where that has a spectral
    norm, is gathered on one process.

    Args:
        layers: L layers.
        before: The parts here of the weights before the last step, by layer name.
        earlier: Those before the step that preceded it.
        ranks: The processes.

    Returns:
        The readings in float32, the same on every process.

    Cost: one all-reduce of ``(14 + 2 R) L`` numbers for R processes; a gather of each matrix and of each step of a
    hidden weight or a convolution.
    """
    here = [_Here(layer, before.get(layer.name), earlier.get(layer.name)) for layer in layers]
    norms = [operator_norm(layer) for layer in layers]
    totals = ShardReduction([layer.parameter for layer in layers], ranks, sums=_SUMS, maxima=2, owned=_FLAGS + _OWNED)
    found = totals.empty()
    found.sums[:] = torch.stack([part.sums() for part in here], 1)
    for row, parts in enumerate([[part.weight for part in here], [part.step for part in here]]):
        found.maxima[row] = largest_here(layers, norms, parts)
    flags = [[float(part.before is not None) for part in here], [float(part.has_two) for part in here]]
    found.owned[:_FLAGS] = on_device([*flags[0], *flags[1]], found.owned.device, found.owned.dtype).view(_FLAGS, -1)
    matrices = [i for i, layer in enumerate(layers) if layer.role != "vector"]
    found.owned[_FLAGS:, matrices] = _of_matrices([here[i] for i in matrices], ranks)
    return _readings(layers, totals.reduce(found), ranks.size)


class _Here:
    """What this process holds of one layer."""

    def __init__(self, layer: Layer, before: Tensor | None, earlier: Tensor | None) -> None:
        self.layer, self.before = layer, before
        self.weight = as_real(to_local(layer.parameter.detach()))
        before, earlier = (None if copy is None else as_real(copy) for copy in (before, earlier))
        self.has_two = before is not None and earlier is not None and earlier.shape == self.weight.shape
        start = self.weight if before is None else before
        self._start = start.to(torch.promote_types(start.dtype, torch.float32))
        self.step = self.weight.to(self._start) - self._start
        self._step_before = self._start - earlier.to(self._start) if self.has_two and earlier is not None else None

    def sums(self) -> Tensor:
        previous = torch.zeros_like(self.step) if self._step_before is None else self._step_before
        parts = [self.weight, self._start, self.step, previous, self.step - previous]
        return wide_lengths(parts).square()

    def gathered(self) -> list[Tensor]:
        """What its norms take whole: the weight, and where its norm by role is one of the matrix, its step."""
        return [self.weight, self.step] if needs_whole(self.layer, operator_norm(self.layer)) else [self.weight]


def _of_matrices(here: Sequence[_Here], ranks: Ranks) -> Tensor:
    """Spectra and norms by role ``[6, M]`` of M matrices, of those that are gathered on this process."""

    def measure(chosen: list[int], wholes: list[list[Tensor]]) -> Tensor:
        layers = [replace(here[i].layer, parameter=tensors[0]) for i, tensors in zip(chosen, wholes, strict=True)]
        stacks = [layer.matrices().float() for layer in layers]
        spectra = reduce_blocks(extremes_of(stacks), [len(stack) for stack in stacks])
        rows = [spectra.sigma_max, spectra.sigma_lower, spectra.sigma_upper, spectra.stable_rank]
        stepping = [position for position, tensors in enumerate(wholes) if len(tensors) > 1]
        norms = torch.zeros(2, len(chosen), dtype=widest_dtype(rows[0].device), device=rows[0].device)
        if stepping:
            own = [layers[position] for position in stepping]
            steps = [wholes[position][1] for position in stepping]
            norms[0, stepping] = _by_role(own, [layer.parameter for layer in own], spectra.sigma_max[stepping])
            norms[1, stepping] = _by_role(own, steps, _largest_of(own, steps))
        return torch.cat([widened(torch.stack(rows)), norms])

    costs = [part.layer.parameter.numel() * min(part.layer.matrix_shape[1:]) for part in here]
    likes = [part.layer.parameter for part in here]
    return measure_gathered(measure, [part.gathered() for part in here], likes, costs, _OWNED, ranks)


def _largest_of(layers: Sequence[Layer], tensors: Sequence[Tensor]) -> Tensor:
    return largest_per_stack([la.matrices(tensor).float() for la, tensor in zip(layers, tensors, strict=True)])


def _by_role(layers: Sequence[Layer], tensors: Sequence[Tensor], sigmas: Tensor) -> Tensor:
    """Norms by role of whole tensors ``[M]``; where they rest on sigma_max, the one that Gram iteration found."""
    factors = [sigma_factor(layer) for layer in layers]
    norms = [
        operator_norm(layer).primal(tensor) if factor is None else sigma * factor
        for layer, tensor, sigma, factor in zip(layers, tensors, sigmas, factors, strict=True)
    ]
    return torch.stack([widened(norm) for norm in norms])


def _readings(layers: Sequence[Layer], found: PartialStats, processes: int) -> WeightReadings:
    weight, start, step, previous, apart = found.sums.sqrt()
    moved, compared = (flags == processes for flags in found.owned[:_FLAGS])
    sigma, lower, upper, stable_rank, whole, whole_step = found.owned[_FLAGS:]
    norms = [operator_norm(layer) for layer in layers]
    operator = primal(layers, norms, found.sums[0], found.maxima[0], whole)
    update = _where(moved, primal(layers, norms, found.sums[2], found.maxima[1], whole_step))
    is_matrix = on_device([layer.role != "vector" for layer in layers], sigma.device, torch.bool)
    sizes = on_device([layer.size for layer in layers], sigma.device, widest_dtype(sigma.device))
    factors = on_device(rms_factors(layers), sigma.device, sigma.dtype)
    readings = WeightReadings(
        operator=operator,
        frobenius=weight,
        rms=weight / sizes.sqrt(),
        update=update,
        ratio=torch.where(operator > 0, update / operator, torch.nan),
        rotation=_where(moved, angles(start, weight, step)),
        cosine=_where(compared, cosines(step, previous, apart)),
        last=_where(compared, step),
        previous=_where(compared, previous),
        sigma_max=_where(is_matrix, sigma),
        sigma_lower=_where(is_matrix, lower),
        sigma_upper=_where(is_matrix, upper),
        stable_rank=_where(is_matrix, stable_rank),
        log2_spectral_condition=log2_or_nan(sigma * factors),
    )
    return WeightReadings(**{name: value.float() for name, value in vars(readings).items()})


def _where(known: Tensor, values: Tensor) -> Tensor:
    return torch.where(known, values, torch.nan)
