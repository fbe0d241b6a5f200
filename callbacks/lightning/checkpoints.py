"""Remember which checkpoints were saved when."""

import os
from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

_KEPT = 64  # a run that saves at every step would fill the memory


class SavedCheckpoints:
    """The last checkpoints that ``ModelCheckpoint`` callbacks have saved, with Lightning's ``global_step`` of each.

    Args:
        state: Of another one, from :meth:`state`.
    """

    def __init__(self, state: Iterable[tuple[int, str]] = ()) -> None:
        """Take up what is known."""
        self._known = [(int(step), str(path)) for step, path in state]

    def look(self, trainer: pl.Trainer) -> None:
        """Note what was saved since the last call."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback._last_checkpoint_saved:
                entry = callback._last_global_step_saved, str(callback._last_checkpoint_saved)
                if entry not in self._known:
                    self._known = [*self._known, entry][-_KEPT:]

    def before(self, step: int) -> str | None:
        """Return the path of the last one that was saved at ``global_step`` ``step`` or before and is still there."""
        for saved, path in sorted(self._known, reverse=True):
            if saved <= step and ("://" in path or os.path.exists(path)):
                return path
        return None

    def state(self) -> list[tuple[int, str]]:
        """Return what is known."""
        return list(self._known)
