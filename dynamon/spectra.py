"""Statistics of the singular values of weight matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynamon.kernels import decomposable, gram_iteration, top_singular
from dynamon.tails import power_law

_SMALL = 1e-6  # entries between this and its inverse have squares that neither vanish nor overflow
_STEPS = 8  # the gap between the bounds is then below 1 % for any rank up to 160


@dataclass(frozen=True)
class SpectralExtremes:
    r"""What can be had of the singular values without computing them; every field is ``[...]``.

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


@dataclass(frozen=True)
class WeightSpectrum:
    r"""Singular-value statistics of one matrix; every field is a 0-d tensor (or ``[...]`` for a batch).

    Attributes:
        sigma_max: Largest singular value.
        sigma_lower: Lower bound on it, less a rounding allowance.
        sigma_upper: Upper bound on it, more a rounding allowance.
        stable_rank: :math:`\|W\|_F^2 / \sigma_1^2`, between 1 and the rank.
        effective_rank: :math:`\exp(-\sum p_i \log p_i)` with :math:`p_i = \sigma_i / \sum \sigma` (Roy and Vetterli).
        participation_ratio: :math:`(\sum \sigma_i^2)^2 / \sum \sigma_i^4`, the number of singular values
            that carry the energy.
        nuclear: Sum of the singular values.
        condition: Largest over smallest singular value; NaN where the smallest is lost in rounding.
        tail_exponent: Power-law exponent of the largest eigenvalues of the Gram matrix
            (:func:`dynamon.tails.power_law`); NaN where they follow no power law.
        tail_distance: Kolmogorov-Smirnov distance of that fit; small is good.
    """

    sigma_max: Tensor
    sigma_lower: Tensor
    sigma_upper: Tensor
    stable_rank: Tensor
    effective_rank: Tensor
    participation_ratio: Tensor
    nuclear: Tensor
    condition: Tensor
    tail_exponent: Tensor
    tail_distance: Tensor


def weight_spectrum(weight: Tensor, exact: bool = False) -> WeightSpectrum:
    """Singular-value statistics of a weight, from the eigenvalues of its smaller Gram matrix.

    Args:
        weight: Matrices ``[..., m, n]``. For a convolution pass the flattening ``weight.flatten(1)``.
        exact: Compute in float64 whatever the dtype. Else singular values below about ``sqrt(n eps)`` of the largest
            (7e-3 for n = 768 in float32) count as zero, and the condition number is NaN where the smallest is.

    Returns:
        :class:`WeightSpectrum` in float32 (float64 for float64 weights or ``exact``), on the weight's device
        if that is a CPU or CUDA, else on the host. NaN where the weight holds NaN or infinity. A zero matrix has
        singular values of zero and no ranks, condition or tail: these are NaN.

    Raises:
        ValueError: If ``weight`` is not floating point, has fewer than two dimensions or is empty.

    Cost: one product ``2 m n s`` with s = min(m, n) and the eigenvalues of an ``s x s`` matrix, which wait for the
    device. Two to five times faster than singular values. :func:`spectral_extremes` is cheaper and does not wait.
    """
    _check(weight)
    weight = decomposable(weight)
    work = weight.double() if exact or weight.dtype == torch.float64 else weight.float()
    scale = torch.linalg.vector_norm(work, torch.inf, dim=(-2, -1))
    finite = torch.isfinite(scale)
    if bool((finite & (scale > _SMALL) & (scale < 1 / _SMALL)).all()):
        scale = torch.ones_like(scale)  # as nearly always: two passes saved
    else:
        scale = torch.where(finite, scale, torch.zeros_like(scale))
        work = torch.where(finite[..., None, None], work, torch.zeros_like(work))
        work = work / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None, None]
    tall = work if work.shape[-2] >= work.shape[-1] else work.mT
    energies = torch.linalg.eigvalsh(tall.mT @ tall).flip(-1).clamp_min(0)
    size, eps = energies.shape[-1], torch.finfo(work.dtype).eps
    lost = energies <= size * eps * energies[..., :1]
    found = _statistics(torch.where(lost, torch.zeros_like(energies), energies), lost[..., -1])
    allowance = eps * (8 + 2 * size**0.5)
    sigma = found["sigma_max"]
    found |= {"sigma_lower": sigma * (1 - allowance), "sigma_upper": sigma * (1 + allowance)}
    for name in ("sigma_max", "sigma_lower", "sigma_upper", "nuclear"):
        found[name] = found[name] * scale
    unknown = torch.where(finite, 1.0, torch.nan).to(work)
    return WeightSpectrum(**{field.name: found[field.name] * unknown for field in fields(WeightSpectrum)})


