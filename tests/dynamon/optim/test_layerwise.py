"""Layerwise rates in a plain loop: the arithmetic of split groups, without the groups."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from dynamon.optim import LayerwiseRates, steering_of, unsupported_reason
from dynamon.rates import FixedRates, NoiseAdaptiveRates, Rule
from tests.models import cnn, gpt, mlp, samples

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
RATIOS = {"0.*": 0.3, "2.weight": 0.77}  # the rest keeps 1


def matrices_only():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in ((5, 7), (7, 6), (6, 3))))


def loss_at(model, step):
    shape = (8, 2, 6, 6) if any(p.ndim == 4 for p in model.parameters()) else (8, 5)
    inputs, labels = samples(*shape, seed=step)
    return cross_entropy(model(inputs), labels)


def backward(model, optimizer, step):
    optimizer.zero_grad()
    loss = loss_at(model, step)
    loss.backward()
    return loss


def train(model, optimizer, steps, closure=False, after=None):
    """Plain training on the same data every time."""
    for step in steps if isinstance(steps, range) else range(steps):
        if closure:
            optimizer.step(lambda step=step: backward(model, optimizer, step))
        else:
            backward(model, optimizer, step)
            optimizer.step()
        if after is not None:
            after(step)
    return model


def split(model, ratios, lr):
    """One group a parameter, with the scaled rate for good."""
    rule = FixedRates(ratios)
    optimizer = SGD(model.parameters(), lr=1.0)
    found = LayerwiseRates(optimizer, rule, model).ratios
    return [{"params": [p], "lr": lr * found[name]} for name, p in model.named_parameters()]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


OPTIMIZERS = {
    "sgd": (mlp, lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "nesterov": (mlp, lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False)),
    "adamw": (mlp, lambda p: AdamW(p, lr=0.01, foreach=False)),
    "adamw foreach": (mlp, lambda p: AdamW(p, lr=0.01, foreach=True, amsgrad=True)),
    "adamw fused": (mlp, lambda p: AdamW(p, lr=0.01, fused=True)),
    "adamw cnn": (cnn, lambda p: AdamW(p, lr=0.01)),
    "rmsprop": (mlp, lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9)),
    "adagrad": (mlp, lambda p: torch.optim.Adagrad(p, lr=0.05)),
    "muon": (matrices_only, lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1)),
}


def make_model(make):
    return mlp(5, 7, 3) if make is mlp else make()


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_permanently_split_groups_bit_for_bit(name, closure):
    make, optimizer_of = OPTIMIZERS[name]
    ratios = {"0.*": 0.3, "2.weight": 0.77} if name == "muon" else {"0.*": 0.3, "*.bias": 0.5}
    reference, steered, plain = (make_model(make) for _ in range(3))
    base = optimizer_of(plain.parameters()).param_groups[0]["lr"]
    train(reference, optimizer_of(split(reference, ratios, base)), 8)
    optimizer = optimizer_of(steered.parameters())
    LayerwiseRates(optimizer, FixedRates(ratios), steered)
    train(steered, optimizer, 8, closure)
    train(plain, optimizer_of(plain.parameters()), 8)
    assert same(steered, reference) and not same(steered, plain)


def test_several_groups_of_the_user_keep_their_own_settings():
    reference, steered = mlp(5, 7, 3), mlp(5, 7, 3)

    def groups(model, factor):
        weights, biases = ([p for n, p in model.named_parameters() if kind in n] for kind in ("weight", "bias"))
        return [
            {"params": [weights[0]], "lr": 0.1 * factor("0"), "weight_decay": 0.1},
            {"params": [weights[1]], "lr": 0.1 * factor("2"), "weight_decay": 0.1},
            {"params": [biases[0]], "lr": 0.03 * factor("0"), "momentum": 0.5},
            {"params": [biases[1]], "lr": 0.03 * factor("2"), "momentum": 0.5},
        ]

    train(reference, SGD(groups(reference, lambda layer: 0.4 if layer == "0" else 1.0)), 6)
    merged = groups(steered, lambda layer: 1.0)
    for a, b in ((0, 1), (2, 3)):
        merged[a]["params"] += merged[b]["params"]
    optimizer = SGD(merged[::2])
    rates = LayerwiseRates(optimizer, FixedRates({"0.*": 0.4}), steered)
    assert rates.base_rates() == {"0.weight": 0.1, "0.bias": 0.03, "2.weight": 0.1, "2.bias": 0.03}
    train(steered, optimizer, 6)
    assert same(steered, reference)


class Spy(SGD):
    """Keeps what it saw in each step: rate by parameter id, and the list of groups itself."""

    def __init__(self, *arguments, fail_at=(), **keywords):
        super().__init__(*arguments, **keywords)
        self.seen, self.lists, self.fail_at = [], [], set(fail_at)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.lists.append(self.param_groups)
        self.seen.append({id(p): group["lr"] for group in self.param_groups for p in group["params"]})
        if len(self.seen) - 1 in self.fail_at:
            raise RuntimeError("the step failed")
        super().step()
        return loss


def rates_seen(spy, model):
    """The rate of each parameter in every step, by name."""
    return [{name: seen[id(p)] for name, p in model.named_parameters()} for seen in spy.seen]


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
def test_the_groups_of_the_user_are_back_after_every_step(closure):
    model = mlp(5, 7, 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    content, members = {k: v for k, v in group.items() if k != "params"}, list(group["params"])

    def check(_):
        assert optimizer.param_groups is groups and len(groups) == 1 and groups[0] is group
        assert {k: v for k, v in group.items() if k != "params"} == content
        assert all(p is q for p, q in zip(group["params"], members, strict=True))

    train(model, optimizer, 4, closure, check)


def test_clipping_in_the_closure_sees_the_groups_of_the_user():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    groups = optimizer.param_groups

    def closure():
        assert optimizer.param_groups is groups
        return backward(model, optimizer, 0)

    optimizer.step(closure)
    optimizer.step(closure=closure)
    assert optimizer.step(closure).isfinite()


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 5, 1.0)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_base_rates_and_the_steps_are_theirs_times_the_ratio(name):
    steered, plain, reference = (mlp(5, 7, 3) for _ in range(3))
    settings = {"lr": 0.1, "momentum": 0.85}
    optimizers = {"steered": SGD(steered.parameters(), **settings), "plain": SGD(plain.parameters(), **settings)}
    schedulers = {key: SCHEDULERS[name](optimizer) for key, optimizer in optimizers.items()}
    LayerwiseRates(optimizers["steered"], FixedRates(RATIOS), steered)
    by_hand = SGD(split(reference, RATIOS, 1.0), **settings)
    ratios = [group["lr"] for group in by_hand.param_groups]
    base_rates = set()
    for step in range(12):
        base_rates.add(optimizers["plain"].param_groups[0]["lr"])
        groups = {key: optimizer.param_groups[0] for key, optimizer in optimizers.items()}
        assert {k: v for k, v in groups["steered"].items() if k != "params"} == {
            k: v for k, v in groups["plain"].items() if k != "params"
        }
        for group, ratio in zip(by_hand.param_groups, ratios, strict=True):
            group.update(lr=groups["plain"]["lr"] * ratio, momentum=groups["plain"]["momentum"])
        for model, optimizer in ((steered, optimizers["steered"]), (plain, optimizers["plain"]), (reference, by_hand)):
            train(model, optimizer, range(step, step + 1))
        for scheduler in schedulers.values():
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert schedulers["steered"].state_dict().keys() == schedulers["plain"].state_dict().keys()
    assert optimizers["steered"].param_groups[0]["lr"] == optimizers["plain"].param_groups[0]["lr"]
    assert len(base_rates) > 2 and same(steered, reference)


def test_an_exception_in_the_closure_leaves_nothing_behind():
    model, reference = mlp(5, 7, 3), mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    groups = optimizer.param_groups
    train(model, optimizer, range(0, 2), closure=True)
    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no data")))
    assert optimizer.param_groups is groups
    train(model, optimizer, range(2, 4), closure=True)
    train(reference, SGD(split(reference, RATIOS, 0.1), momentum=0.9), 4)
    assert same(model, reference)


def fails_in_step():
    """A steered optimizer whose third step raises when its groups are regrouped."""
    model = mlp(5, 7, 3)
    optimizer = Spy(model.parameters(), lr=0.1, fail_at=[2])
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    groups = optimizer.param_groups
    with pytest.raises(RuntimeError, match="the step failed"):
        train(model, optimizer, 3)
    return model, optimizer, rates, groups


@pytest.mark.parametrize("way", ["restore", "state_dict", "load_state_dict", "remove", "next step"])
def test_an_exception_in_the_step_is_recovered_from(way):
    model, optimizer, rates, groups = fails_in_step()
    if way == "restore":
        rates.restore()
    elif way == "state_dict":
        assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [0.1]
    elif way == "load_state_dict":
        optimizer.load_state_dict(SGD(mlp(5, 7, 3).parameters(), lr=0.05).state_dict())
        assert [group["lr"] for group in optimizer.param_groups] == [0.05]
        return
    elif way == "remove":
        rates.remove()
    else:
        backward(model, optimizer, 3)
        optimizer.step()
        assert rates_seen(optimizer, model)[-1] == rates_seen(optimizer, model)[0]
    assert optimizer.param_groups is groups and [group["lr"] for group in groups] == [0.1]


def test_state_dict_in_the_middle_is_that_of_an_unsteered_optimizer():
    steered, plain = mlp(5, 7, 3), mlp(5, 7, 3)
    optimizer, other = AdamW(steered.parameters(), lr=0.01), AdamW(plain.parameters(), lr=0.01)
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), steered)
    train(steered, optimizer, 3)
    train(plain, other, 3)
    saved, expected = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"] and saved["state"].keys() == expected["state"].keys()
    other.load_state_dict(copy.deepcopy(saved))  # goes on without dynamon
    plain.load_state_dict(steered.state_dict())
    rates.remove()
    assert same(train(plain, other, range(3, 5)), train(steered, optimizer, range(3, 5)))


def test_load_state_dict_goes_on_steered():
    whole, parts = mlp(5, 7, 3), mlp(5, 7, 3)
    optimizer = AdamW(whole.parameters(), lr=0.01)
    LayerwiseRates(optimizer, FixedRates(RATIOS), whole)
    train(whole, optimizer, 6)
    first = AdamW(parts.parameters(), lr=0.01)
    LayerwiseRates(first, FixedRates(RATIOS), parts)
    train(parts, first, 3)
    second = AdamW(parts.parameters(), lr=0.7)
    LayerwiseRates(second, FixedRates(RATIOS), parts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(train(parts, second, range(3, 6)), whole)


def test_a_tensor_rate():
    steered, reference = mlp(5, 7, 3), mlp(5, 7, 3)
    rate = torch.tensor(0.01)
    optimizer = AdamW(steered.parameters(), lr=rate, foreach=False)
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), steered)
    objects = []
    optimizer.register_step_pre_hook(lambda o, *_: objects.append([id(g["lr"]) for g in o.param_groups]))
    train(steered, optimizer, 2)
    rate.mul_(0.5)  # as a capturable schedule does
    train(steered, optimizer, range(2, 4))
    assert optimizer.param_groups[0]["lr"] is rate and rates.base_rates()["0.weight"] == float(rate)
    assert len({tuple(ids) for ids in objects}) == 1 and len(objects[0]) == 3  # the same objects every step
    groups = split(reference, RATIOS, 1.0)
    by_hand = AdamW([{**g, "lr": torch.tensor(0.01) * g["lr"]} for g in groups], foreach=False)
    train(reference, by_hand, 2)
    for group, given in zip(by_hand.param_groups, groups, strict=True):
        group["lr"] = rate * given["lr"]
    assert same(train(reference, by_hand, range(2, 4)), steered)


class Counting(SGD):
    """Writes into its groups, as Schedule-Free and others do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = group["lr"] * 0.5
            group["history"] = [*group.get("history", []), group["k"]]
        return super().step(closure)


