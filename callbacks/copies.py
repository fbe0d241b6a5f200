"""Copies of weights between two steps: kept as this process holds them, saved whole."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dynamon.layers import Layer
from dynamon.shards import is_sharded, part_of, wholes_on_cpu


def whole_copies(copies: Mapping[str, Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Copies as a checkpoint holds them: those of sharded weights whole, in main memory.

    Args:
        copies: By layer name. Where weights are sharded, every process must call this, with the same names.
        layers: The layers, and maybe others.
    """
    own = {layer.name: layer.parameter for layer in layers}
    sharded = {name: copy for name, copy in copies.items() if name in own and is_sharded(own[name])}
    wholes = wholes_on_cpu(list(sharded.values()), [own[name] for name in sharded])
    return {**copies, **dict(zip(sharded, wholes, strict=True))}


def matching(layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some saved weights that belong to a layer still: what this process holds of them, on its device."""
    own = {layer.name: layer.parameter for layer in layers}
    known = {name: weight for name, weight in weights.items() if name in own and weight.shape == own[name].shape}
    return {name: part_of(weight.to(own[name].device), own[name]) for name, weight in known.items()}
