"""The stability ratio crosses 1 exactly where a run on a quadratic begins to grow."""

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from dynamon.stability import has_stability_condition, stability_ratio, stability_scaling, stability_threshold
from tests.models import dense_hessian, mlp, samples

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
SHAPES = [(3,), (2, 2)]  # two parameters, seven coordinates
STILL = math.nextafter(1.0, 0.0)  # a decay at which the second moment stays where it is
FROZEN = {"betas": (0.9, STILL), "eps": 1e-3}


class Quadratic:
    """The loss ``curvature / 2 w.H w`` with a dense positive definite H over both parameters."""

    def __init__(self, sign=1.0):
        torch.manual_seed(0)
        self.params = [nn.Parameter(1e-8 * torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
        self.start = [p.detach().clone() for p in self.params]
        factor = torch.randn(7, 7, dtype=torch.float64)
        self.hessian = sign * (factor @ factor.mT / 7 + 0.1 * torch.eye(7, dtype=torch.float64))
        self.curvature = 1.0

    def loss(self):
        w = torch.cat([p.flatten() for p in self.params])
        return self.curvature / 2 * w @ self.hessian @ w

    def reset(self):
        with torch.no_grad():
            for p, start in zip(self.params, self.start, strict=True):
                p.copy_(start)

    def growth(self, optimizer, steps):
        """Length of the weights after some steps over that at the start, by really training."""
        self.reset()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return (
            float(sum(p.detach().square().sum() for p in self.params) / sum(s.square().sum() for s in self.start))
            ** 0.5
        )


def freeze_second_moment(optimizer, moments=None):
    """State as after endless training, whose second moment no longer moves."""
    torch.manual_seed(1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moment = torch.rand_like(p) + 0.05 if moments is None else moments[p]
            optimizer.state[p] = {
                "step": torch.tensor(1e18),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": moment.detach().clone(),
            }
            if group["amsgrad"]:
                optimizer.state[p]["max_exp_avg_sq"] = 4 * moment.detach().clone()
    return optimizer


def plain(kind, **arguments):
    return lambda params: kind(params, lr=0.1, **arguments)


def two_groups(kind, **arguments):
    return lambda p: kind([{"params": [p[0]], "lr": 0.1}, {"params": [p[1]], "lr": 0.037}], **arguments)


RUNS = {
    "sgd": plain(SGD),
    "momentum": plain(SGD, momentum=0.9),
    "little momentum": plain(SGD, momentum=0.3),
    "dampening": plain(SGD, momentum=0.8, dampening=0.4),
    "nesterov": plain(SGD, momentum=0.9, nesterov=True),
    "coupled decay": plain(SGD, momentum=0.7, weight_decay=0.8),
    "nesterov with decay": plain(SGD, momentum=0.7, nesterov=True, weight_decay=0.8),
    "maximize": plain(SGD, momentum=0.9, maximize=True),
    "maximize with decay": plain(SGD, weight_decay=0.5, maximize=True),
    "two groups": two_groups(SGD, momentum=0.6),
    "adam": plain(Adam, **FROZEN),
    "adam with coupled decay": plain(Adam, weight_decay=0.5, **FROZEN),
    "adam without momentum": plain(Adam, betas=(0.0, STILL)),
    "adamw": plain(AdamW, weight_decay=0.0, **FROZEN),
    "adamw with decay": plain(AdamW, weight_decay=0.7, **FROZEN),
    "adamw foreach": plain(AdamW, foreach=True, **FROZEN),
    "adamw two groups": two_groups(AdamW, weight_decay=0.1, **FROZEN),
    "adamw maximize": plain(AdamW, maximize=True, **FROZEN),
    "amsgrad": plain(AdamW, amsgrad=True, **FROZEN),
}


def at_ratio(quadratic, make, target, **arguments):
    """Set the curvature so that the ratio is the target; ratio, and a fresh optimizer in that state."""

    def fresh():
        optimizer = make(quadratic.params)
        return freeze_second_moment(optimizer) if isinstance(optimizer, Adam) else optimizer

    def ratio(curvature):
        quadratic.curvature = curvature
        found = stability_ratio(quadratic.loss, quadratic.params, fresh(), tol=1e-6, **arguments)
        assert found.converged
        return float(found.values[0])

    quadratic.curvature = brentq(lambda curvature: ratio(curvature) - target, 1e-6, 1e4, xtol=1e-12, rtol=1e-12)
    assert ratio(quadratic.curvature) == pytest.approx(target, abs=1e-9)
    return fresh()


@pytest.mark.parametrize("run", RUNS)
def test_a_run_decays_just_below_one_and_grows_just_above(run):
    quadratic = Quadratic(sign=-1.0 if "maximize" in run else 1.0)
    halves = [quadratic.growth(at_ratio(quadratic, RUNS[run], 0.99), steps) for steps in (100, 200)]
    assert halves[1] < 0.9 * halves[0] and halves[1] < 0.1, halves
    growing = [quadratic.growth(at_ratio(quadratic, RUNS[run], 1.01), steps) for steps in (100, 200)]
    assert growing[1] > 1.1 * growing[0] and growing[1] > 10, growing


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_ratios_of_a_layerwise_rule(kind):
    """The ``ratios`` argument against a run whose groups really have the scaled rates."""
    ratios = [0.3, 1.0]
    settings = {"momentum": 0.9} if kind is SGD else FROZEN
    steered = lambda p: kind([{"params": [q], "lr": 0.1 * r} for q, r in zip(p, ratios, strict=True)], **settings)  # noqa: E731
    for target, grows in ((0.99, False), (1.01, True)):
        quadratic = Quadratic()
        at_ratio(quadratic, plain(kind, **settings), target, ratios=ratios)
        optimizer = steered(quadratic.params)
        if kind is AdamW:
            freeze_second_moment(optimizer)
        assert (quadratic.growth(optimizer, 200) > 10) == grows


def test_a_maximum_over_layers_is_not_the_ratio():
    quadratic = Quadratic()
    optimizer = at_ratio(quadratic, plain(SGD), 1.0)
    blocks = [float(stability_ratio(quadratic.loss, [p], optimizer, tol=1e-6).values[0]) for p in quadratic.params]
    assert max(blocks) < 0.95


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({}, 2 / 0.1),
        ({"momentum": 0.9}, 2 * 1.9 / 0.1),
        ({"momentum": 0.9, "dampening": 0.5}, 2 * 1.9 / (0.1 * 0.5)),
        ({"momentum": 0.9, "nesterov": True}, 2 * 1.9 / (0.1 * 2.8)),
        ({"weight_decay": 0.1}, None),
        ({"maximize": True}, None),
    ],
)
def test_threshold(arguments, value):
    p = [nn.Parameter(torch.ones(3))]
    found = stability_threshold(SGD(p, lr=0.1, **arguments))
    assert found == (None if value is None else pytest.approx(value))
    assert stability_threshold(SGD(p, lr=torch.tensor(0.1), **arguments)) == (value and pytest.approx(value))


def test_threshold_needs_one_number():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    assert (
        stability_threshold(Adam([p]))
        is stability_threshold(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]))
        is None
    )
    assert stability_threshold(SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}])) is None
    assert stability_threshold(SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.1}])) == pytest.approx(20)
    assert stability_threshold(SGD([p], lr=0.0)) is None


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_ratio_is_sharpness_over_threshold(arguments):
    inputs, labels = samples(9, 4, dtype=torch.float64)
    model = mlp(4, 5, 3).double()
    loss_of = lambda model: nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    optimizer = SGD(model.parameters(), lr=0.3, **arguments)
    top = float(torch.linalg.eigvalsh(dense_hessian(model, loss_of))[-1])
    params = list(model.parameters())
    found = stability_ratio(lambda: loss_of(model), params, optimizer, tol=1e-5, certify=True)
    assert float(found.values[0]) == pytest.approx(top / stability_threshold(optimizer), rel=1e-6)
    assert found.upper >= top / stability_threshold(optimizer) and found.vectors.shape[0] == 43
    assert stability_scaling(optimizer, params).constant == pytest.approx(1 / stability_threshold(optimizer))


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (plain(SGD), True),
        (plain(SGD, weight_decay=0.1), False),
        (plain(SGD, maximize=True), False),
        (two_groups(SGD), False),
    ],
)
def test_one_constant_where_there_is_one(make, given):
    params = Quadratic().params
    assert (stability_scaling(make(params), params).constant is not None) == given
    assert stability_scaling(make(params), params, [1.0, 0.5]).constant is None