def _statistics(energies: Tensor, rank_lost: Tensor) -> dict[str, Tensor]:
    """Everything that follows from the eigenvalues ``[..., s]``, largest first, of the Gram matrix."""
    sigmas = energies.sqrt()
    nuclear, energy = sigmas.sum(-1), energies.sum(-1)
    shares = sigmas / torch.where(nuclear > 0, nuclear, torch.ones_like(nuclear))[..., None]
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    tail = power_law(energies)
    return {
        "sigma_max": sigmas[..., 0],
        "stable_rank": energy / energies[..., 0],
        "effective_rank": torch.where(nuclear > 0, entropy.exp(), torch.nan),
        "participation_ratio": energy.square() / energies.square().sum(-1),
        "nuclear": nuclear,
        "condition": torch.where(rank_lost, torch.nan, sigmas[..., 0] / sigmas[..., -1]),
        "tail_exponent": tail.exponent.to(sigmas),
        "tail_distance": tail.distance.to(sigmas),
    }


def spectral_extremes(weight: Tensor) -> SpectralExtremes:
    """The largest singular value with its certificate, and the ranks that need no other, without a decomposition.

    Args:
        weight: Matrices ``[..., m, n]``. For a convolution pass the flattening ``weight.flatten(1)``.

    Returns:
        :class:`SpectralExtremes` in float32 (float64 for float64), on the weight's device. NaN where the weight holds
        NaN or infinity. A zero matrix has a sigma_max of zero and no ranks: these are NaN.

    Raises:
        ValueError: If ``weight`` is not floating point, has fewer than two dimensions or is empty.

    Cost: nine products of the smaller side (see ``dynamon.kernels.gram_iteration``). No host synchronisation.
    """
    _check(weight)
    lower, upper = gram_iteration(weight, steps=_STEPS)
    matrix = weight.to(lower.dtype)
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    matrix = matrix / torch.where(scale > 0, scale, torch.ones_like(scale))  # squares of 1e-30 vanish otherwise
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    energy = matrix.square().sum((-2, -1))
    fourth = (tall.mT @ tall).square().sum((-2, -1))
    sigma = lower + (upper - lower) / 2  # the sum could overflow
    relative = sigma / torch.where(scale > 0, scale, torch.ones_like(scale))[..., 0, 0]
    return SpectralExtremes(
        sigma_max=sigma,
        sigma_lower=lower,
        sigma_upper=upper,
        stable_rank=energy / relative.square(),
        participation_ratio=energy.square() / fourth,
    )


Statistics = TypeVar("Statistics", SpectralExtremes, WeightSpectrum)


def by_shape(weights: Sequence[Tensor], measure: Callable[[Tensor], Statistics]) -> Statistics:
    """Measure many matrices at once; those of one shape and dtype are one batch.

    Args:
        weights: Matrices ``[m, n]`` or stacks of them ``[..., m, n]`` on one device.
        measure: :func:`spectral_extremes`, or :func:`weight_spectrum`.

    Returns:
        Statistics whose fields have shape ``[T]``, T the number of matrices, in the order of ``weights`` and of the
        members of each stack.

    Raises:
        ValueError: Without a matrix, and what ``measure`` raises.
    """
    if not weights:
        raise ValueError("a spectrum needs at least one matrix.")
    stacks = [weight.reshape(-1, *weight.shape[-2:]) for weight in weights]
    ends = list(accumulate(len(stack) for stack in stacks))
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, stack in enumerate(stacks):
        groups.setdefault((stack.shape[1:], stack.dtype), []).append(index)
    parts = [measure(_joined([stacks[i] for i in group])) for group in groups.values()]
    order = [m for group in groups.values() for i in group for m in range(ends[i] - len(stacks[i]), ends[i])]
    back = torch.tensor(order).argsort()

    def gather(field: str) -> Tensor:
        joined = torch.cat([getattr(part, field) for part in parts])
        return joined[back.to(joined.device)]

    kind = type(parts[0])
    return kind(*(gather(field.name) for field in fields(kind)))


