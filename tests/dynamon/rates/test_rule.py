"""The arguments of the rules, each against numbers worked out by hand."""

import copy
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.layers import Layer
from dynamon.norms import get_norm
from dynamon.optim import LayerwiseRates
from dynamon.rates import FixedRates, NoiseAdaptiveRates, Rule, SpectralTailRates
from dynamon.spectra.power_law import power_law
from tests.models import gpt, mlp, samples

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def vectors(*names):
    """Layers of one role and size, so that the shape factors cancel."""
    return [Layer(name, "vector", nn.Parameter(torch.zeros(4))) for name in names]


def started(count=3, **arguments):
    """A rule without warm-up or memory, on layers that are compared with each other."""
    rule = NoiseAdaptiveRates(**{"warmup": 0, "beta2": 0.0, "alpha": 0.0, "floor": 1e-3, **arguments})
    layers = vectors(*(f"layer{i}" for i in range(count)))
    rule.start(layers, [get_norm("rms")] * count)
    return rule


def feed(rule, *noise):
    """One update with these changes of the gradient; None where a layer has no gradient."""
    changes = np.array([math.nan if value is None else value for value in noise], dtype=float)
    seen = ~np.isnan(changes)
    finite = bool(np.isfinite(changes[seen]).all())
    facts = {"trend": np.zeros(len(noise)), "rounding": 1e-4, "frozen": None, "window": None}
    rule.update(SimpleNamespace(finite=finite, difference_dual=changes, difference_l2=changes, l2=changes, **facts))
    return rule.ratios().copy()


def test_ten_times_the_noise_takes_a_third_of_the_rate_and_a_hundred_times_a_tenth():
    found = feed(started(), 1.0, 10.0, 100.0)
    np.testing.assert_allclose(found, [1, 0.316228, 0.1], rtol=1e-5)
    assert found[0] == 1


def test_the_noise_floor_by_hand():
    # H = 1, 100, 10000; a^2 = 0.25 * 100
    expected = [1, (26 / 125) ** 0.25, (26 / 10025) ** 0.25]
    np.testing.assert_allclose(feed(started(alpha=0.5), 1.0, 10.0, 100.0), expected, rtol=1e-12)


def test_a_floor_holds_and_is_counted():
    rule = started(floor=0.2)
    np.testing.assert_allclose(feed(rule, 1.0, 10.0, 100.0), [1, 0.316228, 0.2], rtol=1e-5)
    assert rule.bounded() == 1


@pytest.mark.parametrize(("exponent", "expected"), [(0.5, [1, 0.1, 0.01]), (0.125, [1, 0.562341, 0.316228])])
def test_the_exponent_by_hand(exponent, expected):
    np.testing.assert_allclose(feed(started(exponent=exponent), 1.0, 10.0, 100.0), expected, rtol=1e-5)


def test_relative_to_the_mean_by_hand():
    # the geometric mean of H = 1, 100, 10000 is 100
    rule = started(relative_to="mean")
    found = feed(rule, 1.0, 10.0, 100.0)
    np.testing.assert_allclose(found, [10**0.5, 1, 10**-0.5], rtol=1e-12)
    assert rule.bounded() == 0
    rule = started(relative_to="mean", cap=2.0)
    np.testing.assert_allclose(feed(rule, 1.0, 10.0, 100.0), [2, 1, 10**-0.5], rtol=1e-12)
    assert rule.bounded() == 1


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=8), st.floats(0, 3), st.floats(0.05, 0.5))
def test_the_mean_of_a_group_is_kept(noise, alpha, exponent):
    rule = started(len(noise), relative_to="mean", alpha=alpha, exponent=exponent, cap=1e6, floor=1e-6)
    assert np.log(feed(rule, *noise)).mean() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("relative_to", ["quietest", "mean"])
def test_a_layer_alone_in_its_group_keeps_its_rate(relative_to):
    rule = NoiseAdaptiveRates(warmup=0, relative_to=relative_to, group_by="role_and_shape")
    layers = [Layer(str(n), "vector", nn.Parameter(torch.zeros(n))) for n in (2, 3)]
    rule.start(layers, [get_norm("rms")] * 2)
    for noise in ((1.0, 50.0), (3.0, 0.2)):
        assert feed(rule, *noise).tolist() == [1, 1]


