"""Losses that resist a second derivative: the right value or a clear sentence, and nothing of the user's disturbed."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dynamon.curvature import (
    Diagonal,
    GGNOperator,
    HessianOperator,
    NoSecondDerivativeError,
    blockwise_sharpness,
    critical_sharpness,
    top_eigenvalues,
)
from tests.models import cnn, dense_hessian, gpt, mlp, samples

X, Y = samples(7, 4, dtype=torch.float64)
BACKENDS = ("double_backward", "finite_difference")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # central differences in float64


def parameters(model):
    return list(model.parameters())


def matrix_of(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


class Square(torch.autograd.Function):
    """x^2 whose backward hides from autograd, so that its own curvature drops out without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0].detach()


class Onceonly(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Honest(Square):
    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Attention(nn.Module):
    """One head of fused attention between two linear layers."""

    def __init__(self, kernel=None):
        super().__init__()
        self.qkv, self.out, self.kernel = nn.Linear(4, 12), nn.Linear(4, 3), kernel

    def forward(self, x):
        q, k, v = (part[None, None] for part in self.qkv(x).chunk(3, -1))
        if self.kernel is None:
            return self.out(F.scaled_dot_product_attention(q, k, v)[0, 0])
        with sdpa_kernel(self.kernel):
            return self.out(F.scaled_dot_product_attention(q, k, v)[0, 0])


class Checkpointed(nn.Module):
    """Activation checkpointing around the middle of a network, dropout inside."""

    def __init__(self, reentrant, dropout=0.0):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(dropout))

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            return self.last(self.middle(hidden))
        return self.last(checkpoint(self.middle, hidden, use_reentrant=self.reentrant))


def made(make, *args, seed=0):
    torch.manual_seed(seed)
    return make(*args).double().train()


def loss_of(model):
    return F.cross_entropy(model(X), Y)


# --- right values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_fused_attention(backend):
    model = made(Attention)
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    assert operator.backend == ("double_backward" if backend == "auto" else backend) and operator.reason is None
    torch.testing.assert_close(matrix_of(operator), dense_hessian(model, loss_of), **CLOSE)


def test_the_users_kernels_come_back():
    model = made(Attention)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    HessianOperator(lambda: loss_of(model), parameters(model)) @ torch.ones(75, dtype=X.dtype)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_attention_that_insists_on_the_fused_kernel():
    """The network chooses its kernel inside, out of reach: an error with a sentence, or differences."""
    model, plain = made(Attention, SDPBackend.FLASH_ATTENTION), made(Attention)
    probe = torch.ones(75, dtype=X.dtype)
    with pytest.raises(NoSecondDerivativeError, match="the loss has no second derivative: .*flash_attention"):
        HessianOperator(lambda: loss_of(model), parameters(model), backend="double_backward") @ probe
    with pytest.raises(NoSecondDerivativeError, match="the loss has no second derivative: .*flash_attention"):
        GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), parameters(model)) @ probe
    operator = HessianOperator(lambda: loss_of(model), parameters(model))
    matrix = matrix_of(operator)
    assert operator.backend == "finite_difference" and "flash_attention" in operator.reason
    torch.testing.assert_close(matrix, dense_hessian(plain, loss_of), **CLOSE)
    found = top_eigenvalues(HessianOperator(lambda: loss_of(model), parameters(model)), tol=1e-3)
    assert found.backend == "finite_difference" and found.converged and found.product_error > 0


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_compiled_module(backend):
    torch._dynamo.reset()
    model = made(mlp, 4, 5, 3)
    compiled = torch.compile(model, backend="aot_eager")
    loss_of(compiled).backward()
    operator = HessianOperator(lambda: loss_of(compiled), parameters(model), backend=backend)
    assert operator.backend == ("double_backward" if backend == "auto" else backend)
    torch.testing.assert_close(matrix_of(operator), dense_hessian(model, loss_of), **CLOSE)
    assert torch._dynamo.config.suppress_errors is False
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss_of(compiled).backward()  # still compiled, and not once more
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_compiled_code_that_insists():
    """A region that stays compiled whatever is said around it."""
    torch._dynamo.reset()
    model = made(mlp, 4, 5, 3)
    compiled = torch.compile(model, backend="aot_eager")

    def loss():
        with torch.compiler.set_stance("default"):
            return loss_of(compiled)

    with pytest.raises(NoSecondDerivativeError, match="the loss has no second derivative: torch.compile"):
        HessianOperator(loss, parameters(model), backend="double_backward") @ torch.ones(43, dtype=X.dtype)
    operator = HessianOperator(loss, parameters(model))
    torch.testing.assert_close(matrix_of(operator), dense_hessian(model, loss_of), **CLOSE)
    assert operator.backend == "finite_difference" and "torch.compile" in operator.reason


