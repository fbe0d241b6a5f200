"""Add up what monitoring costs, and what it may cost."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dynamon.kernels import waiter

_EVENTS = 64  # measurements whose device time nobody has asked for yet
_SAMPLED = 16  # without events, of what is charged at every step and reads nothing, one in so many is waited for


class Ledger:
    """Adds up what the monitors of one run have spent, and what they may spend together.

    The largest share and the largest grace that one of them was given hold for all. Monitors without a limit, and
    readings at fixed steps, are outside of it: they take what they take, and the others have theirs.

    Attributes:
        budgets: The budgets of the monitors.
    """

    def __init__(self) -> None:
        """Start without a monitor."""
        self.budgets: list[Budget] = []

    def add(self, budget: "Budget") -> None:
        """Take in a monitor's budget, once."""
        self.budgets = [*(one for one in self.budgets if one is not budget), budget]
        budget.ledger = self

    @property
    def limited(self) -> "list[Budget]":
        """Return those that limit anything."""
        return [budget for budget in self.budgets if budget.fraction is not None and budget.is_planned]

    @property
    def fraction(self) -> float:
        """Share of training time that may be spent."""
        return max((budget.fraction or 0.0 for budget in self.limited), default=0.0)

    @property
    def grace(self) -> float:
        """Seconds that may be spent beyond the share, once."""
        return max((budget.grace for budget in self.limited), default=0.0)

    @property
    def training(self) -> float:
        """Seconds of training so far without what any monitor took."""
        running = max((budget.running for budget in self.budgets), default=0.0)
        return max(running - sum(budget.spent for budget in self.budgets), 1e-9)

    @property
    def spent(self) -> float:
        """Seconds spent of what may be spent."""
        return sum(
            budget.spent - sum(budget.spent_on.get(name, 0.0) for name in budget.fixed) for budget in self.limited
        )

    @property
    def booked(self) -> float:
        """Seconds that all monitors have spent, and waited for what training had queued."""
        return sum(budget.spent + budget._waited for budget in self.budgets)

    @property
    def allowed(self) -> float:
        """Seconds that may have been spent by now."""
        return self.fraction * self.training + self.grace

    @property
    def left(self) -> float:
        """Seconds that may be spent now."""
        for budget in self.budgets:
            budget._collect()
        return self.allowed - self.spent


