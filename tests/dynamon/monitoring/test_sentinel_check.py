"""The limit that tells which steps are looked at: how often noise exceeds it, and that jumps do."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import describe_layers
from dynamon.monitoring.sentinel_check import GradientCheck, RunningLimit, StepCheck
from dynamon.monitoring.sentinel_norms import OptimizerNorms

NOISE = {
    "Gaussian": lambda rng, n: rng.normal(size=n),
    "Laplacian": lambda rng, n: rng.laplace(size=n),
    "heavy": lambda rng, n: rng.standard_t(2, size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) ** 2,
    "two kinds": lambda rng, n: rng.normal(size=n) + 5 * (np.arange(n) % 8 == 0),
    "walk": lambda rng, n: np.cumsum(0.1 * rng.normal(size=n)) + rng.normal(size=n),
}


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("name", NOISE)
def test_noise_seldom_exceeds_it(name: str, scale: float) -> None:
    """At some one step in a hundred at most, whatever its tail, and from the beginning."""
    numbers = scale * NOISE[name](np.random.default_rng(0), 20_000)
    limit = RunningLimit(math.log(1.5))
    out = np.array([limit.is_exceeded(float(number)) for number in numbers])
    assert out.mean() <= 0.02 and out[:200].sum() <= 20


@pytest.mark.parametrize("name", NOISE)
def test_a_jump_exceeds_it(name: str) -> None:
    """Of twenty spreads and more, after whatever noise; the number after it does not."""
    numbers = 0.1 * NOISE[name](np.random.default_rng(1), 2000)
    limit = RunningLimit(math.log(1.5))
    for number in numbers:
        limit.is_exceeded(float(number))
    usual = float(np.median(numbers[-50:]))
    assert limit.is_exceeded(usual + 20.0) and not limit.is_exceeded(usual)


def test_trends_are_followed_and_silence_is_no_trap() -> None:
    limit = RunningLimit(math.log(1.5))
    assert not any(limit.is_exceeded(-0.02 * i + 0.1 * (-1) ** i) for i in range(1000))
    still = RunningLimit(math.log(1.5))
    assert not any(still.is_exceeded(1.0) for _ in range(1000))
    assert not still.is_exceeded(1.3) and still.is_exceeded(2.0)


def test_a_level_that_moves_for_good_is_taken_up() -> None:
    limit = RunningLimit(math.log(1.5))
    for i in range(200):
        limit.is_exceeded(0.1 * (-1) ** i)
    out = [limit.is_exceeded(5.0 + 0.1 * (-1) ** i) for i in range(600)]
    assert out[0] and not any(out[300:]) and sum(out) < 60


@pytest.mark.parametrize("kind", ["flat", "a slow rise", "a rise for good", "a fast fall"])
@pytest.mark.parametrize("times", [4.0, 30.0])
def test_spikes_that_come_again_and_again_are_seen(kind: str, times: float) -> None:
    """One at each 137th step; those right after the level has moved may be missed."""
    steps = np.arange(4000)
    level = {
        "flat": 0 * steps,
        "a slow rise": np.minimum(np.maximum(steps - 1000, 0) / 30, 1) * math.log(30),
        "a rise for good": (steps >= 1000) * math.log(30),
        "a fast fall": -4 * np.minimum(steps / 80, 1),
    }[kind]
    numbers = level + 0.1 * np.random.default_rng(0).normal(size=len(steps))
    spikes = steps[80::137]
    numbers[spikes] += math.log(times)
    limit = RunningLimit(math.log(1.5))
    out = np.array([limit.is_exceeded(float(number)) for number in numbers])
    assert out[spikes].sum() >= len(spikes) - 1 and out.sum() <= len(spikes) + 60


def test_numbers_that_are_none() -> None:
    limit = RunningLimit(math.log(1.5))
    for i in range(50):
        assert not limit.is_exceeded(math.nan if i % 3 == 0 else 0.1 * (-1) ** i)
    assert [limit.is_exceeded(math.inf) for _ in range(3)] == [True, False, False]
    assert not limit.is_exceeded(0.0) and limit.is_exceeded(math.inf)


def test_losses_of_any_sign() -> None:
    check = StepCheck()
    assert not any(check.is_loss_out(1.0 + 0.1 * (-1) ** i - 0.01 * i) for i in range(300))  # falls below zero
    assert not check.is_loss_out(-2.0) and check.is_loss_out(50.0) and check.is_loss_out(math.nan)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "strided", "no bias", "sparse", "large"])
def test_gradients_of_any_kind(kind: str) -> None:
    """A rise of all is found, small changes are none, and layers whose gradient is zero or gone are replaced."""
    torch.manual_seed(0)
    width = 300 if kind == "large" else 12
    layers = [nn.Embedding(50, width, sparse=kind == "sparse")]
    layers += [nn.Linear(width, width, bias=kind != "no bias") for _ in range(6)]
    dtypes = {"float64": torch.float64, "bfloat16": torch.bfloat16}
    model = nn.ModuleList(layers).to(dtypes.get(kind, torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check = GradientCheck(OptimizerNorms(optimizer, describe_layers(model)))

    def is_out(size: float, left_out: tuple[int, ...] = ()) -> bool:
        for i, p in enumerate(model.parameters()):
            p.grad = None if i in left_out else size * torch.randn_like(p)
            if kind == "strided" and p.ndim == 2 and p.grad is not None:
                p.grad = p.grad.t().contiguous().t()
        weight = model[0].weight
        words = torch.zeros_like(weight)
        words[45:] = size
        weight.grad = words.to_sparse(1) if kind == "sparse" else words  # its first entries are zero
        return check.is_out_now(1.0)

    assert not any(is_out(1.0 + 0.1 * (i % 3)) for i in range(60))
    assert is_out(20.0) and not is_out(1.0)
    left_out = tuple(one.place for one in check._watched[:2])
    assert not any(is_out(1.0, left_out) for _ in range(40))
    assert is_out(20.0, left_out)


def test_measured_gradients_are_checked_alike() -> None:
    rng = np.random.default_rng(0)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    norms = OptimizerNorms(torch.optim.SGD(model.parameters(), lr=0.1), describe_layers(model))
    check = GradientCheck(norms)
    assert not any(check.is_out(rng.uniform(0.9, 1.1, 10) * (np.arange(10) > 2)) for _ in range(60))
    assert check.is_out(np.full(10, 9.0)) and not check.is_out(np.zeros(10)) and not check.is_out(np.ones(10))
    only = np.where(np.arange(10) == check._watched[0].place, np.nan, 0.0)
    assert check.is_out(only)  # one that is not finite, beside others that are nothing
