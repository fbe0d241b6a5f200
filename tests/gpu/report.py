"""What a check is, and what it says: figures as they come, what must hold, bars that only a GPU is held to."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

PARTS = ("hazards", "neutral", "numbers", "kernels", "launches", "timing", "suites")
NOT_JUDGED = "bars are not judged on this device"


class Skip(Exception):
    """A check cannot be made here; the message says why."""


class Report:
    """What one check says.

    Args:
        name: The check's name.
        on_gpu: Whether bars are judged.
        out: Where each line goes at once, so that a check that is killed leaves what it had.
    """

    def __init__(self, name: str, on_gpu: bool, out: TextIO | None = None) -> None:
        self.name, self.on_gpu, self._out = name, on_gpu, out
        self.figures: dict[str, Any] = {}
        self.bars: list[dict[str, Any]] = []

    def note(self, what: str, value: Any) -> None:
        """A figure."""
        self.figures[what] = value
        self._say(figure=what, value=value)

    def hold(self, what: str, truth: bool) -> None:
        """What must hold on any device."""
        self._bar({"what": what, "holds": bool(truth)})

    def bar(self, what: str, value: float, *, most: float | None = None, least: float | None = None) -> None:
        """A figure that a GPU is held to."""
        bound, sign = (most, "<=") if most is not None else (least, ">=")
        assert bound is not None
        holds: bool | None = bool(value <= bound if most is not None else value >= bound) if self.on_gpu else None
        self._bar({"what": what, "value": _short(value), "bar": f"{sign} {_short(bound):g}", "holds": holds})

    def _bar(self, found: dict[str, Any]) -> None:
        self.bars.append(found)
        self._say(**found)

    def _say(self, **line: Any) -> None:
        if self._out is not None:
            self._out.write(json.dumps({"check": self.name, **line}, default=str) + "\n")
            self._out.flush()


@dataclass(frozen=True)
class Check:
    """A check and how it is run.

    Attributes:
        name: Its name.
        part: One of :data:`PARTS`.
        run: Takes the :class:`Report`.
        seconds: What it takes on an H200, start of the process not counted. Three times that is its limit.
        alone: Whether it measures time, and so runs when nothing else does.
        on_cpu: Why it is not run without a GPU; empty where it is.
        rank: Checks of small rank go first.
    """

    name: str
    part: str
    run: Callable[[Report], None]
    seconds: float
    alone: bool = False
    on_cpu: str = ""
    rank: float = 0.0


CHECKS: dict[str, Check] = {}


def add(check: Check) -> None:
    """Know a check."""
    assert check.name not in CHECKS and check.part in PARTS, check.name
    CHECKS[check.name] = check


def check(part: str, seconds: float, **how: Any) -> Callable[[Callable[[Report], None]], Callable[[Report], None]]:
    """Know a function as the check of its name."""

    def known(function: Callable[[Report], None]) -> Callable[[Report], None]:
        add(Check(function.__name__.replace("_", " "), part, function, seconds, **how))
        return function

    return known


def status(bars: list[dict[str, Any]]) -> str:
    """How a check that came to its end ended."""
    held = [found["holds"] for found in bars]
    if any(truth is False for truth in held):
        return "failed"
    return "not judged" if any(truth is None for truth in held) else "passed"


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Warnings inside, and what dynamon logs, in place of the screen."""
    said: list[str] = []
    handler = _Logged()
    logger = logging.getLogger("dynamon")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            logger.removeHandler(handler)
            found = {*handler.messages, *(str(w.message) for w in seen if _is_ours(str(w.message)))}
            said += sorted(message[:200] for message in found)[:5]


class _Logged(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.add(record.getMessage())


_OURS = ("Monitor", "sharpness", "deterministic", "contiguous chunk", "CUDAGraph", "NoiseAdaptive", "Triton")


def _is_ours(message: str) -> bool:
    return any(word in message for word in _OURS)


@dataclass
class Record:
    """What is known of a check when it is over."""

    check: str
    part: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    bars: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line of JSON, without what is empty."""
        return json.dumps({k: v for k, v in self.__dict__.items() if v not in ("", [], {})}, default=str)


def log(text: str) -> None:
    """For whoever watches."""
    print(text, file=sys.stderr, flush=True)
