"""Alerts of Weights & Biases and Trackio, where a run of theirs is open. Neither is imported here."""

import html
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from dynamon.health import Finding
from dynamon.monitoring.alerts_thread import Recipient

_LEVELS = {"fault": "ERROR", "warning": "WARN"}  # what people are told of
_LONGEST = 1000  # characters of a text


def open_runs() -> Iterator[Recipient]:
    """Yield the runs of this process: ``wandb.run``, and that of ``trackio.init``, which only its thread knows."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    found = [run]
    with suppress(Exception):  # another release keeps it elsewhere
        found.append(sys.modules["trackio.context_vars"].current_run.get())
    yield from (recipient for run in found if (recipient := recipient_of(run)) is not None)


def recipient_of(run: Any) -> Recipient | None:
    """Return who sends the alerts of a run; None for a run of another tracker, or of a release that has none.

    Text only: HTML is escaped, control characters become spaces.

    Args:
        run: What a logger calls its experiment, or None.
    """
    package = type(run).__module__.partition(".")[0]
    send = getattr(run, "alert", None) if package in ("wandb", "trackio") else None
    if not callable(send):
        return None

    def deliver(finding: Finding) -> None:
        level: Any = _LEVELS[finding.severity]
        if package == "trackio":
            level = sys.modules["trackio"].AlertLevel(level.lower())
        text = f"From step {finding.step}: {finding.message} {finding.advice}"
        send(title=f"dynamon: {finding.rule}, {finding.severity}", text=plain_text(text), level=level)

    return Recipient(f"{package}'s alert", deliver, run, tuple(_LEVELS))


def plain_text(text: str) -> str:
    """Return a text without HTML and control characters, at most 1,000 characters of it.

    Example:
        >>> plain_text("<b>net.0</b>" + chr(7) + " stopped")
        '&lt;b&gt;net.0&lt;/b&gt;  stopped'
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST])
    return html.escape(printable, quote=False)
