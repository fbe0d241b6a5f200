"""One row per step for each logger, whichever monitors measured."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dynamon.board.custom_scalars import merge_layouts
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.failures import first_line
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.recorder import Readings, Recorder
from dynamon.monitoring.writers import Writer


@dataclass
class _Part:
    """Hold what one monitor adds to a row."""

    step: int
    recorder: Recorder
    scalars: dict[str, float]  # those of single layers included
    readings: Readings
    budget: Budget


class Row:
    """Collect what all members of a loop have measured at a step, on its way to the loggers.

    Trackers that count rows (W&B) and tables with one row per call (CSV) get one per step, whoever measured.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[_Part] = []
        self._open: list[Writer] = []

    @property
    def is_empty(self) -> bool:
        """Return whether nothing waits to be sent."""
        return not self._parts

    def add(self, recorder: Recorder, step: int, scalars: dict[str, float], readings: Readings, budget: Budget) -> None:
        """Add what a monitor has measured; a later one at the same step joins it."""
        self._parts.append(_Part(step, recorder, scalars, readings, budget))

    def send(self, loop: Loop) -> None:
        """Write to every logger; each monitor's budget is charged by how much of the row is its own.

        Raises:
            Exception: What a logger raised, where one of the monitors is strict.
        """
        parts, self._parts = self._parts, []
        if not parts:
            return
        begin = time.perf_counter()
        try:
            for writer in loop.writers:
                own = [part for part in parts if part.recorder.writes_to(writer)]
                for step in sorted({part.step for part in own}):  # a spike is of a step that has passed
                    self._send_to(writer, step, [part for part in own if part.step == step], loop)
        finally:
            seconds, everything = time.perf_counter() - begin, sum(len(part.scalars) for part in parts)
            for part in parts:
                part.budget.book("loggers", seconds * len(part.scalars) / max(everything, 1))

    def _send_to(self, writer: Writer, step: int, parts: Sequence[_Part], loop: Loop) -> None:
        try:
            self._open.append(writer)
            writer.write({tag: value for part in parts for tag, value in part.scalars.items()}, step)
            if loop.is_writing:
                for part in parts:
                    part.readings.write_layers(writer, step)
        except Exception as error:  # a logger that fails must not end training
            if any(part.recorder.strict for part in parts):
                raise
            parts[0].recorder.failed(writer, error)

    def close(self) -> None:
        """End what a tracker still holds open: the step is over, and the user may write the next row."""
        writers, self._open = self._open, []
        for writer in writers:
            with suppress(Exception):  # the row itself was written
                writer.close_row()


def write_layout(loop: Loop) -> None:
    """Write the charts of all members of a loop: the last layout in a run is the one that counts."""
    if loop.is_barebones or not loop.is_writing or loop.is_trial:
        return
    layout = merge_layouts(member.panels for member in loop.members)
    for writer in loop.writers:
        try:
            writer.write_layout(layout)
        except Exception as error:  # charts are a convenience
            line = first_line(error)
            rank_zero_warn(f"dynamon's panels could not be written: {line} Training goes on without them.")
