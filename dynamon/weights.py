"""Sizes of weights and of the steps they take, in the norm of each layer's role."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.layers import Layer
from dynamon.norms import operator_norm, sigma_factor
from dynamon.spectra import SpectralExtremes, WeightSpectrum, by_shape, spectral_extremes, weight_spectra

FULL_SPECTRUM = ("effective_rank", "participation_ratio", "nuclear", "condition", "tail_exponent")


@dataclass(frozen=True)
class WeightReadings:
    """Per-layer readings, each ``[L]`` on the weights' device; NaN where a quantity has no meaning.

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
        stable_rank: Squared Frobenius norm over squared ``sigma_max``; NaN for vectors.
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


def weight_readings(layers: Sequence[Layer], before: Mapping[str, Tensor] | None = None) -> WeightReadings:
    """Measure the weights of some layers, and the step since an earlier copy of them.

    Args:
        layers: The layers, on one device.
        before: Earlier weights by layer name; layers that are not in it get NaN for the step.

    Returns:
        :class:`WeightReadings` in float32.

    Cost: two passes over the weights and, for matrices, two Gram iterations batched by shape. A stack of
    matrices (three dimensions and more) reports its largest member. No host synchronisation.
    """
    weights = [layer.parameter.detach() for layer in layers]
    before = before or {}
    moved = [i for i, layer in enumerate(layers) if layer.name in before]
    steps = {i: weights[i] - before[layers[i].name] for i in moved}
    spectra = _Spectra(layers, weights)
    operator = torch.stack(
        [_operator(layer, w, spectra, i) for i, (layer, w) in enumerate(zip(layers, weights, strict=True))]
    )
    step_spectra = _Spectra([layers[i] for i in moved], [steps[i] for i in moved])
    update, rotation = torch.full_like(operator, torch.nan), torch.full_like(operator, torch.nan)
    for position, i in enumerate(moved):
        update[i] = _operator(layers[i], steps[i], step_spectra, position)
        rotation[i] = _angle(before[layers[i].name], weights[i])
    wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    frobenius = torch.stack(torch._foreach_norm(weights, 2, dtype=wide)).float()
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
    )


class _Spectra:
    """Spectra of those tensors that are matrices, addressed by their position among all."""

    def __init__(self, layers: Sequence[Layer], tensors: Sequence[Tensor]) -> None:
        self.count = len(layers)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        matrices: list[Tensor] = []
        self.owners: list[int] = []
        for i, (layer, tensor) in enumerate(zip(layers, tensors, strict=True)):
            if layer.role == "vector":
                continue
            own = [tensor.flatten(1)] if layer.role == "conv" else list(tensor.reshape(-1, *tensor.shape[-2:]))
            matrices += [matrix.float() for matrix in own]
            self.owners += [i] * len(own)
        self.values: SpectralExtremes | None = by_shape(matrices, spectral_extremes) if matrices else None
        self._sigma = self.column("sigma_max")

    def sigma(self, position: int) -> Tensor:
        return self._sigma[position]

    def column(self, field: str) -> Tensor:
        """One statistic for every tensor; a stack of matrices gives its largest."""
        out = torch.full((self.count,), torch.nan, device=self.device)
        if self.values is None:
            return out
        owners = torch.tensor(self.owners, device=self.device)
        return out.scatter_reduce(0, owners, getattr(self.values, field), "amax", include_self=False)


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Angle between two tensors, exact for small ones too: twice the arc sine of half the distance of unit vectors."""
    one, other = (t if t.dtype == torch.float64 else t.float() for t in (one, other))
    distance = torch.linalg.vector_norm(one / torch.linalg.vector_norm(one) - other / torch.linalg.vector_norm(other))
    return 2 * torch.asin((distance / 2).clamp_max(1.0)).float()


def spectra_of(layers: Sequence[Layer], exact: bool = False) -> tuple[list[str], WeightSpectrum | None]:
    """Names and full spectra of those layers that are one matrix, or a convolution, which is flattened.

    Args:
        layers: The layers, on one device.
        exact: Compute in float64.

    Cost: as :func:`dynamon.spectra.weight_spectrum`, batched by shape; waits for the device.
    """
    own = {
        layer.name: layer.parameter.detach().flatten(1)
        for layer in layers
        if layer.role == "conv" or layer.role != "vector" and layer.parameter.ndim == 2
    }
    return list(own), weight_spectra(list(own.values()), exact) if own else None


def _operator(layer: Layer, tensor: Tensor, spectra: _Spectra, position: int) -> Tensor:
    """The norm by role; where it rests on sigma_max, the one that Gram iteration found."""
    factor = sigma_factor(layer)
    if factor is not None:
        return spectra.sigma(position) * factor
    return operator_norm(layer).primal(tensor).amax().float()
