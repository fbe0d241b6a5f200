"""Advice on learning rates: which groups of layers deserve larger steps, and which smaller ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dynamon.isolation.preserve import LossFn
from dynamon.monitoring.arguments import check_arguments, check_loss_fn
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.effect_check import EffectCheck
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.progress_meter import ProgressMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.step_probe import StepProbe
from dynamon.optim.lanton import RADII
from dynamon.quantities import meanings, quantities_of, with_tag_table
from dynamon.quantities.progress import Couplings
from dynamon.rates.advice_text import advice_lines, name_of
from dynamon.rates.allocation import BOUNDS, Advice, advise
from dynamon.rates.balanced import check_bounds
from dynamon.rates.groups import LayerGroup, check_groups, group_layers

_LAST = 2**62  # a step that no run reaches


class CouplingsMeter(ProgressMeter):
    """Measures how the steps of groups of layers interact, so many times.

    Args:
        every: Steps between two readings.
        readings: How many.
        group_by: The groups.
        loss_fn: ``loss_fn(module, batch)``, or None for the loss of the loop.
        low: Smallest ratio of the advice.
        high: Largest ratio.

    Attributes:
        groups: The groups, once training has begun.
    """

    name = "advice"
    stands_beside_sharpness = False
    panels = {}
    tags = {}
    quantities = meanings(quantities_of("advice"))

    def __init__(
        self, every: int, readings: int, group_by: str | Sequence[str], loss_fn: LossFn | None, low: float, high: float
    ) -> None:
        """Keep nothing."""
        super().__init__(Cadence(every, every), loss_fn, EffectCheck(loss_fn))
        self._readings, self._group_by, self._bounds = readings, group_by, (low, high)
        self.groups: list[LayerGroup] = []
        self._members: dict[str, list[str]] = {}
        self._progress: list[list[float]] = []
        self._couplings: list[list[list[float]]] = []
        self._is_told = False

    def start(self, run: RunContext) -> None:
        """Form the groups."""
        layers = self._trained(run)
        held = [id(p) for optimizer in run.loop.optimizers for group in optimizer.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for optimizer in run.loop.optimizers for group in optimizer.param_groups]
        place = dict(zip(held, np.repeat(np.arange(len(sizes)), sizes).tolist(), strict=True))
        layers = [layer for layer in layers if id(layer.parameter) in place]
        self.groups = group_layers(layers, self._group_by, [place[id(layer.parameter)] for layer in layers])
        self._members = {name_of(group): [layers[i].name for i in group.indices] for group in self.groups}
        super().start(run)
        if self.is_complete:
            self.cadence.rest(_LAST)

    @property
    def is_complete(self) -> bool:
        """Return whether all readings were taken."""
        return len(self._progress) >= self._readings

    @property
    def advice(self) -> Advice:
        """The advice by the readings so far."""
        count = len(self.groups)
        progress, couplings = np.array(self._progress), np.array(self._couplings)
        low, high = self._bounds
        return advise(progress.reshape(-1, count), couplings.reshape(-1, count, count), low=low, high=high)

    def lines(self) -> list[str]:
        """The advice in words."""
        return advice_lines(self.advice, list(self._members), RADII)

    def _take(self, probe: StepProbe, batch: Any) -> Couplings | None:
        return probe.couplings(batch, self._members)

    def _record(self, run: RunContext, reading: Couplings) -> None:
        names = list(reading.names)
        run.recorder.layers("advice/progress", -reading.slopes, names)
        pairs = [f"{one} | {other}" for one in names for other in names]
        run.recorder.layers("advice/coupling", reading.matrix.ravel(), pairs)
        self._progress.append((-reading.slopes).tolist())
        self._couplings.append(reading.matrix.tolist())
        if self.is_complete:
            self.cadence.rest(_LAST)
            self.tell()

    def tell(self) -> None:
        """Print the advice, once."""
        if not self._is_told and self._progress:
            self._is_told = True
            rank_zero_info("RateAdvisor\n" + "\n".join(self.lines()))

    def end(self, run: RunContext) -> None:
        """Print the advice where the run was shorter than the pilot."""
        super().end(run)
        self.tell()

    def state_dict(self) -> dict[str, Any]:
        """Return the readings so far, and the weights kept for the next."""
        own = {"groups": list(self._members), "progress": self._progress, "couplings": self._couplings}
        return {**super().state_dict(), **own, "told": self._is_told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._progress, self._couplings = list(state.get("progress", [])), list(state.get("couplings", []))
        self._is_told = bool(state.get("told", False))


@with_tag_table(quantities_of("advice", "monitor"))
class RateAdvisor(Monitor):
    r"""Advises on the learning rates of groups of layers, from a pilot of a few hundred steps. It changes nothing.

    About a dozen times it measures, on the batch that follows a step, how much the step of each group takes off the
    loss (p) and how the steps of all groups bend it together (C). At the end of the pilot it prints the ratios with
    which a step makes the most progress at the same curvature, with intervals, what of them is certain, and lines to
    paste. ``dynamon advise RUN`` prints the same from the files of the run. The mathematics is that of
    :func:`dynamon.rates.allocation.advise`.

    Tags (a "layer" is a group here, or a pair of groups ``a | b``):

    {tags}

    Args:
        pilot: Steps of the pilot. Let it reach beyond the warm-up of the rate: early steps are not typical.
        readings: Readings in the pilot, 4 or more.
        group_by: ``"kind"``, ``"role"``, ``"parameter_groups"`` or a list of globs
            (:func:`dynamon.rates.groups.group_layers`). Fewer groups make a surer advice and cheaper readings.
        loss_fn: ``loss_fn(module, batch) -> scalar``; None for ``training_step``. Needed in manual optimisation.
        low: Smallest ratio, in (0, 1].
        high: Largest ratio, at least 1.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.

    Raises:
        ValueError: On an argument out of range, at construction.

    Cost: each reading takes one gradient more than there are groups, of one batch; seven copies of the parameters while
    it is taken, one between a step and its reading.

    Example:
        >>> from dynamon.callbacks import RateAdvisor
        >>> RateAdvisor(pilot=200, group_by="role")
        RateAdvisor(no readings, 0 quantities in .history)
    """

    def __init__(
        self,
        pilot: int = 300,
        readings: int = 12,
        group_by: str | Sequence[str] = "kind",
        loss_fn: LossFn | None = None,
        *,
        low: float = BOUNDS[0],
        high: float = BOUNDS[1],
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments."""
        check_groups(group_by)
        check_bounds(low, high)
        check_arguments(None, None, 0.0, loggers=loggers)
        for name, value, least in (("readings", readings, 4), ("pilot", pilot, readings)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}.")
        if loss_fn is not None:
            check_loss_fn(loss_fn)
        every = max(pilot // readings, 1)
        meters = partial(_meters, every, readings, group_by, loss_fn, low, high)
        super().__init__(meters, None, None, loggers, strict, 0.0)

    @property
    def _meter(self) -> CouplingsMeter:
        (meter,) = self._meters
        assert isinstance(meter, CouplingsMeter)
        return meter

    @property
    def advice(self) -> Advice:
        """The advice by the readings so far."""
        return self._meter.advice

    @property
    def groups(self) -> list[LayerGroup]:
        """The groups, once training has begun."""
        return self._meter.groups

    def __str__(self) -> str:
        """Say the advice in words."""
        return "\n".join(self._meter.lines())


def _meters(*arguments: Any) -> list[Meter]:
    return [CouplingsMeter(*arguments)]
