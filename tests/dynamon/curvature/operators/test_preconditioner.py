"""The diagonal P against what torch's optimizers really divide by.

That is found from the outside: the optimizer's own step is replayed with two tiny gradients of opposite sign. The
change of the weights over that of the gradient is the rate over P, times the share of the gradient in the momentum.
"""

import copy
import math

import pytest
import torch
from torch import nn

from dynamon.curvature import Diagonal, HessianOperator
from dynamon.curvature.operators.preconditioner import preconditioned, preconditioner

SHAPES = [(3, 2), (4,), ()]
LR = 0.01
TINY = 1e-7


def optimizers():
    o = torch.optim
    return {
        "adam": lambda p: o.Adam(p, LR, betas=(0.8, 0.95), eps=1e-3),
        "adam, default": lambda p: o.Adam(p, LR),
        "adam, foreach": lambda p: o.Adam(p, LR, betas=(0.8, 0.95), foreach=True),
        "adam, coupled decay": lambda p: o.Adam(p, LR, betas=(0.8, 0.95), weight_decay=0.3),
        "adam, maximize": lambda p: o.Adam(p, LR, betas=(0.8, 0.95), maximize=True),
        "adam without momentum": lambda p: o.Adam(p, LR, betas=(0.0, 0.9)),
        "adamw": lambda p: o.AdamW(p, LR, betas=(0.8, 0.95), weight_decay=0.2),
        "amsgrad": lambda p: o.Adam(p, LR, betas=(0.8, 0.6), amsgrad=True),
        "nadam": lambda p: o.NAdam(p, LR, betas=(0.8, 0.95)),
        "rmsprop": lambda p: o.RMSprop(p, LR, alpha=0.9, eps=1e-3),
        "rmsprop, momentum": lambda p: o.RMSprop(p, LR, alpha=0.9, momentum=0.7),
        "rmsprop, centered": lambda p: o.RMSprop(p, LR, alpha=0.9, centered=True),
        "adagrad": lambda p: o.Adagrad(p, LR),
        "adagrad, initial value": lambda p: o.Adagrad(p, LR, initial_accumulator_value=0.3, eps=1e-3),
        "adamax": lambda p: o.Adamax(p, LR, betas=(0.8, 0.95)),
    }


OPTIMIZERS = optimizers()


def fresh():
    return [nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64)) for shape in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + i) for i, shape in enumerate(SHAPES)]


def trained(name, steps):
    params = fresh()
    optimizer = OPTIMIZERS[name](params)
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def really_divided_by(name, steps):
    """The change of the weights over the change of the gradient, in a replay of the last step of each parameter."""
    params, optimizer = trained(name, steps)
    group = optimizer.param_groups[0]
    return flat([slope_of_the_last_step(type(optimizer), group, p, optimizer.state[p]) for p in params])


def slope_of_the_last_step(kind, group, p, state):
    """Replayed with g = TINY and -TINY and no momentum from before, so that the step ends in today's second moment."""
    decays = {"exp_avg_sq": "betas", "exp_inf": "betas", "square_avg": "alpha", "grad_avg": "alpha"}
    moved = []
    for sign in (1, -1):
        q = nn.Parameter(p.detach().clone())
        other = kind([{**group, "params": [q], "weight_decay": 0.0}])
        before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
        before["step"] -= 1
        for name, value in before.items():
            if name in ("exp_avg", "momentum_buffer"):
                value.zero_()
            elif name in decays:
                decay = group[decays[name]]
                value /= decay[1] if isinstance(decay, tuple) else decay
            elif name == "mu_product":
                value /= nadam_momentum(group, float(state["step"]))
        other.state[q] = before
        q.grad = torch.full_like(q, sign * TINY)
        other.step()
        moved.append(q.detach() - p.detach())
    slope = (moved[1] - moved[0]) / (2 * TINY)
    return -slope if group.get("maximize") else slope


