"""The monitors in a training loop of your own."""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary, finalize, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from dynamon.health import Finding
from dynamon.isolation.preserve import LossFn
from dynamon.monitoring.arguments import check_loss_fn
from dynamon.monitoring.budget import overhead_of
from dynamon.monitoring.dynamics_monitor import DynamicsMonitor
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.monitor import Monitor
from dynamon.monitoring.plain_loop import PlainLoop
from dynamon.monitoring.row import write_layout
from dynamon.monitoring.steering_probe import SteeringProbe
from dynamon.monitoring.watch_arguments import as_list, check_loop_arguments
from dynamon.monitoring.wrappers import unwrapped_optimizer
from dynamon.monitoring.writers import FolderWriter
from dynamon.optim import steering_of
from dynamon.optim.stepping import has_gradients
from dynamon.runs.history import Series

_AFTER_CLIPPING = (
    "Watch: gradients are read when an optimizer steps. If you clip them, call watch.before_clipping() right before: "
    "without it gradient/ and noise/ are of clipped gradients, and what clipping did is left out."
)
_UNKNOWN_SCALER = (
    "Watch: a GradScaler steps the optimizer, and Watch was not given it: gradients are read multiplied by its scale. "
    "Pass scaler=scaler."
)
_AFTER_ABORT = (
    "Watch is off: an exception ended a watch.batch block, at step {}. Training goes on, and nothing more is measured. "
    "Make a new Watch to measure again."
)


