"""The steps that weights take: their sizes in the layers' norms, and how one turns into the next."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynamon.arrays import Array
from dynamon.kernels import gram_iteration, l2_along
from dynamon.layers import Layer
from dynamon.norms import Norm, sigma_factor

_GRAM_STEPS = 8  # the certificate is then narrower than 1 % for any rank up to 160


def primal_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """The primal norm of one tensor a layer, without a decomposition.

    Args:
        layers: L layers.
        norms: The norm of each, fitted to it as :func:`dynamon.norms.update_norm` does.
        tensors: One a layer, stored as its weight is, all on one device.

    Returns:
        ``[L]``, in float32 (float64 where a tensor is). Spectral norms are the middle of Gram iteration's bounds, which
        are batched by shape; a layer of several matrices counts as its largest.

    Cost: one pass over the tensors, and eight products of the smaller side for spectral norms. No host
    synchronisation.
    """
    found: list[Tensor | None] = [None] * len(layers)
    batches: dict[tuple[object, ...], list[int]] = {}
    for i, (layer, norm, tensor) in enumerate(zip(layers, norms, tensors, strict=True)):
        if norm.name == "rms_to_rms":
            batches.setdefault((*layer.matrices(tensor).shape[-2:], tensor.dtype), []).append(i)
        else:
            found[i] = norm.primal(tensor).amax()
    for members in batches.values():
        stacks = [layers[i].matrices(tensors[i]) for i in members]
        lower, upper = gram_iteration(torch.cat(stacks) if len(stacks) > 1 else stacks[0], _GRAM_STEPS)
        for i, sigmas in zip(members, (lower / 2 + upper / 2).split([len(stack) for stack in stacks]), strict=True):
            found[i] = sigmas.amax() * (sigma_factor(layers[i]) or 1.0)
    values = [value for value in found if value is not None]
    wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return torch.stack([value.to(wide) for value in values]) if values else torch.zeros(0)


def compare_updates(now: Sequence[Tensor], before: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
    """How the last two updates of some tensors compare.

    Args:
        now: T tensors on one device.
        before: The same before the last update.
        earlier: The same before the update that preceded it.

    Returns:
        ``[3, T]`` in float32 (float64 where a tensor is): the cosine between the two updates, NaN where one of them is
        zero, and the Euclidean norms of the last and of the one before.

    Cost: two differences of the tensors and a pass over each. No host synchronisation.
    """
    rows = [_compare(*tensors) for tensors in zip(now, before, earlier, strict=True)]
    wide = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.stack([row.to(wide) for row in rows], 1) if rows else torch.zeros(3, 0)


def _compare(now: Tensor, before: Tensor, earlier: Tensor) -> Tensor:
    wide = torch.promote_types(now.dtype, torch.float32)
    now, before, earlier = (t.detach().reshape(-1).to(wide) for t in (now, before, earlier))
    last, previous = now - before, before - earlier
    size, previous_size = l2_along(last, None), l2_along(previous, None)
    return torch.stack([torch.dot(last / size, previous / previous_size), size, previous_size])


def joint_cosine(rows: Array) -> float:
    """The cosine between the last two updates of all tensors together.

    Args:
        rows: ``[3, T]`` as :func:`compare_updates` returns them, on the host. Columns of NaN are left out.

    Returns:
        The cosine; NaN where one of the two updates is zero or not finite, or nothing is known.
    """
    cosine, last, previous = rows[:, ~np.isnan(rows[1:]).any(0)].astype(np.float64)
    lengths = np.sqrt(np.square(last).sum() * np.square(previous).sum())
    inner = np.nansum(np.where(last * previous > 0, cosine, 0.0) * last * previous)
    return float(np.clip(inner / lengths, -1, 1)) if 0 < lengths < np.inf else float("nan")


def local_smoothness(change: Array, step: Array) -> Array:
    r"""The layerwise trajectory smoothness of Gluon (arXiv 2505.13416).

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
