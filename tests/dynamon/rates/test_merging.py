"""Ratios brought down to few groups: how far off, for how long, and what stays as it was."""

import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.optim import Lanton, LayerwiseRates
from dynamon.rates import FixedRates, NoiseAdaptiveRates, Rule
from dynamon.rates.merging import RatioMerging, cluster_ratios, count_groups, relative_error
from tests.launches import fill_gradients, gpt2

AdamW, SGD, Muon = torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon


class Spread(Rule):
    """A different ratio for each layer from 0.1 to 1, which drift from step to step."""

    bounds = (0.1,)

    def __init__(self, drift=0.0):
        self.drift, self.steps = drift, 0

    def begin_step(self):
        self.steps += 1

    def ratios(self):
        places = np.arange(len(self.layers))
        spread = 10.0 ** -((places * 37 % 101) / 101)
        return np.clip(spread * (1 + self.drift * np.sin(self.steps * 0.3 + places)), 0.1, 1.0)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def draws(count_, seed=0):
    rng = np.random.default_rng(seed)
    return [np.exp(-rng.exponential(0.5, rng.integers(17, 60))).clip(0.1, 1.0) for _ in range(count_)]


def smallest_error(ratios, groups):
    """By dynamic programming over all ways to cut a sorted line."""
    line = np.sort(ratios)
    best = {0: 0.0}
    for _ in range(groups):
        best = {
            end: min(max(best[begin], (line[end - 1] / line[begin]) ** 0.5 - 1) for begin in best if begin < end)
            for end in range(1, len(line) + 1)
            if any(begin < end for begin in best)
        } | {0: 0.0}
    return best[len(line)]


@pytest.mark.parametrize("seed", range(10))
def test_the_largest_error_is_the_smallest_that_so_many_groups_allow(seed):
    for ratios in draws(3, seed):
        places = np.zeros(len(ratios), int)
        inner = (ratios < 1) & (ratios > 0.1)
        exact = count_groups(ratios[~inner], places[~inner])
        merged = cluster_ratios(ratios, places, 8, np.array([0.1, 1.0]))
        assert count_groups(merged, places) <= 8
        assert relative_error(merged, ratios) == pytest.approx(smallest_error(ratios[inner], 8 - exact), rel=1e-6)
        assert (merged[~inner] == ratios[~inner]).all()  # 1 and the bound, to the bit
        assert merged.min() >= ratios.min() and merged.max() <= ratios.max()


def test_the_error_that_is_stated():
    """16 groups, one of the optimizer's own, ratios evenly over 0.1 to 1: 9 %, and 19 % before they change."""
    ratios = np.exp(np.linspace(np.log(0.1), 0, 5000))
    merging, places = RatioMerging(16, (0.1,)), np.zeros(5000, int)
    assert relative_error(merging.apply(ratios, places), ratios) < 0.09 and np.expm1(merging.slack) < 0.19


def test_groups_of_the_optimizer_count():
    ratios = draws(1)[0]
    places = np.arange(len(ratios)) % 3
    assert count_groups(RatioMerging(16).apply(ratios, places), places) <= 16
    places = np.arange(len(ratios)) % 20  # more than there may be: one each, and what must stay exact
    merged = RatioMerging(16).apply(ratios, places)
    assert count_groups(merged, places) <= 20 + len(set(places[ratios == 1.0]))


def test_ratios_that_have_no_logarithm_stay():
    ratios = np.append(np.exp(-np.random.default_rng(0).uniform(0, 2, 60)), [0.0, 0.0, np.nan])
    merging, places = RatioMerging(16), np.zeros(63, int)
    for _ in range(2):
        taken = merging.apply(ratios, places)
        assert (taken[60:62] == 0).all() and np.isnan(taken[62]) and count_groups(taken[:62], places[:62]) <= 16
    assert relative_error(taken[:62], ratios[:62]) < 0.1
    nothing = np.zeros(20)
    assert cluster_ratios(nothing, np.arange(20), 16, np.ones(1)) is nothing


def test_few_ratios_are_left_alone():
    ratios = np.tile(np.linspace(0.3, 0.9, 16), 10)
    assert (RatioMerging(16).apply(ratios, np.zeros(160, int)) == ratios).all()


