"""All monitors in one line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from dynamon.health import Finding
from dynamon.isolation.preserve import LossFn
from dynamon.monitoring.activation_meter import share_probe
from dynamon.monitoring.activation_monitor import ActivationMonitor
from dynamon.monitoring.arguments import check_arguments, check_switches
from dynamon.monitoring.gauss_newton import OutputsFn
from dynamon.monitoring.gradient_monitor import GradientMonitor
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.sentinel import Sentinel
from dynamon.monitoring.sharpness_monitor import QUANTITIES, SharpnessMonitor
from dynamon.monitoring.weight_monitor import WeightMonitor
from dynamon.quantities import quantities_of, with_tag_table


@dataclass(frozen=True)
class Preset:
    """Hold what a preset measures, and how often at most, before the budget stretches it.

    Attributes:
        gradients: Steps between gradient readings.
        weights: Steps between weight readings.
        sharpness: Steps between sharpness readings.
        activations: Steps between readings of activations; None for none.
        probe_fraction: Share of a batch in the probe.
        quantities: Sharpness quantities, as in :class:`SharpnessMonitor`.
        histograms: Whether every tenth reading of gradients and weights brings their histograms.
    """

    gradients: int
    weights: int
    sharpness: int
    activations: int | None
    probe_fraction: float
    quantities: Sequence[str]
    histograms: bool = False


_ECONOMY = ("stability_ratio", "directional", "critical", "progress")
_EXPENSIVE = ("next", "preconditioned", "ggn", "trace", "density")  # asked for by name, in SharpnessMonitor
PRESETS = {
    "economy": Preset(
        gradients=4, weights=20, sharpness=20, activations=None, probe_fraction=0.25, quantities=_ECONOMY
    ),
    "standard": Preset(
        gradients=2,
        weights=10,
        sharpness=20,
        activations=20,
        probe_fraction=0.25,
        quantities=(*_ECONOMY, "hessian", "bracket"),
    ),
    "full": Preset(
        gradients=1,
        weights=5,
        sharpness=10,
        activations=10,
        probe_fraction=1.0,
        quantities=tuple(q for q in QUANTITIES if q not in _EXPENSIVE),
        histograms=True,
    ),
}


@with_tag_table(quantities_of("sentinel"))
class DynamicsMonitor(Monitor):
    """Gradients, weights, sharpness and activations in one callback, with one budget and one pass over the gradients.

    It writes the tags of :class:`GradientMonitor`, :class:`WeightMonitor`, :class:`SharpnessMonitor` and, with
    ``standard`` and ``full``, :class:`ActivationMonitor`; see their tables.

    ============  ===============  ==============  ================  =============================================
    preset        gradients every  weights every   sharpness every   sharpness
    ============  ===============  ==============  ================  =============================================
    ``economy``   4 steps          20 steps        20 steps          stability ratio, directional and critical
                                                                     sharpness, on a quarter of a batch; progress
                                                                     by layer, on the next batch
    ``standard``  2 steps          10 steps        20 steps          with the Hessian and the bracket; activations
                                                                     every 20 steps
    ``full``      1 step           5 steps         10 steps          with batch sharpness, the top eigenspace and
                                                                     every layer's block, on a whole batch; histograms;
                                                                     activations every 10 steps
    ============  ===============  ==============  ================  =============================================

    These are the shortest intervals; the budget stretches them. Below 4 % (``full``: 17 %) it also cuts the probe,
    to ``6 * budget`` of a batch, unless ``probe_fraction`` or ``probe_size`` says how much of it is wanted;
    ``sharpness/probe_samples`` shows what is left. For SGD the Hessian's eigenvalue comes with the stability ratio at
    no cost, so ``economy`` shows it too.

    A part of your own replaces that of the preset, with all its options::

        DynamicsMonitor(
            budget=0.05,
            sharpness=SharpnessMonitor(quantities=["stability_ratio", "ggn"], tol=1e-3),
            weights=WeightMonitor(convolutions=True, every_n_steps=500),
        )

    The parts are settings: this monitor measures them, under one budget and one grace, with one pass over the
    gradients, and everything is in its ``history`` and its state; ``history`` of a part is the same object. What
    concerns all of them (``budget``, ``grace``, ``layers``, ``loggers``, ``strict``, ``roles``, ``geometry``,
    ``on_finding``, ``stop_on``) is given here, not to a part. A part without ``every_n_steps`` has that of this
    monitor. The arguments from ``quantities`` to ``convolutions`` change the preset's own parts.

    Beside the parts a sentinel looks at every step for spikes: the gradient before clipping and the update of each
    layer, and the loss, each against its usual level. It takes at most a quarter of the budget, where that is not
    enough it looks at every k-th step only, and says so; with ``every_n_steps``, or without a budget, it looks at all
    of them. Its tags:

    {tags}

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
        save_vectors: As there: whether checkpoints hold the vectors that a solve starts from.
        tol: As there.
        max_matvecs: As there.
        memory_limit: As there.
        histograms: Whether every tenth reading of gradients and weights brings their histograms.
        convolutions: As in :class:`WeightMonitor`.
        grace: Seconds that monitoring may take beyond ``budget``, once in a fit, so that a short run shows something.
        sharpness: The sharpness part, instead of that of the preset.
        gradients: The gradient part, likewise.
        weights: The weight part, likewise.
        activations: The activation part, likewise; it is measured on the probe of the sharpness part.
        roles: As in :class:`GradientMonitor`.
        geometry: As there.
        on_finding: Function that is called with each new :class:`dynamon.health.Finding`, on a thread of its own, so
            that training does not wait for it. It must not touch the model or the optimizer. What it raises is counted
            in ``failures``. On the first process only.
        stop_on: Health rules (``"loss/nonfinite"``) and severities (``"fault"``; a severity stands for those that are
            worse, too) at which training stops after the step, on all processes; None never stops. Where there are
            several processes, they agree with the next reading.
        sentinel: Whether to look at every step for spikes, within a quarter of the budget.

    Attributes:
        history: Everything measured, as arrays: ``monitor.history["noise/dual"].values`` is ``[T, L]``.

    Raises:
        TypeError: On an argument of the wrong type.
        ValueError: On an argument out of range, or given both here and in a part, at construction; on globs or loggers
            that match nothing, when fit starts.

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
        save_vectors: bool = True,
        tol: float = 1e-2,
        max_matvecs: int = 40,
        memory_limit: float | None = None,
        histograms: bool | None = None,
        convolutions: bool = False,
        grace: float = GRACE,
        sharpness: SharpnessMonitor | None = None,
        gradients: GradientMonitor | None = None,
        weights: WeightMonitor | None = None,
        activations: ActivationMonitor | None = None,
        roles: Mapping[str, str] | None = None,
        geometry: str | Mapping[str, str] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
        sentinel: bool = True,
    ) -> None:
        """Check the arguments, and take the parts together."""
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        check_arguments(every_n_steps, budget, grace, quantities=quantities, layers=layers, loggers=loggers)
        of_sharpness: dict[str, Any] = {
            "quantities": quantities,
            "loss_fn": loss_fn,
            "outputs": outputs,
            "probe_batches": probe_batches,
            "probe_fraction": probe_fraction,
            "probe_size": probe_size,
            "probe_weight": probe_weight,
            "save_probe": save_probe,
            "save_vectors": save_vectors,
            "tol": tol,
            "max_matvecs": max_matvecs,
            "memory_limit": memory_limit,
        }
        cuts_probe = budget is not None and every_n_steps is None
        parts = _preset_parts(PRESETS[preset], of_sharpness, histograms, convolutions, budget if cuts_probe else None)
        given = dict(gradients=gradients, weights=weights, sharpness=sharpness, activations=activations)
        self._given = _checked(given, {**of_sharpness, "histograms": histograms, "convolutions": convolutions})
        own = (parts | self._given).values()
        makes: list[Any] = [partial(part._make_part, part._every_n_steps or every_n_steps) for part in own]
        makes += _sentinels(sentinel, every_n_steps is not None or budget is None, type(self).__name__)
        shared = (budget, layers, loggers, strict, grace, roles, geometry, on_finding, stop_on)
        super().__init__(partial(_meters, makes), *shared)
        self.preset = preset

    def _forget(self) -> None:
        """Begin like new; what is measured is also the history of the parts."""
        super()._forget()
        for part in self._given.values():
            part._recorder, part._budget = self._recorder, self._budget

    def one_of_a_kind(self) -> tuple[type, ...]:
        """One monitor of everything beside one of its parts would measure twice; a monitor of your own may stand by."""
        return (DynamicsMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor, ActivationMonitor)


