"""Statistics of the singular values of weight matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from dynamon.kernels import decomposable
from dynamon.kernels.arguments import check_tensor
from dynamon.kernels.constants import on_device
from dynamon.kernels.gram import gram_extremes
from dynamon.kernels.nuclear import gram_eigenvalues
from dynamon.kernels.precision import product_allowance
from dynamon.kernels.thresholds import half_pays
from dynamon.spectra.power_law import power_law

_SMALL = 1e-6  # entries between this and its inverse have squares that neither vanish nor overflow
_AT_ONCE = 2**27  # entries of matrices that are copied together
_STEPS = 8  # the gap between the bounds is then below 1 % for any rank up to 160


@dataclass(frozen=True)
class SpectralExtremes:
    r"""Statistics of singular values that need no decomposition; every field is ``[...]``.

    Attributes:
        sigma_max: Estimate of the largest singular value, the middle of its bounds.
        sigma_lower: Certified lower bound on it.
        sigma_upper: Certified upper bound on it.
        stable_rank: :math:`\|W\|_F^2 / \sigma_1^2`, between 1 and the rank.
    """

    sigma_max: Tensor
    sigma_lower: Tensor
    sigma_upper: Tensor
    stable_rank: Tensor


@dataclass(frozen=True)
class WeightSpectrum:
    r"""Singular-value statistics of one matrix; every field is a 0-d tensor (``[...]`` for a batch).

    Attributes:
        sigma_max: Largest singular value.
        sigma_lower: Lower bound on it, with a rounding allowance.
        sigma_upper: Upper bound on it, with a rounding allowance.
        stable_rank: :math:`\|W\|_F^2 / \sigma_1^2`, between 1 and the rank.
        effective_rank: :math:`\exp(-\sum p_i \log p_i)` with :math:`p_i = \sigma_i / \sum \sigma` (Roy and Vetterli).
        participation_ratio: :math:`(\sum \sigma_i^2)^2 / \sum \sigma_i^4`, the number of singular values that hold most
            of the squared norm.
        nuclear: Sum of the singular values.
        condition: Largest over smallest singular value; NaN where the smallest is lost in rounding.
        tail_exponent: Power-law exponent of the largest eigenvalues of the Gram matrix
            (:func:`dynamon.spectra.power_law.power_law`); NaN where they follow no power law.
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
    """Compute singular-value statistics of a weight from the eigenvalues of its smaller Gram matrix.

    Args:
        weight: Matrices ``[..., m, n]``. For a convolution pass the flattening ``weight.flatten(1)``.
        exact: Compute in float64 whatever the dtype. Otherwise singular values below about ``sqrt(n eps)`` of the
            largest (7e-3 for n = 768 in float32; 6e-2 where its products are taken in TensorFloat-32) count as zero,
            and the condition number is NaN where the smallest one does.

    Returns:
        :class:`WeightSpectrum` in float32 (float64 for float64 weights or ``exact``), on the weight's device if that is
        a CPU or CUDA, else on the host. NaN where the weight contains NaN or infinity. A zero matrix has singular
        values of zero; its ranks, condition and tail are NaN.

    Raises:
        TypeError: If ``weight`` is not a tensor.
        ValueError: If it is not floating point, has fewer than two dimensions or is empty.

    Cost: one product ``2 m n s`` with s = min(m, n) and the eigenvalues of an ``s x s`` matrix, which synchronise with
    the device. Two to five times faster than singular values. :func:`spectral_extremes` is cheaper and does not
    synchronise.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import weight_spectrum
        >>> found = weight_spectrum(torch.diag(torch.tensor([4.0, 2.0, 2.0])))
        >>> [round(float(value), 2) for value in (found.sigma_max, found.stable_rank, found.nuclear, found.condition)]
        [4.0, 1.5, 8.0, 2.0]
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
    energies = gram_eigenvalues(tall).flip(-1).clamp_min(0)
    size, eps, spare = energies.shape[-1], torch.finfo(work.dtype).eps, product_allowance(work)
    lost = energies <= (size * eps + spare) * energies[..., :1]
    found = _statistics(torch.where(lost, torch.zeros_like(energies), energies), lost[..., -1])
    allowance = eps * (8 + 2 * size**0.5) + spare
    sigma = found["sigma_max"]
    found |= {"sigma_lower": sigma * (1 - allowance), "sigma_upper": sigma * (1 + allowance)}
    for name in ("sigma_max", "sigma_lower", "sigma_upper", "nuclear"):
        found[name] = found[name] * scale
    unknown = torch.where(finite, 1.0, torch.nan).to(work)
    return WeightSpectrum(**{field.name: found[field.name] * unknown for field in fields(WeightSpectrum)})


def _statistics(energies: Tensor, rank_lost: Tensor) -> dict[str, Tensor]:
    """Compute everything that follows from the Gram matrix's eigenvalues ``[..., s]``, largest first."""
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
        "tail_distance": tail.ks_distance.to(sigmas),
    }