def test_what_the_optimizer_writes_into_its_groups_is_carried_back():
    model = mlp(5, 7, 3)
    optimizer = Counting(model.parameters(), lr=0.25)
    LayerwiseRates(optimizer, FixedRates({"0.*": 0.5, "2.bias": 0.25}), model)  # powers of two divide exactly
    train(model, optimizer, 3)
    (group,) = optimizer.param_groups
    assert group["k"] == 3 and group["history"] == [1, 2, 3] and group["lr"] == 0.25 / 8
    assert len(group["params"]) == 4


class AllOnes(Rule):
    def ratios(self):
        import numpy as np

        return np.ones(len(self.layers))


@pytest.mark.parametrize(
    "rule", [FixedRates({}), AllOnes(), NoiseAdaptiveRates(warmup=100), NoiseAdaptiveRates(floor=1.0)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratios_of_one_are_bitwise_neutral(name, rule):
    make, optimizer_of = OPTIMIZERS[name]
    steered, plain = make_model(make), make_model(make)
    optimizer, other = optimizer_of(steered.parameters()), optimizer_of(plain.parameters())
    LayerwiseRates(optimizer, copy.deepcopy(rule), steered)
    groups, seen = optimizer.param_groups, []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups is groups))
    train(plain, other, 5)
    assert same(train(steered, optimizer, 5), plain)
    assert seen == [True] * 5
    for p, q in zip(steered.parameters(), plain.parameters(), strict=True):
        for key, value in other.state[q].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), key


