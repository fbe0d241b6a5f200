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
from dynamon.monitoring.loss_shift import LossShift, Shift
from dynamon.monitoring.sentinel_inputs import LEAST as LEAST_OF_INPUTS
from dynamon.monitoring.sentinel_inputs import MOST_TENSORS, InputSeries
from dynamon.monitoring.sentinel_norms import OptimizerNorms, StepNumbers

KINDS = ("gradient", "update", "loss", "inputs")
_LEAST = {"gradient": 6.0, "update": 2.0, "loss": 1.5}  # times its level that a spike is at least
_FEWER = 0.9  # of the usual samples, below which a batch is a small one
_FORGETS = 0.999  # of the usual number of samples
_RATE_GAIN, _HIGHER, _KNOWN = 1 / 32, 1.5, 1.25  # of the usual rate; times that; times the largest of these so far


@dataclass(frozen=True)
class Judged:
    """Hold how far one step was above its usual level.

    Attributes:
        place: Place of the optimizer.
        names: Names of the L layers.
        layers: ``[L]``, the larger deviation of gradient and update.
        kinds: The largest deviation of gradients, of updates, of the loss and of inputs, as far as there is one.
        risen: The kinds that went beyond their limit at this step, with the optimizer's place.
        out: Those that were beyond it and are not well within it again, likewise.
        inputs: Where inputs have risen, the series that is farthest away, and by how much all of them are above their
            levels, ``[9]``.
        shift: A shift of the loss that was found at this step.
        ended: One that is over.
    """

    place: int
    names: tuple[str, ...]
    layers: NDArray[Any]
    kinds: dict[str, float]
    risen: frozenset[tuple[int, str]]
    out: frozenset[tuple[int, str]]
    inputs: tuple[int, NDArray[Any]] | None = None
    shift: Shift | None = None
    ended: Shift | None = None


