"""Group layers whose learning rates move together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dynamon.layers import Layer, describe_layers
from dynamon.rates.rule import matches_key

_KINDS = ("kind", "role", "parameter_groups")
_VECTORS = "role:vector"
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_STAGE = re.compile(r"\d+(?=\.\*)")  # the number of a stage, which stands before the number of a block


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share one ratio.

    Attributes:
        label: Its name.
        keys: Keys of :class:`dynamon.rates.FixedRates` that match these layers and no others of the model.
        indices: Where they are in the list of layers, ``[n]``.
    """

    label: str
    keys: tuple[str, ...]
    indices: NDArray[np.int64]


def check_groups(group_by: str | Sequence[str]) -> None:
    """Raise TypeError or ValueError for an unknown grouping; keys are checked by :func:`group_layers`."""
    message = f"group_by must be one of {', '.join(_KINDS)}, or a list of globs, got {group_by!r}."
    if not isinstance(group_by, str | Sequence) or not all(isinstance(key, str) for key in group_by):
        raise TypeError(message)
    if not group_by or (isinstance(group_by, str) and group_by not in _KINDS):
        raise ValueError(message)


def group_layers(
    layers: Sequence[Layer], group_by: str | Sequence[str] = "kind", places: Sequence[int] | None = None
) -> list[LayerGroup]:
    """Group layers whose learning rates move together.

    Args:
        layers: L layers.
        group_by: ``"kind"``: one group for each parameter name in which the numbers of blocks are replaced by a star
            (``blocks.*.up.weight``, ``layer*.*.conv1.weight``), and one for all vectors (gains and biases); layers of
            one such name with different roles are kept apart. ``"role"``: one group for each role.
            ``"parameter_groups"``: the optimizer's own groups. A sequence of globs or ``"role:..."``: one group for
            each; the first that matches counts, and layers that none matches are one more group, ``"others"``.
        places: For ``"parameter_groups"``: the number of each layer's group in the optimizer, ``[L]``.

    Returns:
        The groups, in the order of their first layers. Each layer is in exactly one.

    Raises:
        ValueError: For an unknown ``group_by``, a key that matches no layer, or ``"parameter_groups"`` without
            ``places``.

    Example:
        >>> from dynamon.cli.language_model import GPT
        >>> from dynamon.layers import describe_layers
        >>> from dynamon.rates.groups import group_layers
        >>> [group.label for group in group_layers(describe_layers(GPT(depth=2)))][:4]
        ['embedding.weight', 'position.weight', 'role:vector', 'blocks.*.qkv.weight']
    """
    check_groups(group_by)
    if isinstance(group_by, str):
        labels = _labels(layers, group_by, places)
    else:
        labels = [next((key for key in group_by if matches_key(layer, key)), "others") for layer in layers]
        unused = [key for key in group_by if not any(matches_key(layer, key) for layer in layers)]
        if unused:
            raise ValueError(f"group_by: {unused[0]!r} matches no layer; print(describe_layers(model)) lists them.")
    found = []
    for label in dict.fromkeys(labels):
        indices = np.flatnonzero([each == label for each in labels])
        found.append(LayerGroup(label, _keys(layers, label, indices), indices))
    return found


def _labels(layers: Sequence[Layer], group_by: str, places: Sequence[int] | None) -> list[str]:
    if group_by == "role":
        return [f"role:{layer.role}" for layer in layers]
    if group_by == "parameter_groups":
        if places is None:
            raise ValueError('group_by="parameter_groups" needs the number of each layer\'s group.')
        return [f"group {place}" for place in places]
    kinds = [_VECTORS if layer.role == "vector" else kind_of(layer.name) for layer in layers]
    roles: dict[str, set[str]] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        roles.setdefault(kind, set()).add(layer.role)
    return [
        kind if len(roles[kind]) == 1 else f"{kind} ({layer.role})" for kind, layer in zip(kinds, layers, strict=True)
    ]


def kind_of(name: str) -> str:
    """Replace the numbers of blocks in a parameter name by stars.

    Example:
        >>> from dynamon.rates.groups import kind_of
        >>> kind_of("transformer.h.11.mlp.c_fc.weight"), kind_of("layer3.1.conv2.weight")
        ('transformer.h.*.mlp.c_fc.weight', 'layer*.*.conv2.weight')
    """
    return _STAGE.sub("*", _NUMBER.sub("*", name))


def _keys(layers: Sequence[Layer], label: str, indices: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the label where it matches exactly these layers, else their names."""
    matched = [index for index, layer in enumerate(layers) if matches_key(layer, label)]
    return (label,) if matched == indices.tolist() else tuple(layers[index].name for index in indices)


def rate_groups(model: nn.Module, ratios: Mapping[str, float], lr: float) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, one for each ratio of the learning rate.

    Args:
        model: The model.
        ratios: Ratio by key, as in :class:`dynamon.rates.FixedRates`; the first key that matches a layer counts.
        lr: The learning rate at ratio 1.

    Returns:
        Groups with ``params`` and ``lr``, those of ratio 1 first.

    Raises:
        ValueError: If a key matches no layer.

    Example:
        >>> import torch
        >>> from dynamon.rates import rate_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(rate_groups(model, {"role:vector": 0.5}, lr=1e-3))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(2, 0.001), (2, 0.0005)]
    """
    layers = describe_layers(model)
    unused = [key for key in ratios if not any(matches_key(layer, key) for layer in layers)]
    if unused:
        raise ValueError(f"ratios: {unused[0]!r} matches no layer; print(describe_layers(model)) lists them.")
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    known = {id(layer.parameter): layer for layer in layers}
    for parameter in model.parameters():
        layer = known.get(id(parameter))
        matched = (ratio for key, ratio in ratios.items() if layer is not None and matches_key(layer, key))
        groups.setdefault(next(matched, 1.0), []).append(parameter)
    return [{"params": params, "lr": lr * ratio} for ratio, params in groups.items() if params]
