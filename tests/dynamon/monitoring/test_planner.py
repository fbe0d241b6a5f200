"""When readings are taken: on a clock of our own, with readings of given cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from dynamon.monitoring.budget import Budget
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.missed_readings import say_late
from dynamon.monitoring.planner import FIRST_STEPS, Demand, Plan, Planner, spread

Cost = float | Callable[[int], float]


@dataclass
class Group:
    """Readings of one kind: fewest steps between two, steps that prepare one, seconds of one, what it is guessed at."""

    interval: int
    lead: int
    cost: Cost
    guess: float | None = None

    def seconds(self, step: int) -> float:
        return self.cost(step) if callable(self.cost) else self.cost


@dataclass
class Result:
    budget: Budget
    allowed: float
    planner: Planner
    read: dict[str, list[int]]
    most_over: float = -math.inf  # seconds by which the budget was exceeded at the worst step
    awake: int = 0
    prepared: dict[str, list[int]] = field(default_factory=dict)
    told: dict[int, list[str]] = field(default_factory=dict)


class Mine:
    """A monitor, as far as the planner knows it."""

    asleep = False


OWNER = Mine()


def planner_of(budget: Budget, *plans: Plan, owner: Any = OWNER) -> Planner:
    planner = Planner()
    planner.join(owner, budget, plans)
    return planner


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dynamon.monitoring.budget.time.perf_counter", lambda: clock.now)
    return clock


def train(
    clock: SimpleNamespace,
    groups: dict[str, Group],
    steps: int,
    step_seconds: float,
    *,
    fraction: float | None = 0.02,
    grace: float = 3.0,
    known: bool = True,
    start_up: float = 0.0,
    hooks: float = 0.0,
    begin: int = 0,
    rides: tuple[str, ...] = (),
) -> Result:
    """A run in which every reading takes what its group says; the planner learns a price when it is paid."""
    budget = Budget(fraction, grace)
    plans, prices = [], {name: group.guess for name, group in groups.items()}
    for name, group in groups.items():
        cadence = Cadence(None, group.interval)
        cadence.lead = group.lead
        first = group.seconds(0) if group.guess is None else group.guess
        plans.append(Plan(name, cadence, lambda name=name, first=first: prices[name] or first, rides=name in rides))
    planner = planner_of(budget, *plans)
    with budget.watch():
        clock.now += start_up
    planner.begin(begin, steps if known else None)
    result = Result(budget, 0.0, planner, {name: [] for name in groups}, prepared={name: [] for name in groups})
    for step in range(begin, steps):
        budget.start()
        clock.now += step_seconds
        if step < planner.wakes_at(OWNER):
            continue
        result.awake += 1
        with budget.watch():
            clock.now += hooks
            is_read = False
            for plan in planner.plans:
                if plan.cadence.is_due_after(step):
                    result.prepared[plan.name].append(step)
                if plan.rides and not is_read:
                    continue
                is_read = plan.cadence.is_due(step)
                if is_read:
                    prices[plan.name] = groups[plan.name].seconds(step)
                    with budget.charge(plan.name):
                        clock.now += prices[plan.name]
                    plan.cadence.read(step)
                    result.read[plan.name].append(step)
                plan.cadence.passed(step)
            planner.take(planner.review(step, step + 1 - begin))
        if fraction is not None:
            result.most_over = max(result.most_over, budget.spent - fraction * budget.training - grace)
    result.allowed = math.inf if fraction is None else fraction * budget.training + grace
    return result


def economy(gradient: Cost, weight: Cost, steps: Cost, sharpness: Cost) -> dict[str, Group]:
    return {
        "gradient": Group(4, 1, gradient),
        "weight": Group(20, 1, weight),
        "steps": Group(20, 0, steps),
        "sharpness": Group(20, 0, sharpness),
    }


MLP, GPT = (0.001, 0.004, 0.02, 0.06), (0.005, 0.1, 0.25, 0.6)
RUNS = [
    (steps, seconds, costs)
    for steps in (50, 200, 1000, 5000)
    for seconds, costs in ((0.001, MLP), (0.005, MLP), (0.12, GPT))
]


@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
@pytest.mark.parametrize(("steps", "seconds", "costs"), RUNS)
def test_every_group_is_read_soon_and_the_budget_is_kept(clock, steps, seconds, costs, known) -> None:
    found = train(clock, economy(*costs), steps, seconds, known=known)
    assert all(read and read[0] < FIRST_STEPS for read in found.read.values())
    assert found.most_over <= 1e-9
    assert found.budget.overhead == pytest.approx(found.budget.spent / (steps * seconds), rel=1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
@pytest.mark.parametrize(
    ("fraction", "grace"), [(0.02, 3.0), (0.02, 0.0), (0.1, 0.0), (0.1, 5.0)], ids=lambda value: str(value)
)
def test_what_may_be_spent_is_spent(clock, fraction, grace, known) -> None:
    """Where readings are wanted for more seconds than there are, a tenth at most is left over."""
    found = train(clock, economy(0.01, 0.04, 0.2, 0.5), 5000, 0.1, fraction=fraction, grace=grace, known=known)
    assert 0.9 * found.allowed <= found.budget.spent <= found.allowed * 1.0001


def test_readings_are_spread_over_the_run(clock) -> None:
    """Two seconds of grace that a fifth of the run could use up last to its end."""
    found = train(clock, economy(*MLP), 5000, 0.002)
    for read in found.read.values():
        fifths = np.bincount(np.array(read) // 1000, minlength=5)
        assert fifths.max() <= 1.35 * fifths.min() + 1, fifths
    intervals = {name: np.diff(read).mean() for name, read in found.read.items()}
    # As the square root of price times shortest interval.
    assert intervals["sharpness"] / intervals["steps"] == pytest.approx(math.sqrt(3), rel=0.15)
    assert intervals["steps"] / intervals["gradient"] == pytest.approx(10, rel=0.15)


def test_without_knowing_the_length_the_grace_is_not_used_up_at_once(clock) -> None:
    found = train(clock, economy(*MLP), 5000, 0.002, known=False)
    assert min(np.bincount(np.array(found.read["gradient"]) // 1000, minlength=5)) >= 5
    assert all(read[-1] >= 2500 for read in found.read.values())


@pytest.mark.parametrize(("total", "is_known"), [(None, False), (-1, False), (math.inf, False), (300, True)])
def test_lengths_that_say_nothing(clock, total, is_known) -> None:
    budget = Budget(0.02, 3.0)
    planner = planner_of(budget, Plan("it", Cadence(None, 1), lambda: 0.1))
    planner.begin(0, total)
    budget.start()
    clock.now += 1.0
    planner.plans[0].cadence.read(0)
    planner.take(planner.review(0, 1))
    # 300 steps with 3 + 6 s, of which the readings take 0.1: 90 of them. Or 500 steps with 3 + 10 s.
    assert planner.plans[0].cadence.next == pytest.approx(300 / 90 if is_known else 500 / 130, abs=1)


def test_a_reading_that_the_grace_does_not_pay_for_is_earned(clock) -> None:
    """5 s of grace and income of 6 ms a step: the others go on, and the expensive one comes in the first half."""
    found = train(clock, economy(0.02, 0.3, 1.0, 5.0), 2000, 0.3)
    assert found.read["sharpness"] and FIRST_STEPS < found.read["sharpness"][0] < 1000
    assert all(len(found.read[name]) >= 4 for name in ("gradient", "weight", "steps"))
    assert found.most_over <= 1e-9


def test_a_reading_that_the_run_does_not_pay_for_holds_nobody_up(clock) -> None:
    """9 s, and 7 in all: it is not read, and its price is told; the others use what there is."""
    found = train(clock, economy(0.01, 0.04, 0.2, 9.0), 2000, 0.1)
    assert not found.read["sharpness"]
    ((plan, price, step),) = found.planner.late(OWNER)
    assert plan.name == "sharpness" and price == 9.0 and step == math.inf
    assert found.budget.spent >= 0.9 * found.allowed


def test_an_unknown_price_is_said_as_unknown(caplog) -> None:
    named = (("probe", 0.0), ("steps", None), ("sharpness", None), ("weight", 2.0))
    budget, monitor = Budget(0.02, 0.0), Mine()
    plans = [Plan(name, Cadence(None, 10), lambda price=price: price) for name, price in named]
    planner = planner_of(budget, *plans, owner=monitor)
    planner.begin(0, 100)
    planner.take([math.inf] * 4 + [50])
    assert [price for _, price, _ in planner.late(monitor)] == [0.0, None, None, 2.0]
    say_late(monitor, SimpleNamespace(planner=planner, budget=budget))
    assert [record.message for record in caplog.records] == [
        "Mine: one weight reading takes about 2 s, more than grace=0 has left: none is planned so far. Raise grace "
        "or budget to have it sooner.",
        "Mine: no sharpness reading so far, and what one takes is not known yet: none is planned so far. Raise "
        "grace or budget to have it sooner.",
    ]


def test_first_readings_that_do_not_fit_together_come_one_by_one(clock) -> None:
    """Each of 1.8, 1 and 1 s fits into the grace of 3 s; the cheaper ones are first, the other is earned."""
    found = train(clock, economy(0.02, 1.8, 1.0, 1.0), 3000, 0.1)
    assert found.read["steps"][0] < FIRST_STEPS and found.read["sharpness"][0] < FIRST_STEPS
    assert FIRST_STEPS < found.read["weight"][0] < 1500 and found.most_over <= 1e-9


@pytest.mark.parametrize("grace", [0.0, 3.0])
def test_a_large_network_and_few_steps(clock, grace) -> None:
    """320 steps of 85 ms, and weights that take 1.8 s a reading: 2 % are 0.54 s."""
    found = train(clock, economy(0.02, 1.8, 0.15, 0.5), 320, 0.085, grace=grace)
    assert found.budget.spent <= 1.0001 * (0.02 * 320 * 0.085 + grace)
    assert len(found.read["weight"]) == (grace > 0)


def test_what_turns_out_more_expensive_is_made_up_for(clock) -> None:
    """Guessed at 10 ms, and it takes 1.8 s: nothing more is read until that is paid."""
    groups = {"it": Group(20, 0, 1.8, guess=0.01)}
    found = train(clock, groups, 3000, 0.1, grace=1.0)
    first, second = found.read["it"][:2]
    assert first < FIRST_STEPS and second >= (2 * 1.8 - 1.0) / 0.002 - 20
    assert found.budget.spent <= found.allowed


@pytest.mark.parametrize(("weight", "is_read"), [(0.1, True), (9.0, False)])
def test_what_rides_along_waits_for_what_it_rides_with(clock, weight, is_read) -> None:
    """Full spectra come with a reading of the weights; where there is none, nobody saves for them."""
    groups = {"weight": Group(20, 1, weight), "full": Group(200, 0, 1.0), "gradient": Group(4, 1, 0.02)}
    found = train(clock, groups, 1000, 0.1, rides=("full",))
    assert bool(found.read["full"]) == is_read and set(found.read["full"]) <= set(found.read["weight"])
    assert found.budget.spent >= 0.9 * found.allowed


def test_what_rides_along_brings_its_host_where_the_grace_pays_for_both(clock) -> None:
    """Estimates are doubted, so the weights may be read without full spectra; those need a second reading then."""
    groups = {
        "gradient": Group(4, 1, 0.016),
        "weight": Group(20, 1, 0.6, guess=0.85),
        "full": Group(200, 0, 0.44, guess=0.45),
        "steps": Group(20, 1, 0.16, guess=0.06),
        "sharpness": Group(20, 0, 0.3, guess=0.14),
    }
    found = train(clock, groups, 320, 0.03, rides=("full",))
    assert all(read and read[0] < FIRST_STEPS for read in found.read.values())
    assert set(found.read["full"]) <= set(found.read["weight"]) and found.most_over <= 1e-9


def test_intervals_follow_the_price(clock) -> None:
    """0.2 s at 2 % of steps of 0.1 s: every 100 steps; then five times as much; then hardly anything."""
    cost = lambda step: 0.2 if step < 2000 else 1.0 if step < 6000 else 0.02  # noqa: E731
    found = train(clock, {"it": Group(20, 0, cost)}, 10_000, 0.1, grace=0.0)
    stretches = [[s for s in found.read["it"] if a <= s < b] for a, b in ((0, 2000), (2000, 6000), (6500, 10_000))]
    intervals = [np.diff(steps).mean() for steps in stretches]
    assert intervals[0] == pytest.approx(100, rel=0.1) and intervals[1] == pytest.approx(500, rel=0.35)
    assert intervals[2] == pytest.approx(20, rel=0.1)
    assert found.most_over <= 0.8 + 1e-9  # of the one reading that was dearer than the one before


def test_start_up_is_paid_off(clock) -> None:
    """Half a second before the first batch is the budget of 250 steps; without a grace nothing is read before."""
    found = train(clock, {"it": Group(20, 0, 0.05)}, 1000, 0.1, grace=0.0, start_up=0.5)
    assert 250 <= found.read["it"][0] <= 300 and found.budget.spent <= found.allowed


def test_work_beside_the_readings_counts(clock) -> None:
    """Hooks that take 1 % of the steps leave half of 2 %; those that take 3 % leave nothing."""
    groups = {"it": Group(1, 0, 0.1), "often": Group(1, 0, 1e-9)}  # the second one keeps every step awake
    plain, half, none = (train(clock, groups, 4000, 0.1, grace=0.0, hooks=share * 0.1) for share in (0.0, 0.01, 0.03))
    assert len(half.read["it"]) == pytest.approx(len(plain.read["it"]) / 2, rel=0.1)
    assert not none.read["it"] or none.budget.spent <= 0.03 * 400 + 0.1


@pytest.mark.parametrize("fraction", [0.02, None])
def test_what_compares_two_steps_is_always_prepared(clock, fraction) -> None:
    """Whatever other readings come in between, and however often all is planned anew."""
    found = train(clock, economy(0.003, 0.01, 0.05, 0.2), 3000, 0.05, fraction=fraction)
    for name in ("gradient", "weight"):
        assert len(found.read[name]) > 5
        assert {step - 1 for step in found.read[name]} <= set(found.prepared[name])
        assert len(found.prepared[name]) == len(found.read[name])


def test_readings_of_every_step_are_what_the_next_one_is_compared_with(clock) -> None:
    found = train(clock, {"gradient": Group(1, 1, 0.001)}, 100, 0.1, fraction=1.0)
    assert found.read["gradient"] == list(range(2, 100)) and found.prepared["gradient"] == list(range(1, 100))


def test_without_a_limit_everything_comes_as_often_as_it_may(clock) -> None:
    found = train(clock, economy(0.5, 0.5, 0.5, 0.5), 200, 0.01, fraction=None)
    assert set(np.diff(found.read["gradient"])) == {4}
    assert {step for name in ("weight", "steps", "sharpness") for step in np.diff(found.read[name])} == {20}


def test_most_steps_are_asleep(clock) -> None:
    found = train(clock, economy(*GPT), 5000, 0.12)
    readings = sum(len(read) for read in found.read.values())
    assert found.awake <= 2 * readings + math.log2(5000) + 2


def test_several_processes_follow_the_first(clock) -> None:
    """Another clock and other costs; the numbers of the first process give the same timetable."""
    planners, budgets = [], [Budget(0.02, 3.0), Budget(0.02, 3.0)]
    for budget, cost in zip(budgets, (0.1, 7.0), strict=True):
        plans = [Plan(name, Cadence(None, 4), lambda cost=cost: cost) for name in ("one", "two")]
        plans[1].cadence.lead = 1
        planners.append(planner_of(budget, *plans))
        planners[-1].begin(0, 1000)
    first, other = planners
    taken: list[list[tuple[str, int]]] = [[], []]
    for step in range(1000):
        budgets[0].start()
        clock.now += 0.01
        assert first.wakes_at(OWNER) == other.wakes_at(OWNER)
        if step < first.wakes_at(OWNER):
            continue
        for planner, read in zip((first, other), taken, strict=True):
            for plan in planner.plans:
                if plan.cadence.is_due(step):
                    plan.cadence.read(step)
                    read.append((plan.name, step))
                plan.cadence.passed(step)
        budgets[0].book("one", 0.1 * (taken[0][-1:] == [("one", step)]))
        planned = first.review(step, step + 1)
        first.take(planned)
        other.take([float(value) for value in planned])
    assert taken[0] == taken[1] and len(taken[0]) > 10


DEMANDS = [
    [Demand(1.0, 20, 5000), Demand(0.1, 4, 5000), Demand(0.3, 20, 4000)],
    [Demand(1.0, 20, 500), Demand(1e-4, 4, 500), Demand(0.01, 20, 500)],
    [Demand(0.2, 100, 1000), Demand(0.2, 1, 1000)],
]


@pytest.mark.parametrize("demands", DEMANDS)
@pytest.mark.parametrize("money", [0.5, 3.0, 30.0])
def test_intervals_are_the_best_ones(demands, money) -> None:
    """Against a general optimiser: the least sum of relative intervals for the money."""
    found = np.array(spread(money, demands, is_end=False))
    shortest = np.array([d.shortest for d in demands])
    full = np.array([d.price * d.window for d in demands])
    if (full / shortest).sum() <= money:
        np.testing.assert_allclose(found, shortest)
        return
    assert (full / found).sum() == pytest.approx(money)
    best = minimize(
        lambda rates: (1 / (rates * shortest)).sum(),
        1 / (2 * found),
        jac=lambda rates: -1 / (rates**2 * shortest),
        bounds=[(1e-9, 1 / m) for m in shortest],
        constraints={"type": "ineq", "fun": lambda rates: money - (full * rates).sum(), "jac": lambda _: -full},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert (found / shortest).sum() <= best.fun * 1.001


@pytest.mark.parametrize("every", [1, 3, 10])
def test_fixed_steps_are_every_multiple_or_the_next_step_that_was_taken(every) -> None:
    rng = np.random.default_rng(every)
    for begin in (0, 4, 10):
        cadence = Cadence(every, interval=7)
        cadence.begin(begin)
        passed = begin - 1
        for step in range(begin, 200):
            assert cadence.is_due(step) == (step // every > passed // every)
            assert cadence.is_due_after(step) == ((step + 1) // every > step // every)
            assert cadence.wakes_at <= step or not cadence.is_due(step)
            if rng.random() < 0.7:
                cadence.passed(step)
                passed = step
            else:
                cadence.put_off(step)


def test_going_back_reads_again_what_is_undone() -> None:
    cadence = Cadence(10, 1)
    cadence.begin(0)
    for step in range(25):
        if cadence.is_due(step):
            cadence.read(step)
        cadence.passed(step)
    cadence.begin(15)
    assert cadence.next == 20 and cadence.last == -math.inf


def test_a_paused_group_is_left_alone(clock) -> None:
    planned, fixed = Cadence(None, 4), Cadence(4, 4)
    plans = [Plan(name, cadence, lambda: 0.0) for name, cadence in (("planned", planned), ("fixed", fixed))]
    planner = planner_of(Budget(None), *plans)
    planner.begin(0, 1000)
    for cadence in (planned, fixed):
        cadence.rest(50)
        cadence.passed(0)
    planner.take(planner.review(0, 1))
    assert planned.next >= 50 and fixed.next == 52


def test_a_step_that_was_not_taken_is_tried_anew(clock) -> None:
    """With what a comparison needs kept at the step before."""
    cadence = Cadence(None, 20)
    cadence.lead, cadence.next = 1, 7
    cadence.put_off(7)
    assert cadence.next == 9 and cadence.is_due_after(8) and not cadence.is_due(8)


def test_a_price_that_is_not_known_yet_is_asked_for_again(clock) -> None:
    prices: list[float | None] = [None]
    budget = Budget(0.02, 3.0)
    planner = planner_of(budget, Plan("it", Cadence(None, 4), lambda: prices[0]))
    planner.begin(0, 100)
    budget.start()
    clock.now += 0.1
    planner.take(planner.review(0, 1))
    assert planner.plans[0].cadence.next == math.inf and planner.wakes_at(OWNER) == 1
    prices[0] = 0.5
    planner.take(planner.review(1, 2))
    assert planner.plans[0].cadence.next == 2


def test_the_grace_that_was_used_is_not_given_again(clock) -> None:
    """1 s of 3 s, and a second fit with 2 s."""
    budget = Budget(0.02, 3.0)
    budget.start()
    clock.now += 10.0
    budget.book("it", 1.2)  # and 10 - 1.2 s of training
    assert budget.grace_left == pytest.approx(3.0 + 0.02 * 8.8 - 1.2)
    assert Budget(0.02, budget.grace_left).left == pytest.approx(budget.left)
    budget.book("it", 9.0)
    assert budget.grace_left == 0.0


@pytest.mark.parametrize(("every", "is_off"), [(10, False), (None, True)])
def test_where_nothing_is_planned_there_are_no_reviews(clock, every, is_off) -> None:
    """Several processes would exchange numbers at them."""
    planner = planner_of(Budget(0.02, 3.0), Plan("it", Cadence(every, 4), lambda: 0.1, is_off=lambda: is_off))
    planner.begin(0, 1000)
    assert not planner.is_due(0) and planner.wakes_at(OWNER) == (0 if every else math.inf)


def several(*shares: tuple[float | None, float], every: int | None = None) -> tuple[Planner, list[Budget]]:
    """Monitors of one run, each with one group that takes 0.1 s."""
    planner, budgets = Planner(), [Budget(*share) for share in shares]
    for index, budget in enumerate(budgets):
        cadence = Cadence(every if index == 0 else None, 4)
        planner.join(Mine(), budget, [Plan(f"group {index}", cadence, lambda: 0.1)])
    planner.begin(0, 1000)
    return planner, budgets


def test_monitors_of_one_run_have_one_budget_and_one_grace(clock) -> None:
    """The largest of what they were given; what one has spent the others have not."""
    planner, budgets = several((0.02, 1.0), (0.05, 3.0), (0.02, 0.0))
    for budget in budgets:
        budget.start()
    clock.now += 11.0
    budgets[0].book("group 0", 1.0)
    assert planner.ledger.training == pytest.approx(10.0)
    for budget in budgets:
        assert budget.training == pytest.approx(10.0)
        assert budget.left == pytest.approx(3.0 + 0.05 * 10.0 - 1.0)


@pytest.mark.parametrize("first", [(None, 3.0), (0.02, 3.0)])
def test_what_nothing_limits_leaves_the_others_their_budget(clock, first) -> None:
    """A monitor without a budget, or at fixed steps: its time is no training time, and nobody else's money."""
    planner, (free, other) = several(first, (0.02, 1.0), every=10)
    free.start(), other.start()
    clock.now += 60.0
    free.book("group 0", 50.0)
    assert other.left == pytest.approx(1.0 + 0.02 * 10.0)
    assert planner.ledger.fraction == 0.02 and planner.ledger.grace == 1.0