def fake(name, module="elsewhere"):
    kind = type(name, (SGD,), {"__module__": module})
    return kind([nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (fake("Prodigy"), "one step size for all groups"),
        (fake("DAdaptAdam"), "one step size for all groups"),
        (fake("Mine", "dadaptation.dadapt_sgd"), "one step size for all groups"),
        (fake("AdamWScheduleFree"), "weight averaging depends on the history of the rate"),
        (fake("SGDScheduleFreeClosure", "schedulefree.sgd"), "weight averaging"),
        (torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), "evaluates the closure many times"),
        (fake("ZeroRedundancyOptimizer"), "partitions its groups"),
        (fake("DeepSpeedZeroOptimizer"), "DeepSpeed owns the parameter groups"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_refusals(optimizer, reason):
    model = nn.ParameterList(optimizer.param_groups[0]["params"])
    assert reason in unsupported_reason(optimizer)
    with pytest.raises(ValueError, match=f"{type(optimizer).__name__} cannot take layerwise rates: .*{reason}"):
        LayerwiseRates(optimizer, FixedRates({}), model)


def test_refusals_of_things_that_are_no_optimizers():
    assert "list is not a torch.optim.Optimizer" in unsupported_reason([])

    class NoRate(torch.optim.Optimizer):
        pass

    assert "a parameter group has no 'lr'" in unsupported_reason(NoRate([nn.Parameter(torch.ones(1))], {}))
    assert all(
        unsupported_reason(optimizer_of(make_model(make).parameters())) is None
        for make, optimizer_of in OPTIMIZERS.values()
    )


def test_bad_arguments():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lag must be 0 or 1, got 2"):
        LayerwiseRates(optimizer, FixedRates({}), model, lag=2)
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        LayerwiseRates(optimizer, FixedRates({}), mlp(5, 7, 3))
    with pytest.raises(ValueError, match="matches no layer"):
        LayerwiseRates(optimizer, FixedRates({"nope": 0.5}), model)
    rates = LayerwiseRates(optimizer, FixedRates({}), model)  # what failed before holds no claim
    with pytest.raises(ValueError, match="this SGD is steered already"):
        LayerwiseRates(optimizer, FixedRates({}), model)
    rates.remove()
    LayerwiseRates(optimizer, FixedRates(RATIOS), model).remove()
    reference = mlp(5, 7, 3)
    assert same(train(model, optimizer, 2), train(reference, SGD(reference.parameters(), lr=0.1), 2))


def test_parameters_outside_the_model_and_frozen_ones_keep_the_base_rate():
    model, outside = mlp(5, 7, 3), nn.Parameter(torch.ones(3))
    model[0].bias.requires_grad_(False)
    optimizer = Spy([*model.parameters(), outside], lr=0.1)
    rates = LayerwiseRates(optimizer, FixedRates({"*.weight": 0.5}), model)
    assert rates.ratios == {"0.weight": 0.5, "0.bias": 1.0, "2.weight": 0.5, "2.bias": 1.0}
    train(model, optimizer, 1)
    assert optimizer.seen[0][id(outside)] == optimizer.seen[0][id(model[0].bias)] == 0.1
    assert optimizer.seen[0][id(model[0].weight)] == 0.05


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
def test_parameters_that_join_later_are_steered_too(closure):
    steered, reference = mlp(5, 7, 3), mlp(5, 7, 3)
    optimizer = SGD(steered[2].parameters(), lr=0.1, momentum=0.9)
    rates = LayerwiseRates(optimizer, FixedRates({"*.weight": 0.5}), steered)
    by_hand = SGD(
        [{"params": [reference[2].weight], "lr": 0.1 * 0.5}, {"params": [reference[2].bias]}], lr=0.1, momentum=0.9
    )
    train(steered, optimizer, 3, closure)
    train(reference, by_hand, 3)
    optimizer.zero_grad(), by_hand.zero_grad()
    optimizer.add_param_group({"params": list(steered[0].parameters()), "lr": 0.03})
    by_hand.add_param_group({"params": [reference[0].weight], "lr": 0.03 * 0.5})
    by_hand.add_param_group({"params": [reference[0].bias], "lr": 0.03})
    train(steered, optimizer, range(3, 6), closure)
    assert same(steered, train(reference, by_hand, range(3, 6)))
    assert rates.ratios["0.weight"] == 0.5 and [group["lr"] for group in optimizer.param_groups] == [0.1, 0.03]


def test_what_was_learned_stays_when_parameters_join():
    model = mlp(5, 7, 3)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, noise_rule(), model, lag=0)
    train(model, optimizer, 4)
    noise = dict(zip(rates.rule.noise.names, rates.rule.noise.values, strict=True))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, range(4, 5))
    assert rates.rule.updates == 4 and len(rates.ratios) == 4
    after = dict(zip(rates.rule.noise.names, rates.rule.noise.values, strict=True))
    assert math.isnan(after["0.weight"]) and all(0.3 < after[n] / noise[n] < 3 for n in noise)
    assert rates.ratios["0.weight"] == 1


