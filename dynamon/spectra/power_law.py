"""Power-law fits to the tail of a spectrum, with a test that rejects bad ones."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dynamon.kernels import in_double
from dynamon.kernels.constants import on_device

_SMALLEST_TAIL = 10  # eigenvalues in a tail that is worth a fit
_CANDIDATES = 64  # places where the tail may begin
_TOGETHER = 8  # candidates that share a table, which is as wide as the longest of their tails
_AT_ONCE = 2**24  # numbers in the table of all candidates of some spectra
_LILLIEFORS = 1.075  # 5 % critical value of the exponential Lilliefors test, times the square root of the count


@dataclass(frozen=True)
class PowerLaw:
    r"""A fit of :math:`\rho(\lambda) \propto \lambda^{-\alpha}` to the tail of a spectrum; fields are ``[...]``.

    Attributes:
        exponent: :math:`\alpha`; NaN where the fit is rejected.
        ks_distance: Kolmogorov-Smirnov distance of the best fit, accepted or not.
        size: Number of eigenvalues in the tail of that fit.
        start: Smallest eigenvalue in it.
    """

    exponent: Tensor
    ks_distance: Tensor
    size: Tensor
    start: Tensor


def power_law(eigenvalues: Tensor) -> PowerLaw:
    r"""Fit the tail of each set of eigenvalues by a power law, and reject fits that are not warranted.

    For every candidate start :math:`\lambda_0` the exponent is the maximum-likelihood one,
    :math:`\alpha = 1 + k / \sum \log(\lambda_i / \lambda_0)` over the k eigenvalues above it, and the start is the
    candidate with the smallest Kolmogorov-Smirnov distance (Clauset, Shalizi and Newman, arXiv 0706.1062). The fit is
    rejected (the exponent is NaN) where that distance exceeds the 5 % critical value for an estimated exponent, where
    an exponential tail is more likely, or where fewer than ten eigenvalues are left.

    Args:
        eigenvalues: ``[..., n]``, not negative, in any order: squared singular values.

    Returns:
        :class:`PowerLaw` in float64, on the host where the device has no float64; NaN for spectra that contain NaN, and
        for too few positive eigenvalues.

    Cost: some tables of ``64 n`` entries per spectrum, in chunks of 2^24 entries; about forty calls, no host
    synchronisation.

    Examples:
        >>> import torch
        >>> from dynamon.spectra.power_law import power_law
        >>> quantiles = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
        >>> round(float(power_law(quantiles ** (-1 / 1.5)).exponent), 1)  # a density of x^-2.5
        2.5
    """
    values = in_double(eigenvalues).sort(-1, descending=True).values
    count = values.shape[-1]
    if count < _SMALLEST_TAIL:
        nothing = torch.full(values.shape[:-1], torch.nan, dtype=torch.float64, device=values.device)
        return PowerLaw(nothing, nothing, torch.zeros_like(nothing), nothing)
    flat, at_once = values.reshape(-1, count), max(_AT_ONCE // (_CANDIDATES * count), 1)
    parts = [_best(part) for part in flat.split(at_once)] if len(flat) > at_once else [_best(flat)]
    joined = [torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)]
    return PowerLaw(*(column.reshape(values.shape[:-1]) for column in joined))


@lru_cache(maxsize=64)
def _tail_sizes(count: int) -> tuple[int, ...]:
    """Return candidate tail lengths on a geometric grid."""
    sizes = _SMALLEST_TAIL * (count / _SMALLEST_TAIL) ** np.linspace(0, 1, _CANDIDATES)
    return tuple(np.unique(np.minimum(np.round(sizes), count)).astype(int).tolist())


def _best(values: Tensor) -> PowerLaw:
    """Choose the candidate with the smallest distance for each of the spectra ``[T, n]``."""
    tiny = torch.finfo(torch.float64).tiny
    lengths = _tail_sizes(values.shape[-1])
    sizes = on_device(lengths, values.device, torch.float64)
    ends = on_device([k - 1 for k in lengths], values.device, torch.int64)
    logs = values.clamp_min(tiny).log()
    starts, log_starts = values.index_select(-1, ends), logs.index_select(-1, ends)
    usable = starts > 1e-12 * values[..., :1]  # what is smaller is rounding
    tables = [_Tails(lengths[i : i + _TOGETHER], values.device) for i in range(0, len(lengths), _TOGETHER)]
    totals = torch.cat([table.sums(logs) for table in tables], -1)
    excess = totals - sizes * log_starts  # sum of log(lambda / start) over the tail
    exponents = 1 + sizes / excess.clamp_min(tiny)
    parts = zip(tables, log_starts.split(_TOGETHER, -1), exponents.split(_TOGETHER, -1), strict=True)
    found = torch.cat([table.distances(logs, start, exponent) for table, start, exponent in parts], -1)
    distances = torch.where(usable, found, torch.inf)
    chosen = distances.argmin(-1, keepdim=True)

    def pick(table: Tensor) -> Tensor:
        return table.expand(distances.shape).gather(-1, chosen)[..., 0]

    size, start, exponent, distance = (pick(t) for t in (sizes, starts, exponents, distances))
    mean_excess = pick(torch.cat([table.sums(values) for table in tables], -1)) / size - start
    accepted = (distance <= _LILLIEFORS / size.sqrt()) & _beats_exponential(pick(excess), mean_excess, start, size)
    known = torch.isfinite(distance)
    return PowerLaw(
        exponent=torch.where(accepted & known, exponent, torch.nan),
        ks_distance=torch.where(known, distance, torch.nan),
        size=size,
        start=start,
    )


class _Tails:
    """Candidate tails of similar length, of spectra ``[T, n]`` in descending order."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.longest = lengths[-1]
        self.sizes = on_device(lengths, device, torch.float64)[:, None]
        self.ranks = torch.arange(1, self.longest + 1, dtype=torch.float64, device=device)
        self.inside = self.ranks <= self.sizes  # [candidates, longest]: which belong to the tail

    def sums(self, values: Tensor) -> Tensor:
        """Sum over every tail ``[T, candidates]``; a cumulative sum on a GPU is not deterministic."""
        return torch.where(self.inside, values[:, None, : self.longest], 0.0).sum(-1)

    def distances(self, logs: Tensor, log_starts: Tensor, exponents: Tensor) -> Tensor:
        """Compute Kolmogorov-Smirnov distances between every tail and its power law."""
        beyond = logs[:, None, : self.longest] - log_starts[..., None]
        below = torch.exp(beyond.mul_((1 - exponents)[..., None])).sub_(self.ranks / self.sizes)
        above = below + 1 / self.sizes
        return torch.where(self.inside, torch.maximum(below.abs_(), above.abs_()), 0.0).amax(-1)


def _beats_exponential(excess: Tensor, mean_excess: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Return whether the power law's likelihood over the tail exceeds that of an exponential with the same start."""
    rate = size / excess  # alpha - 1
    power = size * (rate.log() - start.log()) - (rate + 1) * excess
    exponential = -size * (mean_excess.log() + 1)
    return power > exponential
