"""The steps that weights take: their sizes in the layers' norms, and how one turns into the next."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.norms.forms import group_by_function

_UNLIKE = 1e5  # lengths of two steps whose quotient is larger leave nothing of their inner product


def primal_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """Take the primal norm of one tensor per layer, without a decomposition.

    Args:
        layers: L layers.
        norms: The norm of each, fitted to it as :func:`dynamon.norms.update_norm` does.
        tensors: One per layer, stored as its weight is, all on one device.

    Returns:
        ``[L]``, in float32 (float64 where a tensor is). Spectral norms are those of
        :func:`dynamon.spectra.largest_singular_values`, within 1 %; a layer of several matrices counts as its largest.

    Cost: one pass over the tensors, and eight products of the smaller side for spectral norms; some ten calls, and
    those of the spectral norms. No host synchronisation.
    """
    if not layers:
        return torch.zeros(0)
    groups = group_by_function([norm.batched_primal for norm in norms])
    columns = [
        measure([layers[i] for i in own], [norms[i] for i in own], [tensors[i] for i in own]) for measure, own in groups
    ]
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    joined = torch.cat([column.to(wide) for column in columns])
    order = [i for _, own in groups for i in own]
    if order == sorted(order):
        return joined
    return joined.index_select(0, on_device(np.argsort(order).tolist(), joined.device, torch.int64))


def differences(now: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """Subtract tensors, in float32 at least: differences in half precision would be rounded once more.

    Args:
        now: T tensors.
        before: T tensors of the same shapes.

    Cost: one call, three where a dtype differs.
    """
    if not now:
        return []
    wide = [torch.promote_types(t.dtype, torch.float32) for t in now]
    current, others = in_dtypes(now, wide), in_dtypes(before, wide)
    if any(a is b for a, b in zip(current, now, strict=True)):
        return list(torch._foreach_sub(current, others))
    torch._foreach_sub_(current, others)
    return current


def in_dtypes(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Convert tensors to these dtypes in one call; return them as they are where all have them already."""
    if all(tensor.dtype == dtype for tensor, dtype in zip(tensors, dtypes, strict=True)):
        return list(tensors)
    found = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(found, list(tensors))
    return found


def wide_lengths(tensors: Sequence[Tensor]) -> Tensor:
    """Take Euclidean norms ``[T]`` in float64, where the device has it, so that they can be subtracted."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=widest_dtype(tensors[0].device)))


def cosines(last: Tensor, previous: Tensor, apart: Tensor) -> Tensor:
    r"""Compute cosines between pairs of vectors from their lengths and that of their difference, all in float64.

    :math:`1 - (|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|)`. The difference is of rounded entries: what is found is off by
    up to 6e-8 times the quotient of the lengths, in practice less by the root of the number of entries.

    Args:
        last: Lengths ``[...]``.
        previous: Those of the other vectors.
        apart: Those of the differences.

    Returns:
        ``[...]``; NaN where a length is zero, or one is 1e5 times the other.
    """
    longer = last - previous
    found = 1 - ((apart - longer) / last) * ((apart + longer) / previous) / 2
    alike = (last > 0) & (previous > 0) & (last < _UNLIKE * previous) & (previous < _UNLIKE * last)
    return torch.where(alike, found.clamp(-1, 1), torch.nan)


def angles(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    r"""Compute angles between vectors before and after a step from the lengths of both and of the step, in float64.

    The squared distance of the unit vectors is :math:`(|d|^2 - (|b| - |a|)^2) / (|a| |b|)`: exact for small angles too,
    since the length of the step is that of the step itself. Where the step is along the vector, the root of the sums'
    rounding stays: up to 2e-8 times the root of ``|d| / |a|``, and where entries change by more than half of
    themselves 3e-4 times that quotient.

    Args:
        start: Lengths before the step ``[...]``.
        end: Lengths after it.
        step: Lengths of the step.

    Returns:
        ``[...]`` in radians; NaN where a vector is zero.
    """
    middle = start.sqrt() * end.sqrt()
    longer = (end - start) / middle
    squares = (step / middle - longer) * (step / middle + longer)
    found = 2 * torch.asin((squares.clamp_min(0).sqrt() / 2).clamp_max(1.0))
    return torch.where(middle > 0, found, torch.nan)


def joint_cosine(rows: NDArray[Any]) -> float:
    """Compute the cosine between the last two updates of all tensors together.

    Args:
        rows: ``[3, T]``, on the host: the cosine between the last two updates of each tensor, and their lengths.
            Columns of NaN are left out, and those of two steps whose cosine is not known.

    Returns:
        The cosine; NaN where one of the two updates is zero or not finite, or nothing is known.
    """
    unknown = np.isnan(rows[1:]).any(0) | np.isnan(rows[0]) & (rows[1:] > 0).all(0)
    cosine, last, previous = rows[:, ~unknown].astype(np.float64)
    lengths = np.sqrt(np.square(last).sum() * np.square(previous).sum())
    inner = np.nansum(np.where(last * previous > 0, cosine, 0.0) * last * previous)
    return float(np.clip(inner / lengths, -1, 1)) if 0 < lengths < np.inf else float("nan")


def local_smoothness(change: NDArray[Any], step: NDArray[Any]) -> NDArray[Any]:
    r"""Compute the layerwise trajectory smoothness of Gluon (arXiv 2505.13416).

    :math:`\|G_t - G_{t-1}\|_* / \|W_t - W_{t-1}\|` with the gradients taken at these weights. For gradients of the
    whole loss it is how quickly a layer's gradient turns along the run; on small batches the numerator is dominated by
    the noise of two different batches.

    Args:
        change: ``[L]`` dual norms of the change of the gradients.
        step: ``[L]`` primal norms of the step between them.

    Returns:
        ``[L]``; NaN where the step is zero or either is unknown.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(step > 0, change / step, np.nan)
