"""Learning rates are followed through every step: what jumps is recorded at its step, ordinary schedules are not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from dynamon.monitoring.sentinel_rates import RateWatch

STEPS = 200


class Recorder:
    def __init__(self):
        self.rows = {}

    def hand_on(self, loop, step, budget, scalars, tables):
        assert step not in self.rows and not tables
        self.rows[step] = scalars["lr/rise"]


def context(recorder, step):
    return SimpleNamespace(recorder=recorder, step=step, loop=None, budget=None)


def optimizer(*rates, kind=torch.optim.SGD):
    layers = [nn.Linear(1, 1) for _ in rates]
    return kind([{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)])


def follow(change, *optimizers, steps=STEPS, watch=None, begin=0):
    """Steps and factors recorded while ``change(step)`` sets rates before each step."""
    watch, recorder = watch or RateWatch(), Recorder()
    for step in range(begin, begin + steps):
        change(step)
        for one in optimizers:
            watch.see(one)
        assert watch.log(context(recorder, step)) == (step in recorder.rows)
    return recorder.rows


def schedule(make):
    """A schedule of torch's, stepped after each step."""
    own = optimizer(0.1)
    made = make(own)

    def change(step):
        if step:
            own.step()  # which schedulers want before theirs
            made.step()

    return change, own


S = schedulers
ORDINARY = {
    "constant": lambda o: S.LambdaLR(o, lambda step: 1.0),
    "linear warm-up": lambda o: S.LambdaLR(o, lambda step: min(1.0, (step + 1) / 50)),
    "warm-up from zero": lambda o: S.LambdaLR(o, lambda step: min(1.0, step / 50)),
    "one cycle": lambda o: S.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "cosine": lambda o: S.CosineAnnealingLR(o, STEPS),
    "there and back": lambda o: S.CosineAnnealingLR(o, 30),
    "warm restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 30),
    "growing restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 20, T_mult=2),
    "step decay": lambda o: S.StepLR(o, 40),
    "cycles": lambda o: S.CyclicLR(o, 0.001, 0.1, step_size_up=20),
    "steep cycles": lambda o: S.CyclicLR(o, 0.001, 0.1, step_size_up=10, step_size_down=30),
    "exponential": lambda o: S.ExponentialLR(o, 1.1),  # a search for a rate
    "square root": lambda o: S.LambdaLR(o, lambda step: min((step + 1) ** -0.5, (step + 1) * 40**-1.5)),
    "warm-up, then cosine": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.01, total_iters=30), S.CosineAnnealingLR(o, STEPS)], [30]
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schedules_are_quiet(name):
    change, own = schedule(ORDINARY[name])
    assert follow(change, own) == {}


@pytest.mark.parametrize("factor", [2.2, 4.0, 64.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_jump_is_recorded_at_its_step(factor, as_tensor):
    own = optimizer(0.1)

    def change(step):
        rate = 0.1 * (factor if step >= 77 else 1.0)
        own.param_groups[0]["lr"] = torch.tensor(rate) if as_tensor else rate

    assert follow(change, own) == {77: pytest.approx(factor)}


def test_a_jump_out_of_a_cosine():
    change, own = schedule(lambda o: S.LambdaLR(o, lambda step: (1 - step / 300) * (4 if step >= 150 else 1)))
    assert follow(change, own) == {150: pytest.approx(4, rel=0.02)}


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.5, 2.0])
def test_what_is_less_is_none(factor):
    own = optimizer(0.1)
    assert follow(lambda step: own.param_groups[0].update(lr=0.1 * (factor if step >= 77 else 1)), own) == {}


def test_one_group_of_one_optimizer():
    """The others have larger rates."""
    first, second = optimizer(1.0, 0.5), optimizer(0.3, 0.01)

    def change(step):
        if step == 100:
            second.param_groups[1]["lr"] = 0.05

    assert follow(change, first, second) == {100: pytest.approx(5)}


def test_a_group_that_joins_warms_up():
    own = optimizer(0.1)

    def change(step):
        if step == 100:
            own.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.001})
        if step == 103:
            own.param_groups[1]["lr"] = 0.01

    assert follow(change, own) == {}


def test_optimizers_without_a_rate():
    own = optimizer(0.1)
    del own.param_groups[0]["lr"]
    assert follow(lambda step: None, own) == {}


@pytest.mark.parametrize(("rate", "found"), [(0.01, {}), (0.1, {300: 10.0}), (0.001, {})])
def test_after_a_resume_the_last_rate_counts(rate, found):
    """It had been as large once, but not before the checkpoint."""
    own, watch = optimizer(0.1), RateWatch()
    assert follow(lambda step: own.param_groups[0].update(lr=0.1 if step < 100 else 0.01), own, watch=watch) == {}
    resumed = RateWatch()
    resumed.load_state_dict(watch.state_dict())
    assert resumed.state_dict() == [[[200, 0.01, 0.01]]]
    again = optimizer(rate)
    assert follow(lambda step: None, again, watch=resumed, begin=300) == pytest.approx(found)
