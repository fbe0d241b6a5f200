"""What all monitors share: when to measure, what it may cost, what happens when it fails, what is saved."""

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from dynamon.callbacks.budget import Budget
from dynamon.callbacks.recorder import Recorder
from dynamon.history import History
from dynamon.layers import Layer, describe_layers, select
from dynamon.panels import OVERHEAD, Layout, combined

PAUSE_AFTER = 3  # failures in a row


class Run:
    """What a meter may know of the run it measures.

    Attributes:
        trainer: The Trainer.
        module: The LightningModule.
        budget: Times measurements.
        recorder: Takes readings.
        all_layers: Every layer of the module.
        layers: Those that per-layer readings are wanted for.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        budget: Budget,
        recorder: Recorder,
        layers: list[Layer],
    ) -> None:
        """Remember them."""
        self.trainer, self.module, self.budget, self.recorder = trainer, module, budget, recorder
        self.all_layers = describe_layers(module)
        self.layers = layers

    @property
    def step(self) -> int:
        """The x axis of Lightning's own monitors; constant from the start of a batch to its end."""
        return self.trainer.fit_loop.epoch_loop._batches_that_stepped

    @property
    def trying_out(self) -> bool:
        """Whether this is a ``fast_dev_run``, in which everything is measured at once."""
        return is_tryout(self.trainer)

    @property
    def seconds_per_step(self) -> float:
        """Mean training time of a step, measurements not counted."""
        return self.budget.training / max(self.steps_seen, 1)

    steps_seen = 0

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        """Book the time inside to a measurement."""
        with self.budget.charge(name, cuda=self.module.device.type == "cuda"):
            yield


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """What brings gradients to their true size: fused optimizers unscale fp16 ones only in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return 1.0 / float(scaler.get_scale())


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks."""
    return list(getattr(trainer, "callbacks", []))


def is_tryout(trainer: pl.Trainer) -> bool:
    """Whether the Trainer only tries its code on a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


class Cadence:
    """When a meter measures.

    Args:
        every_n_steps: At every step that is a multiple of this, whatever it costs. None leaves it to the
            budget.
        interval: Steps between two measurements at least, when the budget decides.
        share: Part of the budget this meter may use; 1 takes what the others leave.
    """

    def __init__(self, every_n_steps: int | None, interval: int, share: float) -> None:
        """Nothing measured yet."""
        self.every_n_steps, self.interval, self.share = every_n_steps, interval, share
        self.last = -math.inf

    def due(self, run: Run, name: str, expected: float, step: int) -> bool:
        """Whether to measure at ``step``."""
        if run.trying_out:
            return True
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        return step - self.last >= self.interval and run.budget.allows(name, expected, self.share)


class Meter(ABC):
    """One group of quantities: measures them and hands them to the recorder.

    Every method is called with failures caught; see :class:`Monitor`.

    Attributes:
        name: Name of the group, under which its time is booked.
        tags: Every scalar tag it writes, with what it is.
        quantities: Every per-layer quantity, likewise.
        panels: Its charts.
    """

    name: str
    tags: Mapping[str, str]
    quantities: Mapping[str, str] = {}
    panels: Layout = {}

    def __init__(self, cadence: Cadence) -> None:
        """Remember when to measure."""
        self.cadence = cadence
        self.points = 0

    def expected(self, run: Run) -> float:
        """Seconds the next measurement will take: the mean so far, or a step's time for the first."""
        if not self.points:
            return run.seconds_per_step / 10
        return run.budget.spent_on.get(self.name, 0.0) / self.points

    def done(self, run: Run) -> None:
        """A measurement is complete."""
        self.points += 1
        self.cadence.last = run.step

    def start(self, run: Run) -> None:
        """Training is about to begin: say in one sentence what cannot work."""

    def batch_start(self, run: Run, batch: Any) -> None:
        """A batch has arrived on the device."""

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Gradients are accumulated, reduced, unscaled and not yet clipped."""

    def batch_end(self, run: Run) -> None:
        """The optimizer has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up; the run may not have started yet."""


def check_arguments(every_n_steps: int | None, budget: float | None) -> None:
    """Raise ValueError naming the argument that is out of range."""
    if every_n_steps is not None and (isinstance(every_n_steps, bool) or every_n_steps < 1):
        raise ValueError(f"every_n_steps must be a whole number of 1 or more, or None, got {every_n_steps!r}.")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(
            f"budget must be positive (0.02 is 2 % of training time) or None for no limit, got {budget!r}."
        )


class DynamonCallback(pl.Callback):
    """What steering and monitors have in common: one of a kind in a Trainer, and a clear word when not.

    Attributes:
        panels: Charts for TensorBoard's Custom Scalars tab.
    """

    panels: Layout = {}

    def __init__(self) -> None:
        """Not checked yet."""
        self._checked = False

    @property
    def state_key(self) -> str:
        """The class name. Until ``setup`` has seen that there is only one, it is made unique, because
        Lightning's own message about two callbacks with one key does not say what to do.
        """  # noqa: D205
        name = type(self).__qualname__
        return name if self._checked else f"{name}#{id(self)}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this is the right Trainer and the only callback of its kind."""
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                f"{type(self).__name__} works with lightning.pytorch, but this Trainer comes from "
                f"{type(trainer).__module__.split('.')[0]}; change its import to 'import lightning.pytorch as pl'."
            )
        twice = [type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, self.one_of_a_kind())]
        if len(twice) > 1:
            raise ValueError(f"the Trainer has {' and '.join(twice)} in callbacks; keep one of them.")
        self._checked = True

    def one_of_a_kind(self) -> type | tuple[type, ...]:
        """The classes of which a Trainer may hold one."""
        return type(self)

    def write_layout(self, trainer: pl.Trainer) -> None:
        """Write the charts of all dynamon callbacks, once: the last layout in a run is the one that counts."""
        ours = [c for c in callbacks_of(trainer) if isinstance(c, DynamonCallback)]
        if ours[0] is not self or not trainer.is_global_zero or is_tryout(trainer):
            return
        layout = combined(callback.panels for callback in ours)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)


