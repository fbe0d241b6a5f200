"""Find out at how many steps the sentinel can look at what, from what it costs."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from dynamon.monitoring.budget import Budget

SHARE = 0.25  # of the budget, and of the grace
CHECK, BATCH, GRADIENT, UPDATE = range(4)  # what is done at a step, the cheapest first
_SHARES = 0.75, 0.5, 0.75, 1.0  # of what the cheaper ones leave, that each may take
_WORDS = {BATCH: "batches", GRADIENT: "gradients", UPDATE: "updates"}
_KNOWN = 20  # looks before any is left out: with fewer there is no usual level
_REVIEW, _STEPS = 32, 250  # looks, or steps, between two decisions
_LEAST_PART = 0.25  # of the share that is still spent while more was spent than allowed
_TIMED = 16  # looks of which one is timed on the device
_MOST = 1000  # steps between two looks


class Pace:
    """Times the looks of the sentinel, books them, and chooses every how many steps it looks at what.

    It may take a quarter of what monitoring may: of ``budget``, and of the grace, so that a short run is looked at at
    every step. The check of a few numbers is the cheapest and may take three quarters of that, loss and batch half of
    what is left, gradients three quarters of what is left then, and the updates the rest. What costs more than its
    share of a step is looked at every k-th step only. Each k is a multiple of the one before: where gradients are
    looked at, so is the loss. The first 20 steps are looked at whatever that takes. What was spent too much is saved
    afterwards, of at most three quarters of the share.

    Args:
        name: Under which name time is booked.
        budget: What pays for it; None for nothing.
        is_free: Whether to look at every step, whatever it costs.
        has_checks: Whether steps are checked that are not looked at.

    Attributes:
        every: Steps from one check to the next, and from one look at loss and batch, at gradients, and at updates.
    """

    def __init__(self, name: str, budget: Budget | None, is_free: bool = False, has_checks: bool = True) -> None:
        """Look at every step."""
        self._name, self._budget, self._is_free = name, budget, is_free or budget is None or budget.fraction is None
        self.has_checks = has_checks and not self._is_free
        self.every = [1, 1, 1, 1]
        self._took: list[deque[float]] = [deque(maxlen=_REVIEW) for _ in self.every]
        self._step, self._due, self._since = -1, [True] * 4, [_MOST] * 4
        self._looks, self._has_passed = 0, False
        self._reviewed: tuple[int, int] | None = None  # looks and steps at the last decision
        self._host, self._on_device = _nothing(), _nothing()
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, step: int) -> None:
        """Decide what is done at a step, as its first batch begins: what was last done so many steps ago."""
        if step != self._step:
            self._step, self._since = step, [since + 1 for since in self._since]
            self._due = [since >= every for since, every in zip(self._since, self.every, strict=True)]
            self._due[GRADIENT] &= self._due[BATCH]
            self._due[UPDATE] &= self._due[GRADIENT]

    def looks(self, what: int) -> bool:
        """Return whether to look at something at this step."""
        return self._due[what]

    def add(self, seconds: float, what: int) -> None:
        """Add host time to the look under way."""
        self._host[what] += seconds

    def mark(self, device: torch.device) -> Any:
        """Return the begin of work on a GPU, for :meth:`finish`, of one look in 16; else None."""
        if device.type != "cuda" or self._looks % _TIMED:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def finish(self, begin: Any, device: torch.device, what: int) -> None:
        """Note the end of work on a GPU."""
        if begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(device))
            self._events.append((what, begin, end))

    def book(self, looked: bool, checked: bool = False) -> None:
        """Book the time since the last call: of a look at a step, of a step that was only checked, or of neither."""
        host, self._host = self._host, _nothing()
        seconds = sum(host)
        if looked:
            seconds = max(seconds, self._book_look(host))
        elif checked:
            if not self._has_passed:  # before, only a part of a check was timed by itself
                self._has_passed = True
                self._took[CHECK].clear()
            self._took[CHECK].append(host[CHECK])
        if looked or checked:
            self._since[CHECK] = 0
        if self._budget is not None and seconds:
            self._budget.book(self._name, seconds)

    def _book_look(self, host: list[float]) -> float:
        self._read_events()
        took = [max(on_host, on_device) for on_host, on_device in zip(host, self._on_device, strict=True)]
        own = [what for what in (BATCH, GRADIENT, UPDATE) if self._due[what]]
        for what in own if self._has_passed else (CHECK, *own):
            self._took[what].append(took[what])
        for what in own:
            self._since[what] = 0
        self._looks += 1
        if self.every[BATCH] > 1:  # not always at the same one of optimizers, or batches, that come in turn
            self._since[BATCH] -= self._looks % 2
        return took[CHECK] + sum(took[what] for what in own)

    def _read_events(self) -> None:
        if self._events and all(end.query() for _, _, end in self._events):
            for what in {what for what, _, _ in self._events}:
                times = [begin.elapsed_time(end) for one, begin, end in self._events if one == what]
                self._on_device[what] = sum(times) / 1000
            self._events = []

    def review(self, steps: int) -> bool:
        """Choose the pace anew, now and then; whether it has become slower.

        Args:
            steps: Steps of this fit so far.
        """
        budget = self._budget
        looks_before, steps_before = self._reviewed or (self._looks - _REVIEW, steps)
        is_due = self._looks - looks_before >= _REVIEW or steps - steps_before >= _STEPS
        if self._is_free or budget is None or budget.fraction is None or self._looks < _KNOWN or not is_due:
            return False
        typical = fmean if self._reviewed else min  # the first ones are slow
        self._reviewed = self._looks, steps
        costs = [typical(took) if took else 0.0 for took in self._took]
        share, training = SHARE * budget.fraction, budget.training
        spent = budget.spent_on.get(self._name, 0.0)
        before, in_hand = self.every, share * training + SHARE * budget.grace - spent
        if in_hand > 2 * _REVIEW * sum(costs):
            self.every = [1, 1, 1, 1]
        else:
            part = max(_LEAST_PART, 1 + min(in_hand, 0.0) / max(share * training, 1e-12))
            self.every = _paces(costs, max(part * share * training / max(steps, 1), 1e-12))
        return any(now > then for now, then in zip(self.every, before, strict=True))

    def in_words(self) -> str:
        """Return how often is looked at what, and how often a step is checked."""
        groups: dict[int, list[str]] = {}
        for what, word in _WORDS.items():
            groups.setdefault(self.every[what], []).append(word)
        looks = [f"{_joined(words)} at about one step in {every}" for every, words in groups.items()]
        said, check = f"they look at {', '.join(looks)}", self.every[CHECK]
        if not self.has_checks or check >= self.every[BATCH]:
            return said
        others = "all steps between" if check == 1 else f"about one step in {check}"
        return f"{said}, and check the loss and a few gradients at {others}"


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _nothing() -> list[float]:
    return [0.0] * 4


def _paces(costs: list[float], left: float) -> list[int]:
    """Return every how many steps to look at what, for its cost, where ``left`` seconds may be spent on a step."""
    found, least = list[int](), 1
    for what, (cost, share) in enumerate(zip(costs, _SHARES, strict=True)):
        every = min(max(math.ceil(cost / max(share * left, 1e-12)), 1), _MOST)
        every = least * math.ceil(every / least)
        least = 1 if what == CHECK else every  # checks are apart from looks
        found.append(every)
        left -= cost / every
    return found
