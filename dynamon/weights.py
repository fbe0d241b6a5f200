"""Sizes of weights and of the steps they take, in the norm of each layer's role."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dynamon.dealing import dealt_out, measured_whole
from dynamon.kernels import l2_along, l2_norms
from dynamon.layers import Layer
from dynamon.norms import operator_norm, rms_factors, sigma_factor
from dynamon.pairs import as_real
from dynamon.quantities import quantities_of
from dynamon.ranks import Ranks
from dynamon.shards import any_sharded, local
from dynamon.spectra import (
    SpectralExtremes,
    WeightSpectrum,
    by_shape,
    per_stack,
    spectral_extremes,
    weight_spectra,
)

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
        sigma_max: Largest singular value (of the flattening for a convolution); NaN for vectors.
        sigma_lower: Certified lower bound on it.
        sigma_upper: Certified upper bound on it.
        stable_rank: Squared Frobenius norm over squared ``sigma_max``; NaN for vectors and for a zero matrix.
        deviation: Logarithm to base 2 of the RMS-to-RMS norm of any matrix: 0 where the spectral condition
            :math:`\sigma_1 = \sqrt{out / in}` (Yang et al., arXiv 2310.17813) holds with a constant of one, and the
            same number at every width where it holds with another; NaN for vectors and for a zero matrix.
    """

    operator: Tensor
    frobenius: Tensor
    rms: Tensor
    update: Tensor
    ratio: Tensor
    rotation: Tensor
    sigma_max: Tensor
    sigma_lower: Tensor
    sigma_upper: Tensor
    stable_rank: Tensor
    deviation: Tensor


def weight_readings(layers: Sequence[Layer], before: Mapping[str, Tensor] | None = None) -> WeightReadings:
    """Measure the weights of some layers, and the step since an earlier copy of them.

    Args:
        layers: The layers, on one device.
        before: Earlier weights by layer name; layers that are not in it get NaN for the step.

    Returns:
        :class:`WeightReadings` in float32.

    Layers of several blocks (:class:`dynamon.layers.Layer`) report the norm and the singular value of the largest
    block and the mean of their stable ranks.

    Cost: two passes over the weights and, for matrices, two Gram iterations batched by shape. No host synchronisation.
    """
    weights = [as_real(layer.parameter.detach()) for layer in layers]
    before = {name: as_real(copy) for name, copy in (before or {}).items()}
    moved = [i for i, layer in enumerate(layers) if layer.name in before]
    steps = {i: _step(weights[i], before[layers[i].name]) for i in moved}
    spectra = _Spectra(layers, weights)
    operator = torch.stack(
        [_operator(layer, w, spectra, i) for i, (layer, w) in enumerate(zip(layers, weights, strict=True))]
    )
    step_spectra = _Spectra([layers[i] for i in moved], [steps[i] for i in moved])
    update, rotation = torch.full_like(operator, torch.nan), torch.full_like(operator, torch.nan)
    for position, i in enumerate(moved):
        update[i] = _operator(layers[i], steps[i], step_spectra, position)
        rotation[i] = _angle(before[layers[i].name], weights[i])
    frobenius = l2_norms(weights).float()
    sizes = torch.tensor([w.numel() for w in weights], dtype=torch.float32, device=frobenius.device)
    return WeightReadings(
        operator=operator,
        frobenius=frobenius,
        rms=frobenius / sizes.sqrt(),
        update=update,
        ratio=torch.where(operator > 0, update / operator, torch.nan),
        rotation=rotation,
        sigma_max=spectra.column("sigma_max"),
        sigma_lower=spectra.column("sigma_lower"),
        sigma_upper=spectra.column("sigma_upper"),
        stable_rank=spectra.column("stable_rank"),
        deviation=log2_or_nan(spectra.column("sigma_max") * rms_factors(layers).to(operator.device)),
    )


def log2_or_nan(values: Tensor) -> Tensor:
    """The logarithm to base 2; NaN where there is none, for zero too."""
    return torch.where(values > 0, values, torch.nan).log2()