def nadam_momentum(group, step):
    """Its momentum changes from step to step."""
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_the_optimizer_divides_by(name, steps):
    """A small gradient moves the weights by ``lr (1 - b1) / P`` times itself, with ``b1`` of those that average."""
    params, optimizer = trained(name, steps)
    found = preconditioner(optimizer, params)
    group = optimizer.param_groups[0]
    share = 1 - group["betas"][0] if "betas" in group else 1.0
    if name == "nadam":  # gradient and momentum enter with corrections of their own; the divisor is the same
        moments = [nadam_momentum(group, step) for step in range(1, steps + 2)]
        product, following = math.prod(moments[:-1]), moments[-1]
        gain = (1 - moments[-2]) / (1 - product) + following * share / (1 - product * following)
        expected = gain * (1 - product) / found
    else:
        expected = share / found
    torch.testing.assert_close(really_divided_by(name, steps) / LR, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adamax"])
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"centered": True}], ids=str)
def test_rows_never_seen_are_not_a_number(kind, extra):
    """A token that never had a gradient: its divisor of eps would stand for an endless sharpness."""
    if extra and not (kind.startswith("Adam") and kind != "Adamax" if "amsgrad" in extra else kind == "RMSprop"):
        return
    table = nn.Embedding(4, 2)
    optimizer = getattr(torch.optim, kind)(table.parameters(), lr=0.01, **extra)
    for step in range(4):
        optimizer.zero_grad()
        (table(torch.tensor([0, 2, 2])) * (step + 1)).square().sum().backward()
        optimizer.step()
    found = preconditioner(optimizer, [table.weight]).view(4, 2)
    assert found[[0, 2]].isfinite().all() and (found[[0, 2]] > 0).all()
    assert found[[1, 3]].isnan().all()
    operator = preconditioned(Diagonal(torch.ones(8)), found.flatten())
    product = (operator @ torch.ones(8)).view(4, 2)
    assert not product[[1, 3]].any() and torch.allclose(product[[0, 2]], 1 / found[[0, 2]])


def test_parameters_without_a_state_are_not_a_number():
    params = fresh()
    optimizer = torch.optim.Adam(params)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    found = preconditioner(optimizer, params)
    assert found[:6].isnan().all() and found[6:10].isfinite().all() and found[10:].isnan().all()
    assert found.shape == (11,) and found.dtype == torch.float64


def test_the_scaled_operator():
    """``P^-1/2 A P^-1/2`` with a dense A, coordinates without a P left out."""
    params, optimizer = trained("adam", 5)
    drawn = torch.randn(11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = drawn + drawn.mT
    hessian = HessianOperator(lambda: flat_loss(params, matrix), params)
    diagonal = preconditioner(optimizer, params)
    diagonal[3] = torch.nan
    scale = diagonal.rsqrt()
    scale[3] = 0
    products = preconditioned(hessian, diagonal) @ torch.eye(11, dtype=torch.float64)
    torch.testing.assert_close(products, scale[:, None] * matrix * scale)


def flat_loss(params, matrix):
    w = torch.cat([p.reshape(-1) for p in params])
    return w @ matrix @ w / 2


def test_the_order_is_that_of_the_parameters_asked_for():
    params, optimizer = trained("adam", 3)
    whole = preconditioner(optimizer, params).split([6, 4, 1])
    torch.testing.assert_close(preconditioner(optimizer, params[::-1]), torch.cat(whole[::-1]))
    torch.testing.assert_close(preconditioner(optimizer, params[1:2]), whole[1])


def test_groups_keep_their_own_settings():
    params = fresh()
    optimizer = torch.optim.Adam(
        [{"params": params[:1], "betas": (0.5, 0.9), "eps": 0.1}, {"params": params[1:], "betas": (0.9, 0.99)}], lr=LR
    )
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    optimizer.step()
    sizes = [abs(g).flatten() for g in gradients(0)]
    expected = torch.cat([(sizes[0] + 0.1) * 0.5, *[(s + 1e-8) * 0.1 for s in sizes[1:]]])
    torch.testing.assert_close(preconditioner(optimizer, params), expected)


def test_the_optimizer_is_not_touched():
    params, optimizer = trained("amsgrad", 3)
    before = copy.deepcopy(optimizer.state_dict())
    preconditioner(optimizer, params).zero_()
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in state.items())


def test_bad_input():
    params = fresh()
    with pytest.raises(ValueError, match="a parameter is not in the optimizer, so it has no preconditioner"):
        preconditioner(torch.optim.Adam(params[:1]), params)
    with pytest.raises(ValueError, match="the optimizer has taken no step yet"):
        preconditioner(torch.optim.Adam(params), params)
    for make in (lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9), lambda: torch.optim.Rprop(params)):
        optimizer = make()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(ValueError, match=f"{type(optimizer).__name__} keeps no second moment"):
            preconditioner(optimizer, params)