def test_a_dead_band_ignores_small_changes_exactly():
    rule = started(2, dead_band=0.1)
    # ratios 0.95, 0.9001, 0.85, 0.80, 0.93, 0.94 of the rule; in force the first further than 10 % from the last
    wanted = [0.95, 0.9001, 0.85, 0.80, 0.93, 0.94]
    in_force = [feed(rule, 1.0, ratio**-2)[1] for ratio in wanted]
    np.testing.assert_allclose(in_force, [1, 1, 0.85, 0.85, 0.85, 0.94], rtol=1e-12)
    assert in_force[:2] == [1.0, 1.0] and len(set(in_force[2:5])) == 1


def test_ratios_change_every_so_often_along_a_line():
    rule = started(2, refresh=4)
    quiet, loud = [1.0, 4.0], [1.0, 16.0]  # ratios 0.5 and 0.25
    seen = [feed(rule, *noise)[1] for noise in [quiet] * 4 + [loud] * 9]
    np.testing.assert_allclose(seen, [1, 1, 1, 1, 0.75, 0.5, 0.5, 0.5, 0.375, 0.25, 0.25, 0.25, 0.25], rtol=1e-12)


def test_a_refresh_and_the_warm_up():
    rule = started(2, refresh=2, warmup=4)
    seen = [feed(rule, 1.0, 16.0)[1] for _ in range(9)]  # in force: 0.25 from the third update on
    np.testing.assert_allclose(seen, [1, 1, 1, 1, 0.25**0.25, 0.25**0.5, 0.25**0.75, 0.25, 0.25], rtol=1e-12)


def test_bias_correction_matters_for_layers_seen_less_often():
    for correct in (True, False):
        rule = started(2, beta2=0.5, bias_correction=correct)
        feed(rule, 2.0, None), feed(rule, 2.0, None)
        found = feed(rule, 2.0, 2.0)
        # H = 4 for both; without the correction 4 * (1 - 0.5^3) = 3.5 and 4 * 0.5 = 2
        np.testing.assert_allclose(found, [1, 1] if correct else [(2 / 3.5) ** 0.25, 1], rtol=1e-12)
    both = [started(2, beta2=0.5, bias_correction=b) for b in (True, False)]
    for noise in ((1.0, 5.0), (3.0, 2.0)):
        one, other = (feed(rule, *noise) for rule in both)
        np.testing.assert_allclose(one, other, rtol=1e-12)


ARGUMENTS = {
    "exponent": {"exponent": 0.5},
    "mean": {"relative_to": "mean", "cap": 3.0},
    "dead band": {"dead_band": 0.2},
    "refresh": {"refresh": 3},
    "all": {"refresh": 4, "dead_band": 0.05, "relative_to": "mean", "bias_correction": False, "warmup": 2},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@given(
    st.lists(
        st.tuples(*[st.sampled_from([None, 0.0, 1e-30, 1.0, 7.0, 1e20, math.inf])] * 3),
        min_size=1,
        max_size=20,
    )
)
def test_ratios_stay_in_bounds_whatever_the_gradients_do(arguments, rows):
    rule = started(**{"floor": 0.1, "beta2": 0.5, **arguments})
    for row in rows:
        before = rule.ratios().copy()
        after = feed(rule, *row)
        assert np.isfinite(after).all() and (after >= 0.1 - 1e-12).all() and (after <= rule.cap + 1e-12).all()
        if math.inf in row:
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 9])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_rule_resumes_bitwise(arguments, stop):
    noise = np.random.default_rng(0).lognormal(sigma=2, size=(14, 3))
    whole, first = started(**arguments), started(**arguments)
    expected = [feed(whole, *row) for row in noise]
    for row in noise[:stop]:
        feed(first, *row)
    resumed = started(**arguments)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    np.testing.assert_array_equal(resumed.ratios(), expected[stop - 1])
    for row, ratios in zip(noise[stop:], expected[stop:], strict=True):
        np.testing.assert_array_equal(feed(resumed, *row), ratios)