def test_tied_weights_have_one_rate():
    model = gpt(tied=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, FixedRates({"lm_head.weight": 0.5}), model)
    assert rates.ratios["wte.weight"] == 0.5 and "lm_head.weight" not in rates.ratios


def noise_rule():
    return NoiseAdaptiveRates(warmup=0, group_by="all", beta2=0.8)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(lag, stop):
    def start():
        model = mlp(5, 7, 3)
        optimizer = AdamW(model.parameters(), lr=0.01)
        return model, optimizer, LayerwiseRates(optimizer, noise_rule(), model, lag=lag)

    whole, optimizer, rates = start()
    train(whole, optimizer, 9)

    going_on, other, other_rates = start()
    train(going_on, other, stop)
    file = io.BytesIO()
    torch.save([going_on.state_dict(), other.state_dict(), other_rates.state_dict()], file)
    train(going_on, other, range(stop, 9))
    assert same(going_on, whole), "saving disturbed the run"

    file.seek(0)
    weights, state, saved = torch.load(file, weights_only=True)
    resumed, third, third_rates = start()
    train(resumed, third, 2)  # whatever was there is overwritten
    resumed.load_state_dict(weights)
    third.load_state_dict(state)
    third_rates.load_state_dict(saved)
    train(resumed, third, range(stop, 9))
    assert same(resumed, whole)
    assert third_rates.ratios == rates.ratios and min(rates.ratios.values()) < 1
    assert third_rates.rule.updates == rates.rule.updates