class StepTracker:
    """Follows the levels of an optimizer's gradients, updates and losses, and of the batches of its steps.

    There is one series for each layer's gradient and update, one for the norm of all gradients, one for the loss, and
    those of the batch. All are followed in logarithms. A loss that has been zero or negative is followed through the
    inverse hyperbolic sine instead, which is linear around zero. A batch with fewer samples than usual may have a
    gradient and a loss that are larger by the root of that ratio, as noise alone makes them. A loss that rises where a
    rate goes back to a value that it has had, as a warm restart does, is no shift.

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
        count, of_inputs = len(self.names), InputSeries.count
        kinds = np.array(["gradient"] * count + ["update"] * count + ["gradient", "loss"] + ["inputs"] * of_inputs)
        self._places = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
        together = np.array([2.0 * count] * (2 * count) + [1.0, 1.0] + [float(of_inputs)] * of_inputs)
        least = [*(_LEAST[kind] for kind in kinds[:-of_inputs]), *(LEAST_OF_INPUTS * MOST_TENSORS)]
        self._levels = Levels(np.log(least), together)
        self._usual_samples, self._is_signed = 0.0, False
        self._shift = LossShift()
        self._rates = 0.0, 0.0  # the usual one lately, and the largest

    def judge(self, step: int, found: StepNumbers, samples: int, inputs: NDArray[Any] | None = None) -> Judged:
        """Judge a step, and learn from it.

        Args:
            step: The step.
            found: Its norms and losses.
            samples: In all of its batches; 0 where unknown.
            inputs: ``[9]``, of its batches, see :class:`dynamon.monitoring.sentinel_inputs.InputSeries`.
        """
        limits, count, slack = self._levels.limits, len(self.names), self._slack(samples)
        numbers, kinds = self._numbers(found, inputs)
        shift, ended = self._see_loss(step, float(numbers[2 * count + 1])) if not slack else (None, None)
        deviations = self._levels.see(numbers, slack)
        largest = {kind: float(deviations[self._places[kind]].max()) for kind in kinds}
        is_out, is_back = deviations >= limits, deviations < limits / 2
        out = {kind for kind in kinds if is_out[self._places[kind]].any()}
        risen = out - self._out
        self._out = {kind for kind in self._out if kind not in kinds or not is_back[self._places[kind]].all()} | out
        return Judged(
            self.place,
            self.names,
            np.maximum(deviations[:count], deviations[count : 2 * count]),
            largest,
            frozenset((self.place, kind) for kind in risen),
            frozenset((self.place, kind) for kind in self._out),
            self._farthest_input(numbers, deviations / limits) if "inputs" in risen else None,
            shift,
            ended,
        )

    def see_loss(self, step: int, losses: Sequence[float]) -> tuple[Shift | None, Shift | None]:
        """Judge the losses of a step that is not looked at otherwise: a shift that is found now, and one that is over.

        Args:
            step: The step.
            losses: Of its batches.
        """
        return self._see_loss(step, self._loss(losses))

    def _see_loss(self, step: int, number: float) -> tuple[Shift | None, Shift | None]:
        """Return the shift of the loss that is found now, and the one that is over."""
        if self._is_restarted(self.norms.rate):
            self._shift.rest()
        found, before = self._shift.see(step, number), self._shift.open
        return found, before if self._shift.close() else None

    def _is_restarted(self, rate: float) -> bool:
        """Return whether the rate is higher than lately, and not higher than what it once was for some time."""
        usual, largest = self._rates
        usual = usual + _RATE_GAIN * (rate - usual) if usual else rate
        self._rates = usual, max(largest, usual)
        return _HIGHER * usual < rate <= _KNOWN * largest

    def _numbers(self, found: StepNumbers, inputs: NDArray[Any] | None) -> tuple[NDArray[Any], list[str]]:
        """Return what the series are to see, NaN where nothing was measured, and the kinds that were."""
        count = len(self.names)
        sizes = np.zeros(2 * count + 1)
        if found.gradients is not None:
            sizes[:count], sizes[-1] = found.gradients, math.sqrt(found.gradients @ found.gradients)
        if found.updates is not None:
            sizes[count:-1] = found.updates
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(np.isfinite(sizes), np.log(np.where(sizes > 0, sizes, np.nan)), np.inf)
        loss = self._loss(found.losses)
        numbers = np.concatenate([logs, [loss], np.full(InputSeries.count, np.nan) if inputs is None else inputs])
        there = {
            "gradient": found.gradients is not None,
            "update": found.updates is not None and bool(found.updates.any()),
            "loss": not math.isnan(loss),
            "inputs": inputs is not None and not np.isnan(inputs).all(),
        }
        return numbers, [kind for kind, is_there in there.items() if is_there]

    def _farthest_input(self, numbers: NDArray[Any], shares: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        at = self._places["inputs"]
        return int(np.argmax(shares[at])), self._levels.rises(numbers)[at]

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
            self._shift = LossShift()
        return math.asinh(mean) if self._is_signed else math.log(mean)

    def _slack(self, samples: int) -> float:
        self._usual_samples = max(_FORGETS * self._usual_samples, float(samples))
        if not 0 < samples < _FEWER * self._usual_samples:
            return 0.0
        return math.log(self._usual_samples / samples) / 2

    def state_dict(self) -> dict[str, Any]:
        """Return levels by layer name."""
        own = {"samples": self._usual_samples, "signed": self._is_signed, "out": sorted(self._out)}
        own |= {"shift": self._shift.state_dict(), "rates": list(self._rates)}
        return {"names": list(self.names), **own, "levels": self._levels.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; a layer that was not there begins anew."""
        known = {name: i for i, name in enumerate(state["names"])}
        own = np.array([known.get(name, -1) for name in self.names], dtype=int)
        count = len(known)
        updates = np.where(own >= 0, own + count, -1)
        rest = np.arange(2 * count, 2 * count + 2 + InputSeries.count)
        rest[rest >= len(state["levels"]["level"])] = -1  # of a run before batches were looked at
        self._levels.load_state_dict(state["levels"], np.concatenate([own, updates, rest]))
        self._usual_samples, self._is_signed = float(state["samples"]), bool(state["signed"])
        self._out = set(state["out"])
        if "shift" in state:
            self._shift.load_state_dict(state["shift"])
            self._rates = tuple(state["rates"])