def test_a_state_from_before_ratios_were_saved_and_one_with_other_bounds():
    rule = started(dead_band=0.05)
    expected = feed(rule, 1.0, 10.0, 100.0)
    state = rule.state_dict()
    old = started(dead_band=0.05)
    old.load_state_dict({key: state[key] for key in ("noise", "updates")})
    np.testing.assert_array_equal(old.ratios(), expected)
    narrow = started(dead_band=0.05, floor=0.5)
    narrow.load_state_dict(state)
    np.testing.assert_array_equal(narrow.ratios(), [1, 0.5, 0.5])
    more = NoiseAdaptiveRates(dead_band=0.05, warmup=0)
    more.start(vectors("layer1", "new"), [get_norm("rms")] * 2)
    more.load_state_dict(state)
    np.testing.assert_array_equal(more.ratios(), [expected[1], 1])


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (NoiseAdaptiveRates, {"exponent": 0.0}, "exponent must be positive and finite .*, got 0.0"),
        (NoiseAdaptiveRates, {"exponent": math.nan}, "exponent must be"),
        (NoiseAdaptiveRates, {"relative_to": "loudest"}, r"relative_to must be one of \('quietest', 'mean'\)"),
        (NoiseAdaptiveRates, {"cap": 0.5}, "cap must be a finite number of at least 1, got 0.5"),
        (NoiseAdaptiveRates, {"dead_band": 1.0}, r"dead_band must lie in \[0, 1\), got 1.0"),
        (NoiseAdaptiveRates, {"refresh": 0}, "refresh must be one or more updates, got 0"),
        (SpectralTailRates, {"low": 0.0}, "low must be positive and finite, got 0.0"),
        (SpectralTailRates, {"low": 2.0}, "high must be finite and at least low = 2.0, got 1.5"),
        (SpectralTailRates, {"high": math.inf}, "high must be finite"),
        (SpectralTailRates, {"group_by": "norm"}, "group_by must be one of .*, got 'norm'"),
        (SpectralTailRates, {"refresh": 0, "ramp": 0}, "refresh must be one or more steps, got 0"),
        (SpectralTailRates, {"ramp": 101}, "ramp must lie between 0 and refresh = 100 steps, got 101"),
    ],
)
def test_bad_arguments(rule, arguments, message):
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


def power_law_matrix(rows, columns, exponent, seed=0):
    """A matrix whose squared singular values are the quantiles of a power law."""
    torch.manual_seed(seed)
    count = min(rows, columns)
    quantiles = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
    sigmas = quantiles ** (-0.5 / (exponent - 1))
    left = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64)).Q
    return (left * sigmas @ right.mT).float()


def network(*exponents, sides=(64, 48)):
    """Linear layers in a chain of blocks with tails of the given exponents; None: a flat spectrum."""
    model = nn.ModuleList(nn.Linear(*sides, bias=True) for _ in exponents)
    for seed, (layer, exponent) in enumerate(zip(model, exponents, strict=True)):
        with torch.no_grad():
            if exponent is None:
                layer.weight.copy_(torch.linalg.qr(torch.randn(sides[1], sides[0]).T).Q.T)
            else:
                layer.weight.copy_(power_law_matrix(sides[1], sides[0], exponent, seed))
    return model


def steps(rates, count):
    """Steps whose gradients are zero; the ratios of each."""
    seen = []
    for _ in range(count):
        for group in rates.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        rates.optimizer.step()
        seen.append(rates.ratios)
    return seen


def test_lighter_tails_take_larger_steps_by_hand():
    model = network(2.0, 3.0, 5.0, None)
    rule = SpectralTailRates(0.5, 1.5, refresh=1, ramp=0)
    rates = LayerwiseRates(SGD(model.parameters(), lr=0.1), rule, model)
    first, second = steps(rates, 2)
    assert set(first.values()) == {1.0}
    exponents = [
        float(power_law(torch.linalg.svdvals(layer.weight.detach().double()).square()).exponent) for layer in model
    ]
    assert exponents[:3] == pytest.approx([2.0, 3.0, 5.0], rel=0.15) and math.isnan(exponents[3])
    assert rule.exponents == pytest.approx({f"{i}.weight": exponents[i] for i in range(3)}, rel=1e-4)
    middle = 0.5 + (exponents[1] - exponents[0]) / (exponents[2] - exponents[0])
    assert second["0.weight"] == 0.5 and second["2.weight"] == 1.5
    assert second["1.weight"] == pytest.approx(middle, rel=1e-4)
    assert all(second[name] == 1.0 for name in second if "bias" in name or name == "3.weight")
    assert second["0.weight"] < second["1.weight"] < second["2.weight"]