def test_without_the_stored_gradient_one_update_is_skipped():
    model = mlp(5, 7, 3)
    optimizer = AdamW(model.parameters(), lr=0.01)
    rates = LayerwiseRates(optimizer, noise_rule(), model)
    train(model, optimizer, 4)
    small, large = rates.state_dict(save_gradient=False), rates.state_dict()
    assert not small["gradients"]["previous"] and len(large["gradients"]["previous"]) == 4
    assert small["rule"] == large["rule"] and rates.rule.updates == 3
    rates.load_state_dict(small)
    train(model, optimizer, range(4, 7))
    rates.settle()
    assert rates.rule.updates == 5  # of three gradients the first had nothing to be compared with


def test_state_of_a_fixed_rule_holds_no_gradient():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    train(model, optimizer, 2)
    assert rates.state_dict() == {"kind": "FixedRates", "rule": {}, "gradients": {"previous": {}}}


def drift(lag, steps=8):
    """Rates of every step under gradients that do not depend on the weights."""
    model = mlp(5, 7, 3)
    optimizer = Spy(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, noise_rule(), model, lag=lag)
    generator = torch.Generator().manual_seed(0)
    for step, scale in zip(range(steps), itertools.cycle([1.0, 3.0]), strict=False):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator) * scale**i
        optimizer.step()
        assert len(optimizer.seen) == step + 1
    return rates_seen(optimizer, model), rates


