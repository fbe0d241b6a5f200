"""Balanced rates: the direction by hand, the allocation that following converges to, noise, pilots, and the state."""

import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import Layer
from dynamon.norms import get_norm
from dynamon.quantities.progress import Couplings, StepReading
from dynamon.rates import BalancedRates
from dynamon.rates.allocation import most_progress
from dynamon.rates.balanced import balance, shift

CURVATURE = np.eye(4) + 0.2


def started(groups=4, **arguments):
    """A rule with one layer a group."""
    names = [f"layer{number}" for number in range(groups)]
    rule = BalancedRates(names, **arguments)
    layers = [Layer(name, "vector", nn.Parameter(torch.zeros(2))) for name in names]
    rule.start(layers, [get_norm("rms")] * groups)
    return rule


def reading(progress, cost):
    """A reading of one step."""
    progress, cost, none = np.asarray(progress, float), np.asarray(cost, float), np.zeros(len(progress))
    names = tuple(f"layer{number}" for number in range(len(progress)))
    return StepReading(names, -progress, cost - progress, none, none, 0.0, 0.0)


def jitter(count, groups, noise=1e-6, seed=0):
    """Factors around 1."""
    return 1 + noise * np.random.default_rng(seed).standard_normal((count, groups))


def test_the_direction_by_hand():
    # p = 3, 1, -1; c = 1, 1, 1: mu = 1. The third climbs.
    found = balance(jitter(6, 3) * [3.0, 1.0, -1.0], jitter(6, 3, seed=1) * [1.0, 1.0, 1.0])
    np.testing.assert_allclose(found, [0.5, 0.0, -1.0], atol=1e-5)
    # a group that climbs goes down also where its curvature is negative, which p - mu c alone would not tell
    found = balance(jitter(6, 3) * [3.0, 1.0, -0.1], jitter(6, 3, seed=1) * [2.0, 2.0, -2.0])
    assert found[2] == -1


@pytest.mark.parametrize(("progress", "cost"), [([-3.0, 1.0], [1.0, 1.0]), ([3.0, 1.0], [-2.0, 1.0])])
def test_nobody_moves_where_progress_or_curvature_is_not_positive_in_all(progress, cost):
    assert balance(jitter(8, 2) * progress, jitter(8, 2, seed=1) * cost).tolist() == [0, 0]


@pytest.mark.parametrize("readings", [1, 3])
def test_nobody_moves_after_fewer_than_four_readings(readings):
    assert not balance(jitter(readings, 2) * [3.0, 1.0], jitter(readings, 2) * [1.0, 1.0]).any()


def test_a_group_that_was_not_stepped_keeps_its_ratio_and_does_not_stop_the_others():
    progress = jitter(6, 3) * [3.0, 1.0, np.nan]
    np.testing.assert_allclose(balance(progress, jitter(6, 3, seed=1)), [0.2, -1 / 3, 0], atol=1e-5)


def test_the_mean_by_curvature_is_kept_and_a_group_that_climbs_does_not_rise():
    progress, cost, start = np.array([3.0, 1.0, -1.0]), np.array([1.0, 3.0, 0.5]), np.zeros(3)
    moved = shift(start, np.array([0.1, -0.1, 0.0]), np.abs(progress), cost, 1 / 8, 8.0)
    assert cost @ moved == pytest.approx(0, abs=1e-15) and moved[0] > 0 > moved[1]
    assert shift(start, np.array([-0.1, -0.1, 0.0]), progress, cost, 1 / 8, 8.0)[2] == 0
    assert shift(start, np.array([5.0, -5.0, 0.0]), progress, cost, 1 / 8, 8.0).max() == np.log(8)


@pytest.mark.parametrize("seed", range(5))
def test_following_a_quadratic_converges_to_the_solution_of_the_allocation_problem(seed):
    random = np.random.default_rng(seed)
    root = random.normal(size=(4, 8))
    curvature = root @ root.T / 8 + 0.2 * np.eye(4)
    progress = np.abs(curvature.sum(1)) * random.permutation([3.0, 1.0, 1.0, 0.4])
    rule, noise = started(low=1 / 64, high=64.0, gain=0.05), jitter(1200, 4, seed=seed)
    for factors in noise.reshape(-1, 2, 4):
        s = rule.ratios()
        rule.learn(reading(s * progress * factors[0], s * (curvature @ s) * factors[1]))
    best = most_progress(progress, curvature, 1 / 64, 64.0)

    def efficiency(s):  # progress at the same curvature
        return s @ progress / np.sqrt(s @ curvature @ s)

    s = rule.ratios()
    assert efficiency(np.ones(4)) < 0.98 * efficiency(best)
    assert efficiency(s) == pytest.approx(efficiency(best), rel=5e-3)
    assert s @ curvature @ s == pytest.approx(curvature.sum(), rel=0.2)  # kept to first order of each move