def test_tails_are_read_every_so_often_and_ratios_follow_along_a_line():
    model = network(2.0, 5.0)
    rates = LayerwiseRates(SGD(model.parameters(), lr=0.1), SpectralTailRates(1.0, 3.0, refresh=10, ramp=4), model)
    seen = [ratios["1.weight"] for ratios in steps(rates, 25)]
    # step 10 reads; steps 11 to 14 go over
    np.testing.assert_allclose(seen[:16], [1.0] * 11 + [1.5, 2.0, 2.5, 3.0, 3.0], rtol=1e-12)
    assert {ratios["0.weight"] for ratios in steps(rates, 3)} == {1.0}
    with torch.no_grad():
        model[0].weight.copy_(power_law_matrix(48, 64, 5.0, 0))
        model[1].weight.copy_(power_law_matrix(48, 64, 2.0, 1))
    seen = steps(rates, 10)  # steps 28 to 37; step 30 reads
    assert [r["0.weight"] for r in seen] == [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3, 3]
    assert [r["1.weight"] for r in seen] == [3, 3, 3, 2.5, 2, 1.5, 1, 1, 1, 1]


def test_tails_are_compared_within_a_group():
    model = network(2.0, 5.0)
    model.append(nn.Embedding(100, 40))
    with torch.no_grad():
        model[2].weight.copy_(power_law_matrix(100, 40, 3.0))
    found = {}
    for group_by in ("all", "role", "role_and_shape"):
        rule = SpectralTailRates(refresh=1, ramp=0, group_by=group_by)
        rates = LayerwiseRates(SGD(model.parameters(), lr=0.1), rule, model)
        found[group_by] = steps(rates, 2)[1]
    assert 0.5 < found["all"]["2.weight"] < 1.5 and found["all"]["0.weight"] == 0.5
    assert found["role"]["2.weight"] == found["role_and_shape"]["2.weight"] == 1.0  # alone of its role


def test_one_exponent_or_equal_ones_change_nothing():
    for model in (network(3.0, None), network(None, None), copy.deepcopy(network(3.0))):
        rates = LayerwiseRates(SGD(model.parameters(), lr=0.1), SpectralTailRates(refresh=1, ramp=0), model)
        assert all(set(ratios.values()) == {1.0} for ratios in steps(rates, 4))
    twins = network(3.0, 3.0)
    twins[1].weight.data.copy_(twins[0].weight.data)
    rates = LayerwiseRates(SGD(twins.parameters(), lr=0.1), SpectralTailRates(refresh=1, ramp=0), twins)
    assert set(steps(rates, 3)[-1].values()) == {1.0}


def test_frozen_unfrozen_broken_and_new_layers():
    model = network(2.0, 3.0, 4.0, 5.0)
    model[2].weight.requires_grad_(False)
    optimizer = SGD([p for layer in model[:3] for p in layer.parameters()], lr=0.1)
    rates = LayerwiseRates(optimizer, SpectralTailRates(refresh=1, ramp=0), model)
    seen = steps(rates, 2)[1]
    assert [seen[f"{i}.weight"] for i in range(3)] == [0.5, 1.5, 1.0]
    model[2].weight.requires_grad_(True)
    seen = steps(rates, 1)[0]
    assert seen["0.weight"] == 0.5 and 0.5 < seen["1.weight"] < 1.5 == seen["2.weight"]
    optimizer.add_param_group({"params": list(model[3].parameters())})
    seen = steps(rates, 1)[0]
    assert seen["3.weight"] == 1.5 > seen["2.weight"] > seen["1.weight"] > seen["0.weight"] == 0.5
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[3].weight.zero_()
    seen = steps(rates, 1)[0]
    assert [seen[f"{i}.weight"] for i in range(4)] == [1.0, 0.5, 1.5, 1.0]


def test_every_kind_of_weight_can_be_read():
    model = nn.Sequential(gpt(tied=True), nn.Conv2d(4, 40, 3, groups=2), nn.LSTM(20, 15))
    rates = LayerwiseRates(SGD(model.parameters(), lr=0.1), SpectralTailRates(refresh=1, ramp=0), model)
    assert all(0.5 <= ratio <= 1.5 for ratio in steps(rates, 3)[-1].values())


def loss_at(model, step):
    inputs, labels = samples(8, 40, seed=step)
    return cross_entropy(model(inputs), labels)