def test_the_gauss_newton_matrix_of_compiled_and_fused_code():
    torch._dynamo.reset()
    for make in (lambda: mlp(4, 5, 3), Attention):
        model = made(make)
        compiled = torch.compile(model, backend="aot_eager")
        loss_of(compiled)
        one, other = (
            GGNOperator(lambda m=m: m(X), lambda z: F.cross_entropy(z, Y), parameters(model)) for m in (compiled, model)
        )
        matrix = matrix_of(one)
        torch.testing.assert_close(matrix, matrix_of(other), **EXACT)
        assert float(torch.linalg.eigvalsh(matrix)[-1]) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_nonreentrant_checkpointing(backend, dropout):
    """The masks are those that the loss would draw now."""
    model, plain = made(Checkpointed, False, dropout), made(Checkpointed, None, dropout)

    def plain_loss(model):
        torch.manual_seed(5)
        return loss_of(model)

    truth = dense_hessian(plain, plain_loss)
    torch.manual_seed(5)
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    torch.rand(3)  # what the stream does afterwards is nobody's business
    torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)
    assert operator.backend == ("double_backward" if backend == "auto" else backend)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_reentrant_checkpointing(dropout):
    model, plain = made(Checkpointed, True, dropout), made(Checkpointed, None, dropout)
    with pytest.raises(NoSecondDerivativeError, match=r"reentrant activation checkpointing.* use_reentrant=False"):
        HessianOperator(lambda: loss_of(model), parameters(model), backend="double_backward")
    with pytest.raises(NoSecondDerivativeError, match="reentrant activation checkpointing"):
        GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), parameters(model))

    def plain_loss(model):
        torch.manual_seed(5)
        return loss_of(model)

    truth = dense_hessian(plain, plain_loss)
    torch.manual_seed(5)
    operator = HessianOperator(lambda: loss_of(model), parameters(model))
    assert operator.backend == "finite_difference" and "reentrant" in operator.reason
    torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)


def custom_loss(function, model):
    """The custom function carries most of the curvature."""
    return function.apply(model(X)).sum(1).add(1).log().mean()


@pytest.mark.parametrize("function", [Square, Onceonly, Honest], ids=lambda f: f.__name__)
def test_custom_functions(function):
    model = made(mlp, 4, 5, 3)
    truth = dense_hessian(model, lambda model: model(X).square().sum(1).add(1).log().mean())
    operator = HessianOperator(lambda: custom_loss(function, model), parameters(model))
    torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)
    if function is Honest:
        assert operator.backend == "double_backward" and operator.reason is None
    else:
        word = {Square: "drops out of the second derivative", Onceonly: "once_differentiable"}[function]
        assert operator.backend == "finite_difference" and word in operator.reason


def test_a_function_without_graph_really_drops_out():
    """Else the test above would prove nothing."""
    model = made(mlp, 4, 5, 3)
    truth = dense_hessian(model, lambda model: model(X).square().sum(1).add(1).log().mean())
    silent = HessianOperator(lambda: custom_loss(Square, model), parameters(model), backend="double_backward")
    assert float((matrix_of(silent) - truth).norm()) > 0.2 * float(truth.norm())


def test_once_differentiable_raises_where_double_backward_is_asked_for():
    model = made(mlp, 4, 5, 3)
    with pytest.raises(NoSecondDerivativeError, match="an operation marked once_differentiable"):
        HessianOperator(lambda: custom_loss(Onceonly, model), parameters(model), backend="double_backward")
    with pytest.raises(NoSecondDerivativeError, match="an operation marked once_differentiable"):
        GGNOperator(lambda: Onceonly.apply(model(X)), lambda z: F.cross_entropy(z, Y), parameters(model)) @ torch.ones(
            43, dtype=X.dtype
        )


