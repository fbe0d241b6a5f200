"""Statistics of the singular values of weight matrices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels import gram_iteration

_STEPS = 8  # the gap between the bounds is then below 1 % for any rank up to 160


@dataclass(frozen=True)
class WeightSpectrum:
    r"""Singular-value statistics of one matrix; every field is a 0-d tensor (or ``[...]`` for a batch).

    Attributes:
        sigma_max: Best estimate of the largest singular value: the middle of the certificate.
        sigma_lower: Certified lower bound on it.
        sigma_upper: Certified upper bound on it.
        stable_rank: :math:`\|W\|_F^2 / \sigma_1^2`, between 1 and the rank.
        participation_ratio: :math:`(\sum \sigma_i^2)^2 / \sum \sigma_i^4`, the number of singular values
            that carry the energy.
    """

    sigma_max: Tensor
    sigma_lower: Tensor
    sigma_upper: Tensor
    stable_rank: Tensor
    participation_ratio: Tensor


def weight_spectrum(weight: Tensor, exact: bool = False) -> WeightSpectrum:
    """Singular-value statistics of a weight, without an SVD.

    Args:
        weight: Matrices ``[..., m, n]``. For a convolution pass the flattening ``weight.flatten(1)``.
        exact: Take the eigenvalues of the Gram matrix in float64 instead; the bounds then meet.

    Returns:
        :class:`WeightSpectrum` in float32 (float64 for float64 weights or ``exact``), on the weight's device.
        NaN where the weight holds NaN or infinity, zeros for a zero matrix.

    Raises:
        ValueError: If ``weight`` is not floating point, has fewer than two dimensions or is empty.

    Cost: nine products of the smaller side (see ``dynamon.kernels.gram_iteration``); with ``exact`` one
    product and an eigenvalue problem. No host synchronisation unless ``exact``.
    """
    lower, upper = gram_iteration(weight, steps=1 if exact else _STEPS)
    finite = torch.isfinite(lower)
    if exact:
        clean = torch.where(finite[..., None, None], weight, torch.zeros_like(weight)).double()
        tall = clean if clean.shape[-2] >= clean.shape[-1] else clean.mT
        lower = upper = torch.linalg.eigvalsh(tall.mT @ tall)[..., -1].clamp_min(0).sqrt()
        lower = upper = torch.where(finite, lower, torch.nan)
    matrix = weight.to(lower.dtype)
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, torch.ones_like(scale))  # squares of 1e-30 vanish otherwise
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    energy = matrix.square().sum((-2, -1))
    fourth = (tall.mT @ tall).square().sum((-2, -1))
    sigma = (lower + upper) / 2
    relative = sigma / torch.where(scale > 0, scale, torch.ones_like(scale))[..., 0, 0]
    return WeightSpectrum(
        sigma_max=sigma,
        sigma_lower=lower,
        sigma_upper=upper,
        stable_rank=_ratio(energy, relative.square()),
        participation_ratio=_ratio(energy.square(), fourth),
    )


def weight_spectra(weights: Sequence[Tensor]) -> WeightSpectrum:
    """Statistics of many matrices at once; those of one shape are computed as one batch.

    Args:
        weights: T two-dimensional tensors on one device.

    Returns:
        :class:`WeightSpectrum` whose fields have shape ``[T]``, in the order of ``weights``.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        by_shape.setdefault((*weight.shape, hash(weight.dtype)), []).append(index)
    order = [index for group in by_shape.values() for index in group]
    parts = [weight_spectrum(torch.stack([weights[i] for i in group])) for group in by_shape.values()]
    back = torch.tensor(order).argsort()

    def gather(field: str) -> Tensor:
        joined = torch.cat([getattr(part, field) for part in parts])
        return joined[back.to(joined.device)]

    return WeightSpectrum(*(gather(field) for field in WeightSpectrum.__dataclass_fields__))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero over zero is zero: a zero matrix has no rank."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)
