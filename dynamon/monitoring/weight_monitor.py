"""Sizes of weights and updates, how updates turn, the spectrum's extremes, and what decay leaves."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dynamon.health import Finding
from dynamon.monitoring.arguments import check_arguments, check_switches
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.weight_meter import WeightMeter
from dynamon.quantities import quantities_of, with_tag_table


@with_tag_table(quantities_of("weight", "monitor"))
class WeightMonitor(Monitor):
    """Weight and update sizes in the norm of each layer's role, and the extremes of the spectrum.

    The norm by role (:func:`dynamon.norms.operator_norm`): hidden and convolution RMS->RMS, embedding 1->RMS,
    head RMS->inf, vectors RMS. The largest singular value comes from Gram iteration with its certificate.

    Tags, all but ``update/cosine`` (a headline) per layer, written as described in
    :class:`dynamon.callbacks.GradientMonitor`:

    {tags}

    (*) matrices and flattened convolutions, every tenth reading: they need all singular values. Under DDP and FSDP2
    each process takes a part of the layers.

    Args:
        every_n_steps: Measure at every step that is a multiple of this; where a step was not taken, at the next one
            that is. None: as often as ``budget`` allows, every twentieth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None. Several monitors
            in one run share one budget and one grace, the largest that one of them has.
        layers: Globs for the layers measured, ``!`` excludes.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.
        histograms: Write a histogram of each layer's weights to TensorBoard, every tenth reading.
        convolutions: Bound the norm of each convolution as a map of whole inputs, every tenth reading. Takes from
            milliseconds to, for hundreds of channels on a CPU, seconds a layer.
        grace: Seconds that monitoring may take beyond ``budget``, once in a fit, so that a short run shows something.
        roles: Roles of layers by glob (``{"stem.*": "embedding"}``) where they are guessed wrongly, as ``overrides`` of
            :func:`dynamon.layers.describe_layers`. What was guessed from a name is logged once.
        geometry: ``"sign"``, ``"euclidean"`` or ``"spectral"``: the geometry in which the optimizers descend, which
            selects the norms of ``gradient/dual``, noise and steps. A mapping from class names states it of some. None:
            by their classes (:func:`dynamon.norms.optimizer_family`); what was guessed is logged once.
        on_finding: Function that is called with each new :class:`dynamon.health.Finding`, on a thread of its own.
        stop_on: Health rules (``"loss/nonfinite"``) and severities (``"fault"``) at which training stops; None never.

    Raises:
        ValueError: On an argument out of range, at construction; on globs or loggers that match nothing, when
            fit starts.

    Cost: two copies of the measured weights for the length of one step; two Gram iterations a matrix, that of the step
    in bfloat16 where this pays (:mod:`dynamon.kernels.thresholds`). Memory: 8 copies of the parameters at a peak, 2 in
    between, where matrices are square and have up to 2^27 entries together; larger and other ones take less. A measured
    step holds its gradients until the batch ends, also where ``zero_grad`` comes before. With
    ``every_n_steps``, checkpoints hold a copy where the next step is read. Decay is followed at every step, which takes
    microseconds. Under FSDP2 the copies are of this process's part; a reading sends one small all-reduce, and gathers
    each matrix, with its step where it is a hidden weight or a convolution, on the process that takes it.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        histograms: bool = False,
        convolutions: bool = False,
        grace: float = GRACE,
        roles: Mapping[str, str] | None = None,
        geometry: str | Mapping[str, str] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, grace, layers=layers, loggers=loggers)
        check_switches(histograms=histograms, convolutions=convolutions)
        self._every_n_steps = every_n_steps
        self._make_part = partial(weight_meters, interval=20, histograms=histograms, convolutions=convolutions)
        own_meters = partial(self._make_part, every_n_steps)
        super().__init__(own_meters, budget, layers, loggers, strict, grace, roles, geometry, on_finding, stop_on)


def weight_meters(every_n_steps: int | None, interval: int, histograms: bool, convolutions: bool) -> list[Meter]:
    """Make the meter of weights."""
    return [WeightMeter(Cadence(every_n_steps, interval), histograms, convolutions)]
