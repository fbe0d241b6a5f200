"""What is done to all tensors of a list at once: a GPU's host takes as long for one call as for another."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dynamon.kernels.gradient_stats import Scale

_Key = TypeVar("_Key", bound=Hashable)


def multiplied(tensors: Sequence[Tensor | None], scale: Scale) -> list[Tensor | None]:
    """Tensors times a factor, as they are where it is the number one; None stays None."""
    given = [t for t in tensors if t is not None]
    if not given or not isinstance(scale, Tensor) and scale == 1.0:
        return list(tensors)
    found = iter(torch._foreach_mul(given, factor(scale)))
    return [None if t is None else next(found) for t in tensors]


def factor(scale: Scale) -> Scale:
    """A factor as the operators on lists take it: a number, or a tensor without dimensions."""
    return scale.detach().reshape(()) if isinstance(scale, Tensor) else scale


def copied(tensors: Mapping[_Key, Tensor], kept: Mapping[_Key, Tensor], scale: Scale = 1.0) -> dict[_Key, Tensor]:
    """Multiples of tensors, in the memory of earlier ones where those are alike.

    Args:
        tensors: What to copy.
        kept: Tensors that nobody needs any more, which are written over.
        scale: Factor on the tensors.
    """
    copies = {key: kept[key] if key in kept and _alike(kept[key], t) else room(t) for key, t in tensors.items()}
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(list(copies.values()), list(tensors.values()))
            if isinstance(scale, Tensor) or scale != 1.0:
                torch._foreach_mul_(list(copies.values()), factor(scale))
    return copies


def room(tensor: Tensor) -> Tensor:
    """Memory for a copy of a tensor, not filled."""
    return torch.empty_like(tensor, requires_grad=False)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.device == other.device
    )


def changes(current: Sequence[Tensor], previous: Sequence[Tensor], scale: Scale = 1.0) -> list[Tensor]:
    """Differences of tensors to earlier ones, in float32 at least.

    Args:
        current: Tensors.
        previous: The same earlier, in any dtype.
        scale: Factor on ``current``.
    """
    if not current:
        return []
    now = widened(current)
    if isinstance(scale, Tensor) or scale != 1.0:
        now = list(torch._foreach_mul(now, factor(scale)))
    return list(torch._foreach_sub(now, list(previous)))


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in float32 at least, copied in one call where they are in less."""
    wide = {dtype: torch.promote_types(dtype, torch.float32) for dtype in {t.dtype for t in tensors}}
    small = [t for t in tensors if wide[t.dtype] != t.dtype]
    if not small:
        return list(tensors)
    made = [torch.empty_like(t, dtype=wide[t.dtype], requires_grad=False) for t in small]
    with torch.no_grad():
        torch._foreach_copy_(made, [t.detach() for t in small])
    copies = iter(made)
    return [t if wide[t.dtype] == t.dtype else next(copies) for t in tensors]