@pytest.mark.parametrize("backend", ["auto", "double_backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_once_differentiable_where_the_gradient_that_comes_in_is_constant(backend, dtype):
    """torch itself says nothing then: the function's curvature is simply not there."""
    w = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    loss = lambda: Onceonly.apply(w).sum()  # noqa: E731
    if backend == "double_backward":
        with pytest.raises(NoSecondDerivativeError, match="once_differentiable"):
            HessianOperator(loss, [w], backend=backend) @ torch.ones(2, dtype=dtype)
    elif dtype == torch.bfloat16:  # differences cannot help
        with pytest.raises(ValueError, match="measure a float32 copy of the model"):
            HessianOperator(loss, [w]) @ torch.ones(2, dtype=dtype)
    else:
        operator = HessianOperator(loss, [w])
        torch.testing.assert_close(matrix_of(operator), 2 * torch.eye(2, dtype=dtype), **CLOSE)
        assert operator.backend == "finite_difference" and operator.reason


class Blind(Square):
    """A backward outside autograd altogether, as kernels written by hand have."""

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_backward_outside_autograd(place, residual):
    """The right matrix, or a sentence; with a residual path around it nothing is missing but a part."""
    first, last = nn.Linear(4, 3), nn.Linear(3, 3)
    torch.manual_seed(0)
    for layer in (first, last):
        nn.init.normal_(layer.weight)
    model = nn.Sequential(first, last).double()
    params = parameters(model)

    def outputs(function):
        square = lambda x: function(x) + x if residual else function(x)  # noqa: E731
        if place == "first":
            return last(first(square(X * params[1].mean())))
        return last(square(first(X))) if place == "middle" else square(last(first(X).tanh()))

    loss = lambda function: F.cross_entropy(outputs(function), Y)  # noqa: E731
    truth = matrix_of(HessianOperator(lambda: loss(torch.square), params, backend="double_backward"))
    operator = HessianOperator(lambda: loss(Blind.apply), params)
    torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)
    assert operator.backend == "finite_difference" and operator.reason
    ggn = matrix_of(GGNOperator(lambda: outputs(torch.square), lambda z: F.cross_entropy(z, Y), params))
    try:
        found = matrix_of(GGNOperator(lambda: outputs(Blind.apply), lambda z: F.cross_entropy(z, Y), params))
    except NoSecondDerivativeError as error:
        assert str(error).strip()
    else:
        torch.testing.assert_close(found, ggn, **CLOSE)


def test_a_loss_without_second_derivative_of_its_own():
    """Here it is the loss that has none, not the network: CTC."""
    model = made(mlp, 4, 5, 3)
    labels, lengths = torch.tensor([[1, 2]]), (torch.tensor([7]), torch.tensor([2]))

    def ctc(z):
        return F.ctc_loss(z.log_softmax(-1)[:, None], labels, *lengths)

    ones = torch.ones(43, dtype=X.dtype)
    with pytest.raises(NoSecondDerivativeError, match="the loss has no second derivative: .*ctc_loss"):
        HessianOperator(lambda: ctc(model(X)), parameters(model), backend="double_backward") @ ones
    operator = HessianOperator(lambda: ctc(model(X)), parameters(model))
    matrix = matrix_of(operator)
    assert operator.backend == "finite_difference"
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-4, atol=1e-5)
    with pytest.raises(NoSecondDerivativeError, match="the loss has no second derivative: .*ctc_loss"):
        GGNOperator(lambda: model(X), ctc, parameters(model)) @ ones


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast(backend):
    """Within a few per cent of the truth, or not called converged."""
    model = mlp(4, 16, 3)
    x = X.float()
    truth = float(torch.linalg.eigvalsh(dense_hessian(mlp(4, 16, 3).double(), loss_of))[-1])

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), Y)

    operator = HessianOperator(loss, parameters(model), backend=backend)
    found = top_eigenvalues(operator, tol=2e-2, max_matvecs=100)
    assert found.backend == backend
    right = abs(float(found.values[0]) - truth) <= 0.03 * truth
    if backend == "double_backward":
        assert found.converged and right
    else:
        assert right or not found.converged
        assert found.product_error > 0.1 and not found.converged  # rounding to 8 bits, magnified


