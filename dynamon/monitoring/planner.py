"""Plan when each group of quantities is read, so that all of them together keep to a budget."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dynamon.monitoring.budget import Budget, Ledger
from dynamon.monitoring.cadence import NEVER, Cadence

GRACE = 3.0  # seconds: all first readings of a GPT of a million parameters take 1.4 s on one slow core
FIRST_STEPS = 50  # within which everything is read once that the grace pays for
_UNKNOWN = 500  # steps that a run of unknown length is taken to go on for at least
_LONGEST = 10_000  # most steps between two reviews
_FIRST_SHARE = 0.5  # of the money, for a first reading that the grace does not pay for
_DOUBT = 3.0  # times its estimate that a first reading may take
_ROUNDING = 1e-6  # of a step


@dataclass(eq=False)
class Plan:
    """Hold what the planner knows of one group of quantities.

    Attributes:
        name: Its name, under which its time is booked.
        cadence: Its timetable.
        price: Gives the seconds that the next reading takes; None where that is not known yet.
        is_off: Tells whether it is not read in this run.
        rides: Whether it is taken along with the readings of another group, which it follows in the list.
        owner: The monitor that reads it; set by the planner.
        budget: What pays for it, likewise.
    """

    name: str
    cadence: Cadence
    price: Callable[[], float | None]
    is_off: Callable[[], bool] = lambda: False
    rides: bool = False
    owner: Any = None
    budget: Budget | None = None

    @property
    def is_free(self) -> bool:
        """Return whether nothing limits it."""
        return self.budget is None or self.budget.fraction is None

    @property
    def spent(self) -> float:
        """Seconds spent on it."""
        return 0.0 if self.budget is None else self.budget.spent_on.get(self.name, 0.0)


@dataclass(frozen=True)
class Demand:
    """Readings that are wanted over a stretch of the run.

    Attributes:
        price: Seconds a reading.
        shortest: Fewest steps between two readings.
        window: Steps from the last reading to the end of the stretch.
        is_first: Whether there was none yet: then one is wanted before others are repeated.
    """

    price: float
    shortest: float
    window: float
    is_first: bool = False


def spread(money: float, demands: Sequence[Demand], is_end: bool) -> list[float]:
    r"""Find the intervals at which readings use up some seconds.

    Of all intervals :math:`d_i \ge m_i` with :math:`\sum_i c_i w_i / d_i` equal to the money, those with the smallest
    :math:`\sum_i d_i / m_i` are taken, :math:`d_i = \max(m_i, \lambda \sqrt{c_i m_i})`: a reading that costs four times
    as much comes half as often. (:math:`c`: price, :math:`m`: shortest interval, :math:`w`: window.)

    Args:
        money: Seconds that readings may take.
        demands: What is wanted.
        is_end: Whether the run ends with the windows. Intervals are then whole parts of their window, and what cannot
            be read within it leaves its money to the others.

    Returns:
        Steps between two readings of each, infinite for those that are not read.
    """
    found = [NEVER] * len(demands)
    rest, left = list(range(len(demands))), money
    for i in sorted(rest, key=lambda i: demands[i].price):
        demand = demands[i]
        if not demand.is_first or demand.price > left:
            continue
        # Without this what is expensive would wait for its share for longer than the run lasts.
        latest = demand.window * demand.price / (left * _FIRST_SHARE)
        latest = min(latest, demand.window)
        if _stretched(left, [demands[j] for j in rest])[rest.index(i)] > latest:
            found[i] = max(latest, demand.shortest)
            left -= demand.price * demand.window / found[i]
            rest.remove(i)
    while rest and left > 0:
        intervals = _stretched(left, [demands[i] for i in rest])
        worst = max(range(len(rest)), key=lambda k: intervals[k] / demands[rest[k]].window)
        if is_end and intervals[worst] > demands[rest[worst]].window + _ROUNDING:
            rest.pop(worst)
            continue
        for k, i in enumerate(rest):
            found[i] = _whole_part(intervals[k], demands[i]) if is_end else intervals[k]
        break
    return found


def _stretched(money: float, demands: Sequence[Demand]) -> list[float]:
    """Stretch the shortest intervals until the readings of all windows take so much."""
    bound: set[int] = set()  # those that are read as often as they may be
    while True:
        free = [i for i in range(len(demands)) if i not in bound]
        left = money - sum(d.price * d.window / d.shortest for i, d in enumerate(demands) if i in bound)
        wanted = sum(math.sqrt(demands[i].price / demands[i].shortest) * demands[i].window for i in free)
        stretch = wanted / left if left > 0 else NEVER
        found = [
            d.shortest if i in bound else max(stretch * math.sqrt(d.price * d.shortest), 0.0)
            for i, d in enumerate(demands)
        ]
        short = {i for i in free if found[i] < demands[i].shortest}
        if not short:
            return found
        bound |= short


def _whole_part(interval: float, demand: Demand) -> float:
    """The interval at which the last reading is at the end of the window."""
    if interval <= demand.shortest:
        return demand.shortest
    return demand.window / max(math.floor(demand.window / interval + _ROUNDING), 1)


def _step(moment: float) -> float:
    """The first step at a moment or after it."""
    return math.ceil(moment - _ROUNDING) if math.isfinite(moment) else NEVER


class Planner:
    """Decides at which steps the monitors of a run read what, from what readings cost and what is left to spend.

    At each review every group gets the step of its next reading. A first reading comes at once where the budget, the
    grace included, pays for it. All others are spread over the rest of the run, or, where its length is not known, over
    as many steps again as it has taken. Between two reviews nothing has to be asked.

    Attributes:
        ledger: What the monitors have spent, and may spend.
        owners: The monitors, in the order in which a training loop calls them.
        plans: The groups of all of them.
        reviews_at: Step at whose end the next review is due, readings or not.
        has_begun: Whether the first step is known.
    """

    def __init__(self) -> None:
        """Plan nothing."""
        self._begun = 0
        self._last_step: int | None = None
        self._start_up = 0.0  # seconds that were no readings, before the first step
        self._clear()

    def _clear(self) -> None:
        self.ledger = Ledger()
        self.owners: list[Any] = []
        self.plans: list[Plan] = []
        self.reviews_at: float = -math.inf
        self.has_begun = False

    def join(self, owner: Any, budget: Budget, plans: Sequence[Plan]) -> None:
        """Take in a monitor before the first step of a fit; those of the fit before are forgotten.

        Args:
            owner: The monitor.
            budget: What pays for its readings.
            plans: What it reads.
        """
        if self.has_begun:
            self._clear()
        self.leave(owner)
        for plan in plans:
            plan.owner, plan.budget = owner, budget
        budget.fixed = frozenset(plan.name for plan in plans if not plan.cadence.is_planned)
        budget.is_planned = any(plan.cadence.is_planned and not plan.is_off() for plan in plans)
        self.ledger.add(budget)
        self.owners.append(owner)
        self.plans += plans

    def leave(self, owner: Any) -> None:
        """Plan nothing for a monitor any more."""
        self.owners = [one for one in self.owners if one is not owner]
        self.plans = [plan for plan in self.plans if plan.owner is not owner]

    def is_last(self, owner: Any) -> bool:
        """Return whether a monitor is the last one to see a step: those that come after it sleep."""
        return all(later.asleep for later in self.owners[self.owners.index(owner) + 1 :])

    def begin(self, step: int, total: float | None, is_tryout: bool = False) -> None:
        """Start a fit, or go back to a step of it.

        Args:
            step: The step that comes.
            total: Steps of the run; None, -1 or infinite where that is not known.
            is_tryout: Whether everything is read at every step.
        """
        self.has_begun = True
        known = total is not None and math.isfinite(total) and total > step
        self._begun, self._last_step = step, int(total) - 1 if known and total is not None else None
        self._start_up = self._other
        for plan in self.plans:
            plan.cadence.is_tryout = is_tryout
            plan.cadence.begin(step)
        self.reviews_at = step

    def wakes_at(self, owner: Any) -> float:
        """Return the first step at which a monitor has something to do; it measures nothing before it."""
        own = [plan.cadence.wakes_at for plan in self.plans if plan.owner is owner and not plan.rides]
        return min([*own, self.reviews_at if self._planned_ones else NEVER])

    def is_due(self, step: int) -> bool:
        """Return whether to plan anew at the end of a step: something was read, or time has passed."""
        planned = self._planned_ones
        return bool(planned) and (step >= self.reviews_at or any(plan.cadence.is_open for plan in planned))

    @property
    def _planned_ones(self) -> list[Plan]:
        """The groups whose readings are planned: not those at fixed steps, and not those that are off."""
        return [plan for plan in self.plans if plan.cadence.is_planned and not plan.is_off()]

    def review(self, step: int, steps_taken: int) -> list[float]:
        """Plan anew after a step.

        Args:
            step: The step that is over.
            steps_taken: Steps of this fit so far, of which the budget has the time.

        Returns:
            The step of the next reading of each group, then that of the next review; for :meth:`take`.
        """
        wanted = [plan for plan in self._planned_ones if self._can_ride(plan)]
        prices = {plan: price for plan in wanted if not plan.is_free and (price := plan.price()) is not None}
        planned = self._paid_for(step, steps_taken, prices) | {
            plan: max(plan.cadence.last + plan.cadence.interval, plan.cadence.possible_after(step))
            for plan in wanted
            if plan.is_free
        }
        planned |= self._kept(step, wanted)
        nexts = [planned.get(plan, NEVER if plan.cadence.is_planned else plan.cadence.next) for plan in self.plans]
        wait = max(1, min(step + 1 - self._begun, _LONGEST))
        return [*nexts, step + wait]

    def _can_ride(self, plan: Plan) -> bool:
        """Return whether a group that rides along has something to ride with."""
        if not plan.rides:
            return True
        host = self._host(plan)
        return host is None or host.cadence.last > -math.inf or host.cadence.next < NEVER

    def _host(self, plan: Plan) -> Plan | None:
        """Return the group that one rides with, None where it needs none."""
        hosts = [other for other in self.plans[: self.plans.index(plan)] if not other.rides]
        return hosts[-1] if plan.rides and hosts else None

    def take(self, planned: Sequence[float]) -> None:
        """Take over what a review has found, here or on another process."""
        for plan, step in zip(self.plans, planned, strict=False):
            if plan.cadence.is_planned:
                plan.cadence.next, plan.cadence.is_open = step, False
        self.reviews_at = planned[-1]

    @staticmethod
    def _kept(step: int, plans: Iterable[Plan]) -> dict[Plan, float]:
        """The readings of which something was kept at this step: they are not given up."""
        return {p: p.cadence.next for p in plans if p.cadence.wakes_at <= step < p.cadence.next}

    def _paid_for(self, step: int, steps_taken: int, prices: dict[Plan, float]) -> dict[Plan, float]:
        """The step of the next reading of each group that the budget limits."""
        possible = {plan: plan.cadence.possible_after(step) for plan in prices}
        income, planned = self._income(step, steps_taken), self._kept(step, prices)
        left = self.ledger.left - sum(prices[plan] for plan in planned)
        firsts = [plan for plan in sorted(prices, key=prices.__getitem__) if plan.cadence.last == -math.inf]
        is_scarce = sum(prices[plan] for plan in firsts) * _DOUBT > left
        for plan in firsts:
            host = self._host(plan)
            # What rides along brings its host's reading, unless that one is planned already.
            needed = [one for one in (host, plan) if one in prices and one not in planned]
            cost = sum(prices[one] for one in needed)
            if plan in planned or cost > left:
                continue
            at = max(possible[one] for one in needed)
            planned |= dict.fromkeys(needed, planned[host] if host in planned else at)
            left -= cost
            if is_scarce and prices[plan] > 0:
                break  # prices are estimates so far: what this one really takes decides on the next
        others = [plan for plan in prices if plan not in planned]
        rest = self._rest(step)
        demands = [self._demand(plan, prices[plan], step, rest) for plan in others]
        intervals = spread(left + income * rest, demands, self._last_step is not None)
        for plan, interval in zip(others, intervals, strict=True):
            planned[plan] = max(_step(self._since(plan) + interval), possible[plan])
        return self._earned(step, income, planned, prices)

    def _demand(self, plan: Plan, price: float, step: int, rest: float) -> Demand:
        window = rest + step - self._since(plan)
        return Demand(max(price, 1e-9), plan.cadence.interval, max(window, 1.0), plan.cadence.last == -math.inf)

    def _since(self, plan: Plan) -> float:
        """The step from which a group waits for its next reading."""
        return max(plan.cadence.last, self._begun)

    def _rest(self, step: int) -> float:
        """Steps that the run goes on for, as far as that is known."""
        if self._last_step is not None and self._last_step > step:
            return self._last_step - step
        return max(step + 1 - self._begun, _UNKNOWN)

    @property
    def _other(self) -> float:
        """Seconds spent on other work than readings."""
        counted = [p for p in self.plans if p.budget in self.ledger.limited and p.name not in p.budget.fixed]
        return self.ledger.spent - sum(plan.spent for plan in counted)

    def _income(self, step: int, steps_taken: int) -> float:
        """Seconds for readings that a step brings; what other work takes at each is taken off."""
        other = (self._other - self._start_up) / (step + 1 - self._begun)
        return self.ledger.fraction * self.ledger.training / max(steps_taken, 1) - max(other, 0.0)

    def _earned(
        self, step: int, income: float, planned: dict[Plan, float], prices: dict[Plan, float]
    ) -> dict[Plan, float]:
        """Put readings off until the budget has what they and all those before them cost."""
        needed, found = 0.0, dict[Plan, float]()
        for plan in sorted(planned, key=lambda plan: planned[plan]):
            needed += prices[plan]
            lacks = needed - self.ledger.left
            wait = 0.0 if lacks <= 0 else lacks / income if income > 0 else NEVER
            found[plan] = max(planned[plan], _step(step + wait))
            if self._last_step is not None and found[plan] > self._last_step:
                found[plan] = NEVER
            if found[plan] == NEVER:
                needed -= prices[plan]
        return found

    def late(self, owner: Any) -> list[tuple[Plan, float | None, float]]:
        """Return a monitor's groups without a reading so far, the price of one if known, and the step of the first."""
        own = (plan for plan in self._planned_ones if plan.owner is owner)
        waiting = [p for p in own if p.cadence.last == -math.inf and self._can_ride(p)]
        return [(plan, plan.price(), plan.cadence.next) for plan in waiting]
