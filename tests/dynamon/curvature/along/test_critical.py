"""Critical sharpness: exact on quadratics, careful elsewhere, and the weights come back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynamon.curvature import HessianOperator, critical_sharpness, directional_sharpness
from tests.models import mlp, samples

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
RATES = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]


def quadratic(n=8, seed=0, sign=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = (sign * (factor @ factor.mT / n + 0.01 * torch.eye(n))).to(dtype)
    w = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return w, (lambda: w @ matrix @ w / 2), matrix


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", range(4))
def test_on_quadratics_it_is_the_sharpness_along_the_gradient(rate, seed):
    """Whatever the rate of the step, the critical rate is 2 / (directional sharpness)."""
    w, loss, matrix = quadratic(seed=seed)
    g = (matrix @ w).detach()
    truth = float(g @ matrix @ g / (g @ g))
    found = critical_sharpness(loss, [w], -rate * g, rate=rate)
    assert found.sharpness == pytest.approx(truth, rel=1e-6)
    assert found.multiple == pytest.approx(2 / (rate * truth), rel=1e-6)
    assert found.lower <= found.multiple * (1 + 1e-9) and found.multiple * (1 - 1e-9) <= found.upper
    assert found.rate == rate and found.evaluations <= 16


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("curvature", [1.0, 100.0])
def test_on_round_quadratics(rate, curvature):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = critical_sharpness(lambda: curvature * w.square().sum() / 2, [w], -rate * curvature * w.detach(), rate=rate)
    assert found.sharpness == pytest.approx(curvature, rel=1e-6)


@pytest.mark.parametrize("rate", [1e-2, 0.1, 1.0, 10.0])
def test_in_single_precision(rate):
    w, loss, matrix = quadratic(dtype=torch.float32)
    g = (matrix @ w).detach()
    truth = float(g @ matrix @ g / (g @ g))
    assert critical_sharpness(loss, [w], -rate * g, rate=rate).sharpness == pytest.approx(truth, rel=1e-2)


@PROPERTY
@given(st.integers(1, 20), st.integers(0, 2**31), st.floats(-2, 2))
def test_any_downhill_step_of_a_quadratic(n, seed, exponent):
    """The loss is back at twice the greedy multiple."""
    w, loss, _ = quadratic(n, seed)
    hessian = HessianOperator(loss, [w])
    d = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    direct = directional_sharpness(hessian, d if hessian.gradient @ d < 0 else -d)
    step = (d if hessian.gradient @ d < 0 else -d) * direct.best_multiple / 10**exponent
    found = critical_sharpness(loss, [w], step)
    assert found.multiple == pytest.approx(2 * 10**exponent, rel=1e-4)
    assert found.rate is None and math.isnan(found.sharpness)


def test_usually_five_to_seven_evaluations_near_the_edge():
    for share in (0.2, 0.5, 0.9, 1.5, 3.0):
        w, loss, matrix = quadratic()
        g = (matrix @ w).detach()
        rate = share * 2 / float(g @ matrix @ g / (g @ g))
        calls = []
        found = critical_sharpness(lambda loss=loss, calls=calls: calls.append(1) or loss(), [w], -rate * g, rate=rate)
        assert len(calls) == found.evaluations <= 7


def test_uphill_is_zero_and_an_endless_slope_infinite():
    w, loss, matrix = quadratic()
    g = (matrix @ w).detach()
    up = critical_sharpness(loss, [w], g, rate=0.1)
    assert up.multiple == 0 == up.lower and up.upper < 1 and math.isnan(up.sharpness)
    w, loss, matrix = quadratic(sign=-1.0)
    down = critical_sharpness(loss, [w], -0.1 * (matrix @ w).detach(), rate=0.1)
    assert down.multiple == math.inf == down.upper and down.lower > 1 and math.isnan(down.sharpness)


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
@pytest.mark.parametrize("wall", [0.3, 1.7, 12.0])
def test_a_wall_of_nan_is_uphill(wall, beyond):
    """A slope that ends where the loss is no longer a number: the wall is what is found, within the tolerance."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def loss():
        return torch.where(w > wall, torch.full_like(w, beyond), -w).sum()

    found = critical_sharpness(loss, [w], torch.ones(1, dtype=torch.float64), rate=1.0, tol=0.01)
    assert found.multiple == pytest.approx(wall, rel=0.03)
    assert found.lower <= wall < found.upper and found.sharpness == pytest.approx(2 / wall, rel=0.03)


