"""Hessian products against dense Hessians in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from dynamon.curvature import HessianOperator, LinearOperator, top_eigenvalues
from tests.models import cnn, dense_hessian, gpt, mlp, samples

X, Y = samples(7, 4, dtype=torch.float64)
TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


def classify(inputs, labels):
    return lambda model: cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


def transformer_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


def layernorm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.idle = mlp(4, 5, 3), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.net(x)


IMAGES, LABELS = samples(5, 2, 6, 6, dtype=torch.float64)
CASES = {
    "mlp": (lambda: mlp(4, 5, 3), classify(X, Y)),
    "attention": (transformer_layer, lambda model: model(X[None]).pow(3).mean()),
    "layernorm": (layernorm, classify(X, Y)),
    "batchnorm": (cnn, classify(IMAGES, LABELS)),
    "gpt": (lambda: gpt(depth=1, width=4), classify(TOKENS, TOKENS)),
    "tied gpt": (lambda: gpt(depth=1, width=4, tied=True), classify(TOKENS, TOKENS)),
    "unused parameter": (Unused, classify(X, Y)),
    "linear": (lambda: nn.Linear(4, 3), lambda model: mse_loss(model(X), torch.ones(7, 3, dtype=X.dtype))),
}


@pytest.fixture(params=CASES)
def case(request):
    make, loss_of = CASES[request.param]
    return make().double().train(), loss_of


@pytest.fixture
def tanh():
    model = mlp(4, 5, 3).double()
    loss_of = classify(X, Y)
    return HessianOperator(lambda: loss_of(model), list(model.parameters())), dense_hessian(model, loss_of), model


def test_products_are_those_of_the_dense_hessian(case):
    model, loss_of = case
    dense = dense_hessian(model, loss_of)
    operator = HessianOperator(lambda: loss_of(model), list(model.parameters()))
    assert operator.shape == tuple(dense.shape)
    products = operator @ torch.eye(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(products, dense, rtol=1e-9, atol=1e-9 * float(dense.abs().max()))


def test_loss_and_gradient_are_reported(case):
    model, loss_of = case
    operator = HessianOperator(lambda: loss_of(model), list(model.parameters()))
    loss = loss_of(model)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(operator.loss, loss.detach())
    torch.testing.assert_close(operator.gradient, torch.cat([g.flatten() for g in gradients]))
    assert not operator.loss.requires_grad and not operator.gradient.requires_grad


def test_a_subset_of_the_parameters_gives_a_block(tanh):
    _, dense, model = tanh
    last = list(model.parameters())[2:]
    size = sum(p.numel() for p in last)
    block = HessianOperator(lambda: classify(X, Y)(model), last) @ torch.eye(size, dtype=X.dtype)
    torch.testing.assert_close(block, dense[-size:, -size:])


def test_a_gradient_that_does_not_depend_on_the_parameters_has_no_curvature():
    layer = nn.Linear(4, 1)
    operator = HessianOperator(lambda: layer(torch.ones(4)).sum(), list(layer.parameters()))
    assert not (operator @ torch.ones(5)).any()
    bias = HessianOperator(lambda: (layer(torch.ones(4)) * layer.weight.sum()).sum(), [layer.bias])
    assert not (bias @ torch.ones(1)).any()


def test_gradients_of_the_user_are_untouched(case):
    model, loss_of = case
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    kept = [p.grad for p in model.parameters()]
    HessianOperator(lambda: loss_of(model), list(model.parameters())) @ torch.ones(
        sum(p.numel() for p in model.parameters()), dtype=X.dtype
    )
    assert all(p.grad is g and bool((g == 2).all()) for p, g in zip(model.parameters(), kept, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_no_grad_around_it_does_no_harm(tanh):
    operator, dense, model = tanh
    with torch.no_grad():
        inside = HessianOperator(lambda: classify(X, Y)(model), list(model.parameters()))
        product = inside @ dense[0]
    torch.testing.assert_close(product, dense @ dense[0])


def test_stale_use_raises(tanh):
    operator, dense, model = tanh
    operator @ dense[0]
    with torch.no_grad():
        model[0].weight.add_(0.1)
    with pytest.raises(RuntimeError, match="a parameter changed after this operator was made"):
        operator @ dense[0]


def test_vectors_and_columns(tanh):
    operator, dense, _ = tanh
    columns = torch.randn(len(dense), 3, dtype=dense.dtype)
    torch.testing.assert_close(operator @ columns, dense @ columns)
    torch.testing.assert_close(operator @ columns[:, 1], dense @ columns[:, 1])
    assert (operator @ columns[:, :0]).shape == (len(dense), 0)
    for bad in (torch.ones(3), torch.ones(3, 2), torch.ones(len(dense), 1, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"expected \[{len(dense)}\]"):
            operator @ bad


def test_linear_combinations(tanh):
    operator, dense, model = tanh
    other_loss = lambda model: model(X).square().mean()  # noqa: E731
    other = HessianOperator(lambda: other_loss(model), list(model.parameters()))
    combined = 2 * operator + other * -0.5
    v = torch.randn(len(dense), dtype=dense.dtype)
    assert isinstance(combined, LinearOperator) and combined.shape == operator.shape
    torch.testing.assert_close(combined @ v, 2 * dense @ v - 0.5 * dense_hessian(model, other_loss) @ v)
    small = HessianOperator(lambda: classify(X, Y)(model), [model[0].weight])
    with pytest.raises(ValueError, match="cannot add operators of shapes"):
        operator + small


def test_scaled(tanh):
    operator, dense, _ = tanh
    scale = torch.rand(len(dense), dtype=dense.dtype)
    v = torch.randn(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(operator.scaled(scale) @ v, (scale[:, None] * dense * scale) @ v)
    with pytest.raises(ValueError, match="scale must have shape"):
        operator.scaled(scale[1:])


def test_scipy_finds_the_same_eigenvalues(tanh):
    operator, dense, _ = tanh
    found = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(dense)[-3:].numpy(), rtol=1e-8)
    single = mlp(4, 5, 3)
    narrow = HessianOperator(lambda: classify(X.float(), Y)(single), list(single.parameters())).to_scipy()
    assert narrow.matvec(np.ones(narrow.shape[0])).dtype == np.float64


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda w: None, "the loss must be a scalar tensor, got NoneType"),
        (lambda w: 1.0, "the loss must be a scalar tensor, got float"),
        (lambda w: w * 2, r"must be a scalar tensor, got shape \(3,\); reduce it first"),
        (lambda w: torch.tensor(1.0), r"does not depend on any parameter \(it carries no graph\)"),
        (lambda w: w.detach().sum(), r"does not depend on any parameter \(it carries no graph\)"),
        (lambda w: torch.ones(1, requires_grad=True).sum(), "does not depend on any of the parameters"),
    ],
)
def test_bad_losses(loss_fn, message):
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError if "got" in message and "shape" not in message else ValueError, match=message):
        HessianOperator(lambda: loss_fn(w), [w])


def test_bad_arguments():
    w, wide = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="params is empty"):
        HessianOperator(lambda: w.sum(), [])
    with pytest.raises(ValueError, match="must share one dtype and device, got torch.float32 on cpu, torch.float64"):
        HessianOperator(lambda: (w * wide).sum(), [w, wide])
    with pytest.raises(ValueError, match="backend must be one of .*, got 'fast'"):
        HessianOperator(lambda: w.sum(), [w], backend="fast")
    assert HessianOperator(lambda: w.pow(2).sum(), [w], backend="double_backward").backend == "double_backward"


def test_an_operation_without_a_second_derivative_raises():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    w = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="an operation marked once_differentiable"):
        HessianOperator(lambda: Once.apply(w).pow(2).sum(), [w], backend="double_backward")
    found = HessianOperator(lambda: Once.apply(w).pow(2).sum(), [w])
    assert found.backend == "finite_difference" and "once_differentiable" in found.reason
    torch.testing.assert_close(found @ torch.ones(3), torch.full((3,), 12.0), rtol=1e-2, atol=0)


def test_a_one_element_loss_counts_as_a_scalar():
    w = torch.ones(3, requires_grad=True)
    assert torch.equal(HessianOperator(lambda: w.pow(2).sum().reshape(1), [w]) @ torch.ones(3), torch.full((3,), 2.0))


def test_lstm_and_activation_checkpointing():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 3, batch_first=True).double()
    net = mlp(3, 4, 2).double()
    params = [*lstm.parameters(), *net.parameters()]

    def loss(checkpointed):
        hidden = lstm(X[None])[0]
        out = torch.utils.checkpoint.checkpoint(net, hidden, use_reentrant=False) if checkpointed else net(hidden)
        return out.square().mean()

    plain, saved = (HessianOperator(lambda c=c: loss(c), params) for c in (False, True))
    eye = torch.eye(plain.shape[0], dtype=X.dtype)
    matrix = plain @ eye
    torch.testing.assert_close(saved @ eye, matrix)
    torch.testing.assert_close(matrix, matrix.mT)
    # The Hessian of a scalar agrees with a difference of gradients.
    v = torch.randn(len(eye), dtype=X.dtype)
    step, gradients = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, piece in zip(params, v.split([p.numel() for p in params]), strict=True):
                p.add_(sign * step * piece.view_as(p))
            with torch.enable_grad():
                found = torch.autograd.grad(loss(False), params)
            gradients.append(torch.cat([g.flatten() for g in found]))
    difference = (gradients[0] - gradients[1]) / (2 * step)
    torch.testing.assert_close(matrix @ v, difference, rtol=1e-6, atol=1e-7)
    assert math.isfinite(float(matrix.abs().max()))


def test_what_people_pass_for_parameters():
    model = mlp(4, 5, 3).double()
    loss = lambda: classify(X, Y)(model)  # noqa: E731
    expected = HessianOperator(loss, list(model.parameters())) @ torch.ones(43, dtype=X.dtype)
    for params in (model, model.named_parameters(), dict(model.named_parameters()), model.parameters()):
        torch.testing.assert_close(HessianOperator(loss, params) @ torch.ones(43, dtype=X.dtype), expected)
    assert HessianOperator(loss, model[0].weight).shape == (20, 20)
    compiled = {f"_orig_mod.{name}": p for name, p in model.named_parameters()}
    assert HessianOperator(loss, compiled).block("0.*").shape == (25, 25)
    assert HessianOperator(loss, model).block(["*", "!0.*"]).shape == (18, 18)
    assert HessianOperator(loss, model).block("!0.*").shape == (18, 18)
    weight = model[0].weight
    for bad, message in [
        ([weight, weight], "in params twice"),
        ([torch.ones(2, dtype=torch.int64)], "floating point tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            HessianOperator(loss, bad)
    for bad in ([1.0], 3, None):
        with pytest.raises(TypeError, match="params must be tensors"):
            HessianOperator(loss, bad)
    assert repr(HessianOperator(loss, model).parameters) == "FlatParameters(4 tensors, 43 numbers, float64 on cpu)"


def test_differences_quotients_and_signs_of_operators(tanh):
    operator, dense, _ = tanh
    v = torch.randn(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(-operator @ v, -dense @ v)
    torch.testing.assert_close((3 * operator - operator / 2) @ v, 2.5 * dense @ v)
    for bad in (lambda: operator + 1, lambda: operator - 1, lambda: operator * operator):
        with pytest.raises(TypeError):
            bad()
    with pytest.raises(TypeError, match="expected a tensor, got ndarray"):
        operator @ np.ones(len(dense))


def test_untrusted_differences_have_no_bounds():
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = lambda: (w**2 / 2 + 1e-12 * torch.cos(3e6 * w)).sum()  # noqa: E731
    found = top_eigenvalues(HessianOperator(loss, [w], backend="finite_difference"), certify=True)
    assert not found.converged and found.product_error > 0.1
    assert found.upper is None and found.lower == -math.inf
