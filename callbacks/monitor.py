"""Monitors as callbacks of a Lightning Trainer."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from dynamon.callbacks.lightning.callback import DynamonCallback
from dynamon.callbacks.lightning.loop import TrainerLoop, step_of
from dynamon.monitoring import monitor


class Monitor(monitor.Monitor, DynamonCallback):
    """A monitor that a Trainer calls.

    Arguments are those of :class:`dynamon.monitoring.monitor.Monitor`, and so is everything that is no hook.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the surroundings and say what is missing."""
        DynamonCallback.setup(self, trainer, pl_module, stage)
        if stage == "fit" and not getattr(trainer, "barebones", False):
            self.check(TrainerLoop(trainer, pl_module))

    def begin_turn(self, goes_on: bool) -> None:
        """Begin anew; a fit that goes on takes up what was there, as from a checkpoint, and keeps history and clock."""
        self.begin_again(goes_on, self._is_given)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, start the meters, write the panels."""
        loop = TrainerLoop(trainer, pl_module)
        loop.begin_windows()
        self._row = loop.row
        self.begin(loop)
        with self._budget.watch():
            self.write_layout(loop)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters see the batch."""
        if self.asleep and self.sleeps_on(step_of(trainer)):
            if self._sentinel is not None:
                self.see_batch(batch)
            return
        with self._budget.watch():
            TrainerLoop(trainer, pl_module).row.close()
            self.batch_start(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the meters see gradients before more is added to them."""
        self.before_backward()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the meters see gradients that are still being accumulated."""
        self.after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the meters see the gradients."""
        if self.asleep:
            if self._sentinel is not None:
                self.see_step(optimizer)
            return
        with self._budget.watch():
            self.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the meters measure, if the optimizer has stepped, and hand on what they read."""
        if self.asleep:
            if self._sentinel is not None:
                self.see_end(outputs)
            if self._row is None or self._row.is_empty:
                return
        with self._budget.watch():
            if not self.asleep:
                self.batch_end(outputs)
            self.send_row(TrainerLoop(trainer, pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: validation is not training time."""
        self.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, if this was a validation inside of training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.go_on()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock, and say what was never measured."""
        loop = TrainerLoop(trainer, pl_module)
        self.end()
        self.send_row(loop)
        self.conclude()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the clock, and write what is known."""
        loop = TrainerLoop(trainer, pl_module)
        self.abort()
        self.send_rest(loop)
        self.last_look()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind, however the fit has ended."""
        DynamonCallback.teardown(self, trainer, pl_module, stage)
        self.close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state up when training starts, or at once in the middle of it."""
        if self.takes_state():
            self.take_state(state_dict, at_once=self._stage == "fit")