class Budget:
    """Times the measurements of a monitor and the training around them.

    Args:
        fraction: Most that measurements may take, as a share of the training time without them; None for
            no limit.
        grace: Seconds that they may take beyond that, once.

    Attributes:
        ledger: What it shares with the other monitors of the run.
        is_planned: Whether it limits anything: not where everything is read at fixed steps.
        fixed: Names of the measurements that are taken at fixed steps all the same.

    On a GPU a measurement is timed by CUDA events as well, since its work is only queued when the host
    moves on; the larger of the two times counts, and events are read when they have passed. A measurement that waits
    for the device would also wait for what training has queued before it, which costs nothing extra: the clock begins
    when that is done. On other accelerators, Apple's say, the clock goes on until the device is done, in every
    measurement that reads something, and in one in 16 of the others, which speaks for those after it.
    """

    def __init__(self, fraction: float | None, grace: float = 0.0) -> None:
        """Start with nothing spent."""
        self.fraction, self.grace = fraction, grace
        self.is_planned, self.fixed = True, frozenset[str]()
        self.ledger = Ledger()
        self.ledger.add(self)
        self.spent = 0.0
        self.spent_on: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._running = 0.0
        self._since: float | None = None
        self._waited = 0.0  # for what training had queued
        self._charged: dict[str, tuple[int, float]] = {}  # how often, and by how much the device took longer
        self._events: deque[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Training begins or goes on."""
        now = time.perf_counter()
        if self._since is not None:
            self._running += now - self._since
        self._since = now

    def rewind(self) -> None:
        """Forget what passed since training last began or went on: it was something else, a search, say."""
        self._since = None

    def stop(self) -> None:
        """Training pauses, for validation say."""
        self._running, self._since = self.running, None

    @property
    def running(self) -> float:
        """Seconds of training so far, measurements included."""
        return self._running + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def training(self) -> float:
        """Seconds of training so far without the measurements of all monitors."""
        return self.ledger.training

    @property
    def overhead(self) -> float:
        """Time of all measurements over that of training without them."""
        return overhead_of([self])

    @property
    def left(self) -> float:
        """Seconds that measurements may take now: of the share and of the grace what no monitor has spent."""
        return math.inf if self.fraction is None else self.ledger.left

    @contextmanager
    def charge(self, name: str, device: torch.device | None = None, waits: bool = False) -> Iterator[None]:
        """Book the time inside to a measurement.

        Args:
            name: The measurement.
            device: Where it works.
            waits: Whether the host reads something of it inside, so that it waits for the device. What training has
                queued there is then waited for first, and not booked.
        """
        with self._clock(name, torch.device("cpu") if device is None else device, waits):
            yield

    def _clock(self, name: str, device: torch.device, waits: bool) -> AbstractContextManager[None]:
        """Return what tells how long a measurement takes on a device."""
        if device.type == "cuda":
            return self._by_events(name, device, waits)
        wait = waiter(device)
        return self._by_host(name) if wait is None else self._by_waiting(name, wait, waits)

    @contextmanager
    def _by_host(self, name: str) -> Iterator[None]:
        begin = time.perf_counter() - self._waited
        try:
            yield
        finally:
            self.book(name, time.perf_counter() - self._waited - begin)

    @contextmanager
    def _by_events(self, name: str, device: torch.device, waits: bool) -> Iterator[None]:
        if len(self._events) >= _EVENTS:
            self._collect()
        stream = torch.cuda.current_stream(device)
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record(stream)
        if waits:
            with self.waiting():
                events[0].synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.book(name, seconds)
            events[1].record(stream)
            self._events.append((name, seconds, *events))

    @contextmanager
    def _by_waiting(self, name: str, wait: Callable[[], Any], waits: bool) -> Iterator[None]:
        count, excess = self._charged.get(name, (0, 0.0))
        is_sampled = waits or count % _SAMPLED == 0
        if is_sampled:
            with self.waiting():
                wait()
        begin = time.perf_counter() - self._waited
        try:
            yield
        finally:
            seconds = time.perf_counter() - self._waited - begin
            if is_sampled:
                wait()
                whole = time.perf_counter() - self._waited - begin
                seconds, own = whole, whole - seconds
                excess = excess if waits else own
            else:
                seconds += excess
            if not waits:
                self._charged[name] = count + 1, excess
            self.book(name, seconds)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Book to nobody what passes inside: a wait for what training has queued."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Book what passes inside beyond what any monitor is charged there: start-up, deciding what to measure."""
        begin, known = time.perf_counter(), self.ledger.booked
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.book("hooks", max(seconds - (self.ledger.booked - known), 0.0))

    @property
    def grace_left(self) -> float:
        """Seconds of the grace that are left for a fit that goes on from here, with a clock of its own."""
        return self.grace if self.fraction is None else min(max(self.left, 0.0), self.grace)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its clock stopped, and waits for no device."""
        return {**self.__dict__, "_running": self.running, "_since": None, "_events": deque()}

    def book(self, name: str, seconds: float) -> None:
        """Book time that was measured elsewhere."""
        self._add(name, seconds)
        self.last[name] = seconds
        for budget in self.ledger.budgets:
            if budget._since is None:  # before the first batch and after the last one: no training beside it
                budget._running += seconds

    def _add(self, name: str, seconds: float) -> None:
        self.spent += seconds
        self.spent_on[name] = self.spent_on.get(name, 0.0) + seconds

    def _collect(self) -> None:
        """Add what the device took beyond the host, for measurements that have passed by now."""
        while self._events and self._events[0][3].query():
            name, host, begin, end = self._events.popleft()
            self._add(name, max(begin.elapsed_time(end) / 1000 - host, 0.0))


def overhead_of(budgets: Sequence[Budget]) -> float:
    """Time of all measurements of some monitors of one run over that of training without them."""
    for budget in budgets:
        budget._collect()
    spent = sum(budget.spent for budget in budgets)
    return spent / max(max(budget.running for budget in budgets) - spent, 1e-9)