class Watch:
    """Measures a training loop that you write yourself, in plain PyTorch or with Lightning Fabric.

    The same monitors, tags, budget and event files as in a Lightning Trainer. Training is not changed: weights, random
    numbers and buffers are bitwise those of the loop without it::

        watch = dynamon.Watch(model, optimizer, loss_fn=loss_fn, logdir="runs/mine")
        for batch in loader:
            with watch.batch(batch):
                loss_fn(model, batch).backward()
                watch.before_clipping()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        watch.close()

    Args:
        model: The model, which ``DistributedDataParallel``, ``torch.compile`` or ``fabric.setup`` may have wrapped.
        optimizer: The optimizer, or several in a list; also from ``fabric.setup``.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the mean loss of a batch, on which sharpness is measured. It is
            called with the model inside of DDP, so it must reach the model through its argument. Put autocast into it
            where training has it. Without it there is no sharpness.
        total_steps: Optimizer steps of the whole run where you know them, over which readings are then spread.
        accumulate: Batches whose gradients are accumulated for one step. Divide each loss by it.
        scaler: Your ``torch.amp.GradScaler``. That of Fabric is found.
        logdir: Folder for TensorBoard's event files, which ``dynamon report`` reads as well. None keeps readings in
            :attr:`history` only.
        monitors: Monitors of :mod:`dynamon.monitoring`, or one; None for one ``DynamicsMonitor()``.
        loader: The training loader, which tells how many samples a batch has: the probe cuts batches more safely.
        schedulers: Schedulers that ``loss_fn`` may touch, if it does, or one.
        on_finding: As in :class:`dynamon.callbacks.DynamicsMonitor`; with ``monitors``, give it to one of them.
        stop_on: As there, and likewise; it sets :attr:`should_stop`, at which your loop may end.

    Attributes:
        monitors: The monitors.
        metrics: The latest numbers of the whole model, by tag.

    Raises:
        TypeError: On an argument of the wrong type.
        ValueError: On an argument out of range, on two monitors that measure the same, and on an optimizer that has
            none of the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_fn: LossFn | None = None,
        total_steps: int | None = None,
        accumulate: int = 1,
        scaler: Any = None,
        logdir: str | Path | None = None,
        *,
        monitors: Monitor | Sequence[Monitor] | None = None,
        loader: Any = None,
        schedulers: Any = (),
        on_finding: Callable[[Finding], object] | None = None,
        stop_on: Sequence[str] | None = None,
    ) -> None:
        """Check the arguments."""
        given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        optimizers = [unwrapped_optimizer(one) for one in given if isinstance(one, Optimizer)]
        if monitors is None:
            monitors = DynamicsMonitor(on_finding=on_finding, stop_on=stop_on)
        elif on_finding is not None or stop_on is not None:
            raise ValueError("on_finding and stop_on are given beside monitors=: give them to one of the monitors.")
        self.monitors: list[Monitor] = as_list(monitors)
        _check_types(model, given, loss_fn, self.monitors)
        check_loop_arguments(model, optimizers, scaler, logdir, loader, schedulers)
        for name, value in (("accumulate", accumulate), ("total_steps", total_steps)):
            if (type(value) is not int or value < 1) and not (name == "total_steps" and value is None):
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")
        _check_kinds(self.monitors)
        writer = None if logdir is None else FolderWriter(logdir)
        self._loop = PlainLoop(
            model,
            optimizers,
            loss_fn,
            total_steps,
            accumulate,
            scaler,
            loader,
            as_list(schedulers),
            writer,
            self.monitors,
        )
        self._is_inside = self._has_begun = self._is_closed = self._is_told = False
        self._is_off = self._is_off_told = self._is_scaler_told = False  # after an exception
        self._steering: SteeringProbe | None = None
        self._pending: Mapping[str, Any] = {}
        for monitor in self.monitors:
            monitor.check(self._loop)
            _watched[monitor] = ref(self)
        # Where it is dropped, or a script ends, without closing.
        self._release = finalize(self, _let_go, self.monitors, self._loop, writer)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The latest numbers of the whole model, by tag."""
        return self._loop.metrics

    @property
    def history(self) -> Mapping[str, Series]:
        """Everything measured so far, as arrays by quantity."""
        histories = [monitor.history for monitor in self.monitors]
        return histories[0] if len(histories) == 1 else ChainMap(*histories)  # type: ignore[arg-type]

    @property
    def findings(self) -> list[Finding]:
        """Return what looks wrong in what was measured so far, see :mod:`dynamon.health`."""
        return [finding for monitor in self.monitors for finding in monitor.findings]

    @property
    def should_stop(self) -> bool:
        """Return whether a finding of ``stop_on`` was met, the same on every process."""
        return self._loop.should_stop

    @property
    def failures(self) -> int:
        """Measurements that failed so far."""
        return sum(monitor.failures for monitor in self.monitors)

    @property
    def overhead(self) -> float:
        """Time of monitoring over the time inside of batches without it."""
        return overhead_of([monitor._budget for monitor in self.monitors])

    @property
    def step(self) -> int:
        """Optimizer steps so far, the x axis of all readings."""
        return self._loop.step

    def batch(self, batch: Any) -> "WatchedBatch":
        """Return the context of one batch: around forward pass, backward pass and, where it comes, the step.

        Args:
            batch: What ``loss_fn`` gets. Samples of the first batches are copied as the probe.

        The context gives an object whose ``loss`` you may set to the mean loss of the batch: it is then recorded beside
        the readings, and the health rules judge by it.
        """
        return WatchedBatch(self, batch)

    def before_clipping(self, optimizer: Optimizer | None = None) -> None:
        """Read gradients before you clip them.

        Call it after the last backward pass of a step, and after ``scaler.unscale_`` where you unscale.

        Args:
            optimizer: Which optimizer is about to step; None for all.

        Raises:
            RuntimeError: Outside of :meth:`batch`.
        """
        if not self._is_inside:
            raise RuntimeError("call watch.before_clipping() inside of `with watch.batch(batch):`.")
        if self._is_off:
            return
        self._loop.was_announced = True
        self._loop.before_step()
        chosen = self._loop.optimizers if optimizer is None else [unwrapped_optimizer(optimizer)]
        for one in chosen:
            if has_gradients(one):
                for monitor in self.monitors:
                    monitor.before_step(one)

    def close(self) -> None:
        """End the run: write what is left, and say what was never measured. No batch may follow."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_off:
            return
        if self._has_begun:
            for monitor in self.monitors:
                monitor.end()
            self._loop.row.send(self._loop)
            for monitor in self.monitors:
                monitor.conclude()
        self._let_go()

    def __enter__(self) -> Self:
        """Close at the end of a ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Return where it is, and what watches."""
        return f"Watch(step {self.step}, {', '.join(map(repr, self.monitors))})"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: numbers and tensors by name."""
        state = {"loop": self._loop.state_dict(), "monitors": [monitor.state_dict() for monitor in self.monitors]}
        pending = {} if self._steering is None else self._steering.state_dict()
        return state | ({"steering": pending} if pending else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state, before the first batch or between two.

        Raises:
            TypeError: Where it is no dictionary.
            ValueError: Where it is not that of a watch with as many monitors.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() has returned, got {type(state).__name__}.")
        if not {"loop", "monitors"} <= set(state) or len(state["monitors"]) != len(self.monitors):
            raise ValueError("state must be what state_dict() of a Watch with as many monitors has returned.")
        self._loop.load_state_dict(state["loop"])
        self._steering, self._pending = None, state.get("steering", {})
        for monitor, own in zip(self.monitors, state["monitors"], strict=True):
            monitor.take_state(own, at_once=self._has_begun)

    def _begin_batch(self, batch: Any) -> None:
        if self._is_inside or self._is_closed:
            after = "after watch.close()" if self._is_closed else "inside of another one"
            raise RuntimeError(f"watch.batch was entered {after}.")
        self._is_inside = True
        if self._is_off:
            self._tell_off()
            return
        try:
            self._see_begin(batch)
        except BaseException:  # of strict=True, or Ctrl-C: the block is not entered, and nobody ends it
            self._abort()
            raise

    def _tell_scaler(self) -> None:
        """Say once that a gradient scaler is at work that nobody named."""
        if self._loop.has_unknown_scaler and not self._is_scaler_told:
            self._is_scaler_told = True
            rank_zero_warn(_UNKNOWN_SCALER)

    def _tell_off(self) -> None:
        """Say once, to a loop that goes on after an exception, that it is no longer measured."""
        if not self._is_off_told:
            self._is_off_told = True
            rank_zero_warn(_AFTER_ABORT.format(self.step))

    def _see_begin(self, batch: Any) -> None:
        self._loop.begin_batch()
        if not self._has_begun:
            self._has_begun = True
            for monitor in self.monitors:
                monitor.begin(self._loop)
            write_layout(self._loop)
        self._loop.row.close()
        self._serve_steering(batch)
        for monitor in self.monitors:
            monitor.go_on()
        with self._watch_time():
            for monitor in self.monitors:
                monitor.batch_start(batch)
            for monitor in self.monitors:
                monitor.before_backward()

    def _serve_steering(self, batch: Any) -> None:
        """Measure for rules that follow the loss of the next batch, on optimizers that are steered."""
        found = [rates for one in self._loop.optimizers if (rates := steering_of(one)) is not None]
        steered = [rates for rates in found if rates.rule.needs_probe]
        if not steered:
            return
        if self._steering is None:
            self._steering = SteeringProbe(self._loop)
            self._steering.start(type(steered[0].rule).__name__, steered, self._pending)
        for rates in steered:
            self._steering.follow(rates)
        self._steering.batch_start(steered, batch)

    def _end_batch(self, loss: Any) -> None:
        self._is_inside = False
        if self._is_off:
            return
        with self._watch_time():
            self._loop.before_step()
            for monitor in self.monitors:
                monitor.batch_end(loss)
            self._loop.row.send(self._loop)
        self._tell_scaler()
        if self._loop.end_batch() and not self._loop.was_announced and not self._is_told:
            self._is_told = True
            rank_zero_info(_AFTER_CLIPPING)
        for monitor in self.monitors:
            monitor.pause()  # what is between two batches is not counted as training

    def _watch_time(self) -> AbstractContextManager[None]:
        """Book what passes inside and belongs to no monitor alone."""
        return self.monitors[0]._budget.watch() if self.monitors else nullcontext()

    def _abort(self) -> None:
        self._is_inside = False
        if self._is_off:
            return
        self._is_off = True
        for monitor in self.monitors:
            monitor.abort()
        with suppress(Exception):  # none of a writer's own may hide the user's
            self._loop.row.send(self._loop)
        for monitor in self.monitors:
            monitor.last_look()
        self._let_go()

    def _let_go(self) -> None:
        self._release()
        for monitor in self.monitors:
            _watched.pop(monitor, None)


class WatchedBatch:
    """The context of one batch.

    Attributes:
        loss: Mean loss of the batch, where the user sets it.
    """

    def __init__(self, watch: Watch, batch: Any) -> None:
        """Start with nothing begun."""
        self._watch, self._batch = watch, batch
        self.loss: Tensor | float | None = None

    def __enter__(self) -> Self:
        """The batch begins."""
        self._watch._begin_batch(self._batch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The batch is over; an exception ends the measuring, and goes on to the caller."""
        if kind is None:
            self._watch._end_batch(self.loss)
        else:
            self._watch._abort()


def _let_go(monitors: Sequence[Monitor], loop: PlainLoop, writer: FolderWriter | None) -> None:
    """Leave no hook behind, and close the files."""
    for monitor in monitors:
        monitor.close()
    loop.remove()
    if writer is not None:
        writer.close()


def _check_types(model: object, optimizers: Sequence[object], loss_fn: object, monitors: Sequence[object]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    wrong = [type(one).__name__ for one in optimizers if not isinstance(one, Optimizer)]
    if wrong or not optimizers:
        raise TypeError(f"optimizer must be a torch optimizer or a list of them, got {', '.join(wrong) or 'none'}.")
    if loss_fn is not None:
        check_loss_fn(loss_fn)
    for monitor in monitors:
        if not isinstance(monitor, Monitor):
            raise TypeError(f"monitors must be monitors of dynamon.monitoring, got {type(monitor).__name__}.")


_watched: "WeakKeyDictionary[Monitor, ref[Watch]]" = WeakKeyDictionary()  # by watches that are not closed


def _check_kinds(monitors: Sequence[Monitor]) -> None:
    for monitor in monitors:
        if monitor in _watched and _watched[monitor]() is not None:
            raise ValueError(
                f"monitors has a {type(monitor).__name__} that another Watch uses: make one for each, or close it."
            )
        same = [type(other).__name__ for other in monitors if isinstance(other, monitor.one_of_a_kind())]
        if len(same) > 1:
            raise ValueError(f"monitors has {' and '.join(same)}, which measure the same; keep one of them.")