def test_a_lag_of_one_acts_one_step_later():
    (published, first), (lagged, second) = drift(0), drift(1)
    assert len({tuple(rates.values()) for rates in published}) > 3
    assert lagged[1:] == published[:-1]
    assert lagged[0] == dict.fromkeys(lagged[0], 0.1) == published[0] != published[-1]
    second.settle()
    assert second.ratios == first.ratios


def test_ratios_are_those_the_next_step_takes():
    model = mlp(5, 7, 3)
    optimizer = Spy(model.parameters(), lr=0.5)
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    train(model, optimizer, 1)
    assert rates_seen(optimizer, model)[0] == {name: 0.5 * ratio for name, ratio in rates.ratios.items()}


@pytest.mark.parametrize("keyed", [False, True])
def test_observing_before_clipping_reads_unclipped_gradients_once(keyed):
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, noise_rule(), model, lag=0)
    for step in range(4):
        backward(model, optimizer, step)
        norms = [float(p.grad.abs().sum()) for p in model.parameters()]
        for _ in range(2 if keyed else 1):
            rates.observe(key=step if keyed else None)
        seen = rates.reader.read().wait()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert rates.reader.step == step + 1 and rates.rule.updates == step
        assert seen.l1.tolist() == pytest.approx(norms, rel=1e-5)


def test_a_nonfinite_gradient_changes_no_ratio():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.01)
    rates = LayerwiseRates(optimizer, noise_rule(), model, lag=0)
    train(model, optimizer, 4)
    before = rates.ratios
    backward(model, optimizer, 4)
    model[0].weight.grad[0, 0] = math.nan
    rates.observe()
    model[0].weight.grad[0, 0] = 0.0
    optimizer.step()
    assert rates.ratios == before
    train(model, optimizer, range(5, 6))
    assert rates.ratios == before
    train(model, optimizer, range(6, 7))
    assert rates.ratios != before


