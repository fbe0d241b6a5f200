"""The budget on a clock of our own: what is counted, how intervals follow the cost, what start-up does."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dynamon.callbacks import DynamicsMonitor, WeightMonitor
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.rank_decisions import Decisions
from dynamon.monitoring.stepping import Steps
from dynamon.optim import LayerwiseRates
from dynamon.rates import NoiseAdaptiveRates
from tests.helpers import Classifier, fit, mlp

STEP = 0.1


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(ranks=SimpleNamespace(is_distributed=False), now=0.0)
    monkeypatch.setattr("dynamon.monitoring.budget.time.perf_counter", lambda: clock.now)
    return clock


def readings(clock, budget: Budget, costs: list[tuple[int, float]], hooks: float = 0.0, start_up: float = 0.0):
    """Steps of a tenth of a second with one meter, whose reading costs so much in each stretch; steps read, shares."""
    meter = Meter(Cadence(None, interval=20, share=1.0))
    meter.name = "it"
    run = SimpleNamespace(
        ranks=SimpleNamespace(is_distributed=False),
        budget=budget,
        step=0,
        begun_at=0,
        trying_out=False,
        seconds_per_step=STEP,
    )
    with budget.watch():
        clock.now += start_up
    read, shares = [], []
    for steps, cost in costs:
        for _ in range(steps):
            budget.start()
            clock.now += STEP
            with budget.watch():
                clock.now += hooks
                if meter.cadence.due(run, meter.name, meter.expected, run.step):
                    with budget.charge(meter.name):
                        clock.now += cost
                    meter.done(run)
                    read.append(run.step)
            run.step += 1
            shares.append(budget.overhead)
    return read, shares


def test_intervals_stretch_and_shrink_with_the_cost(clock) -> None:
    """0.2 s at 2 % of steps of 0.1 s: every 100 steps; five times that when it gets dearer; the shortest when cheap."""
    read, shares = readings(clock, Budget(0.02), [(2000, 0.2), (4000, 1.0), (4000, 0.02)])
    per_stretch = [[s for s in read if a <= s < b] for a, b in ((0, 2000), (2000, 6000), (6000, 10000))]
    intervals = [(steps[-1] - steps[0]) / (len(steps) - 1) for steps in per_stretch]
    assert intervals[0] == pytest.approx(100, rel=0.1) and intervals[1] == pytest.approx(500, rel=0.2)
    assert intervals[2] == pytest.approx(20, rel=0.1)
    # What became dearer than expected is over by one reading (a second in 200), which is then made up for.
    assert max(shares[300:2000]) <= 0.02 and max(shares[2000:]) <= 0.02 + 1.0 / 200 and shares[-1] <= 0.02


def test_start_up_is_paid_back(clock) -> None:
    """Half a second before the first batch is a debt of 250 steps; nothing is read until it is paid."""
    read, shares = readings(clock, Budget(0.02), [(1000, 0.05)], start_up=0.5)
    assert 250 <= read[0] <= 320 and shares[0] > 0.02
    assert max(shares[read[0] + 30 :]) <= 0.0201  # the first reading took five times what was expected


def test_time_between_the_measurements_counts(clock) -> None:
    """Hooks that take 1 % leave half of a budget of 2 %; those that take 3 % leave nothing, and no reading is taken."""
    plain, half, none = (readings(clock, Budget(0.02), [(4000, 0.1)], hooks=h * STEP) for h in (0.0, 0.01, 0.03))
    assert len(half[0]) == pytest.approx(len(plain[0]) / 2, rel=0.1) and not none[0]
    assert half[1][-1] <= 0.02 and none[1][-1] == pytest.approx(0.03, rel=1e-3)


def test_a_first_reading_that_is_dear_is_made_up_for(clock) -> None:
    """Nobody knows what the first one takes: three steps where a tenth was expected; 2 % again 150 steps later."""
    read, shares = readings(clock, Budget(0.02), [(600, 0.3)])
    assert max(shares[read[0] + 160 :]) <= 0.0201


def several(clock, budget: Budget, meters: dict[str, tuple[float, float]], steps: int) -> dict[str, list[int]]:
    """With meters of given costs, in steps of a tenth of a second, and shares: the steps at which each is read."""
    made = {name: Meter(Cadence(None, interval=4, share=share)) for name, (_, share) in meters.items()}
    run = SimpleNamespace(
        ranks=SimpleNamespace(is_distributed=False), budget=budget, begun_at=0, trying_out=False, seconds_per_step=STEP
    )
    read: dict[str, list[int]] = {name: [] for name in meters}
    for run.step in range(steps):
        budget.start()
        clock.now += STEP
        for name, meter in made.items():
            meter.name = name
            if meter.cadence.due(run, name, meter.expected, run.step):
                with budget.charge(name):
                    clock.now += meters[name][0] * STEP
                meter.done(run)
                read[name].append(run.step)
    return read


def longest_wait(read: list[int], steps: int) -> int:
    return max(b - a for a, b in zip([0, *read], [*read, steps], strict=True))


@pytest.mark.parametrize(("shares", "most"), [((0.2, 0.1, 0.2, 1.0), 450), ((1.0, 1.0, 1.0, 1.0), 550)])
def test_what_is_cheap_does_not_starve_what_is_dear(clock, shares, most) -> None:
    """The budget of 500 steps is ten; one of each, with the margin, takes six. Without claims the second never ends."""
    budget, costs = Budget(0.02), (0.1, 0.4, 1.0, 2.4)
    meters = {str(cost): (cost, share) for cost, share in zip(costs, shares, strict=True)}
    read = several(clock, budget, meters, 5000)
    assert max(longest_wait(steps, 5000) for steps in read.values()) <= most
    assert budget.overhead <= 0.02 and budget.overhead > 0.015


def test_what_is_too_dear_holds_nobody_up(clock) -> None:
    """A reading that takes the budget of 3,000 steps waits for what the others leave, and they do not wait for it."""
    read = several(clock, Budget(0.02), {"cheap": (0.1, 0.2), "dear": (40.0, 1.0)}, 6000)
    assert longest_wait(read["cheap"], 6000) <= 500 or len(read["dear"]) == 1


def test_one_that_asks_no_more_holds_nobody_up() -> None:
    budget = Budget(0.02)
    budget.start()
    budget._running = 100.0
    budget.claim("gone", 1.0, waited=300, step=1000, step_seconds=STEP)
    assert not budget.allows("here", 1.0, 1.0, step=1001)
    assert budget.allows("here", 1.0, 1.0, step=1003)


@pytest.mark.parametrize(("seen", "latest"), [(0, 1), (8, 16)])
def test_several_processes_decide_again_soon_after_the_start(clock, seen, latest) -> None:
    """Before the first step nobody knows what one takes: start-up must not put the next decision off for long."""
    budget, meter = Budget(0.02), Meter(Cadence(None, interval=4, share=1.0))
    meter.name = "it"
    with budget.watch():
        clock.now += 30.0
    several = SimpleNamespace(is_distributed=True)
    run = SimpleNamespace(
        ranks=several, budget=budget, step=seen, begun_at=0, steps_seen=seen, seconds_per_step=1e-4, trying_out=False
    )
    allowed, following = Decisions()._decide(run, [meter])
    assert not allowed and seen < following <= latest


def test_hooks_and_start_up_are_in_the_stated_overhead() -> None:
    monitor = DynamicsMonitor(every_n_steps=1000)
    fit(Classifier(mlp()), [monitor], steps=10)
    spent = monitor._budget.spent_on
    assert spent["hooks"] > 0 and monitor._budget.spent == pytest.approx(sum(spent.values()))


def test_full_spectra_wait_for_their_own_money(monkeypatch) -> None:
    """At fixed steps they come with the first reading; under a budget that the plain one just fits, they do not."""
    fixed, tight = WeightMonitor(every_n_steps=2), WeightMonitor(budget=0.5)
    allows = Budget.allows
    monkeypatch.setattr(Budget, "allows", lambda self, name, *rest: name == "weight" and allows(self, name, *rest))
    for monitor in (fixed, tight):
        fit(Classifier(mlp()), [monitor], steps=40, max_epochs=-1)
        assert len(monitor.history["weight/operator"]) >= 1
    assert "spectrum/effective_rank" in fixed.history and "spectrum/effective_rank" not in tight.history


class Stream:
    """A device that works off what it is given, in the order it comes, from the time at which it is given it."""

    def __init__(self, clock) -> None:
        self.clock, self.busy_until = clock, 0.0
        self.recorded: list[torch.device] = []

    def give(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.clock.now) + seconds

    def event(self, **_):
        stream = self

        class Event:
            def record(self, given: "Stream") -> None:
                assert given is stream
                self.at = max(stream.busy_until, stream.clock.now)

            def query(self) -> bool:
                return self.at <= stream.clock.now

            def synchronize(self) -> None:
                stream.clock.now = max(stream.clock.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                return 1000 * (other.at - self.at)

        return Event()

    def current(self, device: torch.device) -> "Stream":
        self.recorded.append(device)
        return self


CARD = torch.device("cuda", 1)


@pytest.fixture
def stream(clock, monkeypatch) -> Stream:
    stream = Stream(clock)
    monkeypatch.setattr("dynamon.monitoring.budget.torch.cuda.Event", stream.event)
    monkeypatch.setattr("dynamon.monitoring.budget.torch.cuda.current_stream", stream.current)
    return stream


def test_a_reading_does_not_pay_for_the_queue_of_training(clock, stream) -> None:
    """A device 30 ms behind, a reading of 2 ms there: 2 ms are booked, the wait nowhere."""
    budget = Budget(0.02)
    for _ in range(20):
        budget.start()
        clock.now += 0.01
        stream.give(0.04)
        with budget.watch(), budget.charge("it", CARD, waits=True):
            stream.give(0.002)
            clock.now = stream.busy_until  # reads a number
    assert budget.spent == pytest.approx(20 * 0.002) and budget.spent_on["hooks"] == pytest.approx(0, abs=1e-9)
    assert budget.training == pytest.approx(20 * 0.05)  # the wait is training's


def test_a_reading_that_waits_for_nothing_adds_no_wait(clock, stream) -> None:
    budget = Budget(None)
    stream.give(1.0)
    with budget.charge("it", CARD):
        clock.now += 0.001
        stream.give(0.005)
    assert clock.now == pytest.approx(0.001)
    clock.now = 2.0
    assert budget.overhead > 0 and budget.spent == pytest.approx(0.005)  # the larger of host and device


def test_what_the_device_took_beyond_the_host_is_no_reading_of_its_own(clock, stream) -> None:
    """Full spectra ask what the last one took: not the excess, zero as a rule, that was booked since."""
    budget = Budget(0.02)
    with budget.charge("it", CARD):
        clock.now += 0.5
    clock.now += 1.0
    assert budget.overhead > 0 and budget.last["it"] == pytest.approx(0.5)
    with budget.charge("it", CARD):
        stream.give(3.0)
    clock.now += 5.0
    assert budget.overhead > 0 and budget.last["it"] == 0.0 and budget.spent_on["it"] == pytest.approx(3.5)


def test_device_times_are_taken_on_the_stream_of_the_device_that_works(stream) -> None:
    with Budget(None).charge("it", CARD):
        pass
    assert stream.recorded == [CARD]
    with Budget(None).charge("it", torch.device("cpu")):
        pass
    assert stream.recorded == [CARD]


def test_events_that_nobody_asks_for_are_few(clock, stream) -> None:
    budget = Budget(None)
    for _ in range(1000):
        with budget.charge("it", CARD):
            stream.give(0.003)
            clock.now += 0.001
        clock.now += 0.01
        assert len(budget._events) <= 64
    assert budget.overhead > 0 and budget.spent == pytest.approx(3.0) and not budget._events


def test_the_first_reading_is_spent_but_not_in_the_mean(clock) -> None:
    """Compilation takes three seconds, a reading a tenth: from the third one on the mean is a tenth."""
    budget, meter = Budget(0.02), Meter(Cadence(None, interval=20, share=1.0))
    meter.name = "it"
    run = SimpleNamespace(budget=budget, step=0, seconds_per_step=STEP)
    expected = [meter.expected(run)]
    for seconds in (3.0, 0.1, 0.1, 0.1):
        with budget.charge(meter.name):
            clock.now += seconds
        meter.done(run)
        expected.append(meter.expected(run))
    assert expected == pytest.approx([STEP / 10, 3.0, 0.1, 0.1, 0.1]) and budget.spent == pytest.approx(3.3)


def test_asking_a_scaler_whether_it_skipped_the_step_is_a_wait(monkeypatch) -> None:
    """Of a fused optimizer only the device knows; what is waited for there is training's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, fused=True)
    waits = []

    @contextmanager
    def waiting():
        waits.append(0)
        yield

    module = SimpleNamespace(parameters=lambda: iter(()))
    loop = SimpleNamespace(module=module, optimizers=[optimizer], scaler=object(), drives_steps=True)
    steps = Steps(loop, SimpleNamespace(is_distributed=False), waiting)
    for found_inf, expected in ((None, 0), (torch.zeros(()), 1)):
        optimizer.found_inf = found_inf
        steps.batch_start()
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        steps.begin(optimizer)
        optimizer.step()
        assert steps.any_taken() and len(waits) == expected


