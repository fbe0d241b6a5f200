"""Decrease by layer: what a step did to the loss of the batch that follows it."""

from functools import partial
from typing import Any

import numpy as np
import torch

from dynamon.board.custom_scalars import chart_layout
from dynamon.distributed.dtensor import to_local
from dynamon.isolation.preserve import LossFn
from dynamon.kernels import widest_dtype
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import real_dtype, real_numel
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.effect_check import EffectCheck
from dynamon.monitoring.evaluation import trained_parameters, why_not_evaluated
from dynamon.monitoring.memory_plan import allowed_memory
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.pair_meter import PairMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.step_probe import COPIES, StepProbe
from dynamon.quantities import Scope, meanings, quantities_of


class ProgressMeter(PairMeter):
    """Keeps the weights before a step, and evaluates the loss of the next batch on either side of the step.

    A reading belongs to the step of that batch. Where training skips it, the next one serves.

    Args:
        cadence: When.
        loss_fn: ``loss_fn(module, batch)``, or None for the loss of the loop.
        effects: What is known of the effects of an evaluation.
        memory_limit: GiB that the copies of the weights may take; None for half of what is free.
        save: Whether checkpoints may hold the weights that are kept.
    """

    name = "progress"
    stands_beside_sharpness = True  # which then warns of what keeps the loss from being evaluated
    panels = chart_layout(quantities_of("progress"))
    tags = meanings(quantities_of("progress", scope=Scope.SCALAR))
    quantities = meanings(quantities_of("progress", scope=Scope.PER_LAYER))

    def __init__(
        self,
        cadence: Cadence,
        loss_fn: LossFn | None,
        effects: EffectCheck,
        memory_limit: float | None = None,
        save: bool = True,
    ) -> None:
        """Keep nothing."""
        super().__init__(cadence)
        self._loss_fn, self._effects, self._memory_limit, self._save = loss_fn, effects, memory_limit, save
        self._probe: StepProbe | None = None  # None where it is off
        self._kept_at = -1
        self._loaded: dict[str, Any] = {}
        self._reading: Any = None  # of the batch that is under way
        self._layers: list[Layer] = []

    def start(self, run: RunContext) -> None:
        """Say why it is off, or go on with what a checkpoint held."""
        probe = StepProbe(run.loop, run.ranks, self._loss_fn, self._effects)
        layers = self._trained(run)
        trained = [layer.parameter for layer in layers]
        reason = probe.off_reason(layers) or self._lacks_memory(run)
        self._probe, self._reading = None, None
        if reason is not None:
            is_said = self.stands_beside_sharpness and reason == why_not_evaluated(probe, trained, self._loss_fn)
            (rank_zero_info if is_said else rank_zero_warn)(f"{self.name} is off: {reason}")
            return
        if self._effects.reason is not None:  # found in an earlier fit
            return
        self._probe = probe
        self._take_up(run)

    def _take_up(self, run: RunContext) -> None:
        if self._probe is not None and self._loaded:
            self._probe.load_state_dict(self._loaded, self._trained(run))
            self._loaded, self._kept_at = {}, run.step - 1

    @staticmethod
    def _trained(run: RunContext) -> list[Layer]:
        trained = trained_parameters(run)
        return [layer for layer in run.all_layers if layer.name in trained]

    def _lacks_memory(self, run: RunContext) -> str | None:
        """Return why there is too little memory on this process or another, in one sentence."""
        parameters = [to_local(layer.parameter) for layer in self._trained(run)]
        needed = COPIES * sum(real_numel(p) * max(real_dtype(p).itemsize, 4) for p in parameters)
        limit = allowed_memory(run, self._memory_limit)
        lacks = torch.tensor(float(needed > limit), dtype=widest_dtype(run.device), device=run.device)
        with run.ranks.collective_section():
            if not bool(run.ranks.maximum(lacks)):
                return None
        said = f"{needed / 2**30:.3g} GiB on each process, and {limit / 2**30:.3g} are allowed"
        return f"its {COPIES} copies of the weights take {said}. Raise memory_limit to have it measured."

    def is_off(self) -> bool:
        """Return whether it cannot measure in this run."""
        return self._probe is None

    def is_missed(self) -> bool:
        """Not where it cannot measure."""
        return super().is_missed() and self._probe is not None

    def expected(self, run: RunContext) -> float | None:
        """Return what a measurement took lately; before the first, two steps of training."""
        return super().expected(run) if self._took else 2 * run.seconds_per_step

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """Measure what the step before did to this batch's loss, and keep the weights for the next measurement."""
        if self._probe is None:
            return
        if self._probe.is_kept and run.step > self._kept_at:
            self._read(run, batch)
        if self._probe is not None and not self._probe.is_kept and self.keeps(run):
            with run.charge(self.name):
                layers = self._layers = self._trained(run)
                self._kept_at = run.step
                self._probe.keep(layers, partial(run.copies, layers))
                self._follow(run, self._probe)

    @staticmethod
    def _follow(run: RunContext, probe: StepProbe | None) -> None:
        """Have the steps of this batch followed, which nobody has to be at other steps; None for no longer."""
        run.steps.followers[:] = [one for one in run.steps.followers if not isinstance(one, StepProbe)]
        if probe is not None:
            run.steps.followers.append(probe)

    def _read(self, run: RunContext, batch: Any) -> None:
        assert self._probe is not None
        if not self.is_due(run):
            self._probe.forget()
            return
        with run.together(self.name):
            self._reading = self._take(self._probe, batch)
        if self._effects.reason is not None:
            self._probe = None
            if run.strict:
                raise ValueError(self._effects.sentence(self.name))
            self._effects.tell(self.name)

    def _take(self, probe: StepProbe, batch: Any) -> Any:
        return probe.read(batch)

    def batch_end(self, run: RunContext) -> None:
        """Hand on what was measured; forget weights that no optimizer has changed."""
        if self._probe is not None and self._probe.is_kept and self._kept_at == run.step:
            self._follow(run, None)
            with run.charge(self.name, waits=True):
                taken = run.steps.taken()
                self._probe.only({id(p) for o in taken for group in o.param_groups for p in group["params"]})
        reading, self._reading = self._reading, None
        if reading is not None:
            self._record(run, reading)
            self.done(run)

    def _record(self, run: RunContext, reading: Any) -> None:
        names = [layer.name for layer in run.layers]
        place = {name: i for i, name in enumerate(reading.names)}
        decays = bool(np.any(reading.decay_before) or np.any(reading.decay_after))
        rows = {name: getattr(reading, name) for name in ("decrease", "first_order", "curvature_cost", "overshoot")}
        scalars = {name: getattr(reading, name) for name in ("total_decrease", "total_overshoot", "discrepancy")}
        if decays:
            rows["decay_decrease"] = reading.decay_decrease
            scalars["total_decay_decrease"] = reading.total_decay_decrease
        scalars["probe_samples"] = reading.samples
        known = {f"progress/{name}": value for name, value in scalars.items() if np.isfinite(value)}
        run.recorder.scalars(known, headline=True)
        for name, row in rows.items():
            shown = np.array([row[place[layer]] if layer in place else np.nan for layer in names])
            run.recorder.layers(f"progress/{name}", shown, names)

    def lapse(self, run: RunContext) -> None:
        """Drop what was kept: steps pass that are not seen."""
        if self._probe is not None:
            self._probe.forget()

    def make_room(self, run: RunContext) -> str | None:
        """Be off: a reading takes as much memory as a training step, and its copies."""
        self._probe = None
        return "It is off from now on: its copies of the weights do not fit."

    def state_dict(self) -> dict[str, Any]:
        """Return how many readings there were, and where the next step is read, the weights kept for it."""
        is_kept = self._probe is not None and self._probe.is_kept and self._saves
        kept = self._probe.state_dict() if is_kept and self._probe is not None else self._loaded
        return {**super().state_dict(), "kept": kept}

    @property
    def _saves(self) -> bool:
        return self._save and self.saves_copies

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self._reading, self._loaded = None, dict(state.get("kept", {}))
        if self._probe is not None:
            self._probe.forget()

    def resume(self, run: RunContext, state: dict[str, Any]) -> None:
        """Take up a saved state, in the middle of a run at once."""
        super().resume(run, state)
        self._take_up(run)
