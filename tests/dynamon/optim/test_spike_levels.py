"""Levels against explicit sums of weighted numbers; what spikes, changes of level and missing numbers do to them."""

import math

import numpy as np
import pytest

from dynamon.optim.spike_levels import SpikeLevels


def fed(values, deviations=1e6, memory=20, warmup=1) -> SpikeLevels:
    levels = SpikeLevels(["a"], deviations, memory, warmup)
    for value in values:
        levels.take(np.array([value]))
    return levels


@pytest.mark.parametrize("count", [2, 19, 20, 200])
def test_mean_and_variance_are_those_of_weighted_logarithms(count):
    """Equal weights for as many numbers as the memory, exponential ones from there."""
    logs = np.random.default_rng(0).normal(3.0, 0.5, count)
    weights = np.zeros(0)
    for n in range(count):
        new = max(1 / (n + 1), 1 / 20)
        weights = np.append(weights * (1 - new), new)
    assert weights.sum() == pytest.approx(1.0)
    mean = weights @ logs
    levels = fed(np.exp(logs))
    assert levels.mean[0] == pytest.approx(mean, rel=1e-12)
    assert levels.variance[0] == pytest.approx(weights @ (logs - mean) ** 2, rel=1e-9)
    if count <= 20:
        assert levels.variance[0] == pytest.approx(logs.var(), rel=1e-9)


def test_the_limit_is_some_deviations_above_the_level_and_at_least_twice_the_level():
    logs = np.random.default_rng(1).normal(0.0, 0.4, 100)
    levels = fed(np.exp(logs), deviations=4.0, memory=1000)
    expected = logs.mean() + math.hypot(math.log(2.0), 4.0 * logs.std())
    assert math.log(levels.limits()[0]) == pytest.approx(expected, rel=1e-9)
    assert fed([3.0] * 30, deviations=4.0).limits()[0] == pytest.approx(6.0)
    assert fed([3.0] * 30, deviations=4.0).limits(3.0)[0] == pytest.approx(3.0 * 2.0**3)


def test_a_spike_enters_as_the_limit_whatever_its_size():
    calm = np.exp(np.random.default_rng(2).normal(0.0, 0.1, 50)).tolist()
    before = fed(calm, deviations=4.0)
    limit = before.limits()[0]
    at_limit = fed([*calm, limit], deviations=4.0)
    for size in (2.0, 1e3, 1e30):
        spiked = fed([*calm, size * limit], deviations=4.0)
        assert spiked.limits()[0] == pytest.approx(at_limit.limits()[0], rel=1e-12)
    tiny = fed([*calm, 1e-30], deviations=4.0)  # the same below the level
    assert abs(tiny.mean[0] - before.mean[0]) <= before.reach[0] / 20 + 1e-12


def test_a_spike_in_the_warmup_is_held_back_once_eight_numbers_are_known():
    calm = np.exp(np.random.default_rng(3).normal(0.0, 0.1, 40)).tolist()
    levels = fed([*calm[:10], 1e6, *calm[10:]], deviations=4.0, memory=100, warmup=25)
    assert levels.limits()[0] < 4.0 * fed(calm, deviations=4.0, memory=100, warmup=25).limits()[0]


def test_a_lasting_change_of_level_is_accepted():
    """What the documentation says of the defaults."""
    calm = np.exp(np.random.default_rng(4).normal(0.0, 0.2, 300)).tolist()
    clipped = {}
    for times in (3.0, 10.0, 100.0):
        levels = fed(calm, deviations=4.0, memory=100, warmup=25)
        clipped[times] = 0
        while levels.limits()[0] < times:
            levels.take(np.array([times]))
            clipped[times] += 1
    assert clipped[3.0] <= 3 and clipped[10.0] <= 15 and clipped[100.0] <= 40
    assert 0 < clipped[10.0] < clipped[100.0]


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_what_is_no_number_changes_nothing(nothing):
    values = np.exp(np.random.default_rng(5).normal(0.0, 0.1, 30)).tolist()
    one, other = fed(values, 4.0), fed([*values[:20], nothing, nothing, *values[20:]], 4.0)
    assert one.state_dict() == other.state_dict()
    assert fed([nothing] * 5).limits()[0] == np.inf


def test_series_warm_up_one_by_one():
    levels = SpikeLevels(["a", "b"], 4.0, 100, 3)
    for step in range(4):
        levels.take(np.array([1.0, 1.0 if step > 1 else np.nan]))
    assert levels.limits()[0] == pytest.approx(2.0) and levels.limits()[1] == np.inf


def test_a_state_goes_by_name_and_to_the_bit():
    levels = fed(np.exp(np.random.default_rng(6).normal(0.0, 0.1, 30)))
    other = SpikeLevels(["new", "a"], 1e6, 20, 1)
    other.load_state_dict(levels.state_dict())
    assert other.state_dict()["a"] == levels.state_dict()["a"]
    assert other.state_dict()["new"] == [0.0, 0.0, 0.0]
    for each in (levels, other):
        each.take(np.full(len(each.names), 1.25))
    assert other.state_dict()["a"] == levels.state_dict()["a"]
