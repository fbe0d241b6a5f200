"""Layer normalisation with a second derivative of few calls: the numbers of torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynamon.curvature import HessianOperator
from dynamon.curvature.operators.layer_norm import FewerCalls
from tests.launches import Launches

SHAPES = {"rows": ((5, 7), (7,)), "two": ((3, 4, 5), (4, 5)), "one row": ((6,), (6,)), "deep": ((2, 3, 4, 5), (5,))}


def inputs(shape, normalized, weight=True, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    w = torch.randn(normalized, generator=generator, dtype=dtype, requires_grad=True) if weight else None
    b = torch.randn(normalized, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    return x, w, b


def products(call, given):
    """Value, gradient, and products of the Hessian with each unit-like vector, of a loss that is curved everywhere."""
    present = [t for t in given if t is not None]
    value = call(*given)
    loss = (value.sin() * torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)).sum()
    gradients = torch.autograd.grad(loss, present, create_graph=True)
    found = [value.detach(), *(g.detach() for g in gradients)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in present]
        found += torch.autograd.grad(gradients, present, vectors, retain_graph=True)
    for one, other in ((i, j) for i in range(len(present)) for j in range(len(present))):  # each block of its own
        vector = torch.ones_like(present[one])
        block = torch.autograd.grad(gradients[one], present[other], vector, retain_graph=True, allow_unused=True)[0]
        found.append(torch.zeros_like(present[other]) if block is None else block)
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)], ids=str)
def test_value_gradient_and_products_are_those_of_torch(name, affine):
    shape, normalized = SHAPES[name]
    given = inputs(shape, normalized, *affine)

    def call(x, w, b):
        return F.layer_norm(x, normalized, w, b, eps=1e-3)

    wanted = products(call, given)
    with FewerCalls():
        found = products(call, given)
    assert torch.equal(wanted[0], found[0])
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_second_derivatives_agree_with_differences():
    x, w, b = inputs((3, 6), (6,))
    with FewerCalls():
        assert torch.autograd.gradgradcheck(lambda *t: F.layer_norm(t[0], (6,), t[1], t[2]).sin(), (x, w, b))


def test_a_gradient_that_is_not_contiguous():
    x, w, b = inputs((4, 6), (6,))

    def call(x, w, b):
        return F.layer_norm(x.t().contiguous().t(), (6,), w, b).t()

    wanted = products(call, (x, w, b))
    with FewerCalls():
        found = products(call, (x, w, b))
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


class Net(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6))
        self.layers[1].weight.requires_grad_(not frozen)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_operators_use_it_and_take_it_for_no_function_of_the_users(frozen):
    model, x = Net(frozen).double(), torch.randn(9, 4, dtype=torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    operator = HessianOperator(lambda: model(x).cos().sum(), params)
    assert operator.backend == "double_backward" and operator.doubt is None and not operator._engine.suspects
    found = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    flat = torch.cat([p.detach().flatten() for p in params])

    def loss(vector):
        pieces = vector.split([p.numel() for p in params])
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        given = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, params, strict=True)}
        return torch.func.functional_call(model, given, (x,)).cos().sum()

    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, flat), rtol=1e-8, atol=1e-9)


def test_it_takes_a_third_of_the_calls():
    given = inputs((4, 6, 8), (8,), dtype=torch.float32)

    def calls(mode):
        with mode:
            gradients = torch.autograd.grad(F.layer_norm(given[0], (8,), *given[1:]).sum(), given, create_graph=True)
        vectors = [torch.ones_like(t) for t in given]
        with Launches() as launches:
            torch.autograd.grad(gradients, given, vectors, allow_unused=True)
        return launches

    plain, own = calls(torch.enable_grad()), calls(FewerCalls())
    assert plain.total > 70 and own.total <= 28, own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    x, w, b = inputs((3, 8), (8,), dtype=dtype)
    wanted = F.layer_norm(x, (8,), w, b)
    with FewerCalls():
        found = F.layer_norm(x, (8,), w, b)
        mixed = F.layer_norm(x, (8,), w.detach().float(), b.detach().float())
    assert torch.equal(wanted, found) and mixed.dtype is dtype


def test_without_gradients_it_is_torchs_own():
    x, w, b = inputs((3, 8), (8,))
    with torch.no_grad(), FewerCalls():
        assert F.layer_norm(x, (8,), w, b).grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_the_same_again(reentrant):
    model, x = Net().double(), torch.randn(9, 4, dtype=torch.float64)
    params, backend = list(model.parameters()), "finite_difference" if reentrant else "double_backward"
    plain = HessianOperator(lambda: model(x).cos().sum(), params)
    again = HessianOperator(lambda: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).cos().sum(), params)
    vector = torch.linspace(-1, 1, plain.shape[0], dtype=torch.float64)
    assert again.backend == backend
    torch.testing.assert_close(plain @ vector, again @ vector, rtol=1e-5, atol=1e-6)


def written_out(x, shape, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def test_third_derivatives_of_a_gradient_penalty(monkeypatch):
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    params = list(model.parameters())

    def loss():
        slope = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)[0]
        return (slope.square().sum(1) - 1).square().mean() + model(x).cos().mean()

    found = HessianOperator(loss, params)
    # torch's own takes mean and scale for constants in its third derivative.
    monkeypatch.setattr(F, "layer_norm", written_out)
    gradients = torch.autograd.grad(loss(), params, create_graph=True)
    vector = torch.linspace(-1, 1, found.shape[0], dtype=torch.float64)
    pieces = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
    wanted = torch.autograd.grad(gradients, params, pieces, allow_unused=True)
    wanted = [torch.zeros_like(p) if w is None else w for w, p in zip(wanted, params, strict=True)]
    assert found.backend == "double_backward"
    torch.testing.assert_close(found @ vector, torch.cat([w.flatten() for w in wanted]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual"])
def test_losses_with_transforms_of_their_own(transform):
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)

    def loss():
        if transform == "vmap":
            return torch.func.vmap(lambda row: model(row).cos().sum())(x).mean()
        if transform == "grad":
            return torch.func.vmap(torch.func.grad(lambda row: model(row).cos().sum()))(x).square().mean()
        if transform == "jvp":
            return torch.func.jvp(lambda given: model(given).cos().sum(), (x,), (torch.ones_like(x),))[1].square()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(model(dual).cos().sum()).tangent.square()

    operator = HessianOperator(loss, list(model.parameters()))
    assert operator.backend == "double_backward" and (operator @ operator.gradient).isfinite().all()


@pytest.mark.parametrize("affine", [True, False])
def test_many_backward_passes_at_once_are_those_one_by_one(affine):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=affine), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x, params = torch.randn(5, 3, dtype=torch.float64), dict(net.named_parameters())

    def loss(at_once):
        at = x.clone().requires_grad_()
        out = net(at).sum(0)
        if at_once:
            unit = torch.eye(2, dtype=torch.float64)
            slopes = torch.autograd.grad(out, at, unit, is_grads_batched=True, create_graph=True)[0]
        else:
            slopes = torch.stack([torch.autograd.grad(o, at, create_graph=True)[0] for o in out])
        return slopes.pow(2).mean()

    gradient = HessianOperator(lambda: loss(True), params).gradient
    expected = HessianOperator(lambda: loss(False), params).gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_has_its_second_derivative(dim, old):
    torch.manual_seed(1)
    normed = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    net, x = normed(nn.Linear(3, 2).double(), dim=dim), torch.randn(8, 3, dtype=torch.float64)
    params = dict(net.named_parameters())
    found = HessianOperator(lambda: net(x).pow(3).mean(), params)
    moved = HessianOperator(lambda: net(x).pow(3).mean(), params, backend="finite_difference")
    unit = torch.eye(found.shape[0], dtype=torch.float64)
    matrix = found @ unit
    assert found.backend == "double_backward"
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(matrix, moved @ unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_training_to_the_bit(dtype, bias):
    torch.manual_seed(0)
    net = nn.LayerNorm(16, bias=bias).to(dtype)
    x = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    inputs_ = [x, *net.parameters()]
    expected = torch.autograd.grad(net(x).square().mean(), inputs_)
    with FewerCalls():
        found = torch.autograd.grad(net(x).square().mean(), inputs_, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
