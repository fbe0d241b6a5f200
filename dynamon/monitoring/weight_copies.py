"""Copies of weights between two steps: kept as this process holds them, saved whole."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import gather_for_checkpoint, is_sharded, shard_like
from dynamon.layers import Layer


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors by name, in one call where all are plain tensors of one device."""
    tensors = list(weights.values())
    if any(type(tensor) is not Tensor or tensor.device != tensors[0].device for tensor in tensors):
        return {name: tensor.clone() for name, tensor in weights.items()}
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return dict(zip(weights, copies, strict=True))


def whole_copies(copies: Mapping[str, Tensor], layers: Iterable[Layer], everywhere: bool = False) -> dict[str, Tensor]:
    """Copies as a checkpoint holds them: those of sharded weights whole, in main memory.

    Args:
        copies: By layer name. Where weights are sharded, every process must call this, with the same names.
        layers: The layers, and maybe others.
        everywhere: Whether other processes than the first, which writes checkpoints, need the whole ones too.
    """
    own = {layer.name: layer.parameter for layer in layers}
    sharded = {name: copy for name, copy in copies.items() if name in own and is_sharded(own[name])}
    plain = {name: copy for name, copy in copies.items() if name not in sharded}
    return {**plain, **gather_for_checkpoint(sharded, own, everywhere)}


def matching(layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those saved weights that still belong to a layer: what this process holds of them, on its device."""
    own = {layer.name: layer.parameter for layer in layers}
    known = {name: weight for name, weight in weights.items() if name in own and weight.shape == own[name].shape}
    return {name: shard_like(weight.to(own[name].device), own[name]) for name, weight in known.items()}
