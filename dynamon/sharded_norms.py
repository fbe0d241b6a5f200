"""Primal norms of tensors that several processes hold in parts: which follow from the parts, and which do not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.shards import has_whole_rows


def follows_from_squares(norm: Norm) -> bool:
    """Whether a primal norm is a multiple of the Euclidean one."""
    return norm.name in ("frobenius", "rms")


def is_maximum(layer: Layer, norm: Norm) -> bool:
    """Whether a primal norm is the largest of those of the parts: over entries, or over rows that are not cut."""
    if norm.name == "one_to_inf":
        return True
    by_rows = {"one_to_rms": layer.rows_are_tokens, "rms_to_inf": not (layer.rows_are_tokens or layer.inputs_first)}
    plain = layer.parameter.ndim == 2 and layer.blocks == 1
    return by_rows.get(norm.name, False) and plain and has_whole_rows(layer.parameter)


def needs_whole(layer: Layer, norm: Norm) -> bool:
    """Whether a primal norm takes the whole tensor."""
    return not follows_from_squares(norm) and not is_maximum(layer, norm)


def largest_here(layers: Sequence[Layer], norms: Sequence[Norm], parts: Sequence[Tensor]) -> Tensor:
    """The norms of the parts ``[T]`` where the norm of the whole is the largest of them; 0 elsewhere.

    Args:
        layers: T layers.
        norms: The norm of each.
        parts: What this process holds of a tensor of each.
    """
    found = torch.zeros(len(layers), dtype=torch.float64, device=parts[0].device if parts else None)
    for i, (layer, norm, part) in enumerate(zip(layers, norms, parts, strict=True)):
        if part.numel() and is_maximum(layer, norm):
            found[i] = norm.primal(part).amax()
    return found


def squares_here(parts: Sequence[Tensor]) -> Tensor:
    """Sums of squares of the entries of T parts ``[T]``, in float64; taken in float32, or float64 where a part is."""
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    lengths = [torch.linalg.vector_norm(part, dtype=wide) for part in parts]
    return torch.stack(lengths).double().square()


def primal(layers: Sequence[Layer], norms: Sequence[Norm], squares: Tensor, largest: Tensor, whole: Tensor) -> Tensor:
    """Primal norms ``[T]`` from what all processes have found.

    Args:
        layers: T layers.
        norms: The norm of each.
        squares: Sums of squares ``[T]``.
        largest: Largest norms of the parts, where that is what counts.
        whole: Norms of the whole tensors, where those are needed.
    """
    sizes = [layer.parameter.numel() if norm.name == "rms" else 1 for layer, norm in zip(layers, norms, strict=True)]
    by_squares = squares.sqrt() / torch.tensor(sizes, dtype=squares.dtype, device=squares.device).sqrt()
    kinds = [
        0 if follows_from_squares(norm) else 1 if is_maximum(layer, norm) else 2
        for layer, norm in zip(layers, norms, strict=True)
    ]
    chosen = torch.tensor(kinds, dtype=torch.int64, device=squares.device)
    return torch.stack([by_squares, largest, whole]).gather(0, chosen[None])[0]