def test_auto_stays_exact_under_autocast():
    model = mlp(4, 16, 3)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(X.float()).float(), Y)

    assert HessianOperator(loss, parameters(model)).backend == "double_backward"


def test_an_lstm_in_single_precision():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5)
    wide = nn.LSTM(4, 5).double()
    wide.load_state_dict({k: v.double() for k, v in lstm.state_dict().items()})
    narrow = HessianOperator(lambda: lstm(X.float())[0].square().mean(), parameters(lstm))
    truth = dense_hessian(wide, lambda model: model(X)[0].square().mean())
    torch.testing.assert_close(matrix_of(narrow).double(), truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))


def test_sparse_embeddings():
    torch.manual_seed(0)
    table, net = nn.Embedding(6, 4, sparse=True).double(), mlp(4, 5, 3).double()
    rows = torch.tensor([0, 2, 2, 4, 5, 0, 2])  # 1 and 3 never occur
    params = [table.weight, *net.parameters()]
    loss = lambda: F.cross_entropy(net(table(rows)), Y)  # noqa: E731
    operator = HessianOperator(loss, params)
    matrix = matrix_of(operator)
    plain = nn.Sequential(nn.Embedding(6, 4), net).double()
    plain[0].weight.data.copy_(table.weight.data)
    truth = dense_hessian(plain, lambda model: F.cross_entropy(model(rows), Y))
    torch.testing.assert_close(matrix, truth, **CLOSE)
    assert not matrix[4:8].any() and matrix[:4].any()
    assert table.weight.grad is None


# --- nothing disturbed ----------------------------------------------------------------------------------------------


def noisy(dropout=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 3)).double().train()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_are_the_same_in_every_product(backend):
    model = noisy()

    def fixed(model):
        torch.manual_seed(7)
        return loss_of(model)

    truth = dense_hessian(model, fixed)
    torch.manual_seed(7)
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    for _ in range(2):
        torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)
        torch.rand(11)
    torch.manual_seed(8)
    other = matrix_of(HessianOperator(lambda: loss_of(model), parameters(model), backend=backend))
    assert float((other - truth).abs().max()) > 1e-2  # the mask matters


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_random_streams_move_as_for_one_evaluation_at_most(backend):
    model = noisy()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    start, others = torch.get_rng_state(), (np.random.get_state()[1].tolist(), random.getstate())
    loss_of(model)
    once = torch.get_rng_state()
    torch.set_rng_state(start)
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    made_at = torch.get_rng_state()
    assert torch.equal(made_at, start if backend == "finite_difference" else once)
    matrix_of(operator)
    top_eigenvalues(operator)
    assert torch.equal(torch.get_rng_state(), made_at)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == others


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_gradients_and_graphs_are_what_they_were(backend, with_grad):
    model = noisy()
    earlier = loss_of(model)  # a graph of the user's, to be used afterwards
    expected = torch.autograd.grad(earlier, parameters(model), retain_graph=True)
    for p in parameters(model):
        p.grad = torch.full_like(p, 2.0) if with_grad else None
    weights = [p.detach().clone() for p in parameters(model)]
    places = [(p.data_ptr(), p.grad, p._version) for p in parameters(model)]
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    matrix_of(operator)
    operator.product_error(operator.gradient)
    for p, weight, (place, grad, version) in zip(parameters(model), weights, places, strict=True):
        assert torch.equal(p.detach(), weight) and p.data_ptr() == place and p._version == version
        assert p.grad is grad and (grad is None or bool((grad == 2).all()))
        assert p.requires_grad and p.is_leaf
    after = torch.autograd.grad(earlier, parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize("reentrant", [None, False])  # reentrant backward reaches all; `preserve_state` is for that
def test_gradients_of_parameters_left_out_are_untouched(reentrant):
    """A Hessian in some of the parameters; the rest of the network has gradients and hooks of its own."""
    model = made(Checkpointed, reentrant)
    chosen, rest = list(model.middle.parameters()), [*model.first.parameters(), *model.last.parameters()]
    inputs = X.clone().requires_grad_()
    rest[0].grad = torch.full_like(rest[0], 2.0)
    fired = []
    for p in rest:
        p.register_post_accumulate_grad_hook(fired.append)
    loss = lambda: F.cross_entropy(model(inputs), Y)  # noqa: E731
    operator = HessianOperator(loss, chosen, backend="finite_difference")
    operator @ torch.ones(operator.shape[0], dtype=X.dtype)
    assert bool((rest[0].grad == 2).all())
    assert all(p.grad is None for p in rest[1:])
    assert inputs.grad is None
    assert not fired


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_hooks_do_not_fire_and_come_back(backend, reentrant):
    if reentrant and backend == "double_backward":
        return
    model, fired = made(Checkpointed, reentrant), []
    first = model.first.weight
    first.register_hook(lambda g: fired.append("hook") or 0 * g)
    first.register_post_accumulate_grad_hook(lambda p: fired.append("post"))
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend=backend)
    truth = dense_hessian(made(Checkpointed, None), loss_of)
    torch.testing.assert_close(matrix_of(operator), truth, **CLOSE)
    assert not fired
    loss_of(model).backward()
    assert fired == ["hook", "post"] and not first.grad.any()