class TwoClosures(SGD):
    """Evaluates the closure twice a step, as SAM does."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


def test_a_closure_that_is_called_twice_sees_the_groups_of_the_user_twice():
    model, reference = mlp(5, 7, 3), mlp(5, 7, 3)
    optimizer = TwoClosures(model.parameters(), lr=0.1, momentum=0.9)
    LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    groups, seen = optimizer.param_groups, []

    for step in range(4):

        def closure(step=step):
            seen.append(optimizer.param_groups is groups)
            return backward(model, optimizer, step)

        optimizer.step(closure)
        assert optimizer.param_groups is groups
    assert seen == [True] * 8
    assert same(model, train(reference, SGD(split(reference, RATIOS, 0.1), momentum=0.9), 4))


def test_parameters_of_one_ratio_share_a_group():
    model = gpt()
    optimizer = SGD(model.parameters(), lr=0.1)
    counts = []
    rates = LayerwiseRates(optimizer, FixedRates({"role:hidden": 0.5, "role:vector": 2.0}), model)
    optimizer.register_step_pre_hook(lambda o, *_: counts.append(len(o.param_groups)))
    tokens = torch.randint(11, (2, 6))
    model(tokens).sum().backward()
    optimizer.step()
    assert counts == [3] and set(rates.ratios.values()) == {0.5, 1.0, 2.0}


class OutOfMemory(SGD):
    fail = True

    def step(self, closure=None):
        if self.fail:
            raise torch.OutOfMemoryError("no memory")
        return super().step(closure)


def test_what_the_user_does_after_a_failed_step_is_kept():
    model, extra = mlp(5, 7, 3), torch.nn.Parameter(torch.ones(2))
    optimizer = OutOfMemory(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), model)
    rates.rule._ramp.aim(np.full(4, 0.5))
    for p in (*model.parameters(), extra):
        p.grad = torch.ones_like(p)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    optimizer.fail = False
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.0] and float(extra.detach()[0]) == 0
    assert len(rates.reader.state_dict()["previous"]) == 4  # the gradients of the second step were read


def test_the_ratios_of_the_step_taken_last():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0, group_by="all"), model)
    assert set(rates.applied.values()) == {1.0}
    before = {}
    optimizer.register_step_pre_hook(lambda *_: before.update(rates.ratios))
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        assert rates.applied == before
        rates.state_dict()  # settles: the ratios of the next step are known now
        assert rates.applied == before and (step < 1 or rates.ratios != before)


def bitsandbytes(**overrides):
    """An optimizer as bitsandbytes makes them: overrides are kept by the numbers of group and parameter."""
    optimizer = fake("AdamW8bit", "bitsandbytes.optim.adamw")
    optimizer.mng = type("GlobalOptimManager", (), {"index2config": {}, "pid2config": {}, **overrides})()
    return optimizer


def test_overrides_by_place_are_refused():
    assert unsupported_reason(bitsandbytes()) is None
    assert "AdamW8bit cannot take layerwise rates: it has overrides" in unsupported_reason(
        bitsandbytes(index2config={(0, 1): {}})
    )
    assert "overrides" in unsupported_reason(bitsandbytes(module_weight_config_triple=[(None, "weight", {})]))


def test_a_compiled_step_is_refused():
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    backward(model, optimizer, 0)
    before, groups = copy.deepcopy(model), optimizer.param_groups
    with pytest.raises(RuntimeError, match="SGD cannot take layerwise rates in a step that is compiled"):
        torch.compile(optimizer.step, backend="eager")()
    assert same(model, before) and optimizer.param_groups is groups
    optimizer.step()  # by itself it goes on
    assert not same(model, before) and rates.applied["2.weight"] == 0.77


def test_a_step_that_is_captured_is_refused(monkeypatch):
    model = mlp(5, 7, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    LayerwiseRates(optimizer, FixedRates(RATIOS), model)
    backward(model, optimizer, 0)
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: True)
    with pytest.raises(RuntimeError, match="SGD cannot take layerwise rates in a step that is captured"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()


def test_a_model_on_two_devices():
    """By hand, as pipelines are; ``meta`` stands for the second. Ratios that follow no gradients act on both."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD cannot take rates that follow gradients: .* on cpu and meta, and grad"):
        LayerwiseRates(optimizer, NoiseAdaptiveRates(), model)
    assert optimizer.param_groups and not optimizer._optimizer_step_pre_hooks
    LayerwiseRates(optimizer, FixedRates({"*.weight": 0.5}), model)
    weight = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(model[0].weight, weight - 0.1 * 0.5)