def test_coordinates_that_never_had_a_gradient_are_left_out_and_counted():
    quadratic = Quadratic()
    moments = {p: torch.rand_like(p) + 0.1 for p in quadratic.params}
    moments[quadratic.params[0]][1] = 0
    optimizer = freeze_second_moment(AdamW(quadratic.params, lr=0.1, **FROZEN), moments)
    scaling = stability_scaling(optimizer, quadratic.params)
    assert scaling.excluded == 1 and scaling.scale[1] == 0 and (scaling.scale != 0).sum() == 6
    kept = [0, 2, 3, 4, 5, 6]
    v = torch.cat([moments[p].flatten() for p in quadratic.params])[kept]
    scale = (0.1 * 0.1 / ((2 - 0.1 * 0.01) * 1.9) / (v.sqrt() + 1e-3)).sqrt()
    dense = scale[:, None] * quadratic.hessian[kept][:, kept] * scale
    found = stability_ratio(quadratic.loss, quadratic.params, optimizer, tol=1e-6)
    assert float(found.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)


def test_a_parameter_without_state_is_left_out():
    quadratic = Quadratic()
    optimizer = AdamW(quadratic.params, lr=0.1)
    quadratic.params[0].grad = torch.ones_like(quadratic.params[0])
    optimizer.step()
    scaling = stability_scaling(optimizer, quadratic.params)
    assert scaling.excluded == 4 and not scaling.scale[3:].any() and scaling.scale[:3].all()


