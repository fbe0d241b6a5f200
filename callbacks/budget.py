"""What monitoring costs, and what it may cost."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MARGIN = 1.5  # by how much a measurement may take longer than expected without breaking the budget


class Budget:
    """Times the measurements and the training around them.

    Args:
        fraction: Most that measurements may take, as a share of the training time without them; None for
            no limit.

    On a GPU a measurement is timed by CUDA events as well, since its work is only queued when the host
    moves on; the larger of the two times counts, and events are read when they have passed.
    """

    def __init__(self, fraction: float | None) -> None:
        """Start with nothing spent."""
        self.fraction = fraction
        self.spent = 0.0
        self.spent_on: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._running = 0.0
        self._since: float | None = None
        self._events: deque[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Training begins or goes on."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Training pauses, for validation say."""
        self._running, self._since = self.running, None

    @property
    def running(self) -> float:
        """Seconds of training so far, measurements included."""
        return self._running + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def training(self) -> float:
        """Seconds of training so far without the measurements."""
        return max(self.running - self.spent, 1e-9)

    @property
    def overhead(self) -> float:
        """Time of all measurements over that of training without them."""
        self._collect()
        return self.spent / self.training

    @contextmanager
    def charge(self, name: str, cuda: bool = False) -> Iterator[None]:
        """Book the time inside to a measurement."""
        begin = time.perf_counter()
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if cuda else None
        if events:
            events[0].record()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._book(name, seconds)
            if events:
                events[1].record()
                self._events.append((name, seconds, *events))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Book what passes inside beyond what is charged there: start-up, deciding what to measure."""
        begin, spent = time.perf_counter(), self.spent
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            if self._since is None:  # before the first batch
                self._running += seconds
            self._book("hooks", max(seconds - (self.spent - spent), 0.0))

    def allows(self, name: str, expected: float, share: float = 1.0) -> bool:
        """Whether a measurement may be taken now.

        Args:
            name: The measurement.
            expected: Seconds it is expected to take.
            share: Most of the budget that this measurement may use up; those with a share below one keep to
                it, one with share 1 takes what is left.
        """
        if self.fraction is None:
            return True
        self._collect()
        allowance = self.fraction * self.training
        cost = _MARGIN * expected
        return self.spent + cost <= allowance and self.spent_on.get(name, 0.0) + cost <= share * allowance

    def seconds_to_wait(self, name: str, expected: float, share: float = 1.0) -> float:
        """Seconds of training after which :meth:`allows` would say yes; 0 where it does."""
        if self.fraction is None:
            return 0.0
        cost = _MARGIN * expected
        needed = max(self.spent + cost, (self.spent_on.get(name, 0.0) + cost) / share) / self.fraction
        return max(needed - self.training, 0.0)

    def _book(self, name: str, seconds: float) -> None:
        self.spent += seconds
        self.spent_on[name] = self.spent_on.get(name, 0.0) + seconds
        self.last[name] = seconds

    def _collect(self) -> None:
        """Add what the device took beyond the host, for measurements that have passed by now."""
        while self._events and self._events[0][3].query():
            name, host, begin, end = self._events.popleft()
            self._book(name, max(begin.elapsed_time(end) / 1000 - host, 0.0))
