"""Judge the steps of one optimizer by their usual level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from dynamon.layers import Layer
from dynamon.monitoring.levels import Levels
from dynamon.monitoring.sentinel_norms import OptimizerNorms

KINDS = ("gradient", "update", "loss")
_LEAST = {"gradient": 2.0, "update": 2.0, "loss": 1.5}  # times its level that a spike is at least
_FEWER = 0.9  # of the usual samples, below which a batch is a small one
_FORGETS = 0.999  # of the usual number of samples


@dataclass(frozen=True)
class Judged:
    """Hold how far one step was above its usual level.

    Attributes:
        place: Place of the optimizer.
        names: Names of the L layers.
        layers: ``[L]``, the larger deviation of gradient and update.
        kinds: The largest deviation of gradients, of updates and of the loss, as far as there is one.
        risen: The kinds that went beyond their limit at this step, with the optimizer's place.
        out: Those that were beyond it and are not well within it again, likewise.
    """

    place: int
    names: tuple[str, ...]
    layers: NDArray[Any]
    kinds: dict[str, float]
    risen: frozenset[tuple[int, str]]
    out: frozenset[tuple[int, str]]


class StepTracker:
    """Follows the levels of an optimizer's gradients, updates and losses.

    There is one series for each layer's gradient and update, one for the norm of all gradients, and one for the loss.
    All are followed in logarithms. A loss that has been zero or negative is followed through the inverse hyperbolic
    sine instead, which is linear around zero. A batch with fewer samples than usual may have a gradient and a loss that
    are larger by the root of that ratio, as noise alone makes them.

    Args:
        optimizer: The optimizer.
        layers: All layers of the model.
        place: Its place among the optimizers.

    Attributes:
        norms: Measures them.
        place: The same.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer], place: int = 0) -> None:
        """Start with no level."""
        self.place = place
        self.norms = OptimizerNorms(optimizer, layers)
        self.names = tuple(layer.name for layer in self.norms.layers)
        self._out: set[str] = set()
        count = len(self.names)
        kinds = ["gradient"] * count + ["update"] * count + ["gradient", "loss"]
        self._places = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in KINDS}
        together = np.array([2.0 * count] * (2 * count) + [1.0, 1.0])
        self._levels = Levels(np.log([_LEAST[kind] for kind in kinds]), together)
        self._usual_samples, self._is_signed = 0.0, False

    def judge(self, gradients: NDArray[Any], updates: NDArray[Any], losses: Sequence[float], samples: int) -> Judged:
        """Judge a step, and learn from it.

        Args:
            gradients: ``[L]`` norms; 0 where there is none.
            updates: ``[L]`` sizes; 0 where there is none.
            losses: Of the batches of the step; none where unknown.
            samples: In all of its batches; 0 where unknown.
        """
        limits, count = self._levels.limits, len(self.names)
        whole = np.sqrt(np.sum(np.square(gradients)))
        sizes = np.concatenate([gradients, updates, [whole]])
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.where(np.isfinite(sizes), np.log(np.where(sizes > 0, sizes, np.nan)), np.inf)
        loss = self._loss(losses)
        deviations = self._levels.see(np.append(numbers, loss), self._slack(samples))
        kinds = {kind: float(deviations[at].max()) for kind, at in self._places.items()}
        if math.isnan(loss):
            del kinds["loss"]
        if not updates.any():
            del kinds["update"]
        is_out, is_back = deviations >= limits, deviations < limits / 2
        out = {kind for kind in kinds if is_out[self._places[kind]].any()}
        risen = out - self._out
        self._out = {kind for kind in self._out if not is_back[self._places[kind]].all()} | out
        return Judged(
            self.place,
            self.names,
            np.maximum(deviations[:count], deviations[count : 2 * count]),
            kinds,
            frozenset((self.place, kind) for kind in risen),
            frozenset((self.place, kind) for kind in self._out),
        )

    def _loss(self, losses: Sequence[float]) -> float:
        """The mean loss as its series has it: NaN for none, infinite for one that is not finite."""
        if not losses:
            return math.nan
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            return math.inf
        if mean <= 0 and not self._is_signed:
            self._is_signed = True
            self._levels.restart(self._places["loss"])
        return math.asinh(mean) if self._is_signed else math.log(mean)

    def _slack(self, samples: int) -> float:
        self._usual_samples = max(_FORGETS * self._usual_samples, float(samples))
        if not 0 < samples < _FEWER * self._usual_samples:
            return 0.0
        return math.log(self._usual_samples / samples) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return levels by layer name."""
        own = {"samples": self._usual_samples, "signed": self._is_signed, "out": sorted(self._out)}
        return {"names": list(self.names), **own, "levels": self._levels.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; a layer that was not there begins anew."""
        known = {name: i for i, name in enumerate(state["names"])}
        own = np.array([known.get(name, -1) for name in self.names], dtype=int)
        count = len(known)
        updates = np.where(own >= 0, own + count, -1)
        self._levels.load_state_dict(state["levels"], np.concatenate([own, updates, [2 * count, 2 * count + 1]]))
        self._usual_samples, self._is_signed = float(state["samples"]), bool(state["signed"])
        self._out = set(state["out"])