def test_three_monitors_keep_to_what_one_may_spend(clock) -> None:
    """2 % of 100 s and 3 s of grace for all of them, in a run of which each reads what it can."""
    planner, budgets = several((0.02, 3.0), (0.02, 3.0), (0.02, 3.0))
    for step in range(1000):
        for budget in budgets:
            budget.start()
        clock.now += 0.1
        for plan, budget in zip(planner.plans, budgets, strict=True):
            if plan.cadence.is_due(step):
                with budget.charge(plan.name):
                    clock.now += 0.1
                plan.cadence.read(step)
            plan.cadence.passed(step)
        if planner.is_due(step):
            planner.take(planner.review(step, step + 1))
    spent = sum(budget.spent for budget in budgets)
    allowed = 3.0 + 0.02 * (clock.now - spent)
    assert 0.9 * allowed <= spent <= allowed + 1e-9
    assert min(budget.spent for budget in budgets) > 0.2 * spent  # and none starves


def test_the_last_of_those_awake_plans_for_all() -> None:
    planner, _ = several((0.02, 1.0), (0.02, 1.0), (0.02, 1.0))
    owners = planner.owners
    assert [planner.is_last(owner) for owner in owners] == [False, False, True]
    owners[2].asleep = True
    assert [planner.is_last(owner) for owner in owners[:2]] == [False, True]


