"""Find out what the dtypes of weights lose of the steps that optimizers compute, and what smaller dtypes would lose."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import to_local_as
from dynamon.layers.complex_pairs import real_numel
from dynamon.monitoring.run_context import RunContext
from dynamon.optim.computed_steps import computed_step
from dynamon.quantities.precision import RANGES, ComputedStep, bits_of, lost_shares, range_shares, stored_shares

ROWS = 5  # of a reading, still on the device
_HALF = 16  # significant bits below which a dtype is too coarse for many steps


class StoredSteps:
    """Measures what was lost of the last steps; holds the gradients that they used, without a copy, until it is over.

    Attributes:
        lost_decay: Share of the decay that was lost at the last reading, by layer, where decay and step are rounded
            together in half precision.
    """

    def __init__(self) -> None:
        """Start with nothing held."""
        self.lost_decay: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._steps: dict[str, ComputedStep] = {}
        self._owners: dict[str, Optimizer] = {}

    def before_step(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        """Hold the gradients that this optimizer is about to use; torch's fused steps leave scaled ones unscaled."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in names:
                    self._gradients[names[id(p)]] = p.grad

    def rows(
        self, run: RunContext, before: Mapping[str, Tensor], rates: Mapping[str, tuple[float, float]]
    ) -> list[Tensor]:
        """Measure the steps since these copies of the weights, ``[L]`` each; ``rates`` are rate and rate x decay."""
        layers = {layer.name: layer for layer in run.layers}
        held = {
            id(p): (optimizer, group)
            for optimizer in run.loop.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self._steps, self._owners = {}, {}
        for name, start in before.items():
            known = held.get(id(layers[name].parameter)) if name in layers else None
            if known is None or name not in self._gradients and not run.steps.in_backward:
                continue  # an optimizer leaves a parameter without a gradient alone
            rate, shrink = rates.get(name, (np.nan, 0.0))
            gradient = self._gradients.get(name)
            shrink = shrink if np.isfinite(shrink) else 0.0
            step = computed_step(*known, layers[name].parameter, start, gradient, rate, shrink)
            if step is not None:
                self._steps[name], self._owners[name] = step, known[0]
        return list(stored_shares(run.layers, self._steps, run.ranks))

    def readings(
        self, run: RunContext, rows: NDArray[Any], rates: Mapping[str, tuple[float, float]]
    ) -> dict[str, NDArray[Any]]:
        """Return the readings ``[L]`` by quantity, from the rows on the host."""
        layers, bits = run.layers, bits_of(run.layers)
        sizes = np.array([float(real_numel(layer.parameter)) for layer in layers])
        groups = [(id(self._owners.get(layer.name)), layer.parameter.dtype) for layer in layers]
        keeps = [layer.name in self._steps and self._steps[layer.name].keeps for layer in layers]
        lost, decay, size = lost_shares(rows, sizes, groups, keeps)
        shrinks = np.array([rates.get(layer.name, (0.0, 0.0))[1] for layer in layers])
        decay[~(shrinks > 0)] = np.nan
        together = {name for name, step in self._steps.items() if not step.decays_first}
        self.lost_decay = {
            layer.name: float(share)
            for layer, share, own in zip(layers, decay, bits, strict=True)
            if layer.name in together and own < _HALF and share > 0
        }
        found = {"update_lost": lost, "decay_lost": decay, "update_size": size, "bits": bits}
        return {f"precision/{name}": row for name, row in found.items() if np.isfinite(row).any()}

    def ranges(self, run: RunContext) -> dict[str, NDArray[Any]]:
        """Measure which entries of weights and gradients copies in fewer bits would lose, ``[L]`` by quantity."""
        layers, found = run.layers, dict[str, NDArray[Any]]()
        own = [layer.parameter for layer in layers]
        weights = range_shares([to_local_as(p.detach(), p) for p in own], own, run.ranks)
        places = [i for i, layer in enumerate(layers) if layer.name in self._gradients]
        tables = {"weight": weights.cpu().numpy()}
        if places:
            held, likes = [self._gradients[layers[i].name] for i in places], [own[i] for i in places]
            here = [to_local_as(g.to_dense() if g.is_sparse else g, p) for g, p in zip(held, likes, strict=True)]
            shares = range_shares(here, likes, run.ranks).cpu().numpy()
            tables["gradient"] = np.full((len(RANGES), len(layers)), np.nan)
            tables["gradient"][:, places] = shares
        for kind, table in tables.items():
            found |= {f"precision/{kind}_{name}": row for name, row in zip(RANGES, table, strict=True)}
        return found

    def forget(self) -> None:
        """Let go of the gradients and of the optimizers' state."""
        self._gradients, self._steps, self._owners = {}, {}, {}
