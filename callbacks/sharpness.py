"""Sharpness and the stability ratio."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dynamon.callbacks.layerwise_lr import steering_of
from dynamon.callbacks.meter import Cadence, Meter, Run
from dynamon.callbacks.monitor import Monitor, check_arguments
from dynamon.curvature import Eigenpairs, HessianOperator, top_eigenvalues
from dynamon.panels import SHARPNESS
from dynamon.probe import LossFn, take_samples, training_loss, undisturbed
from dynamon.stability import has_stability_condition, stability_operator, stability_scaling

_COLD_EVERY = 10  # a cold run now and then finds what tracking could have lost
_CERTIFY_AT = 5  # ... and half-way between, one with an upper bound
_CERTIFY_PRODUCTS = 20
_SAVED_NUMBERS = 2**26  # warm-start vectors and probe enter a checkpoint up to this size
_SEED = 20_240_801


class SharpnessMeter(Meter):
    """Keeps a probe of training samples and tracks the top of the loss's curvature on it."""

    name = "sharpness"
    panels = SHARPNESS
    tags = {
        "sharpness/stability_ratio": "largest eigenvalue of the update's own Hessian; 1 is the largest stable step",
        "sharpness/stability_ratio_upper": "99 % upper bound on it, now and then",
        "sharpness/stability_ratio_residual": "residual of its eigenpair",
        "sharpness/stability_ratio_unconverged": "the value where it did not converge: a lower bound only",
        "sharpness/hessian_max": "largest eigenvalue of the Hessian",
        "sharpness/hessian_max_upper": "99 % upper bound on it, now and then",
        "sharpness/hessian_max_residual": "residual of its eigenpair",
        "sharpness/hessian_max_unconverged": "the value where it did not converge: a lower bound only",
        "sharpness/hessian_min": "smallest Ritz value: an upper bound on the smallest eigenvalue",
        "sharpness/products": "Hessian products this measurement took",
        "sharpness/probe_loss": "training loss on the probe",
        "sharpness/probe_samples": "samples in the probe",
        "sharpness/left_out": "coordinates left out because Adam has never seen them move",
    }

    def __init__(
        self,
        cadence: Cadence,
        loss_fn: LossFn | None,
        probe_batches: int,
        probe_fraction: float,
        hessian: bool,
        tol: float,
        max_matvecs: int,
    ) -> None:
        """No probe yet."""
        super().__init__(cadence)
        self._loss_fn, self._hessian, self._tol, self._max_matvecs = loss_fn, hessian, tol, max_matvecs
        self._probe_batches, self._probe_fraction = probe_batches, probe_fraction
        self._probe: list[Any] = []
        self._indices: list[int] = []
        self._samples: list[int | None] = []
        self._vectors: dict[str, Tensor] = {}
        self._taken = 0
        self._product_seconds: deque[float] = deque(maxlen=5)
        self._off = False
        self._told: set[str] = set()
        self._last_loss = math.inf

    def start(self, run: Run) -> None:
        """Say what cannot be measured."""
        trainer, module = run.trainer, run.module
        self._off = True
        if trainer.world_size > 1:
            rank_zero_warn("sharpness is off: it is measured in one process only so far, and there are several.")
            return
        if self._loss_fn is None and not module.automatic_optimization:
            rank_zero_warn(
                "sharpness is off: with manual optimisation training_step would train; "
                "pass loss_fn=lambda module, batch: ... to have it measured."
            )
            return
        self._off = False
        if len(trainer.optimizers) == 1 and not has_stability_condition(trainer.optimizers[0]):
            rank_zero_info(
                f"no stability ratio: {type(trainer.optimizers[0]).__name__} has no known stability condition; "
                "the Hessian's largest eigenvalue is shown instead."
            )

    def is_missed(self) -> bool:
        """Not where it is off for another reason."""
        return super().is_missed() and not self._off

    def batch_start(self, run: Run, batch: Any) -> None:
        """Keep a share of the first batches."""
        if self._off or len(self._probe) >= self._probe_batches:
            return
        with run.charge(self.name):
            part, samples = take_samples(batch, self._probe_fraction)
            self._probe.append(part)
            self._indices.append(run.trainer.fit_loop.epoch_loop.batch_idx)
            self._samples.append(samples)

    def expected(self, run: Run) -> float:
        """Products of the coming measurement at what they took lately.

        A guess of two training steps for a product on a full batch counts as one experience, so that a single
        slow measurement does not keep the next one away for long.
        """
        products = _CERTIFY_PRODUCTS if self._certifies() else 10 if self._is_cold() else 6
        guess = 2 * run.seconds_per_step * self._probe_fraction * self._probe_batches
        return (2 if self._hessian else 1) * products * median([guess, *self._product_seconds])

    def batch_end(self, run: Run) -> None:
        """Measure when due."""
        if self._off or not self.cadence.due(run, self.name, self.expected(run), run.step):
            return
        if not self._probe:
            return
        spent = run.budget.spent_on.get(self.name, 0.0)
        with run.charge(self.name):
            products = self._measure(run)
        self._product_seconds.append((run.budget.spent_on[self.name] - spent) / products)
        self._taken += 1
        self.done(run)

    def _is_cold(self) -> bool:
        return self._taken % _COLD_EVERY == 0 or self._certifies()

    def _certifies(self) -> bool:
        return self._taken % _COLD_EVERY == _CERTIFY_AT

    def _measure(self, run: Run) -> int:
        moving = {id(p) for o in run.trainer.optimizers for group in o.param_groups for p in group["params"]}
        params = [p for p in run.module.parameters() if p.requires_grad and p.numel() and id(p) in moving]
        optimizer = run.trainer.optimizers[0] if len(run.trainer.optimizers) == 1 else None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(undisturbed(run.module, _SEED))
            stack.enter_context(_loggers_muted(run.trainer))
            stack.enter_context(run.trainer.precision_plugin.train_step_context())
            operator = HessianOperator(lambda: self._loss(run), params)
            products = 0
            readings = {"sharpness/probe_loss": float(operator.loss)}
            if all(samples is not None for samples in self._samples):
                readings["sharpness/probe_samples"] = float(sum(s or 0 for s in self._samples))
            if optimizer is not None and has_stability_condition(optimizer):
                found = self._stability(run, operator, params, optimizer, readings)
                products += found.matvecs
            # SGD's stability ratio brings the Hessian with it; without any ratio the Hessian is all there is.
            if (self._hessian and "sharpness/hessian_min" not in readings) or not products:
                products += self._solve_hessian(operator, readings).matvecs
            readings["sharpness/products"] = float(products)
            run.recorder.scalars(readings, headline=True)
        self._warn(run, readings)
        return products

    def _stability(
        self,
        run: Run,
        operator: HessianOperator,
        params: Sequence[Tensor],
        optimizer: Optimizer,
        readings: dict[str, float],
    ) -> Eigenpairs:
        rates = steering_of(run.trainer, optimizer)
        ratios = {} if rates is None else rates.ratios
        ratio_of = {} if rates is None else {id(la.parameter): ratios[la.name] for la in rates.layers}
        scaling = stability_scaling(optimizer, params, [ratio_of.get(id(p), 1.0) for p in params])
        if scaling.constant is not None and scaling.constant > 0:
            # Plain SGD: the ratio is the Hessian's eigenvalue times a number, one solve gives both.
            found = self._solve_hessian(operator, readings)
            readings |= _readings("stability_ratio", found.scaled(scaling.constant))
        else:
            found = self._solve("stability_ratio", stability_operator(operator, scaling))
            readings |= _readings("stability_ratio", found)
        readings["sharpness/left_out"] = float(scaling.left_out)
        return found

    def _solve_hessian(self, operator: HessianOperator, readings: dict[str, float]) -> Eigenpairs:
        found = self._solve("hessian_max", operator)
        readings |= _readings("hessian_max", found)
        readings["sharpness/hessian_min"] = found.smallest
        return found

    def _solve(self, quantity: str, operator: Any) -> Eigenpairs:
        known = None if self._is_cold() else self._vectors.get(quantity)
        fits = known is not None and known.shape[0] == operator.shape[0]
        warm = known.to(operator.device) if known is not None and fits else None
        found = top_eigenvalues(
            operator,
            tol=self._tol,
            max_matvecs=self._max_matvecs,
            warm_start=warm,
            certify=self._certifies(),
            seed=self._taken,
        )
        self._vectors[quantity] = found.vectors
        return found

    def _loss(self, run: Run) -> Tensor:
        """Mean loss over the probe's batches, weighted by their samples."""
        pairs = zip(self._probe, self._indices, strict=True)
        losses = [training_loss(run.module, batch, self._loss_fn, index) for batch, index in pairs]
        weights = losses[0].new_tensor([float(samples or 1) for samples in self._samples])
        return (torch.stack(losses) * weights).sum() / weights.sum()

    def _warn(self, run: Run, readings: Mapping[str, float]) -> None:
        missed = [tag for tag in readings if tag.endswith("_unconverged")]
        if missed and "unconverged" not in self._told:
            self._told.add("unconverged")
            rank_zero_info(
                f"step {run.step}: {missed[0].removesuffix('_unconverged')} did not converge in "
                f"{self._max_matvecs} products and is shown as {missed[0]}, a lower bound."
            )
        ratio = readings.get("sharpness/stability_ratio", math.nan)
        if not math.isfinite(readings["sharpness/probe_loss"]) and "loss" not in self._told:
            self._told.add("loss")
            rank_zero_warn(f"step {run.step}: the loss on the probe is not finite any more.")
        rising = readings["sharpness/probe_loss"] > self._last_loss
        self._last_loss = readings["sharpness/probe_loss"]
        if ratio > 10 and rising and "ratio" not in self._told:
            self._told.add("ratio")
            rank_zero_info(
                f"step {run.step}: the stability ratio is {ratio:.3g} and the loss on the probe rises. Hovering around "
                "1 is normal training; ten times that means that the steps are too large for the curvature."
            )

    def state_dict(self) -> dict[str, Any]:
        """Warm-start vectors and probe, where they are not large, and the counters."""
        state: dict[str, Any] = {"taken": self._taken}
        if sum(v.numel() for v in self._vectors.values()) <= _SAVED_NUMBERS:
            state["vectors"] = dict(self._vectors)
        numbers = _numbers(self._probe)
        if numbers is not None and numbers <= _SAVED_NUMBERS:
            state["probe"], state["samples"], state["indices"] = self._probe, self._samples, self._indices
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up probe and vectors; without them a new probe is kept and the next run is cold."""
        self._taken = int(state["taken"])
        self._vectors = dict(state.get("vectors", {}))
        self._probe, self._samples = list(state.get("probe", [])), list(state.get("samples", []))
        self._indices = list(state.get("indices", []))


def _readings(quantity: str, found: Eigenpairs) -> dict[str, float]:
    """The tags of one solve; a value that did not converge goes under a tag of its own."""
    tag = f"sharpness/{quantity}"
    readings = {
        tag if found.converged else f"{tag}_unconverged": float(found.values[0]),
        f"{tag}_residual": float(found.residuals[0]),
    }
    return readings if found.upper is None else {**readings, f"{tag}_upper": found.upper}


def _numbers(batch: Any) -> int | None:
    """How many numbers a probe holds, None where it holds objects that a checkpoint cannot take safely."""
    if type(batch) is Tensor:
        return batch.numel()
    if type(batch) is dict:
        batch = [*batch.keys(), *batch.values()]
    if type(batch) in (list, tuple):
        counts = [_numbers(item) for item in batch]
        return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)
    return 1 if type(batch) in (int, float, str, bool, type(None)) else None


@contextmanager
def _loggers_muted(trainer: pl.Trainer) -> Iterator[None]:
    """What ``training_step`` writes to ``self.logger`` itself is written for its own batches only."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger()] if loggers else []
    try:
        yield
    finally:
        trainer.loggers = loggers