def test_another_fit_begins_with_its_own_monitors() -> None:
    planner, _ = several((0.02, 1.0), (0.02, 1.0))
    planner.join(OWNER, Budget(0.02, 5.0), [Plan("it", Cadence(None, 4), lambda: 0.1)])
    assert planner.owners == [OWNER] and planner.ledger.grace == 5.0 and not planner.has_begun
    planner.leave(OWNER)
    assert not planner.plans and not planner.owners


@pytest.mark.parametrize("grace", [0.05, 0.1, 0.3])
def test_first_readings_on_wrong_estimates_overdraw_a_small_grace_by_one_of_them(clock, grace) -> None:
    """Each takes three times what was thought: after the first of them the others are not bought on credit."""
    groups = {f"group {i}": Group(20, 0, 0.12 + 0.01 * i, guess=0.04 + 0.01 * i / 3) for i in range(5)}
    found = train(clock, groups, 200, 0.01, grace=grace)
    assert found.most_over <= 2 / 3 * 0.16 + 1e-9


def test_first_readings_that_a_grace_pays_for_several_times_come_together(clock) -> None:
    groups = {f"group {i}": Group(20, 0, 0.1, guess=0.1) for i in range(5)}
    found = train(clock, groups, 50, 0.01, grace=3.0)
    assert {read[0] for read in found.read.values()} == {1}
