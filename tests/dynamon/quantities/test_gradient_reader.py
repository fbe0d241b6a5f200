"""When steering reads gradients: at some steps only, in two parts, without what nobody asked for."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dynamon.layers import describe_layers
from dynamon.optim import LayerwiseRates
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.rates import NoiseAdaptiveRates
from tests.models import gpt, mlp, samples


def train(model, rates, steps, begin=0, optimizer=None, parts=1):
    """Steps on batches of their own; what the rule was given at each."""
    optimizer = optimizer or rates.optimizer
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        inputs, labels = samples(8, 5, seed=step)
        for number in range(parts):
            chosen = slice(number * 8 // parts, (number + 1) * 8 // parts)
            (cross_entropy(model(inputs[chosen]), labels[chosen]) / parts).backward()
            if number + 1 < parts and rates is not None:
                rates.observe_part((number + 1) / parts)
        optimizer.step()


def steered(seed=0, read_every=1, lag=0, **arguments):
    model = mlp(5, 7, 6, 3, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = NoiseAdaptiveRates(**{"warmup": 0, "group_by": "all", "beta2": 0.0, **arguments})
    return model, LayerwiseRates(optimizer, rule, model, lag=lag, read_every=read_every)


@pytest.mark.parametrize("lag", [0, 1])
def test_every_third_step_is_read_with_the_one_before_it(lag):
    """With beta2 = 0 the noise is that of the last reading: the change between steps 3k - 1 and 3k."""
    model, rates = steered(read_every=3, lag=lag)
    gradients, seen = [], []
    rates.optimizer.register_step_post_hook(
        lambda *_: gradients.append([p.grad.detach().clone() for p in model.parameters()])
    )
    for step in range(12):
        train(model, rates, 1, step)
        seen.append((rates.rule.updates, rates.rule.noise.squared.copy()))
    for step, (updates, squared) in enumerate(seen, start=1 - lag):
        assert updates == step // 3
        if updates:
            at = step // 3 * 3 - 1  # counted from 0
            pairs = zip(gradients[at], gradients[at - 1], strict=True)
            np.testing.assert_allclose(squared, [float((a - b).abs().sum()) ** 2 for a, b in pairs], rtol=1e-4)


def test_reading_seldom_resumes_where_it_stopped():
    for stop in range(4, 9):
        whole, rates = steered(read_every=3, lag=1, beta2=0.9)
        train(whole, rates, 14)
        model, first = steered(read_every=3, lag=1, beta2=0.9)
        train(model, first, stop)
        state, inner = first.state_dict(), first.optimizer.state_dict()
        again, second = steered(read_every=3, lag=1, beta2=0.9)
        again.load_state_dict(model.state_dict())
        second.optimizer.load_state_dict(inner)
        second.load_state_dict(state)
        train(again, second, 14 - stop, stop)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)), stop


@pytest.mark.parametrize("read_every", [0, 1.5, True, "2"])
def test_read_every_is_checked(read_every):
    kind = ValueError if read_every == 0 else TypeError
    with pytest.raises(kind, match="read_every must be a"):
        steered(read_every=read_every)


@pytest.mark.parametrize("read_every", [1, 2])
def test_halves_of_a_window(read_every):
    """With beta2 = 0: sqrt(2) (A - B) / 2 of the two halves' gradients, whatever the steps between."""
    model, rates = steered(source="independent", read_every=read_every)
    halves = []
    for step in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, rates, 1, step, parts=2)
        after = [p.detach().clone() for p in model.parameters()]
        inputs, labels = samples(8, 5, seed=step)
        with torch.no_grad():
            for p, w in zip(model.parameters(), before, strict=True):
                p.copy_(w)
        halves.append([
            torch.autograd.grad(cross_entropy(model(inputs[half]), labels[half]), list(model.parameters()))
            for half in (slice(0, 4), slice(4, 8))
        ])  # fmt: skip
        with torch.no_grad():
            for p, w in zip(model.parameters(), after, strict=True):
                p.copy_(w)
        assert rates.rule.updates == (step + 1) // read_every
    first, second = halves[-1]
    expected = [float((a - b).abs().sum()) ** 2 / 2 for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rates.rule.noise.squared, expected, rtol=1e-4)
    assert min(rates.ratios.values()) < 1


def test_without_parts_independent_noise_steers_nothing():
    model, rates = steered(source="independent")
    train(model, rates, 5)
    assert set(rates.ratios.values()) == {1.0} and rates.rule.updates == 0


def test_a_rule_that_wants_no_parts_keeps_none():
    model, rates = steered()
    train(model, rates, 3, parts=2)
    assert rates.rule.updates == 2 and rates.reader._part is None


@pytest.mark.parametrize("family", ["sign", "euclidean", "spectral"])
def test_duals_of_gradients_come_when_they_are_asked_for(family):
    """The readings are the same whoever asks first."""
    model = gpt()
    layers = describe_layers(model)
    once, twice = (GradientReader(layers, family) for _ in range(2))
    for step in range(3):
        model.zero_grad()
        tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for reader in (once, twice):
            reader.begin(step)
        early = twice.read(dual=False).wait()
        direct, late = once.read().wait(), twice.read().wait()
        assert twice.read(dual=False).wait().dual is not None and np.isfinite(late.dual).all()
        for name in direct.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(direct, name), getattr(late, name), err_msg=name)
            if name != "dual":
                np.testing.assert_array_equal(getattr(early, name), getattr(late, name), err_msg=name)
        special = np.array([norm.name == "rms_to_rms" for norm in once.norms])
        assert np.isnan(early.dual[special]).all() and np.isfinite(early.dual[~special]).all()
        assert early.finite


def test_a_source_is_checked():
    with pytest.raises(ValueError, match=r"source must be one of \('successive', 'independent'\), got 'both'"):
        NoiseAdaptiveRates(source="both")