def test_a_rate_of_zero_leaves_no_coordinate_out():
    """A warm-up begins at rate 0: the ratio is 0, and nothing is missing."""
    quadratic = Quadratic()
    optimizer = freeze_second_moment(AdamW(quadratic.params, lr=0.0, **FROZEN))
    scaling = stability_scaling(optimizer, quadratic.params)
    assert scaling.excluded == 0 and not scaling.scale.any()
    assert float(stability_ratio(quadratic.loss, quadratic.params, optimizer).values[0]) == 0


def test_bias_correction_in_early_steps():
    """After real steps: the preconditioner that torch itself divides by."""
    quadratic = Quadratic()
    optimizer = Adam(quadratic.params, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    quadratic.growth(optimizer, 3)
    pieces = []
    for p in quadratic.params:
        before = p.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[p].items()}
        denominator = (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 1e-6
        pieces.append((0.01 * 0.2 / (2 * 1.8) / (denominator * (1 - 0.8**3))).flatten())
        assert torch.equal(p.detach(), before)
    assert torch.allclose(stability_scaling(optimizer, quadratic.params).scale ** 2, torch.cat(pieces), rtol=1e-12)


def test_the_optimizer_is_not_touched():
    quadratic = Quadratic()
    optimizer = AdamW(quadratic.params, lr=0.1)
    quadratic.growth(optimizer, 2)
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in quadratic.params]
    grads = [p.grad.clone() for p in quadratic.params]
    weights = [p.detach().clone() for p in quadratic.params]
    stability_ratio(quadratic.loss, quadratic.params, optimizer, ratios=[0.5, 1.0])
    for p, state, grad, weight in zip(quadratic.params, before, grads, weights, strict=True):
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
        assert torch.equal(p.grad, grad) and torch.equal(p.detach(), weight)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("name", ["Muon", "NAdam", "RAdam", "Adagrad", "LBFGS", "Adamax"])