def per_stack(found: Statistics, sizes: Sequence[int]) -> Statistics:
    """One reading for each stack of matrices, of readings for each matrix.

    Largest singular values and their bounds and the condition number are those of the worst member, the nuclear norm
    is the sum; ranks, tails and the rest are the mean over the members that have one.

    Args:
        found: Fields ``[T]``, the members of one stack after the other.
        sizes: Number of members of each of S stacks; none may be zero.

    Returns:
        The same statistics, fields ``[S]``.
    """
    if all(size == 1 for size in sizes):
        return found
    owners = torch.repeat_interleave(torch.tensor(sizes)).to(found.sigma_max.device)

    def combine(field: str) -> Tensor:
        values: Tensor = getattr(found, field)
        out = values.new_zeros(len(sizes))
        how = _OF_A_STACK.get(field)
        if how is not None:
            return out.scatter_reduce(0, owners, values, how, include_self=False)
        # What a zero matrix has none of is left out; a matrix that is not finite shows.
        known = ~values.isnan() if field.startswith("tail") else ~values.isnan() | found.sigma_max.isnan()
        total = out.scatter_add(0, owners, torch.where(known, values, torch.zeros_like(values)))
        return total / out.scatter_add(0, owners, known.to(values))

    kind = type(found)
    return kind(*(combine(field.name) for field in fields(kind)))


_OF_A_STACK = {
    "sigma_max": "amax",
    "sigma_lower": "amax",
    "sigma_upper": "amax",
    "condition": "amax",
    "nuclear": "sum",
}


def weight_spectra(weights: Sequence[Tensor], exact: bool = False) -> WeightSpectrum:
    """:func:`weight_spectrum` of many matrices ``[..., m, n]``, batched by shape; fields have shape ``[T]``."""
    return by_shape(weights, lambda batch: weight_spectrum(batch, exact))


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    """One batch; a single stack is not copied."""
    return stacks[0] if len(stacks) == 1 else torch.cat(list(stacks))


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """One batch; a single matrix, an embedding say, is not copied."""
    return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))


class SigmaTracker:
    """The largest singular values of the same weights again and again, by two power steps from the last vectors.

    Each value is a lower bound up to rounding; for weights that change slowly it is exact to about 1 %, to 1e-3 where
    the largest singular value stands apart. Take
    :func:`spectral_extremes` now and then for a certificate.

    Args:
        steps: Power steps a refresh; the first one takes twenty times as many.
    """

    def __init__(self, steps: int = 2) -> None:
        """Nothing known yet."""
        self._steps = steps
        self._vectors: list[Tensor] = []

    def update(self, weights: Sequence[Tensor]) -> Tensor:
        """Refresh: ``[T]`` largest singular values of T matrices ``[m, n]``, in float32 (float64 for float64).

        Raises:
            ValueError: If a matrix has another shape than the last time.

        Cost: each matrix is read five times. On a GPU matrices of one shape are stacked, so that launches are few.
        """
        first = not self._vectors
        steps = self._steps * (20 if first else 1)
        starts: list[Tensor | None] = list(self._vectors) if not first else [None] * len(weights)
        if len(starts) != len(weights):
            raise ValueError(f"there were {len(starts)} matrices the last time, now there are {len(weights)}.")
        groups: dict[Any, list[int]] = {}
        for i, weight in enumerate(weights):
            groups.setdefault((weight.shape, weight.dtype) if weight.is_cuda else i, []).append(i)
        values: list[Tensor] = [torch.empty(0)] * len(weights)
        vectors = list(values)
        for group in groups.values():
            known = [start for i in group if (start := starts[i]) is not None]
            batch = _stacked([weights[i] for i in group])
            found, after = top_singular(batch, torch.stack(known) if known else None, steps)
            for i, value, vector in zip(group, found, after, strict=True):
                values[i], vectors[i] = value, vector
        self._vectors = vectors
        return torch.stack(values)


def _check(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"a spectrum needs a floating point tensor, got {weight.dtype}.")
    if weight.ndim < 2 or 0 in weight.shape:
        raise ValueError(f"a spectrum needs matrices [..., m, n], got shape {tuple(weight.shape)}.")
