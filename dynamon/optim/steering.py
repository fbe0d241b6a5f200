"""Find the steering of an optimizer, and the layers that can be steered."""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from dynamon.layers import Layer, is_steerable, known_layers

if TYPE_CHECKING:
    from dynamon.optim.layerwise import LayerwiseRates

# Weak on both sides: the optimizer's hooks keep its steering alive, and nothing here keeps either.
steered: "WeakKeyDictionary[Optimizer, ref[LayerwiseRates]]" = WeakKeyDictionary()


def steering_of(optimizer: Optimizer) -> "LayerwiseRates | None":
    """Return what steers an optimizer now, or None.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates, steering_of
        >>> from dynamon.rates import FixedRates
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> steering_of(optimizer) is None
        True
        >>> rates = LayerwiseRates(optimizer, FixedRates({"bias": 2.0}), model)
        >>> steering_of(optimizer)
        LayerwiseRates(FixedRates on 2 layers of SGD)
    """
    found = steered.get(optimizer)
    return None if found is None else found()


def steerable_layers(model: nn.Module, optimizer: Optimizer, roles: Mapping[str, str] | None = None) -> list[Layer]:
    """List the layers of a model that an optimizer holds and a rule can steer: real floating-point weights.

    Args:
        model: The module.
        optimizer: The optimizer.
        roles: As ``overrides`` of :func:`dynamon.layers.describe_layers`.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [layer for layer in known_layers(model, roles) if id(layer.parameter) in own and is_steerable(layer)]