def moves(progress, cost, noise, count):
    """In 1,000 series of readings: the share of groups that would move, and of series in which any would."""
    found = []
    for seed in range(1000):
        random = np.random.default_rng(seed)
        shape = (count, len(progress))
        found.append(balance(progress + noise * random.normal(size=shape), cost + noise * random.normal(size=shape)))
    return (np.array(found) != 0).mean(), (np.array(found) != 0).any(1).mean()


@pytest.mark.parametrize("count", [4, 12])
def test_pure_noise_moves_nobody(count):
    _, any_moves = moves(np.zeros(8), np.zeros(8), 1.0, count)
    assert any_moves <= 0.002  # both sums must come out as significantly positive, and a group beside them


@pytest.mark.parametrize(("count", "noise"), [(4, 0.1), (12, 0.1), (12, 1.0)])
def test_noise_around_balance_moves_a_group_at_one_in_twenty_readings_at_most(count, noise):
    groups, _ = moves(np.ones(8), np.ones(8), noise, count)
    assert groups <= 0.05


def test_a_pilot_changes_nothing_and_then_commits_what_is_certain():
    rule, random = started(pilot=24), np.random.default_rng(0)
    progress = CURVATURE.sum(1) * [3.0, 1.0, 1.0, 0.4]
    asked = 0
    for step in range(60):
        if step < 24 and (step + 1) % 2 == 0:
            assert rule.asks_for() == "couplings"
            noise = 1 + 0.05 * random.normal(size=(4, 4))
            rule.learn_couplings(Couplings(tuple("abcd"), CURVATURE * noise, -progress * noise[0], 1.0))
            asked += 1
        else:
            assert rule.asks_for() is None
        rule.begin_step()
        if step < 24:
            assert rule.ratios().tolist() == [1.0] * 4
    assert asked == 12 and rule.advice.certain.tolist() == [True, True, True, True] or rule.advice.certain[[0, 3]].all()
    assert rule.ratios().tolist() == rule.advice.committed.tolist()
    assert rule.ratios()[0] > 1 > rule.ratios()[3]


def test_a_pilot_that_says_nothing_leaves_all_ratios_at_one():
    rule, random = started(pilot=12), np.random.default_rng(0)
    for _ in range(20):
        if rule.asks_for():
            rule.learn_couplings(Couplings(tuple("abcd"), random.normal(size=(4, 4)), random.normal(size=4), 1.0))
        rule.begin_step()
    assert "not positive" in rule.advice.refusal and rule.ratios().tolist() == [1.0] * 4


def test_readings_that_are_not_finite_are_skipped():
    rule = started()
    for factors in jitter(8, 4):
        rule.learn(reading(factors, factors))
    before = json.dumps(rule.state_dict())
    rule.learn(reading([np.inf, 1, 1, 1], np.ones(4)))
    rule.learn(reading([np.nan] * 4, [np.nan] * 4))
    rule.learn_couplings(Couplings(tuple("abcd"), np.full((4, 4), np.nan), np.ones(4), 1.0))
    assert json.dumps(rule.state_dict()) == before


@pytest.mark.parametrize("arguments", [{"every": 3, "dead_band": 0.05}, {"pilot": 24}])
def test_a_resumed_rule_goes_on_bitwise(arguments):
    def live(rule, steps, seed):
        random = np.random.default_rng(seed)
        for _ in range(steps):
            asked = rule.asks_for()
            progress = np.array([3.0, 1.0, 1.0, 0.5]) * (1 + 0.02 * random.normal(size=4))
            if asked == "step":
                rule.learn(reading(progress, np.ones(4)))
            elif asked:
                rule.learn_couplings(Couplings(tuple("abcd"), CURVATURE, -progress, 1.0))
            rule.begin_step()
        return rule

    whole = live(live(started(**arguments), 20, 0), 25, 1)
    file = io.BytesIO()
    torch.save(live(started(**arguments), 20, 0).state_dict(), file)
    file.seek(0)
    resumed = started(**arguments)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    live(resumed, 25, 1)
    assert resumed.ratios().tolist() == whole.ratios().tolist() != [1.0] * 4
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())


def test_a_state_of_other_groups_keeps_the_ratios_and_forgets_the_readings():
    rule = started()
    for factors in jitter(20, 4):
        rule.learn(reading(factors * [3.0, 1, 1, 0.5], np.ones(4)))
    other = started(3)
    other.load_state_dict(rule.state_dict())
    np.testing.assert_allclose(other.ratios(), rule.ratios()[:3], rtol=1e-12)
    assert not other.state_dict()["progress"]


@pytest.mark.parametrize(
    "arguments",
    [{"pilot": 3}, {"every": 0}, {"gain": 0.0}, {"low": 2.0}, {"high": 0.5}, {"dead_band": 1.0}, {"group_by": "x"}],
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        BalancedRates(**arguments)