def test_a_clustering_stays_through_jitter_and_goes_when_it_is_off():
    rng, ratios = np.random.default_rng(0), np.exp(-np.random.default_rng(1).uniform(0, 2, 100))
    merging, places = RatioMerging(16), np.zeros(100, int)
    first = merging.apply(ratios, places)
    for _ in range(20):
        assert merging.apply(ratios * (1 + 0.01 * rng.standard_normal(100)), places) is first
    moved = ratios.copy()
    moved[0] *= 1.5
    assert (merging.preview(moved, places) != first).any() and merging.current is first  # asked, not taken
    again = merging.apply(moved, places)
    assert abs(again[0] / moved[0] - 1) < 0.1 and merging.current is again
    for drift in range(200):
        wanted = moved * (1 + 0.002 * drift)
        taken = merging.apply(wanted, places)
        assert relative_error(taken, wanted) <= np.expm1(merging.slack) + 1e-12 and count_groups(taken, places) <= 16


def test_a_layer_whose_ratio_becomes_exactly_one_has_it_at_once():
    ratios = np.exp(-np.random.default_rng(1).uniform(0.001, 2, 100))
    merging, places = RatioMerging(16), np.zeros(100, int)
    merging.apply(ratios, places)
    nearest = int(ratios.argmax())
    ratios[nearest] = 1.0
    assert merging.apply(ratios, places)[nearest] == 1.0


@pytest.mark.parametrize("most", [0, -1, 2.0, True])
def test_bad_arguments(most):
    model = nn.Linear(3, 3)
    with pytest.raises(
        ValueError if type(most) is int else TypeError,
        match="max_groups must be a whole number of 1 or more, or None, got",
    ):
        LayerwiseRates(SGD(model.parameters(), lr=0.1), Spread(), model, max_groups=most)


def matrices():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(60)))


def small_gpt2():
    torch.manual_seed(0)
    model = gpt2("cpu", scale=48)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


MAKERS = {
    "adamw foreach": (small_gpt2, lambda p: AdamW(p, lr=0.01, foreach=True)),
    "adamw fused": (small_gpt2, lambda p: AdamW(p, lr=0.01, fused=True)),
    "adamw tensor rate": (small_gpt2, lambda p: AdamW(p, lr=torch.tensor(0.01), foreach=False)),
    "adamw fused tensor rate": (small_gpt2, lambda p: AdamW(p, lr=torch.tensor(0.01), fused=True)),
    "sgd fused": (small_gpt2, lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True)),
    "sgd": (small_gpt2, lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "muon": (matrices, lambda p: Muon(p, lr=0.02, weight_decay=0.1)),
}


def train(model, optimizer, steps, before=None):
    for step in steps:
        fill_gradients(model, seed=step)
        if before is not None:
            before()
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_equals_permanently_split_groups_bit_for_bit(name):
    """The groups are split for good by the ratios that were applied; 148 tensors are in at most 16 groups."""
    make, optimizer_of = MAKERS[name]
    steered, reference = make(), make()
    optimizer = optimizer_of(steered.parameters())
    rates = LayerwiseRates(optimizer, Spread(), steered)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    train(steered, optimizer, range(4))
    layers = len(list(steered.parameters()))
    assert set(seen) == {16} and len(set(rates.ratios.values())) == 16 < layers
    assert rates.ratios == rates.applied and 0 < rates.merging_error < 0.09
    base = optimizer.param_groups[0]["lr"]
    split = optimizer_of([{"params": [p], "lr": base * rates.ratios[name]} for name, p in reference.named_parameters()])
    train(reference, split, range(4))
    for one, other in zip(steered.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_groups_of_the_optimizer_make_sixteen_together():
    model = small_gpt2()
    decay = [{"params": [p for p in model.parameters() if (p.ndim < 2) == small]} for small in (False, True)]
    optimizer = AdamW(decay, lr=0.01)
    seen = []
    LayerwiseRates(optimizer, Spread(), model)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    train(model, optimizer, range(2))
    assert seen == [16, 16] and len(optimizer.param_groups) == 2


def test_noise_adaptive_rates_of_gpt2_take_sixteen_groups():
    model = small_gpt2()
    optimizer = AdamW(model.parameters(), lr=0.001)
    rates, seen = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=2), model), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    # Noise that differs by layer, and no two gradients alike.
    scales = torch.logspace(-2, 1, 148)[torch.randperm(148, generator=torch.Generator().manual_seed(0))]

    def before():
        for p, scale in zip(model.parameters(), scales, strict=True):
            p.grad.mul_(scale)

    train(model, optimizer, range(10), before)
    assert max(seen) == 16 and len(set(rates.ratios.values())) > 10
    assert all(0.1 <= ratio <= 1.0 for ratio in rates.ratios.values())


@pytest.mark.parametrize(
    ("rule", "most"), [(FixedRates({f"{i}.weight": 1 / (i + 1) for i in range(60)}), 16), (Spread(), None)]
)
def test_ratios_by_hand_and_the_published_rule_are_exact(rule, most):
    model = matrices()
    optimizer = SGD(model.parameters(), lr=0.1)
    rates, seen = LayerwiseRates(optimizer, rule, model, max_groups=most), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    train(model, optimizer, range(2))
    assert seen == [60, 60] and rates.merging_error == 0.0
    assert list(rates.ratios.values()) == rule.ratios().tolist()


