"""Measure what modules return: sizes, outliers, dead units, gradients of outputs, and the logits of attention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from dynamon.health import Finding
from dynamon.isolation.preserve import LossFn
from dynamon.monitoring.activation_meter import activation_meters
from dynamon.monitoring.activation_modules import HEADS, row_is_chosen, watched_modules
from dynamon.monitoring.arguments import BadArgumentError, check_arguments, check_probe, check_switches
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.planner import GRACE
from dynamon.monitoring.probe import ProbeMeter
from dynamon.quantities import quantities_of, with_tag_table
from dynamon.quantities.activations import FLAT
from dynamon.quantities.names import is_chosen


@with_tag_table(quantities_of("activation", "monitor"))
class ActivationMonitor(Monitor):
    r"""Sizes of what modules return during training, outliers, dead units, gradients that come back, attention logits.

    The training loss and one gradient are evaluated on a held probe, as in :class:`SharpnessMonitor`: a share of the
    first batches, in train mode, with the same dropout masks each time, uncompiled. Hooks are there during that
    evaluation only: training runs without any, a compiled module keeps its graphs, and a module under activation
    checkpointing, DDP or FSDP2 is measured as it is. Statistics are summed up on the device where an output arises, and
    no output is kept.

    Rows are modules, under their names: those that hold parameters and no other module, activation functions, attention
    (``torch.nn.MultiheadAttention``), and blocks (the members of a ``ModuleList`` or ``Sequential`` of modules of one
    class). Activation functions that a module calls as functions are rows ``<module>.gelu``, and the last states of
    each layer of a recurrent module of several ``<module>.layer.0``. Of an output that is a tuple or a mapping the
    first real floating point tensor counts. A module that is called several times has one row of all its calls.

    For the entries :math:`x` of an output: :math:`\sqrt{\overline{x^2}}`, :math:`\max |x|`,
    :math:`\overline{x^4} / \overline{x^2}^2` and the share of exact zeros. A unit (a channel or feature) of an
    activation function is saturated if its input lies where the function's slope is below 1 % of the steepest one
    (ReLU: at or below 0, GELU: below -3.0, sigmoid: beyond 6.0, tanh: beyond 3.0) for every entry of the probe: a dead
    unit, in the case of ReLU. n independent entries are all below 0 by chance with probability 2^-n: on a small probe
    some units are dead by chance. Gradients are those of the loss of one sample: the gradient of the mean loss times
    the samples. A residual stream is where blocks that follow each other return the shape that they take.

    Attention logits are computed again from queries and keys, since fused attention hides them: for at most 8 heads of
    a call (each has a row ``<module>.heads.0``), 16 rows and 8 samples, evenly spread, with scale and mask. Seen are
    ``torch.nn.functional.scaled_dot_product_attention`` (grouped queries included), ``torch.nn.MultiheadAttention``,
    and attention written by hand: queries times keys (``@``, ``matmul``, ``bmm``, ``einsum``), a softmax over the last
    of three or four dimensions, times values. Not seen are ``flex_attention`` and kernels of other packages. The
    largest logit is that of these rows: a lower bound of the head's. Entropy is relative to that of equal weights on
    the keys that a row sees.

    Tags:

    {tags}

    Under DDP and FSDP2 each process has its part of the probe, and sums and maxima are those of all processes.
    Parameters that FSDP2 has dealt out are gathered layer by layer, as in training (in :class:`DynamicsMonitor` all at
    once, where sharpness gathers them). It is off where sharpness is off.

    Args:
        every_n_steps: Measure at every step that is a multiple of this; where a step was not taken, at the next one
            that is. None: as often as ``budget`` allows, every twentieth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None. Several monitors
            in one run share one budget and one grace, the largest that one of them has.
        loss_fn: As in :class:`SharpnessMonitor`.
        probe_batches: As there.
        probe_fraction: As there.
        probe_size: As there.
        probe_weight: As there.
        save_probe: As there.
        layers: Globs for the modules measured, by their names or those of their own parameters, and for rows of
            attention and activation functions that they call (``*.heads``, ``*.gelu``); ``!`` excludes.
        loggers: Loggers to write to by part of the class name, class or object; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.
        grace: Seconds that monitoring may take beyond ``budget``, once in a fit, so that a short run shows something.
        on_finding: Function that is called with each new :class:`dynamon.health.Finding`, on a thread of its own.
        stop_on: Health rules (``"loss/nonfinite"``) and severities (``"fault"``) at which training stops; None never.

    Raises:
        ValueError: On an argument out of range, at construction; on globs that match no module, when fit starts.

    Cost: the loss and its gradient on the probe, and some seven passes over each output. On the device fourteen calls
    an output, two more an activation function, 34 a call of attention.

    Memory, beyond the activations of a gradient on the probe: three copies of the parameters, and one copy of the
    largest output in float32.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        loss_fn: LossFn | None = None,
        probe_batches: int = 1,
        probe_fraction: float = 0.25,
        probe_size: int | None = None,
        probe_weight: str | None = None,
        save_probe: bool = True,
        layers: Sequence[str] | None = None,
        loggers: Sequence[Any] | None = None,
        strict: bool = False,
        grace: float = GRACE,
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, grace, layers=layers, loggers=loggers)
        check_probe(probe_batches, probe_fraction, loss_fn, probe_size, probe_weight)
        check_switches(save_probe=save_probe)
        self._every_n_steps, self._modules = every_n_steps, layers
        self._of_probe = {
            "loss_fn": loss_fn,
            "probe_batches": probe_batches,
            "probe_fraction": probe_fraction,
            "probe_size": probe_size,
            "probe_weight": probe_weight,
            "save_probe": save_probe,
        }
        probe = partial(ProbeMeter, loss_fn, probe_batches, probe_fraction, probe_size, probe_weight, save=save_probe)
        self._make_part = partial(activation_meters, interval=20, patterns=layers, probe=probe)
        own_meters = partial(self._make_part, every_n_steps)
        super().__init__(own_meters, budget, None, loggers, strict, grace, on_finding=on_finding, stop_on=stop_on)

    def shared_settings(self) -> dict[str, Any]:
        """Return by name the arguments that the parts of a :class:`dynamon.callbacks.DynamicsMonitor` share."""
        not_here = ("roles", "geometry", "layers")  # its globs are for modules
        own = {name: value for name, value in super().shared_settings().items() if name not in not_here}
        return {**own, **self._of_probe}

    def _join(self, loop: Loop, steps_seen: int) -> None:
        """Check the globs for modules, and take part in the loop."""
        if self._modules is not None:
            self._check_globs(loop.module, list(self._modules))
        super()._join(loop, steps_seen)

    @staticmethod
    def _check_globs(module: nn.Module, globs: list[str]) -> None:
        known = watched_modules(module, globs).values()
        if any(one.is_measured for one in known):
            return
        holders = [one.name for one in known if one.is_inside and is_chosen(one.names, globs)]
        if holders:
            rank_zero_warn(
                f"layers={globs} names modules that hold others, such as {holders[0]}: of these only attention and "
                f"activation functions that they call themselves are measured. '{holders[0]}.*' names what they hold."
            )
        elif not any(row_is_chosen(one, name, globs) for one in known for name in (HEADS, *FLAT)):
            raise BadArgumentError(f"layers={globs} matches no module of {type(module).__name__}.")