class Monitor(DynamonCallback):
    """A thin shell around meters: calls them, catches what goes wrong, saves their state.

    Args:
        make_meters: Makes what measures, anew for each fit.
        budget: Share of training time for all of it, or None.
        layers: Globs for the layers with readings of their own; ``!`` excludes.
        loggers: Loggers to write to, by (part of) class name; None for all.
        strict: Raise where a measurement fails, instead of warning.
    """

    def __init__(
        self,
        make_meters: Callable[[], list[Meter]],
        budget: float | None,
        layers: Sequence[str] | None,
        loggers: Sequence[str] | None,
        strict: bool,
    ) -> None:
        """Remember what to measure."""
        super().__init__()
        self._make_meters = make_meters
        self._fraction, self._patterns, self._loggers, self._strict = budget, layers, loggers, strict
        self._state: dict[str, Any] = {}
        self._forget()
        self.panels = combined([*(meter.panels for meter in self._meters), OVERHEAD])

    def _forget(self) -> None:
        """Begin like new: a callback may see several fits."""
        self._meters = self._make_meters()
        self._budget = Budget(self._fraction)
        self._recorder = Recorder(self._loggers, sum(len(m.quantities) for m in self._meters))
        self._run: Run | None = None
        self._failures = 0
        self._in_a_row = {meter.name: 0 for meter in self._meters}
        self._stepped = False

    @property
    def history(self) -> History:
        """Everything measured so far, as arrays by quantity."""
        return self._recorder.history

    @property
    def overhead(self) -> float:
        """Time of monitoring over the training time without it, so far."""
        return self._budget.overhead

    @property
    def failures(self) -> int:
        """Measurements that failed so far."""
        return self._failures

    def paused(self, meter: Meter) -> bool:
        """Whether a meter failed too often in a row."""
        return self._in_a_row[meter.name] >= PAUSE_AFTER

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the surroundings and say what is missing."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not getattr(trainer, "barebones", False):
            self._recorder.check(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, write the panels, start the meters."""
        self._forget()
        reason = off_reason(trainer, pl_module)
        if reason is not None:
            rank_zero_warn(f"{type(self).__name__} is off: {reason}")
            return
        if trainer.barebones or not trainer.is_global_zero:
            return
        layers = select(describe_layers(pl_module), self._patterns)
        if not layers:
            raise ValueError(f"layers={list(self._patterns or ())} matches no layer of {type(pl_module).__name__}.")
        if not trainer.loggers:
            rank_zero_info(f"{type(self).__name__}: the Trainer has no logger; readings are in its .history only.")
        self.write_layout(trainer)
        self._run = Run(trainer, pl_module, self._budget, self._recorder, layers)
        for meter in self._meters:
            if meter.name in self._state:
                meter.load_state_dict(self._state.pop(meter.name))
            self._call(meter, "start")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters see the batch."""
        if self._run is not None:
            self._budget.start()
            for meter in self._meters:
                self._call(meter, "batch_start", batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the meters see the gradients."""
        if self._run is not None:
            self._stepped = True
            for meter in self._meters:
                self._call(meter, "before_step", optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters measure, if the optimizer has stepped."""
        if self._run is None or not self._stepped:
            return
        self._stepped = False
        self._run.steps_seen += 1
        for meter in self._meters:
            self._call(meter, "batch_end")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        self._budget.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        if self._run is not None:
            self._budget.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._budget.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the clock."""
        self._budget.stop()

    def state_dict(self) -> dict[str, Any]:
        """The meters' states: numbers and tensors by name."""
        return {**self._state, **{meter.name: meter.state_dict() for meter in self._meters}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; some strategies load before there are optimizers, some after."""
        self._state = dict(state_dict)

    def _call(self, meter: Meter, method: str, *arguments: Any) -> None:
        """Call a meter. What it raises costs one warning and a count; three in a row pause it."""
        assert self._run is not None
        if self.paused(meter):
            return
        points = meter.points
        try:
            getattr(meter, method)(self._run, *arguments)
            if meter.points > points:
                self._in_a_row[meter.name] = 0
                with self._run.charge(meter.name):
                    self._finish()
        except Exception as error:
            if self._strict:
                raise
            self._failed(meter, error)

    def _finish(self) -> None:
        assert self._run is not None
        self._recorder.scalars(
            {"dynamon/overhead": self._budget.overhead, "dynamon/failures": float(self._failures)},
            headline=True,
        )
        self._recorder.flush(self._run.trainer, self._run.step)

    def _failed(self, meter: Meter, error: Exception) -> None:
        assert self._run is not None
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        self._failures += 1
        self._in_a_row[meter.name] += 1
        meter.cadence.last = self._run.step
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        after = "It is paused now." if self.paused(meter) else "Training goes on; strict=True raises here instead."
        if self._in_a_row[meter.name] in (1, PAUSE_AFTER):
            rank_zero_warn(f"{type(self).__name__}: the {meter.name} measurement failed: {first_line} {after}")


def off_reason(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Why dynamon cannot measure this run at all, in one sentence; None where it can."""
    if not any(p.numel() and p.requires_grad for p in module.parameters()):
        return f"{type(module).__name__} has no trainable parameter, so there is nothing to measure."
    strategy = type(trainer.strategy).__name__
    if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        return f"{strategy} shards the parameters, which dynamon cannot measure yet."
    return None