def deep():
    model = mlp(40, 40, 40, 3)
    with torch.no_grad():
        model[0].weight.copy_(power_law_matrix(40, 40, 2.0, 0) / 8)
        model[2].weight.copy_(power_law_matrix(40, 40, 4.0, 1) / 8)
    return model


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
    return model


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


RULES = {
    "tails": lambda: SpectralTailRates(refresh=4, ramp=3),
    **{
        name: lambda arguments=arguments: NoiseAdaptiveRates(**{"warmup": 0, "group_by": "all", **arguments})
        for name, arguments in ARGUMENTS.items()
    },
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(name, stop):
    def start():
        model = deep()
        optimizer = AdamW(model.parameters(), lr=0.01)
        return model, optimizer, LayerwiseRates(optimizer, RULES[name](), model)

    whole, optimizer, rates = start()
    train(whole, optimizer, range(14))
    first, other, other_rates = start()
    train(first, other, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), other.state_dict(), other_rates.state_dict()], file)
    file.seek(0)
    weights, state, saved = torch.load(file, weights_only=True)
    resumed, third, third_rates = start()
    train(resumed, third, range(2))  # whatever was there is overwritten
    resumed.load_state_dict(weights)
    third.load_state_dict(state)
    third_rates.load_state_dict(saved)
    train(resumed, third, range(stop, 14))
    assert same(resumed, whole) and third_rates.ratios == rates.ratios
    plain = deep()
    assert not same(whole, train(plain, AdamW(plain.parameters(), lr=0.01), range(14)))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_step_is_that_of_split_groups_with_the_ratios_of_that_step(name, kind):
    model, reference = deep(), deep()
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    by_hand = kind([{"params": [p]} for p in reference.parameters()], lr=0.01, weight_decay=0.1)
    rates = LayerwiseRates(optimizer, RULES[name](), model)
    seen = []
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        ratios = rates.rule.ratios()
        for group, ratio in zip(by_hand.param_groups, ratios, strict=True):
            group["lr"] = 0.01 * float(ratio)
        train(reference, by_hand, range(step, step + 1))
        seen.append(tuple(ratios))
    assert same(model, reference) and len(set(seen)) > 2


class Counting(Rule):
    """Counts the steps it is told of."""

    def start(self, layers, norms):
        super().start(layers, norms)
        self.begun = 0

    def begin_step(self):
        self.begun += 1

    def ratios(self):
        return np.full(len(self.layers), 0.5)


def test_a_rule_hears_of_every_step_once():
    model = mlp(5, 4, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, Counting(), model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).sum()
        loss.backward()
        return loss

    closure()
    optimizer.step()
    assert rates.rule.begun == 1
    optimizer.step(closure)
    assert rates.rule.begun == 2
    rates.observe(key=7), rates.observe(key=7)
    optimizer.step()
    assert rates.rule.begun == 3
    optimizer.step()
    assert rates.rule.begun == 4 and rates.reader.step == 4


@pytest.mark.parametrize("rule", [lambda: NoiseAdaptiveRates(warmup=0, group_by="all"), lambda: FixedRates({"*": 0.1})])
def test_a_dry_run_changes_nothing(rule):
    model, plain, steered = deep(), deep(), deep()
    optimizer = AdamW(model.parameters(), lr=0.01)
    rates = LayerwiseRates(optimizer, rule(), model, apply=False)
    train(model, optimizer, range(8))
    assert same(model, train(plain, AdamW(plain.parameters(), lr=0.01), range(8)))
    assert set(rates.ratios.values()) == {1.0} and min(rates.wanted.values()) < 1
    other = AdamW(steered.parameters(), lr=0.01)
    steering = LayerwiseRates(other, rule(), steered)
    assert not same(train(steered, other, range(8)), plain) and steering.wanted == steering.ratios


