"""Give monitors and steering what they have in common as callbacks of a Lightning Trainer."""

from contextlib import suppress
from functools import cached_property
from typing import Any
from weakref import ref

import lightning.pytorch as pl

from dynamon.board.custom_scalars import Layout
from dynamon.callbacks.lightning.loop import TrainerLoop, callbacks_of, step_of
from dynamon.monitoring.row import write_layout

_LENT = ("log", "log_dict")  # functions of the module, which a Trainer puts into each callback


class DynamonCallback(pl.Callback):
    """Base of monitors and steering in a Trainer: one of a kind, with a clear error where there are two.

    Attributes:
        is_dynamon: Marks the callbacks that measure and write together.
        panels: Charts for TensorBoard's Custom Scalars tab.
    """

    is_dynamon = True
    panels: Layout = {}

    def __init__(self) -> None:
        """Not checked yet."""
        self._checked = False
        self._stage: str | None = None  # what the Trainer does just now
        self._seen_with: tuple[ref[pl.Trainer], ref[pl.LightningModule]] | None = None  # in the last fit
        self._is_given = False  # whether a state was loaded between two fits, for the next one

    @property
    def failures(self) -> int:
        """Return what failed so far."""
        return 0

    @cached_property  # a Trainer asks for it at every hook
    def state_key(self) -> str:
        """The class name, made unique until ``setup`` has checked that there is one callback of the class only.

        Lightning's own message about two callbacks with one key does not say what to do.
        """
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
        self._checked, self._stage = True, stage
        self.__dict__.pop("state_key", None)
        if stage == "fit":
            seen, self._seen_with = self._seen_with, (ref(trainer), ref(pl_module))
            goes_on = seen is not None and seen[0]() is trainer and seen[1]() is pl_module and step_of(trainer) > 0
            self.begin_turn(goes_on)
            self._is_given = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note that the Trainer is done with what it did."""
        self._stage = None

    def begin_turn(self, goes_on: bool) -> None:
        """Begin a fit: forget the one before, unless this one goes on from where it ended."""

    def takes_state(self) -> bool:
        """Return whether a state that is loaded now concerns training: not where a validation loads weights."""
        self._is_given = self._is_given or self._stage is None
        return self._stage in ("fit", None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows of no Trainer."""
        mine = {name: value for name, value in self.__dict__.items() if name not in (*_LENT, "state_key")}
        return {**mine, "_checked": False, "_stage": None, "_seen_with": None}

    def one_of_a_kind(self) -> type | tuple[type, ...]:
        """The classes of which a Trainer may hold one."""
        return type(self)

    def send_row(self, loop: TrainerLoop) -> None:
        """Write what all dynamon callbacks have measured in this step, once: when the last of them is through."""
        if not loop.row.is_empty and loop.members[-1] is self:
            loop.row.send(loop)

    def send_rest(self, loop: TrainerLoop) -> None:
        """Write what was measured before an exception."""
        with suppress(Exception):  # none of a logger's own may hide the user's
            self.send_row(loop)

    def write_layout(self, loop: TrainerLoop) -> None:
        """Write the charts of all dynamon callbacks, once: the last layout in a run is the one that counts.

        The last callback does, when all of them have found out what they measure.
        """
        if loop.members[-1] is self:
            write_layout(loop)