class NoMemory:
    """Makes the statistics of gradients run out of memory at some calls."""

    def __init__(self, monkeypatch, at):
        import dynamon.quantities.gradient_statistics

        self.calls, self.at, inner = 0, at, dynamon.quantities.gradient_statistics.gradient_stats

        def gradient_stats(*arguments, **keywords):
            self.calls += 1
            if self.calls in self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return inner(*arguments, **keywords)

        monkeypatch.setattr("dynamon.quantities.gradient_statistics.gradient_stats", gradient_stats)


def steered_by_noise(**arguments):
    model = mlp(5, 7, 6, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), model, **arguments)


def test_a_reading_that_runs_out_of_memory_leaves_the_ratios_and_training_goes_on(monkeypatch):
    model, optimizer, rates = steered_by_noise()
    train(model, optimizer, range(6))
    before = rates.ratios
    failing = NoMemory(monkeypatch, {1, 2})
    with pytest.warns(UserWarning, match="could not be read: out of memory. Ratios stay unchanged") as said:
        train(model, optimizer, range(6, 7))
        kept = rates.ratios  # with the reading of the step before
        train(model, optimizer, range(7, 9))
    assert len(said) == 1 and failing.calls == 3 and rates.ratios == kept != before
    train(model, optimizer, range(9, 11))  # the first has nothing to compare with
    assert rates.ratios != kept


def test_of_several_processes_all_must_read(monkeypatch):
    model, optimizer, _ = steered_by_noise()
    NoMemory(monkeypatch, {1})
    monkeypatch.setattr("dynamon.optim.layerwise.has_several_processes", lambda: True)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, range(1))


def test_other_errors_are_raised(monkeypatch):
    model, optimizer, _ = steered_by_noise()

    def gradient_stats(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("dynamon.quantities.gradient_statistics.gradient_stats", gradient_stats)
    with pytest.raises(RuntimeError, match="a bug"):
        train(model, optimizer, range(1))


def test_gradients_that_are_only_kept_may_run_out_of_memory_too(monkeypatch):
    model, optimizer, rates = steered_by_noise(read_every=2)
    store = rates.reader.store
    train(model, optimizer, range(4))

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rates.reader.store = fail
    with pytest.warns(UserWarning, match="out of memory"):
        train(model, optimizer, range(4, 8))
    rates.reader.store = store
    train(model, optimizer, range(8, 10))


def test_roles_and_geometry_can_be_stated():
    model = mlp(6, 8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(), model, roles={"0.weight": "embedding"}, geometry="spectral")
    assert [layer.role for layer in rates.layers] == ["embedding", "vector", "head", "vector"]
    assert [norm.name for norm in rates.reader.norms] == ["one_to_inf", "rms", "one_to_inf", "rms"]
    rates.remove()
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(), model)
    assert [layer.role for layer in rates.layers] == ["hidden", "vector", "head", "vector"]
    assert {norm.name for norm in rates.reader.norms} == {"one_to_inf"}
    rates.remove()
    with pytest.raises(ValueError, match="geometry must be 'sign', 'euclidean' or 'spectral', got 'l2'"):
        LayerwiseRates(optimizer, NoiseAdaptiveRates(), model, geometry="l2")
    with pytest.raises(ValueError, match="unknown role 'tail'"):
        LayerwiseRates(optimizer, NoiseAdaptiveRates(), model, roles={"0.weight": "tail"})
    assert steering_of(optimizer) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be of type Optimizer, got str"),
        ({"rule": "noise"}, "rule must be of type Rule, got str"),
        ({"rule": FixedRates}, "rule must be of type Rule, got ABCMeta"),
        ({"model": None}, "model must be of type Module, got NoneType"),
        ({"read_every": 2.0}, "read_every must be an integer, got 2.0"),
        ({"max_groups": 1.5}, "max_groups must be a whole number of 1 or more, or None, got 1.5"),
    ],
)
def test_wrong_types_are_named(change, message):
    model = mlp(6, 8, 4)
    given = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "rule": FixedRates({}), "model": model}
    with pytest.raises(TypeError, match=message):
        LayerwiseRates(**{**given, **change})
