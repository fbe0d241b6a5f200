"""Copies many tensors in few calls: on a GPU the host's time goes with the number of calls."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynamon.quantities.scales import Scale, without_dimensions


def copied(tensors: Mapping[int, Tensor], kept: Mapping[int, Tensor], scale: Scale = 1.0) -> dict[int, Tensor]:
    """Copy multiples of tensors, into the memory of earlier copies of the same shape, layout and dtype.

    Args:
        tensors: What to copy, without a graph.
        kept: Earlier copies, which are overwritten.
        scale: Factor on the tensors.
    """
    copies = {i: kept[i] if i in kept and _are_alike(kept[i], t) else torch.empty_like(t) for i, t in tensors.items()}
    if copies:
        torch._foreach_copy_(list(copies.values()), list(tensors.values()))
        if isinstance(scale, Tensor) or scale != 1.0:
            torch._foreach_mul_(list(copies.values()), without_dimensions(scale))
    return copies


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.device == other.device
    )
