"""What a budget counts, on a clock of our own and on devices that work off a queue."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dynamon.monitoring.budget import Budget, overhead_of
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.stepping import Steps
from dynamon.optim import LayerwiseRates
from dynamon.rates import NoiseAdaptiveRates
from tests.models import mlp

STEP = 0.1


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dynamon.monitoring.budget.time.perf_counter", lambda: clock.now)
    return clock


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
    budget, meter = Budget(0.02), Meter(Cadence(None, interval=20))
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
    queue, network = Queue(clock, monkeypatch), mlp(8, 16, 3)
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


def test_what_is_booked_while_the_clock_stands_is_no_training_that_is_missing(clock) -> None:
    """The last look of health after a short run, and the first one before it, and both beside another monitor's."""
    budget, other = Budget(0.02), Budget(0.02)
    budget.ledger.add(other)
    with budget.charge("loggers"):
        clock.now += 7
    for one in (budget, other):
        one.start()
    clock.now += 10 * STEP
    with budget.charge("gradients"):
        clock.now += 0.5
    for one in (budget, other):
        one.stop()
    before = overhead_of([budget, other])
    with budget.watch(), other.charge("health"):
        clock.now += 30
    assert budget.ledger.training == pytest.approx(10 * STEP)
    assert before == pytest.approx(7.5) and overhead_of([budget, other]) == pytest.approx(37.5)
