"""Sizes of weights and updates, and the spectrum's extremes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.callbacks.monitor import Monitor, check_arguments
from dynamon.panels import WEIGHTS
from dynamon.weights import weight_readings


class WeightMeter(Meter):
    """Copies the weights before a step and measures them, and the step, after it."""

    name = "weight"
    panels = WEIGHTS
    tags: dict[str, str] = {}
    quantities = {
        "weight/operator": "norm by role: RMS->RMS, 1->RMS, RMS->inf or RMS",
        "weight/frobenius": "Euclidean norm",
        "weight/rms": "Euclidean norm over the square root of the size",
        "update/operator": "the step in the norm by role",
        "update/ratio": "step over weight, both in that norm",
        "spectrum/sigma_max": "largest singular value",
        "spectrum/sigma_lower": "certified lower bound on it",
        "spectrum/sigma_upper": "certified upper bound on it",
        "spectrum/stable_rank": "squared Frobenius norm over squared sigma_max",
    }

    def __init__(self, cadence: Cadence) -> None:
        """Nothing copied."""
        super().__init__(cadence)
        self._before: dict[str, Tensor] = {}

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Copy the weights that this optimizer is about to change."""
        if not self.cadence.due(run, self.name, self.expected(run), run.step):
            return
        with run.charge(self.name):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for layer in run.layers:
                if id(layer.parameter) in own and layer.name not in self._before:
                    self._before[layer.name] = layer.parameter.detach().clone()

    def batch_end(self, run: Run) -> None:
        """Measure, if weights were copied."""
        if not self._before:
            return
        before, self._before = self._before, {}
        with run.charge(self.name):
            readings = weight_readings(run.layers, before)
            names = [layer.name for layer in run.layers]
            fields = dict(zip(self.quantities, readings.__dict__.values(), strict=True))
            table = torch.stack(list(fields.values())).cpu().numpy()
            for quantity, row in zip(fields, table, strict=True):
                run.recorder.layers(quantity, row, names)
        self.done(run)


class WeightMonitor(Monitor):
    """Weight and update sizes in the norm of each layer's role, and the extremes of the spectrum.

    The norm by role (:func:`dynamon.norms.operator_norm`): hidden and convolution RMS->RMS, embedding 1->RMS,
    head RMS->inf, vectors RMS. The largest singular value comes from Gram iteration with its certificate.

    Tags, all per layer and written as described in :class:`dynamon.callbacks.GradientMonitor`:

    ================================  ====================================================
    tag                               what it is
    ================================  ====================================================
    ``weight/operator``               norm by role: RMS->RMS, 1->RMS, RMS->inf or RMS
    ``weight/frobenius``              Euclidean norm
    ``weight/rms``                    Euclidean norm over the square root of the size
    ``update/operator``               the step in the norm by role
    ``update/ratio``                  step over weight, both in that norm
    ``spectrum/sigma_max``            largest singular value
    ``spectrum/sigma_lower``          certified lower bound on it
    ``spectrum/sigma_upper``          certified upper bound on it
    ``spectrum/stable_rank``          squared Frobenius norm over squared sigma_max
    ``dynamon/overhead``              time of monitoring over training time without it
    ``dynamon/failures``              measurements that failed so far
    ================================  ====================================================

    Args:
        every_n_steps: Measure at every step that is a multiple of this. None: as often as ``budget`` allows,
            every twentieth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None.
        layers: Globs for the layers measured, ``!`` excludes.
        loggers: Loggers to write to by part of the class name; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.

    Raises:
        ValueError: On an argument out of range, at construction; on globs or loggers that match nothing, when
            fit starts.

    Cost: a copy of the measured weights for the length of one step; two Gram iterations a matrix.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        layers: Sequence[str] | None = None,
        loggers: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, layers=layers, loggers=loggers)
        super().__init__(partial(_meters, every_n_steps), budget, layers, loggers, strict)


def _meters(every_n_steps: int | None) -> list[Meter]:
    return [WeightMeter(Cadence(every_n_steps, interval=20, share=1.0))]