def _checked(given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the parts that are given, after :func:`check_part`; no option is one of the activation part."""
    parts = {name: part for name, part in given.items() if part is not None}
    for name, part in parts.items():
        check_part(name, part, {} if name == "activations" else options)
    return parts


def _meters(makes: Sequence[Callable[[], list[Meter]]]) -> list[Meter]:
    """Make the meters of all parts."""
    return share_probe([meter for make in makes for meter in make()])


def _sentinels(is_wanted: bool, looks_always: bool, name: str) -> list[Callable[[], list[Meter]]]:
    """Return what makes the meter that looks at every step; nothing where none is wanted."""
    check_switches(sentinel=is_wanted)
    return [partial(_sentinel, looks_always, name)] if is_wanted else []


def _sentinel(looks_always: bool, name: str) -> list[Meter]:
    return [Sentinel(looks_always, name)]


def _preset_parts(
    chosen: Preset, of_sharpness: dict[str, Any], histograms: bool | None, convolutions: bool, budget: float | None
) -> dict[str, Any]:
    """Make the parts of a preset, changed by what is given; a budget cuts the probe."""
    fraction, binned = chosen.probe_fraction, chosen.histograms if histograms is None else histograms
    may_shrink = of_sharpness["probe_fraction"] is None and of_sharpness["probe_size"] is None
    if budget is not None:
        # Two per cent carry an eighth of a batch: about one reading in 300 steps on a small GPT.
        fraction = min(fraction, 6 * budget)
    preset: dict[str, Any] = {"quantities": chosen.quantities, "probe_fraction": fraction}
    settings: dict[str, Any] = {
        name: preset.get(name) if value is None else value for name, value in of_sharpness.items()
    }
    gradients, weights = GradientMonitor(histograms=binned), WeightMonitor(histograms=binned, convolutions=convolutions)
    sharpness = SharpnessMonitor(**settings)
    gradients._make_part = partial(gradients._make_part, interval=chosen.gradients)
    weights._make_part = partial(weights._make_part, interval=chosen.weights)
    sharpness._make_part = partial(sharpness._make_part, interval=chosen.sharpness, may_shrink=may_shrink)
    parts: dict[str, Any] = {"gradients": gradients, "weights": weights, "sharpness": sharpness}
    if chosen.activations is not None:
        activations = parts["activations"] = ActivationMonitor()
        activations._make_part = partial(activations._make_part, interval=chosen.activations)
    return parts


def check_part(name: str, part: Any, options: dict[str, Any]) -> None:
    """Raise TypeError or ValueError where a part is none, or where something is given twice.

    Args:
        name: The argument that holds the part.
        part: The part.
        options: What the monitor of all parts was given for one of them.
    """
    kinds: dict[str, type[Monitor]] = {
        "gradients": GradientMonitor,
        "weights": WeightMonitor,
        "sharpness": SharpnessMonitor,
        "activations": ActivationMonitor,
    }
    kind = kinds[name]
    if not isinstance(part, kind):
        article = "an" if kind is ActivationMonitor else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, or None, got {type(part).__name__}.")
    of_all, of_part = signature(DynamicsMonitor).parameters, signature(kind).parameters
    for option, value in options.items():
        if option in of_part and value != of_all[option].default:
            raise ValueError(
                f"{option} is given beside {name}={kind.__name__}(...): give it to {kind.__name__} instead."
            )
    for option, value in part.shared_settings().items():
        if value != of_part[option].default:
            raise ValueError(
                f"{option} is given to {name}={kind.__name__}(...), but all parts share it: give it to DynamicsMonitor "
                "instead."
            )
