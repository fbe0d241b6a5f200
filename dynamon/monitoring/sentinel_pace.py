"""Find out at how many steps the sentinel can look, from what it costs."""

import math
from collections import deque
from statistics import median
from typing import Any

import torch

from dynamon.monitoring.budget import Budget

SHARE = 0.25  # of the budget, and of the grace
_REVIEW = 32  # looks between two decisions
_TIMED = 16  # looks of which one is timed on the device
_MOST = 1000  # steps between two looks


class Pace:
    """Times the looks of the sentinel, books them, and chooses every how many steps it looks.

    It may take a quarter of what monitoring may: of ``budget``, and of the grace, so that a short run is looked at at
    every step. Where a look costs more than its share of a step, only every k-th step is looked at.

    Args:
        name: Under which name time is booked.
        budget: What pays for it; None for nothing.
        is_free: Whether to look at every step, whatever it costs.

    Attributes:
        every: Steps from one look to the next.
    """

    def __init__(self, name: str, budget: Budget | None, is_free: bool = False) -> None:
        """Look at every step."""
        self._name, self._budget, self._is_free = name, budget, is_free
        self.every = 1
        self._took: deque[float] = deque(maxlen=_REVIEW)
        self._looks = 0
        self._host = self._on_device = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, seconds: float) -> None:
        """Add host time to the look under way."""
        self._host += seconds

    def mark(self, device: torch.device) -> Any:
        """Return the begin of work on a GPU, for :meth:`finish`, of one look in 16; else None."""
        if device.type != "cuda" or self._looks % _TIMED:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def finish(self, begin: Any, device: torch.device) -> None:
        """Note the end of work on a GPU."""
        if begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(device))
            self._events.append((begin, end))

    def book(self, looked: bool) -> None:
        """Book the time since the last call: of a look, or of a step that was passed."""
        host, self._host = self._host, 0.0
        if not looked:
            if self._budget is not None and host:
                self._budget.book(self._name, host)
            return
        if self._events and all(end.query() for _, end in self._events):
            self._on_device = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events = []
        seconds = max(host, self._on_device)
        self._looks += 1
        self._took.append(seconds)
        if self._budget is not None:
            self._budget.book(self._name, seconds)

    def review(self, steps: int) -> bool:
        """Choose the pace anew, now and then; whether it has become slower.

        Args:
            steps: Steps of this fit so far.
        """
        budget = self._budget
        if self._is_free or budget is None or budget.fraction is None or self._looks < _REVIEW or self._looks % _REVIEW:
            return False
        cost = median(self._took)
        before, share = self.every, SHARE * budget.fraction
        training = budget.training
        spent = budget.spent_on.get(self._name, 0.0)
        in_hand = share * training + SHARE * budget.grace - spent
        needed = max(1, math.ceil(cost / max(share * training / max(steps, 1), 1e-12)))
        if needed == 1 or in_hand > 2 * _REVIEW * cost:
            self.every = 1
        else:
            self.every = min(needed, _MOST)
        return self.every > before
