"""Outputs of modules, their gradients and the logits of attention, on the probe."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from dynamon.board.custom_scalars import chart_layout
from dynamon.curvature import ShardedParameters
from dynamon.curvature.distributed.sharded import ShardedGradients
from dynamon.curvature.operators.backends import Gradients
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.dtensor import is_sharded
from dynamon.isolation.evaluations import Evaluations
from dynamon.monitoring.activation_reading import Table, read_activations
from dynamon.monitoring.activation_watch import ActivationWatch
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.evaluation import trained_parameters
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.quantities import Scope, meanings, quantities_of


class ActivationMeter(Meter):
    """Evaluates the loss and one gradient on the probe, and watches what modules return.

    Args:
        cadence: When.
        probe: What the loss is evaluated on.
        patterns: Globs for modules; None for those of the run.
    """

    name = "activation"
    panels = chart_layout(quantities_of("activation"))
    tags = meanings(quantities_of("activation", scope=Scope.SCALAR))
    quantities = meanings(quantities_of("activation", scope=Scope.PER_LAYER))

    def __init__(self, cadence: Cadence, probe: ProbeMeter, patterns: Sequence[str] | None = None) -> None:
        """Remember them."""
        super().__init__(cadence)
        self.probe, self._patterns, self._is_told = probe, patterns, False

    def start(self, run: RunContext) -> None:
        """Leave sharded parameters where they are: a pass gathers them layer by layer; sharpness gathers for itself."""
        if self.probe.subject == self.name:
            self.probe.gathers = not all(is_sharded(p) for p in trained_parameters(run).values())

    def is_off(self) -> bool:
        """Return whether the loss cannot be evaluated on a probe."""
        return self.probe.off

    def is_missed(self) -> bool:
        """Not where it is off."""
        return super().is_missed() and not self.is_off()

    def missed_reason(self) -> str | None:
        """Return why there was no loss to measure on."""
        return None if self.points or self.is_off() else self.probe.refusal

    def expected(self, run: RunContext) -> float | None:
        """Return what a measurement took lately; before the first, a step and two on as many samples."""
        return super().expected(run) if self._took else (1 + 2 * self.probe.share) * run.seconds_per_step

    def make_room(self, run: RunContext) -> str | None:
        """Halve the probe."""
        return self.probe.halve(run)

    def batch_end(self, run: RunContext) -> None:
        """Measure when due."""
        if self.is_off() or not self.is_due(run) or not self.probe.is_expected(run) or not run.steps.any_taken():
            return
        with run.charge(self.name, waits=True):
            is_there = self.probe.check(run)
        if not is_there:
            return
        with run.together(self.name):
            self.probe.agree(run)
            for tag, (values, names) in self._measure(run).items():
                run.recorder.layers(tag, values, names)
            if self.probe.samples_in_all is not None:
                run.recorder.scalars({"activation/probe_samples": float(self.probe.samples_in_all)}, headline=True)
        self.done(run)

    def _measure(self, run: RunContext) -> dict[str, Table]:
        watch = ActivationWatch(run.module, run.patterns if self._patterns is None else self._patterns)
        with self.probe.evaluation(run) as params:
            evaluate_watched(watch, lambda: self.probe.loss(run), params)
        if self.probe.samples is None and not self._is_told:
            self._is_told = True
            rank_zero_info(
                "activation/gradient is left out: how many samples the probe has is not known. A loss_fn that takes a "
                "mapping or a tuple of tensors with one sample a row shows it."
            )
        return read_activations(watch, run.ranks, run.device, self.probe.samples)


def evaluate_watched(watch: ActivationWatch, loss_fn: Callable[[], Tensor], params: FlatParameters) -> None:
    """Evaluate a loss and its gradient, in whatever way its parameters allow, under a watch."""
    kind = ShardedGradients if isinstance(params, ShardedParameters) else Gradients
    with watch.watching():
        kind(lambda: watch.loss(loss_fn()), params, Evaluations()).evaluate()


def activation_meters(
    every_n_steps: int | None, interval: int, patterns: Sequence[str] | None, probe: partial[ProbeMeter]
) -> list[Meter]:
    """Make a probe and the meter that measures on it."""
    kept = probe()
    kept.subject = ActivationMeter.name
    return [kept, ActivationMeter(Cadence(every_n_steps, interval), kept, patterns)]


def share_probe(meters: Sequence[Meter]) -> list[Meter]:
    """Have activations measured on the probe that sharpness is measured on, and leave out their own."""
    probe = next((meter for meter in meters if isinstance(meter, ProbeMeter)), None)
    for meter in meters:
        if isinstance(meter, ActivationMeter) and probe is not None:
            meter.probe, probe.guests = probe, ("activations",)
    return [meter for meter in meters if not isinstance(meter, ProbeMeter) or meter is probe]
