"""Give the callbacks that act inside an optimizer's step what they have in common."""

import lightning.pytorch as pl

from dynamon.callbacks.lightning.callback import DynamonCallback
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.monitoring.recorder import Recorder
from dynamon.runs.history import History


class StepCallback(DynamonCallback):
    """Base of steering and guards: they record what they did, and let go of the optimizers however a fit ends."""

    _recorder: Recorder
    _next_step = 0

    @property
    def history(self) -> History:
        """Return what was recorded so far, as arrays by quantity."""
        return self._recorder.history

    @property
    def failures(self) -> int:
        """Return the calls of loggers that failed so far."""
        return self._recorder.failures

    def _go_back_to(self, step: int) -> None:
        """Undo what was recorded at a step that is yet to come, before a checkpoint was loaded."""
        if step < self._next_step:
            self.history.forget_from(step)
        self._next_step = step

    def _let_go(self) -> None:
        """Give the optimizers back as they were; each kind knows what it holds."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the optimizers back as they were. A reading that is still on its way is lost if the device is."""
        self._let_go()
        self.send_rest(TrainerLoop(trainer, pl_module))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind, however the fit has ended."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()