class SharpnessMonitor(Monitor):
    """The loss's top curvature during training, and how close the step size is to the edge of stability.

    The training loss is evaluated on a held probe (a share of the first batches, in train mode, with the same
    dropout masks each time) through the module's own ``training_step``, or ``loss_fn``; nothing of that leaves a
    trace in the run; checkpoints hold the probe, so that a resumed run measures the same. Eigenvalues come from
    warm-started Lanczos, cold every fifth time, every tenth with an upper bound. The value depends
    on the probe more than on the solver: a small probe is sharper than the whole training set.

    The **stability ratio** (:func:`dynamon.stability.stability_ratio`) is the number to watch: 1 is the largest
    step the curvature allows for this optimizer with its present state and the rates in force. Hovering
    around 1 is normal training; under mini-batches a value below 1 is normal too.

    Tags (headlines are also in ``trainer.callback_metrics``):

    ==========================================  ====================================================
    tag                                         what it is
    ==========================================  ====================================================
    ``sharpness/stability_ratio``               largest eigenvalue of the update's own Hessian; 1 is the largest
                                                stable step
    ``sharpness/stability_ratio_upper``         99 % upper bound on it, now and then
    ``sharpness/stability_ratio_residual``      residual of its eigenpair
    ``sharpness/stability_ratio_unconverged``   the value where it did not converge: a lower bound only
    ``sharpness/hessian_max``                   largest eigenvalue of the Hessian
    ``sharpness/hessian_max_upper``             99 % upper bound on it, now and then
    ``sharpness/hessian_max_residual``          residual of its eigenpair
    ``sharpness/hessian_max_unconverged``       the value where it did not converge: a lower bound only
    ``sharpness/hessian_min``                   smallest Ritz value: an upper bound on the smallest eigenvalue
    ``sharpness/products``                      Hessian products this measurement took
    ``sharpness/probe_loss``                    training loss on the probe
    ``sharpness/probe_samples``                 samples in the probe
    ``sharpness/left_out``                      coordinates left out because Adam has never seen them move
    ``dynamon/overhead``                        time of monitoring over training time without it
    ``dynamon/failures``                        measurements that failed so far
    ==========================================  ====================================================

    The stability ratio needs one optimizer of class SGD, Adam or AdamW; otherwise the Hessian is shown alone.

    Args:
        every_n_steps: Measure at every step that is a multiple of this. None: as often as ``budget`` allows,
            every twentieth step at most.
        budget: Share of training time that monitoring may take; used when ``every_n_steps`` is None.
        loss_fn: ``loss_fn(module, batch) -> scalar``, instead of ``training_step``. Needed for manual
            optimisation and where ``training_step`` has effects outside the module (files, iterators).
        probe_batches: How many of the first batches enter the probe.
        probe_fraction: Share of each batch's samples in the probe.
        hessian: Measure the Hessian's own top eigenvalue too where the stability ratio does not contain it
            (Adam), at about the price of the ratio.
        tol: Relative tolerance on residual and change; the value's error is about its square.
        max_matvecs: Most Hessian products a solve may take.
        loggers: Loggers to write to by part of the class name; None for all.
        strict: Raise where a measurement fails, instead of warning and going on.

    Raises:
        ValueError: On an argument out of range, at construction.

    Cost: on a full-size probe a product takes 2 to 3.5 training steps, on a quarter of it about half a step; a
    tracked measurement takes 4 to 8 products. Memory: 9 vectors of the size of the parameters and the graph of
    a gradient on the probe.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        budget: float | None = 0.02,
        loss_fn: LossFn | None = None,
        probe_batches: int = 1,
        probe_fraction: float = 0.25,
        hessian: bool = True,
        tol: float = 2e-2,
        max_matvecs: int = 40,
        loggers: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        """Check the arguments."""
        check_arguments(every_n_steps, budget, loggers=loggers)
        check_probe(probe_batches, probe_fraction, loss_fn)
        if not 0 < tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
        if max_matvecs < 8:
            raise ValueError(f"max_matvecs must be at least 8, got {max_matvecs}.")
        probe = (loss_fn, probe_batches, probe_fraction)
        super().__init__(
            partial(_meters, every_n_steps, *probe, hessian, tol, max_matvecs), budget, None, loggers, strict
        )


def _meters(every_n_steps: int | None, *arguments: Any) -> list[Meter]:
    return [SharpnessMeter(Cadence(every_n_steps, interval=20, share=1.0), *arguments)]


def check_probe(probe_batches: int, probe_fraction: float, loss_fn: LossFn | None) -> None:
    """Raise ValueError naming the argument that is out of range."""
    if probe_batches < 1:
        raise ValueError(f"probe_batches must be 1 or more, got {probe_batches}.")
    if not 0 < probe_fraction <= 1:
        raise ValueError(f"probe_fraction must lie in (0, 1], got {probe_fraction}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (module, batch), got {type(loss_fn).__name__}.")
