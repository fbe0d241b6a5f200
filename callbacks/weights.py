"""Sizes of weights and updates, and the spectrum's extremes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.callbacks.layerwise_lr import steering_of
from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.callbacks.monitor import Monitor, check_arguments
from dynamon.gradients import Array
from dynamon.panels import WEIGHTS
from dynamon.weights import FULL_SPECTRUM, spectra_of, weight_readings

_FULL_EVERY = 10  # readings between two with all singular values
_COUPLED = {"SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Rprop", "ASGD"}  # add decay to gradients


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
        "update/rotation": "angle between the weight before and after the step, in radians",
        "spectrum/sigma_max": "largest singular value",
        "spectrum/sigma_lower": "certified lower bound on it",
        "spectrum/sigma_upper": "certified upper bound on it",
        "spectrum/stable_rank": "squared Frobenius norm over squared sigma_max",
        "weight/effective_rate": "learning rate over the squared Euclidean norm",
        "weight/constraint_usage": "rate x decay x norm by role over the step in it: 1 where decay balances the step",
        "spectrum/effective_rank": "exp of the entropy of the singular values, every tenth reading",
        "spectrum/participation_ratio": "singular values that carry the energy, every tenth reading",
        "spectrum/nuclear": "sum of the singular values, every tenth reading",
        "spectrum/condition": "largest over smallest singular value where that is resolved, every tenth reading",
        "spectrum/tail_exponent": "power-law exponent of the Gram eigenvalues where there is one, every tenth reading",
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
            fields = dict(zip(self.quantities, readings.__dict__.values(), strict=False))
            table = dict(zip(fields, torch.stack(list(fields.values())).cpu().numpy(), strict=True))
            for quantity, row in (table | _rate_readings(run, table)).items():
                run.recorder.layers(quantity, row, names)
            if self.points % _FULL_EVERY == 0:
                self._full_spectra(run)
        self.done(run)

    def _full_spectra(self, run: Run) -> None:
        """What needs all singular values."""
        names, spectra = spectra_of(run.layers)
        if spectra is None:
            return
        table = torch.stack([getattr(spectra, field).float() for field in FULL_SPECTRUM]).cpu().numpy()
        for field, row in zip(FULL_SPECTRUM, table, strict=True):
            run.recorder.layers(f"spectrum/{field}", row, names)

    def state_dict(self) -> dict[str, Any]:
        """How many readings there were: every tenth is a full one."""
        return {"points": self.points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.points = int(state["points"])


def _rate_readings(run: Run, table: Mapping[str, Array]) -> dict[str, Array]:
    """Learning rate and decay of each layer, as in force, against its norms."""
    group_of = {id(p): (o, group) for o in run.trainer.optimizers for group in o.param_groups for p in group["params"]}
    rates, decays = np.full((2, len(run.layers)), np.nan)
    for i, layer in enumerate(run.layers):
        optimizer, group = group_of.get(id(layer.parameter), (None, None))
        if optimizer is not None and group is not None:
            steering = steering_of(run.trainer, optimizer)
            rates[i] = float(group["lr"]) * (1.0 if steering is None else steering.ratios.get(layer.name, 1.0))
            decoupled = group.get("decoupled_weight_decay", type(optimizer).__name__ not in _COUPLED)
            decays[i] = float(group.get("weight_decay", 0.0)) if decoupled else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        usage = rates * decays * table["weight/operator"] / table["update/operator"]
        return {
            "weight/effective_rate": rates / np.square(table["weight/frobenius"].astype(np.float64)),
            "weight/constraint_usage": np.where(decays > 0, usage, np.nan),
        }


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
    ``update/rotation``               angle between the weight before and after the step
    ``weight/effective_rate``         learning rate over the squared Euclidean norm
    ``weight/constraint_usage``       rate x decay x norm by role over the step in it: 1 where decay balances the
                                      step (decoupled decay only)
    ``spectrum/sigma_max``            largest singular value
    ``spectrum/sigma_lower``          certified lower bound on it
    ``spectrum/sigma_upper``          certified upper bound on it
    ``spectrum/stable_rank``          squared Frobenius norm over squared sigma_max
    ``spectrum/effective_rank``       exp of the entropy of the singular values (*)
    ``spectrum/participation_ratio``  singular values that carry the energy (*)
    ``spectrum/nuclear``              sum of the singular values (*)
    ``spectrum/condition``            largest over smallest singular value, where that is resolved (*)
    ``spectrum/tail_exponent``        power-law exponent of the Gram eigenvalues, where there is a power law (*)
    ``dynamon/overhead``              time of monitoring over training time without it
    ``dynamon/failures``              measurements that failed so far
    ================================  ====================================================

    (*) matrices and flattened convolutions, every tenth reading: they need all singular values.

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
