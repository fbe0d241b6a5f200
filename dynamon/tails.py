"""Power laws in the tail of a spectrum, and when there is none."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels import in_double

_SMALLEST_TAIL = 10  # eigenvalues in a tail that is worth a fit
_CANDIDATES = 64  # places where the tail may begin
_LILLIEFORS = 1.075  # 5 % critical value of the exponential Lilliefors test, times the square root of the count


@dataclass(frozen=True)
class PowerLaw:
    r"""A fit of :math:`\rho(\lambda) \propto \lambda^{-\alpha}` to the tail of a spectrum; fields are ``[...]``.

    Attributes:
        exponent: :math:`\alpha`; NaN where there is no power law to speak of.
        distance: Kolmogorov-Smirnov distance of the best fit, whether it is accepted or not.
        size: Eigenvalues in the tail of that fit.
        start: Where it begins.
    """

    exponent: Tensor
    distance: Tensor
    size: Tensor
    start: Tensor


def power_law(eigenvalues: Tensor) -> PowerLaw:
    r"""Fit the tail of each set of eigenvalues by a power law, and say where that is not warranted.

    For every candidate start :math:`\lambda_0` the exponent is the maximum-likelihood one,
    :math:`\alpha = 1 + k / \sum \log(\lambda_i / \lambda_0)` over the k eigenvalues above it, and the start is the
    candidate with the smallest Kolmogorov-Smirnov distance (Clauset, Shalizi and Newman, arXiv 0706.1062). The fit is
    refused (the exponent is NaN) where that distance exceeds the 5 % critical value for an estimated exponent, where an
    exponential tail is more likely, or where fewer than ten eigenvalues are left.

    Args:
        eigenvalues: ``[..., n]``, not negative, in any order: squared singular values.

    Returns:
        :class:`PowerLaw` in float64, on the host where the device has none; NaN for spectra that hold NaN, and for too
        few positive eigenvalues.

    Cost: ``64 n`` numbers a spectrum; no host synchronisation.
    """
    values = in_double(eigenvalues).sort(-1, descending=True).values
    if values.shape[-1] < _SMALLEST_TAIL:
        nothing = torch.full(values.shape[:-1], torch.nan, dtype=torch.float64, device=values.device)
        return PowerLaw(nothing, nothing, torch.zeros_like(nothing), nothing)
    return _best(values, _tail_sizes(values.shape[-1], values.device))


def _tail_sizes(count: int, device: torch.device) -> Tensor:
    """Candidate numbers of eigenvalues in the tail, on a geometric grid."""
    exponents = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64, device=device)
    return (_SMALLEST_TAIL * (count / _SMALLEST_TAIL) ** exponents).round().long().clamp_max(count).unique()


def _best(values: Tensor, sizes: Tensor) -> PowerLaw:
    """The candidate with the smallest distance, for each spectrum."""
    tiny = torch.finfo(torch.float64).tiny
    logs = values.clamp_min(tiny).log()
    starts = values[..., sizes - 1]
    usable = starts > 1e-12 * values[..., :1]  # what is smaller is rounding
    counts = sizes.tolist()
    excess = _sums(logs, counts) - sizes * logs[..., sizes - 1]  # sum of log(lambda / start) over the tail
    exponents = 1 + sizes / excess.clamp_min(tiny)
    distances = torch.stack([_distance(logs[..., :k], exponents[..., i]) for i, k in enumerate(counts)], dim=-1)
    distances = torch.where(usable, distances, torch.inf)
    chosen = distances.argmin(-1, keepdim=True)

    def pick(table: Tensor) -> Tensor:
        return table.expand(distances.shape).gather(-1, chosen)[..., 0]

    size, start, exponent, distance = (pick(t) for t in (sizes.double(), starts, exponents, distances))
    mean_excess = pick(_sums(values, counts)) / size - start
    accepted = (distance <= _LILLIEFORS / size.sqrt()) & _beats_exponential(pick(excess), mean_excess, start, size)
    known = torch.isfinite(distance)
    return PowerLaw(
        exponent=torch.where(accepted & known, exponent, torch.nan),
        distance=torch.where(known, distance, torch.nan),
        size=size,
        start=start,
    )


def _sums(values: Tensor, counts: list[int]) -> Tensor:
    """Sums of the first so many numbers, ``[..., candidates]``; a cumulative sum on a GPU is not deterministic."""
    return torch.stack([values[..., :k].sum(-1) for k in counts], dim=-1)


def _distance(logs: Tensor, exponent: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance between a tail (descending logarithms) and the power law that begins at its end."""
    count = logs.shape[-1]
    survival = torch.exp(-(exponent[..., None] - 1) * (logs - logs[..., -1:]))
    ranks = torch.arange(1, count + 1, dtype=logs.dtype, device=logs.device) / count
    return torch.maximum((survival - ranks).abs(), (survival - ranks + 1 / count).abs()).amax(-1)


def _beats_exponential(excess: Tensor, mean_excess: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Whether the power law's likelihood over the tail exceeds that of an exponential from the same start."""
    rate = size / excess  # alpha - 1
    power = size * (rate.log() - start.log()) - (rate + 1) * excess
    exponential = -size * (mean_excess.log() + 1)
    return power > exponential