def spectral_extremes(weight: Tensor) -> SpectralExtremes:
    """Bound the largest singular value and compute the stable rank, without a decomposition.

    Args:
        weight: Matrices ``[..., m, n]``. For a convolution pass the flattening ``weight.flatten(1)``.

    Returns:
        :class:`SpectralExtremes` in float32 (float64 for float64), on the weight's device. NaN where the weight
        contains NaN or infinity. A zero matrix has a sigma_max of zero and a stable rank of NaN.

    Raises:
        TypeError: If ``weight`` is not a tensor.
        ValueError: If it is not floating point, has fewer than two dimensions or is empty.

    Cost: eight products of the smaller side (see ``dynamon.kernels.gram_iteration``). No host synchronisation.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import spectral_extremes
        >>> found = spectral_extremes(torch.diag(torch.tensor([4.0, 2.0, 2.0])))
        >>> bool(found.sigma_lower <= 4 <= found.sigma_upper), round(float(found.stable_rank), 1)
        (True, 1.5)
    """
    _check(weight)
    found = extremes_of([weight])
    return SpectralExtremes(*(value.reshape(weight.shape[:-2]) for value in vars(found).values()))


def extremes_of(stacks: Sequence[Tensor]) -> SpectralExtremes:
    """Compute :func:`spectral_extremes` of many matrices in few calls.

    Args:
        stacks: Matrices ``[..., m, n]`` of any shapes on one device, at least one.

    Returns:
        Fields ``[T]``, T the number of matrices, in the order of ``stacks`` and of the members of each.

    Raises:
        ValueError: As :func:`spectral_extremes`.

    Cost: one pass over the matrices and eight products of the smaller side; about 70 calls per smaller side and 10 per
    shape. Matrices are copied in chunks of up to 2^27 entries. No host synchronisation.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import extremes_of
        >>> extremes_of([torch.eye(3), torch.ones(2, 5, 4)]).sigma_max.shape
        torch.Size([3])
    """
    for stack in stacks:
        _check(stack)
    found = gram_extremes([stack.reshape(-1, *stack.shape[-2:]) for stack in stacks], _STEPS)
    sigma = (found.lower + found.upper) / 2  # relative to the largest entry, so that the sum cannot overflow
    return SpectralExtremes(
        sigma_max=sigma * found.scale,
        sigma_lower=found.lower * found.scale,
        sigma_upper=found.upper * found.scale,
        stable_rank=found.energy / sigma.square(),
    )


def largest_singular_values(stacks: Sequence[Tensor]) -> Tensor:
    """Estimate the largest singular values of many matrices whose bounds are not needed, such as updates.

    Args:
        stacks: S stacks ``[t, m, n]`` of matrices on one device, at least one.

    Returns:
        ``[T]`` in float32 (float64 where a stack is): the middle of Gram iteration's bounds, within 0.7 % for ranks up
        to 768. On GPUs with bfloat16 units (:mod:`dynamon.kernels.thresholds`) products are taken in bfloat16, and the
        estimate is within 1 %.

    Cost: as :func:`extremes_of`; products in bfloat16 where that pays.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import largest_singular_values
        >>> largest_singular_values([torch.eye(3)[None], 2 * torch.eye(2)[None]]).round(decimals=2)
        tensor([1., 2.])
    """
    half = half_pays(stacks[0].device) and all(stack.dtype != torch.float64 for stack in stacks)
    found = gram_extremes(stacks, _STEPS, half)
    return (found.lower + found.upper) / 2 * found.scale


def largest_per_stack(stacks: Sequence[Tensor]) -> Tensor:
    """Return the largest of :func:`largest_singular_values` in each of S stacks, ``[S]``.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import largest_per_stack
        >>> largest_per_stack([torch.stack([torch.eye(3), 5 * torch.eye(3)]), 2 * torch.eye(2)[None]]).round(decimals=1)
        tensor([5., 2.])
    """
    values, sizes = largest_singular_values(stacks), [len(stack) for stack in stacks]
    if all(size == 1 for size in sizes):
        return values
    table, inside = _by_stack(values[None], sizes)
    return torch.where(inside, table[0], -torch.inf).amax(-1)


Statistics = TypeVar("Statistics", SpectralExtremes, WeightSpectrum)


