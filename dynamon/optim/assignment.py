"""Map ratios of layers to an optimizer's parameters, merged where there would be too many groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.layers import Layer
from dynamon.optim.views import are_same
from dynamon.rates.merging import RatioMerging


class RatioAssignment:
    """Maps ratios ``[L]`` of layers to ratios ``[P]`` of an optimizer's parameters; parameters of no layer have 1.

    Args:
        merging: Limits the number of groups of a step; None leaves all ratios as they are.

    Attributes:
        merging: The same.
    """

    def __init__(self, merging: RatioMerging | None) -> None:
        """Leave the parameters to :meth:`assign`."""
        self.merging = merging

    def assign(self, optimizer: Optimizer, layers: Sequence[Layer]) -> list[int]:
        """Find the layer and the group of each parameter, and forget merged ratios, which belonged to others.

        Returns:
            The number of each layer's group in the optimizer, ``[L]``.
        """
        if self.merging is not None:
            self.merging.forget()
        self._layers = [layer.name for layer in layers]
        at = {id(layer.parameter): index for index, layer in enumerate(layers)}
        self._parameters, self._sizes = parameters_of(optimizer), group_sizes(optimizer)
        self._layer_at = np.array([at.get(id(p), len(at)) for p in self._parameters], np.int64)
        self._group_at = np.repeat(np.arange(len(self._sizes)), self._sizes)
        group_of = dict(zip(map(id, self._parameters), self._group_at.tolist(), strict=True))
        return [group_of[id(layer.parameter)] for layer in layers]

    def fits(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer has the parameters and groups of the last :meth:`assign`."""
        return are_same(parameters_of(optimizer), self._parameters) and group_sizes(optimizer) == self._sizes

    def by_parameter(self, ratios: NDArray[Any]) -> NDArray[Any]:
        """Spread ratios ``[L]`` over the parameters ``[P]``, in the order of the groups."""
        return np.append(ratios, 1.0)[self._layer_at]

    def merge(self, ratios: NDArray[Any], is_taken: bool = False) -> NDArray[Any]:
        """Merge ratios ``[L]`` for the next step; ``is_taken`` where it is taken now."""
        if self.merging is None:
            return ratios
        merge = self.merging.apply if is_taken else self.merging.preview
        return self._by_layer(merge(self.by_parameter(ratios), self._group_at), ratios)

    def _by_layer(self, ratios: NDArray[Any], default: NDArray[Any]) -> NDArray[Any]:
        found = np.append(default, 1.0)
        found[self._layer_at] = ratios
        return found[:-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the merged ratios in force by layer name, nothing where no ratio is merged."""
        if self.merging is None or self.merging.current is None:
            return {}
        ratios = self._by_layer(self.merging.current, np.ones(len(self._layers)))
        return {"ratios": dict(zip(self._layers, ratios.tolist(), strict=True)), **self.merging.state(self._group_at)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the merged ratios, where they are of the same layers."""
        if self.merging is None:
            return
        self.merging.forget()
        if state and state["ratios"].keys() == set(self._layers):
            ratios = np.array([state["ratios"][name] for name in self._layers])
            self.merging.load(self.by_parameter(ratios), state, self._group_at)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer, in the order of its groups."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        found += group["params"]
    return found


def group_sizes(optimizer: Optimizer) -> list[int]:
    """Return how many parameters each group of an optimizer has."""
    return [len(group["params"]) for group in optimizer.param_groups]