@pytest.mark.parametrize(
    "kind", [AdamW, torch.optim.Muon, lambda p, **k: torch.optim.NAdam(p, **k, decoupled_weight_decay=True)]
)
def test_weight_decay_at_the_base_rate(kind):
    def chain():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in ((40, 7), (7, 3))))

    def run(model, groups):
        optimizer = kind(groups, lr=0.02, weight_decay=0.3)
        return optimizer, lambda: train(model, optimizer, range(5))

    ratios = {"0.weight": 0.25, "1.weight": 1.0}  # powers of two divide exactly
    reference, steered, scaled = chain(), chain(), chain()
    groups = [
        {"params": [p], "lr": 0.02 * ratios[n], "weight_decay": 0.3 / ratios[n]}
        for n, p in reference.named_parameters()
    ]
    run(reference, groups)[1]()
    optimizer, go = run(steered, steered.parameters())
    LayerwiseRates(optimizer, FixedRates(ratios), steered, scale_weight_decay=False)
    go()
    assert same(steered, reference) and optimizer.param_groups[0]["weight_decay"] == 0.3
    optimizer, go = run(scaled, scaled.parameters())
    LayerwiseRates(optimizer, FixedRates(ratios), scaled)
    go()
    assert not same(scaled, reference)
    # Without gradients all that is left is the decay: that of the base rate.
    start = steered[0].weight.detach().clone()
    steered[0].weight.grad = torch.zeros_like(start)
    still = AdamW(steered[:1].parameters(), lr=0.02, weight_decay=0.3)
    LayerwiseRates(still, FixedRates({"0.weight": 0.25}), steered, scale_weight_decay=False)
    still.step()
    torch.testing.assert_close(steered[0].weight.detach(), start * (1 - 0.02 * 0.3))


class Tightens(AdamW):
    """Writes its own weight decay into its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["weight_decay"] = group["weight_decay"] * 2
        return super().step(closure)


def test_weight_decay_that_the_optimizer_changes_is_carried_back():
    model = deep()
    optimizer = Tightens(model.parameters(), lr=0.01, weight_decay=0.125)
    LayerwiseRates(optimizer, FixedRates({"0.*": 0.5, "2.*": 0.25}), model, scale_weight_decay=False)
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("kind", [SGD, torch.optim.Adam])
def test_weight_decay_that_is_part_of_the_gradient_is_refused(kind):
    model = deep()
    coupled = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=f"scale_weight_decay=False needs decoupled .*; {kind.__name__} adds"):
        LayerwiseRates(coupled, FixedRates({}), model, scale_weight_decay=False)
    without = kind(model.parameters(), lr=0.1)
    LayerwiseRates(without, FixedRates({"0.*": 0.5}), model, scale_weight_decay=False)
    train(model, without, range(2))


def test_a_network_just_initialised_has_no_tails():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in ((128, 128), (128, 512), (512, 64), (64, 64))))
    rule = SpectralTailRates(refresh=1, ramp=0)
    assert set(steps(LayerwiseRates(SGD(model.parameters(), lr=0.1), rule, model), 2)[1].values()) == {1.0}
    assert rule.exponents == {}


@pytest.mark.parametrize("name", RULES)
def test_missing_zero_unfrozen_and_new_layers_in_a_run(name):
    model = deep()
    model[4].weight.requires_grad_(False)
    optimizer = SGD([*model[2].parameters(), *model[4].parameters()], lr=0.01)
    rates = LayerwiseRates(optimizer, RULES[name](), model)
    for step in range(24):
        if step == 6:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
        model[4].weight.requires_grad_(step >= 9)
        optimizer.zero_grad()
        loss_at(model, step).backward()
        if step in (3, 4, 12):
            model[2].weight.grad = None
        if step in (7, 8, 15):
            model[4].bias.grad.zero_()
        if step == 18:
            model[2].bias.grad[0] = math.nan
            rates.observe()
            model[2].bias.grad[0] = 0.0
        optimizer.step()
        found = np.array(list(rates.ratios.values()))
        assert np.isfinite(found).all() and 0.1 <= found.min() <= found.max() <= 3.0
        assert len(found) == (4 if step < 6 else 6) and len(optimizer.param_groups) == (1 if step < 6 else 2)
    assert len(set(found.tolist())) > 1


def test_rules_print_what_was_asked_for():
    assert repr(NoiseAdaptiveRates()) == "NoiseAdaptiveRates()"
    assert repr(NoiseAdaptiveRates(0.2, floor=0.5)) == "NoiseAdaptiveRates(alpha=0.2, floor=0.5)"
    assert repr(FixedRates({"role:head": 0.5})) == "FixedRates({'role:head': 0.5})"
    assert repr(SpectralTailRates(refresh=10, ramp=5)) == "SpectralTailRates(refresh=10, ramp=5)"
    with pytest.raises(TypeError, match="ratios must be a mapping from names to numbers, got float"):
        FixedRates(0.5)