def batched_by_shape(weights: Sequence[Tensor], measure: Callable[[Tensor], Statistics]) -> Statistics:
    """Measure many matrices at once; those of one shape and dtype form one batch.

    Args:
        weights: Matrices ``[m, n]`` or stacks of them ``[..., m, n]`` on one device.
        measure: :func:`spectral_extremes` or :func:`weight_spectrum`.

    Returns:
        Statistics whose fields have shape ``[T]``, T the number of matrices, in the order of ``weights`` and of the
        members of each stack.

    Raises:
        TypeError: If one of them is not a tensor.
        ValueError: Without a matrix, and as ``measure`` does.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import batched_by_shape, weight_spectrum
        >>> batched_by_shape([torch.eye(2), torch.eye(3), 4 * torch.eye(2)], weight_spectrum).sigma_max
        tensor([1., 1., 4.])
    """
    if not weights:
        raise ValueError("a spectrum needs at least one matrix.")
    for weight in weights:
        check_tensor("weights", weight, "[..., m, n] each")
    stacks = [weight.reshape(-1, *weight.shape[-2:]) for weight in weights]
    ends = list(accumulate(len(stack) for stack in stacks))
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, stack in enumerate(stacks):
        groups.setdefault((stack.shape[1:], stack.dtype), []).append(index)
    calls = [call for group in groups.values() for call in _calls(group, stacks)]
    parts = [measure(_joined([stacks[i] for i in call])) for call in calls]
    order = [m for call in calls for i in call for m in range(ends[i] - len(stacks[i]), ends[i])]
    kind = type(parts[0])
    if order == list(range(len(order))) and len(parts) == 1:
        return parts[0]
    names, back = [field.name for field in fields(kind)], sorted(range(len(order)), key=order.__getitem__)
    wide = torch.float64 if any(part.sigma_max.dtype == torch.float64 for part in parts) else torch.float32
    table = torch.cat([torch.stack([getattr(part, name) for name in names]).to(wide) for part in parts], 1)
    return kind(*table.index_select(1, on_device(back, table.device, torch.int64)).unbind())


def _calls(group: Sequence[int], stacks: Sequence[Tensor]) -> list[list[int]]:
    """Divide stacks into portions whose copies fit into device memory."""
    found: list[list[int]] = [[]]
    for i in group:
        if found[-1] and sum(stacks[j].numel() for j in found[-1]) + stacks[i].numel() > _AT_ONCE:
            found.append([])
        found[-1].append(i)
    return found


def reduce_blocks(found: Statistics, sizes: Sequence[int]) -> Statistics:
    """Reduce readings of single matrices to one reading per stack.

    Largest singular values, their bounds and the condition number are maxima over the members, the nuclear norm is
    their sum. Ranks, tails and the rest are means over the members that have one.

    Args:
        found: Statistics with fields ``[T]``, members stack by stack.
        sizes: Number of members of each of S stacks; none may be zero.

    Returns:
        The same statistics with fields ``[S]``.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import reduce_blocks, weight_spectra
        >>> heads = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> found = reduce_blocks(weight_spectra([heads, torch.eye(2)]), [2, 1])
        >>> found.sigma_max, found.nuclear
        (tensor([3., 1.]), tensor([8., 2.]))
    """
    if all(size == 1 for size in sizes):
        return found
    kind = type(found)
    names = [field.name for field in fields(kind)]
    table, inside = _by_stack(torch.stack([getattr(found, name) for name in names]), sizes)
    lost = table[names.index("sigma_max")].isnan()
    combined: dict[str, Tensor] = {}
    for name, values in zip(names, table, strict=True):
        how = _BLOCK_REDUCTIONS.get(name, "mean")
        if how == "amax":
            combined[name] = torch.where(inside, values, -torch.inf).amax(-1)
        elif how == "sum":
            combined[name] = torch.where(inside, values, 0.0).sum(-1)
        else:  # what a zero matrix has none of is left out; a matrix that is not finite shows, but for its tail
            known = ~values.isnan() if name.startswith("tail") else ~values.isnan() | lost
            known &= inside
            combined[name] = torch.where(known, values, 0.0).sum(-1) / known.sum(-1)
    return kind(**combined)


def _by_stack(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Arrange readings ``[F, T]`` of members as ``[F, S, longest]`` with a mask; sums have a fixed order."""
    longest, device = max(sizes), values.device
    ends = accumulate(sizes)
    chosen = [end - size + min(j, size - 1) for end, size in zip(ends, sizes, strict=True) for j in range(longest)]
    flags = [j < size for size in sizes for j in range(longest)]
    table = values.index_select(1, on_device(chosen, device, torch.int64)).unflatten(1, (len(sizes), longest))
    return table, on_device(flags, device, torch.bool).view(len(sizes), longest)


_BLOCK_REDUCTIONS = {
    "sigma_max": "amax",
    "sigma_lower": "amax",
    "sigma_upper": "amax",
    "condition": "amax",
    "nuclear": "sum",
}


def weight_spectra(weights: Sequence[Tensor], exact: bool = False) -> WeightSpectrum:
    """Compute :func:`weight_spectrum` of many matrices ``[..., m, n]``, batched by shape; fields have shape ``[T]``.

    Examples:
        >>> import torch
        >>> from dynamon.spectra import weight_spectra
        >>> weight_spectra([torch.eye(2), torch.eye(5, 3)]).stable_rank
        tensor([2., 3.])
    """
    return batched_by_shape(weights, lambda batch: weight_spectrum(batch, exact))


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    """Join stacks to one batch; a single stack is not copied."""
    return stacks[0] if len(stacks) == 1 else torch.cat(list(stacks))


def _check(weight: Tensor) -> None:
    check_tensor("weight", weight, "[..., m, n]")
    if not weight.is_floating_point():
        raise ValueError(f"a spectrum needs a floating point tensor, got {weight.dtype}.")
    if weight.ndim < 2 or 0 in weight.shape:
        raise ValueError(f"a spectrum needs matrices [..., m, n], got shape {tuple(weight.shape)}.")