def test_unsupported_optimizers(name):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = getattr(torch.optim, name)([p], lr=0.1)
    assert not has_stability_condition(optimizer) and stability_threshold(optimizer) is None
    with pytest.raises(
        ValueError, match=f"{name} has no known stability condition; it is known for SGD, Adam, AdamW and RMSprop"
    ):
        stability_ratio(lambda: p.square().sum(), [p], optimizer)


def test_subclasses_are_supported():
    class Mine(AdamW):
        pass

    assert has_stability_condition(Mine([nn.Parameter(torch.ones(1))]))


def test_bad_input():
    quadratic = Quadratic()
    p, q = quadratic.params
    with pytest.raises(ValueError, match="the optimizer has taken no step yet"):
        stability_ratio(quadratic.loss, quadratic.params, AdamW(quadratic.params))
    with pytest.raises(ValueError, match="a parameter is not in the optimizer"):
        stability_ratio(quadratic.loss, quadratic.params, SGD([p], lr=0.1))
    mixed = SGD([{"params": [p], "maximize": True}, {"params": [q]}], lr=0.1)
    with pytest.raises(ValueError, match="some groups maximize and some minimize"):
        stability_ratio(quadratic.loss, quadratic.params, mixed)
    with pytest.raises(ValueError):
        stability_ratio(quadratic.loss, quadratic.params, SGD([p, q], lr=0.1), ratios=[1.0])
    assert math.isfinite(float(stability_ratio(quadratic.loss, [p], SGD([p, q], lr=0.1)).values[0]))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (Adam, {"weight_decay": 0.2, "betas": (0.8, 0.9)}),
        (Adam, {"maximize": True, "weight_decay": 0.1, "amsgrad": True}),
        (AdamW, {"amsgrad": True, "weight_decay": 0.1}),
        (RMSprop, {"centered": True, "momentum": 0.3, "alpha": 0.9}),
        (RMSprop, {"weight_decay": 0.2}),
    ],
)
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_the_scaling_of_the_coming_step_is_that_after_it(cls, arguments, size):
    """Against torch's own step with that gradient; where nothing has moved yet, nothing counts."""
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.ones(4, dtype=torch.float64)]
    params[1].requires_grad_()
    optimizer = cls(params, lr=0.01, **arguments)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for key in {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg"} & set(optimizer.state[params[0]]):
        optimizer.state[params[0]][key][0, 0] = 0
    gradient = size * torch.randn(10, dtype=torch.float64)
    coming = stability_scaling(optimizer, params, gradient=gradient)
    now = stability_scaling(optimizer, params)
    for p, g in zip(params, gradient.split([6, 4]), strict=True):
        p.grad = g.view_as(p).clone()
    optimizer.step()
    after = stability_scaling(optimizer, params)
    assert coming.scale[0] == 0 == now.scale[0] and coming.excluded == 1
    torch.testing.assert_close(coming.scale[1:], after.scale[1:], rtol=1e-12, atol=0)
    assert not torch.allclose(coming.scale[1:], now.scale[1:], rtol=1e-3)


def test_a_gradient_says_nothing_of_the_coming_step_of_sgd():
    quadratic = Quadratic()
    optimizer = SGD(quadratic.params, lr=0.1, momentum=0.9)
    one, other = (stability_scaling(optimizer, quadratic.params, gradient=g) for g in (None, torch.ones(7).double()))
    assert torch.equal(one.scale, other.scale) and one.constant == other.constant


def test_with_a_small_gradient_the_ratio_of_the_coming_step_is_exact_on_quadratics():
    """Frozen moments: a coming step of gradient sqrt(v) leaves them as they are, and the ratio too."""
    quadratic = Quadratic()
    optimizer = freeze_second_moment(AdamW(quadratic.params, lr=0.1, **FROZEN))
    moment = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in quadratic.params])
    now, coming = (stability_scaling(optimizer, quadratic.params, gradient=g) for g in (None, moment.sqrt()))
    torch.testing.assert_close(coming.scale, now.scale, rtol=1e-6, atol=0)
