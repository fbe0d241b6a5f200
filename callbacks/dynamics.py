"""All monitors in one line."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dynamon.callbacks.gradients import GradientMeter
from dynamon.callbacks.meter import Cadence, Meter
from dynamon.callbacks.monitor import Monitor, check_arguments
from dynamon.callbacks.sharpness import SharpnessMeter, check_probe
from dynamon.callbacks.weights import WeightMeter
from dynamon.probe import LossFn


@dataclass(frozen=True)
class Preset:
    """What a preset measures at most how often, before the budget stretches it.

    Attributes:
        gradients: Steps between gradient readings.
        weights: Steps between weight readings.
        sharpness: Steps between sharpness readings.
        probe_fraction: Share of a batch in the probe.
        hessian: Whether the Hessian's own eigenvalue is measured beside an Adam run's stability ratio.
    """

    gradients: int
    weights: int
    sharpness: int
    probe_fraction: float
    hessian: bool


PRESETS = {
    "economy": Preset(gradients=4, weights=20, sharpness=20, probe_fraction=0.25, hessian=False),
    "standard": Preset(gradients=2, weights=10, sharpness=20, probe_fraction=0.25, hessian=True),
    "full": Preset(gradients=1, weights=5, sharpness=10, probe_fraction=1.0, hessian=True),
}


class DynamicsMonitor(Monitor):
    """Gradients, weights and sharpness in one callback, with one budget and one pass over the gradients.

    It writes the tags of :class:`GradientMonitor`, :class:`WeightMonitor` and :class:`SharpnessMonitor`; see
    their tables.

    ============  ================  ===============  =================  =========================================
    preset        gradients every   weights every    sharpness every    sharpness
    ============  ================  ===============  =================  =========================================
    ``economy``   4 steps           20 steps         20 steps           stability ratio, on a quarter of a batch
    ``standard``  2 steps           10 steps         20 steps           with the Hessian, on a quarter of a batch
    ``full``      1 step            5 steps          10 steps           with the Hessian, on a whole batch
    ============  ================  ===============  =================  =========================================

    These are the shortest intervals; the budget stretches them. Below 4 % (``full``: 17 %) it also cuts the probe,
    to ``6 * budget`` of a batch; ``sharpness/probe_samples`` shows what is left. For SGD the Hessian's eigenvalue
    comes with the stability ratio at no cost, so ``economy`` shows it too.

    Args:
        preset: ``"economy"``, ``"standard"`` or ``"full"``.
        budget: Share of training time that monitoring may take; None for no limit. It never touches steering.
        every_n_steps: Measure everything at every step that is a multiple of this, whatever it costs; makes
            panels reproducible.
        loss_fn: As in :class:`SharpnessMonitor`.
        probe_batches: How many of the first batches enter the probe.
        layers: Globs for the layers shown one by one, ``!`` excludes.
        loggers: Loggers to write to by part of the class name; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.

    Attributes:
        history: Everything measured, as arrays: ``monitor.history["noise/dual"].values`` is ``[T, L]``.

    Raises:
        ValueError: On an argument out of range, at construction; on globs or loggers that match nothing, when
            fit starts.
    """

    def __init__(
        self,
        preset: str = "economy",
        budget: float | None = 0.02,
        every_n_steps: int | None = None,
        loss_fn: LossFn | None = None,
        probe_batches: int = 1,
        layers: Sequence[str] | None = None,
        loggers: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        chosen = PRESETS[preset]
        check_arguments(every_n_steps, budget, layers=layers, loggers=loggers)
        check_probe(probe_batches, chosen.probe_fraction, loss_fn)
        # Two per cent carry an eighth of a batch: about one reading in 300 steps on a small GPT.
        fraction = chosen.probe_fraction
        if budget is not None and every_n_steps is None:
            fraction = min(fraction, 6 * budget)
        make_meters = partial(_meters, chosen, every_n_steps, loss_fn, probe_batches, fraction)
        super().__init__(make_meters, budget, layers, loggers, strict)
        self.preset = preset

    def one_of_a_kind(self) -> type:
        """One monitor of everything beside another monitor would measure twice."""
        return Monitor


def _meters(
    preset: Preset, every_n_steps: int | None, loss_fn: LossFn | None, probe_batches: int, probe_fraction: float
) -> list[Meter]:
    """Gradients and weights keep to their part of the budget, sharpness takes what they leave."""
    sharpness = Cadence(every_n_steps, preset.sharpness, share=1.0)
    return [
        GradientMeter(Cadence(every_n_steps, preset.gradients, share=0.25)),
        WeightMeter(Cadence(every_n_steps, preset.weights, share=0.1)),
        SharpnessMeter(sharpness, loss_fn, probe_batches, probe_fraction, preset.hessian, tol=2e-2, max_matvecs=40),
    ]
