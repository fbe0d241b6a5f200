"""Curvature along directions, exact on quadratics and against dense Hessians."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.curvature import (
    Diagonal,
    HessianOperator,
    batch_sharpness,
    directional_sharpness,
    norm_sharpness,
)
from dynamon.norms import get_norm
from tests.models import dense_hessian, mlp, samples

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(n, seed, sign=1.0):
    """Weights, their loss ``w.A w / 2 + b.w`` and A."""
    factor = gaussian(n, n, seed=seed)
    matrix = sign * (factor @ factor.mT / n + 0.01 * torch.eye(n, dtype=torch.float64))
    offset = gaussian(n, seed=seed + 1)
    w = gaussian(n, seed=seed + 2).requires_grad_()
    return w, (lambda: w @ matrix @ w / 2 + offset @ w), matrix, offset


@PROPERTY
@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(-6, 6), st.sampled_from([1.0, -1.0]))
def test_on_quadratics(n, seed, exponent, sign):
    w, loss, matrix, offset = quadratic(n, seed, sign)
    d = 10.0**exponent * gaussian(n, seed=seed + 3)
    found = directional_sharpness(HessianOperator(loss, [w]), d)
    gradient = (matrix @ w + offset).detach()
    assert found.sharpness == pytest.approx(float(d @ matrix @ d / (d @ d)), rel=1e-9)
    assert found.curvature == pytest.approx(float(d @ matrix @ d), rel=1e-9)
    assert found.slope == pytest.approx(float(gradient @ d), rel=1e-9, abs=1e-12 * float(d.norm()))
    torch.testing.assert_close(found.product, matrix @ d)


@PROPERTY
@given(st.integers(1, 30), st.integers(0, 2**31), st.integers(-6, 6))
def test_the_best_multiple_is_the_best_length(n, seed, exponent):
    """No multiple of the step has a lower loss, and twice the multiple is where the loss is back."""
    w, loss, _, _ = quadratic(n, seed)
    d = 10.0**exponent * gaussian(n, seed=seed + 3)
    best = directional_sharpness(HessianOperator(loss, [w]), d).best_multiple
    start = w.detach().clone()

    def at(multiple):
        w.data = start + multiple * d
        return loss().item()

    losses = {c: at(c * best) for c in (0.0, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0)}
    assert min(losses, key=losses.get) == 1.0
    assert losses[2.0] == pytest.approx(losses[0.0], rel=1e-6, abs=1e-9 * max(1, abs(losses[1.0])))


def test_the_best_multiple_of_a_step_just_taken():
    """1 for a step that went to the minimum along its line, 2 for one that came out at the same height."""
    w, loss, _, _ = quadratic(8, 0)
    start, d = w.detach().clone(), gaussian(8, seed=9)
    best = directional_sharpness(HessianOperator(loss, [w]), d).best_multiple
    for share in (0.25, 0.5, 1.0, 4.0):
        step = share * best * d
        w.data = start + step
        found = directional_sharpness(HessianOperator(loss, [w]), step)
        assert found.best_multiple_of_last_step == pytest.approx(1 / share)


def test_uphill_and_downward_curves():
    w, loss, matrix, offset = quadratic(6, 0)
    hessian = HessianOperator(loss, [w])
    uphill = directional_sharpness(hessian, hessian.gradient)
    assert uphill.slope > 0 and uphill.best_multiple < 0
    w, loss, _, _ = quadratic(6, 0, sign=-1.0)
    hessian = HessianOperator(loss, [w])
    found = directional_sharpness(hessian, -hessian.gradient)
    assert found.sharpness < 0 and found.best_multiple == math.inf
    flat = directional_sharpness(Diagonal(torch.zeros(3)), torch.ones(3), gradient=-torch.ones(3))
    assert flat.sharpness == 0 and flat.best_multiple == math.inf


@pytest.mark.parametrize("backend", ["double_backward", "finite_difference"])
def test_of_a_network(backend):
    inputs, labels = samples(20, 5, dtype=torch.float64)
    model = mlp(5, 7, 3).double()
    loss = lambda model: torch.nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    truth, d = dense_hessian(model, loss), gaussian(66)
    operator = HessianOperator(lambda: loss(model), list(model.parameters()), backend=backend)
    found = directional_sharpness(operator, d)
    assert found.sharpness == pytest.approx(float(d @ truth @ d / (d @ d)), rel=1e-5)
    assert found.slope == pytest.approx(float(operator.gradient @ d))
    spectrum = torch.linalg.eigvalsh(truth)
    assert spectrum[0] <= found.sharpness <= spectrum[-1]


def test_other_operators_need_a_gradient():
    d = torch.tensor([1.0, 2.0])
    found = directional_sharpness(Diagonal(torch.tensor([3.0, 1.0])), d, gradient=torch.tensor([-1.0, -1.0]))
    assert (found.sharpness, found.slope, found.curvature) == (7 / 5, -3, 7)
    with pytest.raises(ValueError, match="the direction is zero"):
        directional_sharpness(Diagonal(d), torch.zeros(2), gradient=d)


# --- in the layers' norms -------------------------------------------------------------------------------------------

SHAPES = {"a": (3, 4), "b": (5, 2), "c": (6,)}


def pieces_of(flat):
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    return [piece.view(shape) for piece, shape in zip(flat.split(sizes), SHAPES.values(), strict=True)]


@pytest.mark.parametrize("names", [("rms_to_rms", "spectral", "rms"), ("one_to_inf", "frobenius", "frobenius")])
@pytest.mark.parametrize("seed", range(5))
def test_norm_sharpness(names, seed):
    factor, d = gaussian(28, 28, seed=seed), gaussian(28, seed=seed + 1)
    matrix = factor + factor.mT
    norms = {layer: get_norm(name).primal for layer, name in zip(SHAPES, names, strict=True)}
    found = norm_sharpness(matrix @ d, pieces_of(d), norms)
    lengths = [float(norm(piece)) for norm, piece in zip(norms.values(), pieces_of(d), strict=True)]
    assert found.norm == pytest.approx(max(lengths))
    assert found.sharpness == pytest.approx(float(d @ matrix @ d) / max(lengths) ** 2)
    products = (matrix @ d).split([12, 10, 6])
    expected = [
        float(p.flatten() @ q) / length**2 for p, q, length in zip(pieces_of(d), products, lengths, strict=True)
    ]
    assert list(found.layers) == list(SHAPES) and list(found.layers.values()) == pytest.approx(expected)
    scaled = norm_sharpness(matrix @ (-3 * d), pieces_of(-3 * d), norms)
    assert scaled.sharpness == pytest.approx(found.sharpness) and scaled.norm == pytest.approx(3 * found.norm)


def test_the_frobenius_norm_of_one_layer_is_directional_sharpness():
    values, d = gaussian(12).abs(), gaussian(12, seed=1)
    found = norm_sharpness(values * d, [d.view(3, 4)], {"w": torch.linalg.vector_norm})
    direct = directional_sharpness(Diagonal(values), d, gradient=d)
    assert found.sharpness == pytest.approx(direct.sharpness) == found.layers["w"]


def test_sign_descent_is_at_its_edge_at_two_over_the_rate():
    """On a quadratic a step ``-lr |g|_1 sign(g)`` raises the loss exactly where the sharpness is above 2 / lr."""
    values = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    w = torch.tensor([1.0, -0.4, 2.0], dtype=torch.float64)
    g = values * w
    d = -g.abs().sum() * g.sign()
    loss = lambda w: float((values * w * w).sum() / 2)  # noqa: E731
    sharpness = norm_sharpness(values * d, [d], {"w": lambda t: t.abs().max()}).sharpness
    assert loss(w + 0.999 * 2 / sharpness * d) < loss(w) < loss(w + 1.001 * 2 / sharpness * d)


def test_bad_steps():
    d = [torch.ones(3), torch.ones(2)]
    norm = torch.linalg.vector_norm
    with pytest.raises(ValueError, match="2 norms and 5 numbers do not fit a product of 6"):
        norm_sharpness(torch.ones(6), d, {"a": norm, "b": norm})
    with pytest.raises(ValueError, match="1 norms and 5 numbers do not fit"):
        norm_sharpness(torch.ones(5), d, {"a": norm})
    with pytest.raises(ValueError, match="the step is zero"):
        norm_sharpness(torch.ones(5), [torch.zeros(3), torch.zeros(2)], {"a": norm, "b": norm})


def test_a_layer_that_stands_still():
    """One layer's step may be zero, a frozen layer's say; its own sharpness is then not a number, the rest stays."""
    d = [torch.ones(3), torch.zeros(2)]
    norm = torch.linalg.vector_norm
    found = norm_sharpness(2 * torch.cat(d), d, {"a": norm, "b": norm})
    assert found.sharpness == pytest.approx(2) == found.layers["a"] and math.isnan(found.layers["b"])


# --- batches --------------------------------------------------------------------------------------------------------


def test_batch_sharpness_is_the_mean_over_batches():
    inputs, labels = samples(24, 5, dtype=torch.float64)
    model, expected, operators = mlp(5, 7, 3).double(), [], []
    for x, y in zip(inputs.split(8), labels.split(8), strict=True):
        loss = lambda model, x=x, y=y: torch.nn.functional.cross_entropy(model(x), y)  # noqa: E731
        operators.append(HessianOperator(lambda loss=loss: loss(model), list(model.parameters())))
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), list(model.parameters()))])
        expected.append(float(g @ dense_hessian(model, loss) @ g / (g @ g)))
    assert batch_sharpness(operators) == pytest.approx(sum(expected) / 3)
    assert batch_sharpness(operators[:1]) == pytest.approx(expected[0])
    assert len({round(value, 6) for value in expected}) == 3


def test_batch_sharpness_needs_a_batch():
    with pytest.raises(ValueError, match="batch_sharpness needs the Hessian of at least one batch"):
        batch_sharpness([])
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="the direction is zero"):
        batch_sharpness([HessianOperator(lambda: w.square().sum(), [w])])
