"""Gradient norms, gradient noise, clipping, and how quickly gradients turn."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dynamon.health import Finding
from dynamon.monitoring.arguments import check_arguments, check_switches
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.gradient_meter import GradientMeter
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.quantities import quantities_of, with_tag_table


@with_tag_table(quantities_of("gradient", "monitor"))
class GradientMonitor(Monitor):
    """Gradient norms by layer and as a whole, gradient noise, what clipping does, and how quickly gradients turn.

    Gradients are read accumulated, reduced, unscaled and before clipping; the clipped norm is read when the step
    begins. Of a closure that runs twice in a step (SAM) the second gradient is shown, which the step uses; where a step
    uses more than one (L-BFGS), or its gradients are gone before they can be read, they are left out, and that is said.
    Dual norms are those of the optimizer's geometry and the layer's role (:func:`dynamon.norms.update_norm`): the sum
    of magnitudes under Adam, the Frobenius norm under SGD.

    Tags (headlines are also in ``trainer.callback_metrics``):

    {tags}

    A per-layer quantity ``a/b`` is written as the quantiles ``a/b_p10``, ``a/b_median``, ``a/b_p90``, as
    ``a.b/<layer>`` for each layer while that makes at most 400 tags in all, and as one tensor summary
    ``a/b/layers``. Histograms are ``gradient/histogram/<layer>``, in TensorBoard only.

    The local smoothness is the layerwise trajectory smoothness of Gluon (arXiv 2505.13416): how quickly a layer's
    gradient turns along the run, in the norms of the layer's update. Two successive gradients are of two batches, and
    on small batches their difference, and so this number, is dominated by gradient noise.

    The noise is the change between successive gradients, curvature included. Where the Trainer accumulates gradients
    over two or more batches, the halves of a window are compared as well, and under DDP the gradients of the processes
    with their mean (both with automatic optimisation; under FSDP2 gradients arrive summed, and only windows have
    halves); ``noise/scale`` and ``noise/snr`` (arXiv 1812.06162) then rest on that at every step, or are left out.

    Gradients are compared only where they are accumulated over alike windows
    (:class:`dynamon.quantities.windows.Window`): not across the short window at the end of an epoch, a skipped batch, a
    smaller last batch, or a change of ``.grad`` between two backward passes. What cannot be compared at a step is NaN
    or left out there, and averages stay.

    Args:
        every_n_steps: Measure at every step that is a multiple of this; where a step was not taken, at the next one
            that is. None: as often as ``budget`` allows, every fourth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None. Several monitors
            in one run share one budget and one grace, the largest that one of them has.
        layers: Globs for the layers shown one by one, ``!`` excludes: ``["blocks.*", "!*.bias"]``.
        loggers: Loggers to write to by part of the class name, class or object (``["tensorboard"]``); None for all.
        strict: Raise where a measurement fails, instead of warning and going on.
        histograms: Write a histogram of each layer's gradient to TensorBoard, every tenth reading.
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

    Cost: a few passes over the gradients and a copy of gradients and weights for the length of one step; two copies
    of small tables to the host. Memory: 4 copies of the parameters at a peak, 2 in between. With ``every_n_steps``,
    checkpoints hold these copies where the next step is read. Under FSDP2 the copies are of this process's part; a
    reading sends one small all-reduce before the step and one after it, and for orthogonalised steps gathers each
    hidden gradient, its change and the step on one process.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        histograms: bool = False,
        grace: float = GRACE,
        roles: Mapping[str, str] | None = None,
        geometry: str | Mapping[str, str] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, grace, layers=layers, loggers=loggers)
        check_switches(histograms=histograms)
        self._every_n_steps = every_n_steps
        self._make_part = partial(gradient_meters, interval=4, histograms=histograms)
        own_meters = partial(self._make_part, every_n_steps)
        super().__init__(own_meters, budget, layers, loggers, strict, grace, roles, geometry, on_finding, stop_on)


def gradient_meters(every_n_steps: int | None, interval: int, histograms: bool) -> list[Meter]:
    """Make the meter of gradients."""
    return [GradientMeter(Cadence(every_n_steps, interval), histograms)]
