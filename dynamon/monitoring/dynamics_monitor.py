"""All monitors in one line."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dynamon.isolation.preserve import LossFn
from dynamon.monitoring.arguments import check_arguments, check_probe
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.gauss_newton import OutputsFn
from dynamon.monitoring.gradient_meter import GradientMeter
from dynamon.monitoring.gradient_monitor import GradientMonitor
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.sharpness_monitor import QUANTITIES, SharpnessMonitor, check_solver, sharpness_meters
from dynamon.monitoring.weight_meter import WeightMeter
from dynamon.monitoring.weight_monitor import WeightMonitor


@dataclass(frozen=True)
class Preset:
    """What a preset measures at most how often, before the budget stretches it.

    Attributes:
        gradients: Steps between gradient readings.
        weights: Steps between weight readings.
        sharpness: Steps between sharpness readings.
        probe_fraction: Share of a batch in the probe.
        quantities: Sharpness quantities, as in :class:`SharpnessMonitor`.
        histograms: Whether every tenth reading of gradients and weights brings their histograms.
    """

    gradients: int
    weights: int
    sharpness: int
    probe_fraction: float
    quantities: Sequence[str]
    histograms: bool = False


_ECONOMY = ("stability_ratio", "directional", "critical", "progress")
_EXPENSIVE = ("preconditioned", "ggn", "trace", "density")  # asked for by name, in SharpnessMonitor
PRESETS = {
    "economy": Preset(gradients=4, weights=20, sharpness=20, probe_fraction=0.25, quantities=_ECONOMY),
    "standard": Preset(
        gradients=2, weights=10, sharpness=20, probe_fraction=0.25, quantities=(*_ECONOMY, "hessian", "bracket")
    ),
    "full": Preset(
        gradients=1,
        weights=5,
        sharpness=10,
        probe_fraction=1.0,
        quantities=tuple(q for q in QUANTITIES if q not in _EXPENSIVE),
        histograms=True,
    ),
}


class DynamicsMonitor(Monitor):
    """Gradients, weights and sharpness in one callback, with one budget and one pass over the gradients.

    It writes the tags of :class:`GradientMonitor`, :class:`WeightMonitor` and :class:`SharpnessMonitor`; see
    their tables.

    ============  ===============  ==============  ================  =============================================
    preset        gradients every  weights every   sharpness every   sharpness
    ============  ===============  ==============  ================  =============================================
    ``economy``   4 steps          20 steps        20 steps          stability ratio, directional and critical
                                                                     sharpness, on a quarter of a batch
    ``standard``  2 steps          10 steps        20 steps          with the Hessian and the bracket
    ``full``      1 step           5 steps         10 steps          with batch sharpness, the top eigenspace and
                                                                     every layer's block, on a whole batch; histograms
    ============  ===============  ==============  ================  =============================================

    These are the shortest intervals; the budget stretches them. Below 4 % (``full``: 17 %) it also cuts the probe,
    to ``6 * budget`` of a batch, unless ``probe_fraction`` or ``probe_size`` says how much of it is wanted;
    ``sharpness/probe_samples`` shows what is left. For SGD the Hessian's eigenvalue comes with the stability ratio at
    no cost, so ``economy`` shows it too. All arguments from ``quantities`` on are those of the three monitors, under
    one budget; where they are None the preset decides.

    Under DDP every reading is that of all processes, and the budget is kept by the first one's clock.

    Args:
        preset: ``"economy"``, ``"standard"`` or ``"full"``.
        budget: Share of training time that monitoring may take; None for no limit. It never touches steering.
        every_n_steps: Measure everything at every step that is a multiple of this, whatever it costs; makes
            panels reproducible. Where a step was not taken, the next one that is stands in for it.
        loss_fn: As in :class:`SharpnessMonitor`.
        probe_batches: How many of the first batches enter the probe.
        layers: Globs for the layers shown one by one, ``!`` excludes.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.
        quantities: Sharpness quantities, as in :class:`SharpnessMonitor`.
        outputs: As there.
        probe_fraction: As there: share of each batch's samples in the probe.
        probe_size: As there: samples in the probe, instead of ``probe_batches`` and ``probe_fraction``.
        probe_weight: As there.
        save_probe: As there: whether checkpoints hold the probe.
        tol: As there.
        max_matvecs: As there.
        memory_limit: As there.
        histograms: Whether every tenth reading of gradients and weights brings their histograms.
        convolutions: As in :class:`WeightMonitor`.
        grace: Seconds that monitoring may take beyond ``budget``, once in a fit, so that a short run shows something.

    Attributes:
        history: Everything measured, as arrays: ``monitor.history["noise/dual"].values`` is ``[T, L]``.

    Raises:
        ValueError: On an argument out of range, at construction; on globs or loggers that match nothing, when
            fit starts.

    Memory: what the three monitors keep in between, and the peak of one of them at a time; they share their copies.
    """

    def __init__(
        self,
        preset: str = "economy",
        budget: float | None = 0.02,
        every_n_steps: int | None = None,
        loss_fn: LossFn | None = None,
        probe_batches: int = 1,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        quantities: Sequence[str] | None = None,
        outputs: OutputsFn | None = None,
        probe_fraction: float | None = None,
        probe_size: int | None = None,
        probe_weight: str | None = None,
        save_probe: bool = True,
        tol: float = 1e-2,
        max_matvecs: int = 40,
        memory_limit: float | None = None,
        histograms: bool | None = None,
        convolutions: bool = False,
        grace: float = GRACE,
    ) -> None:
        """Check the arguments."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        own: dict[str, Any] = {"quantities": quantities, "probe_fraction": probe_fraction, "histograms": histograms}
        chosen = replace(PRESETS[preset], **{name: value for name, value in own.items() if value is not None})
        check_arguments(every_n_steps, budget, grace, quantities=quantities, layers=layers, loggers=loggers)
        check_probe(probe_batches, chosen.probe_fraction, loss_fn, probe_size, probe_weight)
        check_solver(chosen.quantities, outputs, tol, max_matvecs, memory_limit)
        if budget is not None and every_n_steps is None and probe_fraction is None:
            # Two per cent carry an eighth of a batch: about one reading in 300 steps on a small GPT.
            chosen = replace(chosen, probe_fraction=min(chosen.probe_fraction, 6 * budget))
        probe = partial(
            ProbeMeter,
            *(loss_fn, probe_batches, chosen.probe_fraction, probe_size, probe_weight),
            save=save_probe,
            may_shrink=probe_fraction is None and probe_size is None,
        )
        solver = (tol, max_matvecs, outputs, memory_limit)
        make_meters = partial(_meters, chosen, every_n_steps, probe, solver, convolutions)
        super().__init__(make_meters, budget, layers, loggers, strict, grace)
        self.preset = preset

    def one_of_a_kind(self) -> tuple[type, ...]:
        """One monitor of everything beside one of its parts would measure twice; a monitor of your own may stand by."""
        return (DynamicsMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor)


def _meters(
    chosen: Preset,
    every_n_steps: int | None,
    probe: partial[ProbeMeter],
    solver: tuple[float, int, OutputsFn | None, float | None],
    convolutions: bool,
) -> list[Meter]:
    """Make the meters of a preset."""
    return [
        GradientMeter(Cadence(every_n_steps, chosen.gradients), chosen.histograms),
        WeightMeter(Cadence(every_n_steps, chosen.weights), chosen.histograms, convolutions),
        *sharpness_meters(tuple(chosen.quantities), probe, partial(Cadence, every_n_steps, chosen.sharpness), *solver),
    ]