def test_batchnorm_products_do_not_depend_on_the_running_statistics():
    images, labels = samples(5, 2, 6, 6, dtype=torch.float64)
    model = cnn().double().train()
    loss = lambda model: F.cross_entropy(model(images), labels)  # noqa: E731
    truth = dense_hessian(model, loss)
    operator = HessianOperator(lambda: loss(model), parameters(model), backend="finite_difference")
    v = torch.randn(len(truth), dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        torch.testing.assert_close(operator @ v, truth @ v, rtol=1e-4, atol=1e-5)


# --- differences ----------------------------------------------------------------------------------------------------


def test_the_size_of_a_vector_does_not_matter_to_differences():
    model = made(mlp, 4, 5, 3)
    operator = HessianOperator(lambda: loss_of(model), parameters(model), backend="finite_difference")
    v = torch.randn(43, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    truth = dense_hessian(model, loss_of) @ v
    for factor in (1e-30, 1e-8, 1.0, 1e8, 1e30, -3.0):
        torch.testing.assert_close(operator @ (factor * v), factor * truth, rtol=1e-4, atol=1e-6 * abs(factor))
    assert not (operator @ torch.zeros(43, dtype=X.dtype)).any()


def test_two_step_sizes_tell_good_differences_from_bad_ones():
    """A loss that wiggles below the step has no use for differences, and the operator says so."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    smooth = HessianOperator(lambda: w.square().sum() / 2, [w], backend="finite_difference")
    assert smooth.product_error(torch.ones(3, dtype=X.dtype)) < 1e-8
    assert top_eigenvalues(smooth).converged

    def wiggle():
        return w.square().sum() / 2 + 1e-12 * (w * 3e6).cos().sum()

    rough = HessianOperator(wiggle, [w], backend="finite_difference")
    assert rough.product_error(torch.ones(3, dtype=X.dtype)) > 0.05
    found = top_eigenvalues(rough)
    assert not found.converged and found.product_error > 0.05
    exact = HessianOperator(wiggle, [w])
    assert exact.backend == "double_backward" and exact.product_error(torch.ones(3, dtype=X.dtype)) == 0


def test_the_error_of_a_combination_is_that_of_its_worst_part():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=X.dtype)
    rough = HessianOperator(lambda: 1e-12 * (w * 3e6).cos().sum(), [w], backend="finite_difference")
    smooth = HessianOperator(lambda: w.square().sum(), [w])
    expected = rough.product_error(ones)
    assert expected > 0.05
    for combined in (rough + smooth, smooth + rough, 2 * rough, rough.scaled(ones), rough + Diagonal(ones)):
        assert combined.product_error(ones) == pytest.approx(expected)
        assert "finite_difference" in combined.backend
    assert (smooth + Diagonal(ones)).product_error(ones) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = mlp(4, 16, 3).to(dtype)
    loss = lambda: F.cross_entropy(model(X.to(dtype)), Y)  # noqa: E731
    with pytest.raises(ValueError, match=f"finite differences need float32 or float64 parameters, these are {dtype}"):
        HessianOperator(loss, parameters(model), backend="finite_difference")
    with pytest.raises(ValueError, match="measure a float32 copy of the model"):
        HessianOperator(lambda: Onceonly.apply(model(X.to(dtype))).float().pow(2).mean(), parameters(model))
    truth = float(torch.linalg.eigvalsh(dense_hessian(mlp(4, 16, 3).double(), loss_of))[-1])
    found = top_eigenvalues(HessianOperator(loss, parameters(model)), tol=5e-2)
    assert float(found.values[0]) == pytest.approx(truth, rel=0.1)


# --- errors ---------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA out of memory."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{type(error).__name__}: {error}"[:40])
@pytest.mark.parametrize("where", ["loss", "backward", "product"])
def test_running_out_of_memory_is_not_mistaken_for_a_missing_derivative(error, where):
    state = {"calls": 0, "armed": where != "product"}

    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return Greedy.apply(grad)

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "backward":
                raise error
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if where == "product" and state["armed"]:
                raise error
            return grad

    w = torch.ones(3, requires_grad=True)

    def loss():
        state["calls"] += 1
        if where == "loss":
            raise error
        return Hungry.apply(w).pow(3).sum()

    with pytest.raises(type(error)) as caught:
        operator = HessianOperator(loss, [w])
        assert operator.backend == "double_backward"
        state["armed"] = True
        calls = state["calls"]
        operator @ torch.ones(3)
    assert str(caught.value) == str(error) and not isinstance(caught.value, NoSecondDerivativeError)
    assert state["calls"] == (1 if where != "product" else calls)  # not tried again another way


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 cannot be multiplied"), NotImplementedError("later"), KeyError("loss")],
    ids=repr,
)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_errors_in_the_users_loss_are_the_users(error, backend):
    calls = []

    def loss():
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        HessianOperator(loss, [torch.ones(3, requires_grad=True)], backend=backend)
    assert caught.value is error and len(calls) == 1
    with pytest.raises(type(error)) as caught:
        GGNOperator(loss, lambda z: z.sum(), [torch.ones(3, requires_grad=True)])
    assert caught.value is error


def test_an_error_while_the_weights_are_moved_puts_them_back():
    w = torch.ones(3, requires_grad=True)
    w.grad = torch.full_like(w, 2.0)
    place, grad, weights = w.data_ptr(), w.grad, w.detach().clone()

    def loss():
        if not torch.equal(w.detach(), weights):
            raise RuntimeError("a wall")
        return w.pow(3).sum()

    operator = HessianOperator(loss, [w], backend="finite_difference")
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="a wall"):
        operator @ torch.ones(3)
    assert torch.equal(w.detach(), weights) and w.data_ptr() == place and w.grad is grad
    assert torch.equal(torch.get_rng_state(), state)
    operator.parameters.check_unchanged()
    with pytest.raises(RuntimeError, match="a wall"):
        critical_sharpness(loss, [w], -torch.ones(3))
    assert torch.equal(w.detach(), weights) and w.data_ptr() == place


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_frozen_parameters_among_those_given(backend):
    """``list(model.parameters())`` holds them too: rows of zeros, or a sentence that says what is wrong."""
    model = made(mlp, 4, 5, 3)
    truth = dense_hessian(model, loss_of)
    model[0].weight.requires_grad_(False)
    truth[:20] = truth[:, :20] = 0
    try:
        matrix = matrix_of(HessianOperator(lambda: loss_of(model), parameters(model), backend=backend))
    except ValueError as error:
        assert "requires_grad" in str(error) or "frozen" in str(error)
    else:
        torch.testing.assert_close(matrix, truth, **CLOSE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_diverged_loss_is_said(bad, backend):
    w = torch.full((3,), bad, requires_grad=True)
    with pytest.raises(FloatingPointError, match="NaN or infinity; the loss or the weights diverged"):
        top_eigenvalues(HessianOperator(lambda: w.pow(4).sum(), [w], backend=backend))


def test_one_step_of_the_optimizer_and_every_operator_is_stale():
    model = made(mlp, 4, 5, 3)
    params = dict(model.named_parameters())
    hessians = [HessianOperator(lambda: loss_of(model), params, backend=backend) for backend in BACKENDS]
    ggn = GGNOperator(lambda: model(X), lambda z: F.cross_entropy(z, Y), params)
    ones = torch.ones(43, dtype=X.dtype)
    operators = {
        **{h.backend: h for h in hessians},
        **{f"block of {h.backend}": h.block("2.*") for h in hessians},
        **{f"scaled {h.backend}": h.scaled(ones) for h in hessians},
        **{f"multiple of {h.backend}": -2 * h for h in hessians},
        "sum": Diagonal(ones) + hessians[0],
        "sum with differences": hessians[1] + Diagonal(ones),
        "ggn": ggn,
        "block of ggn": ggn.block("0.weight"),
        "scaled sum of ggn": (ggn + hessians[0]).scaled(ones),
    }

    def use(operator):
        return operator @ ones[: operator.shape[0]]

    for operator in operators.values():
        use(operator)
    directions = [torch.ones(7, 3, dtype=X.dtype)]
    uses = {name: lambda operator=operator: use(operator) for name, operator in operators.items()}
    uses |= {
        "push": lambda: ggn.push(ones),
        "pull": lambda: ggn.pull(directions),
        "scipy": lambda: hessians[0].to_scipy().matvec(np.ones(43)),
        "eigenvalues": lambda: top_eigenvalues(hessians[0]),
        "gram": lambda: top_eigenvalues(ggn, method="gram"),
        "blocks": lambda: blockwise_sharpness(ggn, {"first": "0.*"}),
    }
    loss_of(model).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, stale in uses.items():
        with pytest.raises(RuntimeError, match="a parameter changed after this operator was made"):
            stale()
            pytest.fail(f"{name} used old weights")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_every_implementation_of_a_step_is_noticed(kind, how):
    model = made(mlp, 4, 5, 3)
    operator = HessianOperator(lambda: loss_of(model), parameters(model))
    loss_of(model).backward()
    getattr(torch.optim, kind)(model.parameters(), lr=0.1, **how).step()
    with pytest.raises(RuntimeError, match="a parameter changed"):
        operator @ operator.gradient


def test_transformers_with_the_default_attention_are_exact():
    """Causal attention in a GPT, in the dtype users have, against the dense Hessian in float64."""
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    loss = lambda model: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())  # noqa: E731
    truth = dense_hessian(gpt(depth=1, width=4).double(), loss)
    model = gpt(depth=1, width=4)
    operator = HessianOperator(lambda: loss(model), parameters(model))
    assert operator.backend == "double_backward"
    torch.testing.assert_close(matrix_of(operator).double(), truth, rtol=0, atol=1e-5 * float(truth.abs().max()))


class Reads(TorchDispatchMode):
    """How often the host waits for a number, beside what else is called."""

    def __init__(self):
        super().__init__()
        self.waits, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_fused_steps_are_noticed_on_a_device_too_by_one_read(kind, monkeypatch):
    monkeypatch.setattr("dynamon.curvature.operators.parameters.reads_are_free", lambda device: False)
    model = made(mlp, 4, *(5,) * 40, 3)
    operator = HessianOperator(lambda: loss_of(model), parameters(model))
    vector = operator.gradient
    with Reads() as plain:
        operator._engine.product(vector)
    with Reads() as checked:
        operator @ vector
    assert (plain.waits, checked.waits) == (0, 1) and checked.calls - plain.calls < 40
    loss_of(model).backward()
    getattr(torch.optim, kind)(model.parameters(), lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="a parameter changed"):
        operator @ vector


def test_a_solve_asks_once_whether_weights_have_changed():
    model = made(mlp, 4, 5, 3)
    operator = HessianOperator(lambda: loss_of(model), parameters(model))
    asked = []
    fingerprint = operator.parameters._fingerprint
    operator.parameters._fingerprint = lambda: asked.append(1) or fingerprint()
    top_eigenvalues(operator)
    assert len(asked) == 1
    operator @ operator.gradient
    operator @ operator.gradient
    assert len(asked) == 3


# ---- one-sided differences


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_sided_differences_take_one_gradient_a_product(dtype):
    """Against the dense Hessian; the gradient at the weights is shared, and the weights are put back bit for bit."""
    model, (x, y), calls = mlp(4, 6, 3).to(dtype), samples(7, 4, dtype=dtype), []
    before = [p.detach().clone() for p in model.parameters()]

    def loss():
        calls.append(1)
        return F.cross_entropy(model(x), y)

    operator = HessianOperator(loss, parameters(model), backend="forward_difference")
    assert len(calls) == 1 and operator.backend == "forward_difference"
    found = matrix_of(operator)
    assert len(calls) == 1 + operator.shape[0]
    truth = dense_hessian(model, lambda call: F.cross_entropy(call(x), y))
    close = 2e-3 if dtype == torch.float32 else 1e-6
    assert float((found - truth).norm() / truth.norm()) <= close
    part = operator.block([parameters(model)[0]]) @ torch.ones(24, dtype=dtype)
    torch.testing.assert_close(part, (truth[:24, :24] @ torch.ones(24, dtype=dtype)), rtol=0, atol=close)
    assert all(torch.equal(p, old) for p, old in zip(parameters(model), before, strict=True))
    known = HessianOperator(loss, parameters(model), backend="forward_difference", error=0.25)
    assert known.product_error(torch.ones(operator.shape[0], dtype=dtype)) == 0.25
    direction = torch.linalg.eigh(truth).eigenvectors[:, -1]
    actual = float((operator @ direction - truth @ direction).norm() / (truth @ direction).norm())
    assert actual / 3 <= operator.product_error(direction) <= max(100 * actual, close)


def test_one_sided_differences_can_become_exact():
    """With the same random numbers: a dropout mask of one evaluation is that of all."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3)).double(), (X, Y)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    torch.manual_seed(3)
    exact = matrix_of(HessianOperator(loss, parameters(model)))
    torch.manual_seed(3)
    operator = HessianOperator(loss, parameters(model), backend="forward_difference")
    torch.testing.assert_close(matrix_of(operator), exact, rtol=1e-5, atol=1e-6)
    operator.make_exact()
    assert operator.backend == "double_backward"
    torch.testing.assert_close(matrix_of(operator), exact, **EXACT)
    operator.make_exact()
    assert operator.backend == "double_backward"


def test_where_one_sided_differences_are_not_taken():
    """Half precision, autocast, functions without a graph, and operators that are no Hessian."""
    model = mlp(4, 6, 3)
    loss = lambda: F.cross_entropy(model(X.float()), Y)  # noqa: E731
    with pytest.raises(ValueError, match="one-sided differences need float32 or float64"):
        HessianOperator(
            lambda: model.bfloat16()(X.bfloat16()).sum(), parameters(model.bfloat16()), backend="forward_difference"
        )
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="and no autocast"):
            HessianOperator(loss, parameters(model), backend="forward_difference")
        half = HessianOperator(loss, parameters(model))
    hidden = HessianOperator(lambda: Square.apply(model(X.float())).sum(), parameters(model))
    differences = HessianOperator(loss, parameters(model), backend="finite_difference")
    for operator in (half, hidden, differences, Diagonal(torch.ones(3))):
        with operator.one_sided() as is_possible:
            assert not is_possible


def test_a_combination_takes_one_sided_differences_in_all_of_its_parts():
    model = mlp(4, 6, 3).double()
    hessian = HessianOperator(lambda: F.cross_entropy(model(X), Y), parameters(model))
    scale = torch.linspace(0.5, 2, hessian.shape[0], dtype=torch.float64)
    operator = (hessian + Diagonal(0.1 * torch.ones_like(scale))).scaled(scale)
    exact = matrix_of(operator)
    with operator.one_sided() as is_possible:
        near = matrix_of(operator)
    assert is_possible and not torch.equal(near, exact) and torch.equal(matrix_of(operator), exact)
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-6)
