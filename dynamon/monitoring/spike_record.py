"""Tell spikes from one another, and record them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamon.monitoring.levels import PATIENCE
from dynamon.monitoring.loss_shift import Shift
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.sentinel_tracker import KINDS, Judged

Place = tuple[int, str]  # an optimizer, and what of it: gradient, update or loss


@dataclass
class _Spike:
    """Hold a spike that is not over: its begin, what is watched for its end, and the steps seen since."""

    step: int
    moved: frozenset[Place]
    looks: int = 0


class SpikeRecord:
    """Counts spikes, finds out when each is over, and hands on readings.

    A spike begins where something goes beyond its limit while no other spike lasts. It is over when the gradients and
    the loss that began it are well within their limits again; if it was the update alone, when that is. Running
    averages of an optimizer come back slowly: what is left in them of a spike that is over begins no other one.
    """

    def __init__(self) -> None:
        """No spike so far."""
        self._count = 0
        self._open: _Spike | None = None
        self._out: dict[int, frozenset[Place]] = {}
        self._step = -1  # of the last step that was judged
        self._largest: dict[str, float] = {}
        self._layers: dict[str, float] = {}
        self._row: dict[str, float] = {}
        self._has_row = False

    def add(self, step: int, judged: Sequence[Judged]) -> bool:
        """Take in a step.

        Args:
            step: The step.
            judged: What was found, for each optimizer that took it; none where a gradient scaler skipped it.

        Returns:
            Whether a spike has begun.
        """
        if not judged:
            return False
        self._step = step
        for found in judged:
            for kind, deviation in found.kinds.items():
                self._largest[kind] = max(self._largest.get(kind, -math.inf), deviation)
            for name, deviation in zip(found.names, found.layers.tolist(), strict=True):
                self._layers[name] = max(self._layers.get(name, -math.inf), deviation)
            self._out[found.place] = found.out
        self.note_shift(step, judged[0].shift, judged[0].ended)
        risen = frozenset[Place]().union(*(found.risen for found in judged))
        if risen and self._open is None:
            self._open = _Spike(step, frozenset(one for one in risen if one[1] != "update") or risen)
            self._count += 1
            return True
        if self._open is not None:
            self._follow(self._open, step)
        return False

    @property
    def is_open(self) -> bool:
        """Return whether a spike lasts."""
        return self._open is not None

    def note_shift(self, step: int, shift: Shift | None, ended: Shift | None) -> None:
        """Record a shift of the loss when it is found, and when it is over."""
        self._step = step
        if shift is not None:
            self._row |= {
                "spike/shift": shift.deviations,
                "spike/shift_size": math.exp(shift.rise),
                "spike/shift_age": float(step - shift.step),
            }
        if ended is not None:
            self._row["spike/shift_lasted"] = float(step - ended.step)
        self._has_row = self._has_row or shift is not None or ended is not None

    def _follow(self, spike: _Spike, step: int) -> None:
        spike.looks += 1
        if spike.looks >= PATIENCE:
            self._open = None
        elif not any(self._out.get(place, frozenset()) & spike.moved for place, _ in spike.moved):
            self._row["spike/lasted"] = float(step - spike.step)
            self._open, self._has_row = None, True

    def spiked(self, batch: Mapping[str, float]) -> None:
        """Record the spike that has begun."""
        self._row |= batch
        self._has_row = True

    def log(self, run: RunContext, is_end: bool = False) -> None:
        """Record the largest deviations since the last time; at the end of a fit they are kept for one that goes on."""
        self._has_row = self._has_row or bool(self._largest)
        since = dict(self._largest), dict(self._layers)
        self.send(run)
        if is_end:
            self._largest, self._layers = since

    def send(self, run: RunContext) -> None:
        """Hand on what is to be recorded, at the step that was judged last."""
        if not self._has_row:
            return
        scalars = {f"spike/{kind}": self._largest[kind] for kind in KINDS if kind in self._largest}
        if scalars:
            scalars["spike/deviation"] = max(scalars.values())
        scalars["spike/count"] = float(self._count)
        shown = [layer.name for layer in run.layers if layer.name in self._layers]
        tables = {"spike/layer_deviation": (np.array([self._layers[name] for name in shown]), tuple(shown))}
        row, self._row, self._has_row = {**scalars, **self._row}, {}, False
        self._largest, self._layers = {}, {}
        run.recorder.hand_on(run.loop, self._step, run.budget, row, tables if shown else {}, ("spike/deviation",))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        spike = self._open
        begun = None if spike is None else [spike.step, sorted(map(list, spike.moved)), spike.looks]
        return {"count": self._count, "open": begun, "largest": dict(self._largest), "layers": dict(self._layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        begun = state["open"]
        self._count = int(state["count"])
        self._open = (
            None if begun is None else _Spike(begun[0], frozenset((at, kind) for at, kind in begun[1]), begun[2])
        )
        self._largest, self._layers = dict(state["largest"]), dict(state["layers"])
        self._row, self._has_row = {}, False