class _Spectra:
    """Spectra of those tensors that are matrices, addressed by their position among all."""

    def __init__(self, layers: Sequence[Layer], tensors: Sequence[Tensor]) -> None:
        self.count = len(layers)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._where = [i for i, layer in enumerate(layers) if layer.role != "vector"]
        stacks = [layers[i].matrices(tensors[i]).float() for i in self._where]
        self._values: SpectralExtremes | None = None
        if stacks:
            self._values = per_stack(by_shape(stacks, spectral_extremes), [len(stack) for stack in stacks])
        self._sigma = self.column("sigma_max")

    def sigma(self, position: int) -> Tensor:
        return self._sigma[position]

    def column(self, field: str) -> Tensor:
        """One statistic for every tensor, NaN for vectors."""
        out = torch.full((self.count,), torch.nan, dtype=torch.float32, device=self.device)
        if self._values is None:
            return out
        return out.index_copy(0, torch.tensor(self._where, device=self.device), getattr(self._values, field))


def _step(now: Tensor, before: Tensor) -> Tensor:
    """The difference, in float32 at least: in half precision it would be rounded once more."""
    return now.to(torch.promote_types(now.dtype, torch.float32)) - before


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Angle between two tensors, exact for small ones too: twice the arc sine of half the distance of unit vectors."""
    one, other = (t if t.dtype == torch.float64 else t.float() for t in (one, other))
    distance = torch.linalg.vector_norm(one / l2_along(one, None) - other / l2_along(other, None))
    return 2 * torch.asin((distance / 2).clamp_max(1.0)).float()


def spectra_of(
    layers: Sequence[Layer], exact: bool = False, group: Any = None
) -> tuple[list[str], WeightSpectrum | None]:
    """Names and full spectra of those layers that are matrices; a convolution is taken by its flattening.

    Args:
        layers: The layers, on one device. Several blocks of one layer are put together by
            :func:`dynamon.spectra.per_stack`.
        exact: Compute in float64.
        group: Processes that all hold these weights and call this together: each takes a part of the layers, and
            one reduction brings the results to all. Where weights are sharded, who holds a part is known without it;
            given as :class:`dynamon.ranks.Ranks`, this is part of their measurement.

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
        table = dealt_out(measure, costs, len(fields(WeightSpectrum)), stacks[0].device, group)
    wide = exact or any(stack.dtype == torch.float64 for stack in stacks)
    return list(own), WeightSpectrum(*(table if wide else table.float()))


def _spectra(stacks: Sequence[Tensor], exact: bool) -> Tensor:
    found = per_stack(weight_spectra(stacks, exact), [len(stack) for stack in stacks])
    return torch.stack([getattr(found, field.name).double() for field in fields(found)])


def _sharded_spectra(layers: Sequence[Layer], exact: bool, group: Any) -> tuple[list[str], WeightSpectrum | None]:
    """The same of matrices of which each process holds a part."""
    if not layers:
        return [], None
    parts = [local(layer.parameter.detach()) for layer in layers]
    ranks = group if isinstance(group, Ranks) else Ranks(parts[0].device, group)

    def measure(chosen: list[int], wholes: list[list[Tensor]]) -> Tensor:
        return _spectra([layers[i].matrices(tensors[0]) for i, tensors in zip(chosen, wholes, strict=True)], exact)

    likes = [layer.parameter for layer in layers]
    costs = [layer.parameter.numel() * min(layer.matrix_shape[1:]) for layer in layers]
    with nullcontext() if ranks is group else ranks.measurement():
        own = measured_whole(measure, [[part] for part in parts], likes, costs, len(fields(WeightSpectrum)), ranks)
        table = ranks.sum(own)
    wide = exact or any(part.dtype == torch.float64 for part in parts)
    return [layer.name for layer in layers], WeightSpectrum(*(table if wide else table.float()))


def _operator(layer: Layer, tensor: Tensor, spectra: _Spectra, position: int) -> Tensor:
    """The norm by role; where it rests on sigma_max, the one that Gram iteration found."""
    factor = sigma_factor(layer)
    if factor is not None:
        return spectra.sigma(position) * factor
    return operator_norm(layer).primal(tensor).float()