def test_lanton_is_as_published():
    assert Lanton(matrices(), lr=0.01).rates._assignment.merging is None


@pytest.mark.parametrize("own", [1, 20])
def test_a_run_that_is_resumed_goes_on_bitwise(own):
    """With ratios that drift, so that what is in force depends on when they were clustered last."""

    def sgd(model):
        parameters = list(model.parameters())
        return SGD([{"params": parameters[i::own], "lr": 0.1 / (i + 1)} for i in range(own)], lr=0.1, momentum=0.9)

    def run(steps, stop=None):
        model = matrices()
        optimizer = sgd(model)
        rates, taken = LayerwiseRates(optimizer, Spread(0.05), model), []
        for step in range(steps):
            if step == stop:
                file = io.BytesIO()
                torch.save((rates.state_dict(), optimizer.state_dict(), model.state_dict()), file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                model = matrices()
                model.load_state_dict(state[2])
                optimizer = sgd(model)
                optimizer.load_state_dict(state[1])
                rates = LayerwiseRates(optimizer, Spread(0.05), model)
                rates.load_state_dict(state[0])
            train(model, optimizer, [step])
            taken.append(rates.applied)
        return model, taken

    whole, applied = run(30)
    changes = sum(one != other for one, other in itertools.pairwise(applied))
    assert 1 <= changes <= 15, changes  # some, and not at each step
    for stop in (1, 7, 13, 20):
        model, again = run(30, stop)
        assert again == applied
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_asking_for_ratios_changes_nothing():
    def run(asks):
        model = matrices()
        optimizer = SGD(model.parameters(), lr=0.1)
        rates, seen = LayerwiseRates(optimizer, Spread(0.05), model), []
        for step in range(12):
            train(model, optimizer, [step])
            seen.append(rates.applied)
            if asks:
                assert rates.ratios == rates.wanted
        return seen

    assert run(True) == run(False)


def test_a_dry_run_says_what_it_would_do():
    model, plain = matrices(), matrices()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, Spread(), model, apply=False)
    train(model, optimizer, range(3))
    train(plain, other, range(3))
    assert len(set(rates.wanted.values())) == 16 and set(rates.applied.values()) == {1.0}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_rule_of_another_length_is_named():
    class Short(Rule):
        def ratios(self):
            return np.ones(2)

    model = matrices()
    optimizer = SGD(model.parameters(), lr=0.1)
    LayerwiseRates(optimizer, Short(), model)
    with pytest.raises(ValueError, match=r"Short.ratios\(\) must be \[L\] for 60 layers, got \[2\]"):
        train(model, optimizer, [0])


def test_groups_that_join_before_a_step_without_gradients_begin_anew():
    model, other = matrices(), nn.Linear(6, 6, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, Spread(), nn.Sequential(*model, other), max_groups=4)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": list(other.parameters())})
    optimizer.zero_grad()
    optimizer.step()
    train(model, optimizer, range(3, 5))
    assert len(rates.applied) == 61 and len(set(rates.applied.values())) <= 4


def test_a_group_that_is_split_counts_as_two():
    model = matrices()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = []
    LayerwiseRates(optimizer, Spread(), model, max_groups=4)
    optimizer.register_step_pre_hook(lambda *_: seen.append(len(optimizer.param_groups)))
    train(model, optimizer, range(2))
    (group,) = optimizer.param_groups
    parameters = group["params"]
    optimizer.param_groups[:] = [{**group, "params": parameters[:30]}, {**group, "params": parameters[30:]}]
    train(model, optimizer, range(2, 5))
    assert seen == [4] * 5


def test_more_groups_are_taken_at_once_by_a_resumed_run():
    model = matrices()
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, Spread(), model, max_groups=2)
    train(model, optimizer, range(2))
    state = rates.state_dict()
    rates.remove()
    rates = LayerwiseRates(optimizer, Spread(), model, max_groups=16)
    rates.load_state_dict(state)
    train(model, optimizer, range(2, 3))
    assert len(set(rates.applied.values())) == 16


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "16"])
@pytest.mark.parametrize("rule", [FixedRates({"*": 0.5}), Spread()])
def test_numbers_of_groups_that_mean_nothing_are_refused(rule, most):
    model = matrices()
    with pytest.raises(ValueError if type(most) is int else TypeError, match="max_groups must be a whole number"):
        LayerwiseRates(SGD(model.parameters(), lr=0.1), rule, model, max_groups=most)
