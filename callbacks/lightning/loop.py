"""The training loop of a Lightning Trainer, as the engine sees it."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.callbacks.lightning.loggers import writer_for
from dynamon.callbacks.lightning.strategy import averages_gradients, is_distributed, strategy_reason, sums_gradients
from dynamon.callbacks.lightning.watchers import warnings_of
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.preserve import training_loss
from dynamon.isolation.trackers import is_muted
from dynamon.monitoring.accumulation import Windows
from dynamon.monitoring.loop import Loop, nothing_to_train
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.planner import Planner
from dynamon.monitoring.row import Row
from dynamon.monitoring.writers import Writer
from dynamon.optim import LayerwiseRates, several_devices_reason

_IDLE_HOOK = "on_sanity_check_start"  # which no monitor has
_HOOKS = 6  # of a callback that a Trainer calls for a batch with a step
_TIMED_CALLS = 16


@dataclass
class _Shared:
    """Hold what all dynamon callbacks of a Trainer have in common."""

    windows: Windows = field(default_factory=Windows)
    row: Row = field(default_factory=Row)
    planner: Planner = field(default_factory=Planner)
    writers: WeakKeyDictionary[Logger, Writer] = field(default_factory=WeakKeyDictionary)


_shared: "WeakKeyDictionary[pl.Trainer, _Shared]" = WeakKeyDictionary()


class TrainerLoop(Loop):
    """Shows the engine a Trainer and the module that it trains.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
    """

    name = "the Trainer"
    without_writers = "the Trainer has no logger"
    module: pl.LightningModule

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember them."""
        self.trainer, self.module = trainer, module

    @property
    def _shared(self) -> _Shared:
        if self.trainer not in _shared:
            _shared[self.trainer] = _Shared()
        return _shared[self.trainer]

    @property
    def windows(self) -> Windows:  # type: ignore[override]
        """Follows what gradients are accumulated over, for all callbacks of the Trainer."""
        return self._shared.windows

    @property
    def row(self) -> Row:  # type: ignore[override]
        """Collects what all callbacks of the Trainer have measured at one step."""
        return self._shared.row

    @property
    def planner(self) -> Planner:  # type: ignore[override]
        """Decides when all callbacks of the Trainer measure."""
        return self._shared.planner

    def begin_windows(self) -> None:
        """Forget what was accumulated in another fit."""
        self._shared.windows = Windows()

    @property
    def step(self) -> int:
        """The x axis of Lightning's own monitors."""
        return step_of(self.trainer)

    @property
    def optimizer_steps(self) -> int:
        """Steps that all optimizers have taken."""
        return self.trainer.global_step

    @property
    def batch_index(self) -> int:
        """Index of the batch in its epoch."""
        return self.trainer.fit_loop.epoch_loop.batch_idx

    @property
    def position(self) -> tuple[int, int, int]:
        """Return what tells this batch from every other one."""
        return self.trainer.current_epoch, self.batch_index, self.trainer.global_step

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps by what the Trainer expects; None where only time or the data will tell."""
        if self.trainer.train_dataloader is None or any(isinstance(c, Timer) for c in callbacks_of(self.trainer)):
            return None
        try:
            steps = self.trainer.estimated_stepping_batches
        except MisconfigurationException:  # windows whose length changes between epochs
            return None
        return int(steps) if 0 < steps < math.inf else None

    @property
    def is_trial(self) -> bool:
        """Return whether this is a ``fast_dev_run``."""
        return is_trial(self.trainer)

    @property
    def is_barebones(self) -> bool:
        """Return whether the Trainer leaves everything out that costs time."""
        return self.trainer.barebones

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The Trainer's optimizers."""
        return self.trainer.optimizers

    @property
    def schedulers(self) -> Sequence[Any]:
        """The schedulers that the Trainer steps."""
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    @property
    def device(self) -> torch.device:
        """Return where the module is."""
        return self.module.device

    @property
    def drives_steps(self) -> bool:
        """Return whether optimisation is automatic."""
        return self.module.automatic_optimization

    @property
    def knows_windows(self) -> bool:
        """Return whether optimisation is automatic: else a step may come at any batch."""
        return self.module.automatic_optimization

    @property
    def reads_before_clipping(self) -> bool:
        """Return whether optimisation is automatic: else ``training_step`` clips before the step is announced."""
        return self.module.automatic_optimization

    def clipped(self, gradient: Tensor) -> Tensor:
        """Return a flat gradient as ``gradient_clip_val`` of the Trainer clips it."""
        value = self.trainer.gradient_clip_val
        if value is None or value <= 0 or not self.module.automatic_optimization:
            return gradient
        if self.trainer.gradient_clip_algorithm == "value":
            return gradient.clamp(-value, value)
        return gradient * (value / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)

    @property
    def accumulates(self) -> int:
        """Batches in an accumulation window, at present."""
        return self.trainer.accumulate_grad_batches

    @property
    def longest_window(self) -> int:
        """Most batches in an accumulation window of this run."""
        lengths = [self.trainer.accumulate_grad_batches]
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, GradientAccumulationScheduler):
                lengths += callback.scheduling.values()
        return max(lengths)

    @property
    def batches_per_epoch(self) -> float:
        """Batches in an epoch."""
        return self.trainer.num_training_batches

    @property
    def loaders(self) -> Iterable[Any]:
        """The loaders in whatever collection the Trainer was given."""
        return _loaders(self.trainer.train_dataloader)

    @property
    def loader_key(self) -> tuple[Any, int]:
        """Return what changes when the loaders do."""
        return self.trainer.train_dataloader, self.trainer.current_epoch

    @property
    def repeats_batches(self) -> bool:
        """Return whether the Trainer overfits a few batches."""
        return getattr(self.trainer, "overfit_batches", 0) > 0

    def ranks(self) -> Ranks:
        """Make the group of the processes of a DDP or FSDP2 run, or of this one alone."""
        return Ranks(self.device, alone=not is_distributed(self.trainer))

    @property
    def world_size(self) -> int:
        """Processes that train."""
        return self.trainer.world_size

    @property
    def processes_on_host(self) -> int:
        """Processes that share the memory of this host."""
        return self.trainer.num_devices

    @property
    def averages_gradients(self) -> bool:
        """Return whether each process has gradients of its own before they are averaged (DDP)."""
        return averages_gradients(self.trainer)

    @property
    def sums_gradients(self) -> bool:
        """Return whether gradients are summed in every backward pass (FSDP2)."""
        return sums_gradients(self.trainer)

    @property
    def strategy(self) -> str:
        """Class of the strategy."""
        return type(self.trainer.strategy).__name__

    def off_reason(self) -> str | None:
        """Return why dynamon cannot measure this run at all, in one sentence; None where it can."""
        trained = (p for p in self.module.parameters() if p.requires_grad and not is_lazy(p))
        return nothing_to_train(self.module) or strategy_reason(self.trainer) or several_devices_reason(trained)

    @property
    def precision(self) -> str:
        """The Trainer's precision."""
        return str(self.trainer.precision)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of the precision plugin, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def call_seconds(self, member: pl.Callback) -> float:
        """Time a hook in which a callback does nothing, as the Trainer calls it."""
        profile, times = PassThroughProfiler().profile, []
        for _ in range(_TIMED_CALLS):
            begin = time.perf_counter()
            hook = getattr(member, _IDLE_HOOK)
            if callable(hook):
                with profile(f"[Callback]{member.state_key}.{_IDLE_HOOK}"):
                    hook(self.trainer, self.module)
            times.append(time.perf_counter() - begin)
        return _HOOKS * median(times)

    @property
    def batches_seen(self) -> int:
        """Batches of all epochs so far."""
        return self.trainer.fit_loop.total_batch_idx

    def no_loss_reason(self) -> str | None:
        """Return why ``training_step`` cannot be called once more; None where it can."""
        if self.module.automatic_optimization:
            return None
        return (
            "with manual optimisation training_step would train; "
            "pass loss_fn=lambda module, batch: ... to have it measured."
        )

    def loss(self, batch: Any, index: int) -> Tensor:
        """Evaluate ``training_step``."""
        return training_loss(self.module, batch, None, index)

    @property
    def loss_source(self) -> Any:
        """``training_step``."""
        return self.module.training_step

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Silence the loggers, and use the Trainer's precision."""
        loggers = self.trainer.loggers
        self.trainer.loggers = [_Muted(logger) for logger in loggers]
        try:
            with self.trainer.precision_plugin.train_step_context():
                yield
        finally:
            self.trainer.loggers = loggers

    def loss_of(self, outputs: Any) -> float | None:
        """Return the loss that ``training_step`` returned for a batch; None where it returned none.

        Args:
            outputs: What Lightning hands to ``on_train_batch_end``: with automatic optimisation, and only there it may
                accumulate, over the number of batches accumulated.
        """
        loss = self.loss_tensor(outputs)
        return None if loss is None else float(loss) * self.trainer.accumulate_grad_batches

    def loss_tensor(self, outputs: Any) -> Tensor | None:
        """Return the same over the number of batches accumulated, on its device; see :meth:`loss_of`."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex() else None

    @property
    def writers(self) -> Sequence[Writer]:
        """One for each of the Trainer's loggers."""
        known = self._shared.writers
        return [known.setdefault(logger, writer_for(logger)) for logger in self.trainer.loggers]

    @property
    def is_writing(self) -> bool:
        """Return whether this is the first process."""
        return self.trainer.is_global_zero

    def publish(self, headlines: Mapping[str, float]) -> None:
        """Enter them into ``trainer.callback_metrics``."""
        self.trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in headlines.items()})

    def request_stop(self) -> None:
        """Set ``trainer.should_stop``."""
        self.trainer.should_stop = True

    @property
    def members(self) -> Sequence[Any]:
        """The dynamon callbacks of the Trainer."""
        return members_of(self.trainer)

    def reads_for_steering(self, rates: LayerwiseRates) -> bool:
        """Return whether a steering callback reads an optimizer's gradients: one of two can read for both.

        An optimizer that steers itself reads when its step begins and knows no windows: a monitor that read for it
        would change what it learns, and so the run.
        """
        finds = (getattr(callback, "rates_for", None) for callback in callbacks_of(self.trainer))
        return any(find is not None and find(rates.optimizer) is rates for find in finds)

    def warnings_of(self, monitor: str, meters: Iterable[Meter]) -> list[str]:
        """Return what to say of callbacks and schedulers that watch a tag which may be missing."""
        return [] if self.is_trial else warnings_of(self.trainer, monitor, meters)


class _Muted(DummyLogger):
    """A logger that is one for other threads only."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._real = logger

    def __getattribute__(self, name: str) -> Any:
        if is_muted() or name in ("_real", "__class__", "__dict__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("_real"), name)


def step_of(trainer: pl.Trainer) -> int:
    """Return steps taken, the x axis of Lightning's own monitors; constant from the start of a batch to its end."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the Trainer's callbacks."""
    return list(getattr(trainer, "callbacks", []))


def members_of(trainer: pl.Trainer) -> list[Any]:
    """Return the dynamon callbacks of a Trainer."""
    return [callback for callback in callbacks_of(trainer) if getattr(callback, "is_dynamon", False)]


def is_trial(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer only tries its code on a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _loaders(value: Any) -> Iterator[Any]:
    inner = value.iterables if isinstance(value, CombinedLoader) else value
    if isinstance(inner, Mapping | list | tuple):
        for item in inner.values() if isinstance(inner, Mapping) else inner:
            yield from _loaders(item)
    else:
        yield inner