class Queue:
    """A device that works while the host goes on, without events: Apple's, say."""

    def __init__(self, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.done, self.waits = clock, 0.0, 0
        monkeypatch.setattr(torch.mps, "synchronize", self.wait)

    def add(self, seconds: float) -> None:
        self.done = max(self.done, self.clock.now) + seconds

    def wait(self) -> None:
        self.waits += 1
        self.clock.now = max(self.clock.now, self.done)


def test_a_device_without_events_is_waited_for(clock, monkeypatch) -> None:
    """A reading is charged what the device takes for it, and not for what training has queued before it."""
    budget, queue, mps = Budget(None), Queue(clock, monkeypatch), torch.device("mps")
    for reads in (False, True):
        budget.start()
        queue.add(STEP)
        with budget.watch(), budget.charge("it", mps, waits=True):
            queue.add(0.03)
            if reads:
                queue.wait()
    assert budget.spent_on == {"it": pytest.approx(0.06), "hooks": pytest.approx(0.0)}


def test_what_is_charged_at_every_step_is_waited_for_now_and_then(clock, monkeypatch) -> None:
    """A host that waited at every step would leave the device idle while the next step is queued."""
    budget, queue, mps = Budget(None), Queue(clock, monkeypatch), torch.device("mps")
    for _ in range(32):
        queue.add(STEP)
        with budget.charge("steering", mps):
            queue.add(0.002)
            clock.now += 0.001
        clock.now += 0.01
    assert queue.waits == 4
    assert budget.spent_on["steering"] == pytest.approx(32 * 0.002)


def test_waiting_for_training_before_a_late_reading_is_nobodys_cost(clock, monkeypatch) -> None:
    """Steering takes up readings of the step before when the device is in the middle of this one."""
    queue, network = Queue(clock, monkeypatch), mlp()
    rates = LayerwiseRates(torch.optim.AdamW(network.parameters()), NoiseAdaptiveRates(), network)
    budget = Budget(None)
    rates.idle = budget.waiting
    monkeypatch.setattr("dynamon.optim.layerwise.waiter", lambda device: queue.wait)
    for _ in range(3):
        network(torch.ones(2, 8)).sum().backward()
        queue.add(STEP)
        with budget.charge("steering"):
            rates.observe()
        rates.optimizer.step()
    assert queue.waits == 2 and budget.spent_on["steering"] == pytest.approx(0.0)
    assert clock.now == pytest.approx(3 * STEP)