def test_a_loss_that_is_no_quadratic():
    """``cosh`` along a line: the loss is back at the mirror image, and a tighter tolerance comes closer."""
    w = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    errors = []
    for tol in (1 / 16, 1e-3):
        found = critical_sharpness(
            lambda: w.cosh().sum(), [w], torch.tensor([-0.7]).double(), tol=tol, max_evaluations=60
        )
        errors.append(abs(found.multiple / (4 / 0.7) - 1))
        assert found.lower <= 4 / 0.7 <= found.upper
    assert errors[0] <= 0.15 and errors[1] <= 5e-3


def test_of_a_network():
    """The loss really is no higher just before the multiple, and higher just beyond."""
    inputs, labels = samples(20, 5, dtype=torch.float64)
    model = mlp(5, 7, 3).double()
    loss = lambda: nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    params = dict(model.named_parameters())
    step = -0.5 * HessianOperator(loss, params).gradient
    found = critical_sharpness(loss, params, step, rate=0.5, tol=1e-3, max_evaluations=40)
    start, weights = loss().item(), {name: p.detach().clone() for name, p in params.items()}

    def at(multiple):
        pieces = step.split([p.numel() for p in params.values()])
        for (name, p), piece in zip(params.items(), pieces, strict=True):
            p.data = weights[name] + multiple * piece.view_as(p)
        return loss().item()

    assert at(0.99 * found.multiple) < start < at(1.01 * found.multiple)


def test_the_same_random_numbers_each_time():
    """Dropout of one mask is a smooth function; the stream afterwards is where it was."""
    torch.manual_seed(0)
    inputs, labels = samples(20, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 3)).double().train()
    params, drawn = list(model.parameters()), []

    def loss():
        drawn.append(float(torch.rand(())))
        return nn.functional.cross_entropy(model(inputs), labels)

    step = -0.5 * HessianOperator(loss, params).gradient
    state = torch.get_rng_state()
    drawn.clear()
    found = critical_sharpness(loss, params, step)
    assert len(drawn) == found.evaluations and len(set(drawn)) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails_at", [None, 1, 2, 4])
def test_the_weights_come_back_bit_for_bit(fails_at):
    w, loss, matrix = quadratic(dtype=torch.float32)
    w.grad = torch.ones_like(w)
    before, place, version, grad = w.detach().clone(), w.data_ptr(), w._version, w.grad
    state, calls = torch.get_rng_state(), []
    g = (matrix @ w).detach()

    def watched():
        calls.append(torch.rand(()))
        if len(calls) == fails_at:
            raise RuntimeError("a bad batch")
        assert not torch.is_grad_enabled()
        return loss()

    if fails_at is None:
        critical_sharpness(watched, [w], -0.37 * g)
    else:
        with pytest.raises(RuntimeError, match="a bad batch"):
            critical_sharpness(watched, [w], -0.37 * g)
    assert torch.equal(w.detach(), before) and w.data_ptr() == place and w._version == version and w.grad is grad
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    w, loss, _ = quadratic()
    for update, message in (
        (torch.ones(7), r"update must have shape \[8\], got \(7,\)"),
        (torch.zeros(8), "the update is zero"),
    ):
        with pytest.raises(ValueError, match=message):
            critical_sharpness(loss, [w], update)
    for arguments, message in (
        ({"tol": 0.0}, "tol must lie between 0 and 1, got 0.0"),
        ({"tol": 1.0}, "tol must lie between 0 and 1, got 1.0"),
        ({"max_evaluations": 2}, "max_evaluations must be at least 3, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            critical_sharpness(loss, [w], torch.ones(8).double(), **arguments)
    with pytest.raises(TypeError, match=r"update must be a tensor \[8\], got list"):
        critical_sharpness(loss, [w], [1.0] * 8)
    with pytest.raises(FloatingPointError, match="the loss at the present weights is not finite"):
        critical_sharpness(lambda: loss() * math.nan, [w], torch.ones(8).double())


def single_precision():
    model, (inputs, labels) = mlp(4, 8, 3), samples(32, 4)
    params = list(model.parameters())
    loss = lambda: nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    return loss, params, torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)])


def test_rounding_of_the_loss_is_not_a_descent():
    """In float32 a tiny step does not change the loss; that must not be taken for a way down."""
    loss, params, gradient = single_precision()
    found = critical_sharpness(loss, params, 0.1 * gradient, rate=0.1)
    assert found.multiple == 0 and math.isnan(found.sharpness)


def test_a_step_too_small_to_be_seen_is_made_longer():
    loss, params, gradient = single_precision()
    tiny, plain = (critical_sharpness(loss, params, -s * gradient, rate=s) for s in (1e-7, 1.0))
    assert tiny.sharpness == pytest.approx(plain.sharpness, rel=0.15)
