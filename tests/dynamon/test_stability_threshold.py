"""The stability ratio is 1 at the multiple of the rates where the optimizer itself turns from converging to diverging.

The one-step map of the real optimizer, weights and momentum buffers as its state, is found by taking its step from
every basis vector; a bisection finds the multiple of all rates at which its spectral radius passes 1.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from dynamon.stability import stability_ratio, stability_scaling
from tests.models import dense_hessian

SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
SHAPES = [(3,), (2, 2), ()]  # eight coordinates
SIZE = 8
TINY = 1e-9  # of a basis vector: what the second moment sees of it, its square, is lost in rounding
AGE = 6  # steps that the optimizer has taken
SEEDS = range(6)


@dataclass
class Run:
    """An optimizer and its groups, one dict for each of the three parameters or one for all."""

    kind: type
    groups: list[dict[str, Any]]
    sign: float = 1.0
    buffers: tuple[str, ...] = field(init=False)  # the part of the state that moves

    def __post_init__(self) -> None:
        momentum = {SGD: "momentum_buffer", RMSprop: "momentum_buffer", Adam: "exp_avg", AdamW: "exp_avg"}[self.kind]
        self.buffers = (momentum,) if self.kind in (Adam, AdamW) or any(g.get("momentum") for g in self.groups) else ()

    def make(self, params, multiple=1.0):
        groups = self.groups * (3 if len(self.groups) == 1 else 1)
        given = [{"params": [p], **g, "lr": multiple * g.get("lr", 0.1)} for p, g in zip(params, groups, strict=True)]
        return self.kind(given, **({} if self.kind is SGD else {"eps": 1e-3}))


RUNS = {
    "sgd": Run(SGD, [{}]),
    "sgd, mixed rates": Run(SGD, [{"lr": 0.1}, {"lr": 0.03}, {"lr": 0.5}]),
    "momentum": Run(SGD, [{"momentum": 0.9}]),
    "mixed momentum": Run(SGD, [{"momentum": 0.9}, {"momentum": 0.0, "lr": 0.3}, {"momentum": 0.5}]),
    "nesterov": Run(SGD, [{"momentum": 0.9, "nesterov": True}]),
    "nesterov beside heavy ball": Run(SGD, [{"momentum": 0.8, "nesterov": True}, {"momentum": 0.8}, {"lr": 0.2}]),
    "dampening": Run(SGD, [{"momentum": 0.8, "dampening": 0.5}]),
    "coupled decay": Run(SGD, [{"weight_decay": 0.9, "momentum": 0.7}]),
    "mixed coupled decay": Run(SGD, [{"weight_decay": 0.9}, {"weight_decay": 0.0, "lr": 0.3}, {"momentum": 0.5}]),
    "nesterov, coupled decay": Run(SGD, [{"weight_decay": 0.4, "momentum": 0.6, "nesterov": True}]),
    "maximize": Run(SGD, [{"maximize": True, "momentum": 0.5}], sign=-1.0),
    "maximize with decay": Run(SGD, [{"maximize": True, "weight_decay": 0.3}], sign=-1.0),
    "adamw": Run(AdamW, [{"weight_decay": 0.0}]),
    "adamw, decoupled decay": Run(AdamW, [{"weight_decay": 2.0}]),
    "adamw, mixed groups": Run(
        AdamW, [{"weight_decay": 3.0}, {"weight_decay": 0.0, "betas": (0.5, 0.9)}, {"lr": 0.02, "betas": (0.0, 0.99)}]
    ),
    "adamw, maximize": Run(AdamW, [{"maximize": True, "weight_decay": 0.5}], sign=-1.0),
    "adam, coupled decay": Run(Adam, [{"weight_decay": 0.7}]),
    "adam, mixed coupled decay": Run(Adam, [{"weight_decay": 0.7}, {"lr": 0.05}, {"betas": (0.3, 0.9)}]),
    "amsgrad": Run(AdamW, [{"amsgrad": True, "weight_decay": 1.0}]),
    "rmsprop": Run(RMSprop, [{}]),
    "rmsprop, momentum": Run(RMSprop, [{"momentum": 0.9}]),
    "rmsprop, mixed": Run(RMSprop, [{"momentum": 0.9}, {"lr": 0.05}, {"momentum": 0.4, "alpha": 0.9}]),
    "rmsprop, centered": Run(RMSprop, [{"centered": True}]),
    "rmsprop, centered, momentum, decay": Run(RMSprop, [{"centered": True, "momentum": 0.7, "weight_decay": 0.4}]),
}


class Quadratic:
    """The loss ``w.H w / 2`` with a dense random H, and a frozen second moment for each coordinate."""

    def __init__(self, seed, sign=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        factor = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.hessian = sign * (factor @ factor.mT / SIZE + 0.05 * torch.eye(SIZE, dtype=torch.float64))
        self.moment = torch.rand(SIZE, generator=generator, dtype=torch.float64) + 0.05
        self.mean = 0.4 * self.moment.sqrt() * torch.randn(SIZE, generator=generator, dtype=torch.float64).sign()

    def loss(self):
        w = torch.cat([p.flatten() for p in self.params])
        return w @ self.hessian @ w / 2

    def pieces(self, flat):
        sizes = [p.numel() for p in self.params]
        return [piece.view_as(p) for piece, p in zip(flat.split(sizes), self.params, strict=True)]

    def with_state(self, optimizer, buffers, age, before):
        """Write the state an optimizer has after ``age`` steps; with ``before``, such that the next step ends there."""
        flat = {name: self.pieces(value) for name, value in buffers.items()}
        moments, means = self.pieces(self.moment), self.pieces(self.mean)
        for group in optimizer.param_groups:
            for p in group["params"]:
                i = next(i for i, q in enumerate(self.params) if q is p)
                state = {name: values[i].clone() for name, values in flat.items()}
                if "momentum_buffer" in state and not group["momentum"]:
                    del state["momentum_buffer"]
                decay = group["betas"][1] if "betas" in group else group.get("alpha", 1.0)
                fade = decay if before else 1.0
                if isinstance(optimizer, Adam):
                    state |= {"step": torch.tensor(float(age)), "exp_avg_sq": moments[i] / fade}
                    if group["amsgrad"]:
                        state["max_exp_avg_sq"] = 4 * moments[i]
                if isinstance(optimizer, RMSprop):
                    state |= {"step": torch.tensor(float(age)), "square_avg": moments[i] / fade}
                    if group["centered"]:
                        state["grad_avg"] = means[i] / fade
                optimizer.state[p] = state
        return optimizer

    def step_of(self, run, multiple, flat):
        """Weights and buffers after one step of the real optimizer."""
        parts = dict(zip(("weights", *run.buffers), flat.split(SIZE), strict=True))
        with torch.no_grad():
            for p, value in zip(self.params, self.pieces(parts.pop("weights")), strict=True):
                p.copy_(value)
        optimizer = self.with_state(run.make(self.params, multiple), parts, AGE - 1, before=True)
        gradient = self.hessian @ flat[:SIZE]
        for p, piece in zip(self.params, self.pieces(gradient), strict=True):
            p.grad = piece.clone()
        optimizer.step()
        after = [torch.cat([p.detach().flatten() for p in self.params])]
        for name in run.buffers:
            after.append(torch.cat([optimizer.state[p].get(name, torch.zeros_like(p)).flatten() for p in self.params]))
        return torch.cat(after)

    def spectral_radius(self, run, multiple):
        size = SIZE * (1 + len(run.buffers))
        still = self.step_of(run, multiple, torch.zeros(size, dtype=torch.float64))
        columns = [self.step_of(run, multiple, TINY * e) - still for e in torch.eye(size, dtype=torch.float64)]
        return float(torch.linalg.eigvals(torch.stack(columns, 1) / TINY).abs().max())

    def ratio(self, run, multiple=1.0, **arguments):
        buffers = {name: torch.zeros(SIZE, dtype=torch.float64) for name in run.buffers}
        optimizer = self.with_state(run.make(self.params, multiple), buffers, AGE, before=False)
        found = stability_ratio(self.loss, self.params, optimizer, tol=1e-6, max_matvecs=200, **arguments)
        assert found.converged
        return float(found.values[0])


def critical_multiple(quadratic, run):
    """Where the spectral radius passes 1, to 1e-5."""
    low, high = 1e-3, 1e-3
    while quadratic.spectral_radius(run, high) < 1:
        low, high = high, 2 * high
    assert low < high, "diverges at any rate"
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if quadratic.spectral_radius(run, middle) < 1 else (low, middle)
    return low


@pytest.mark.parametrize("name", RUNS)
def test_the_ratio_is_one_where_the_optimizer_turns_from_converging_to_diverging(name):
    run, errors = RUNS[name], []
    for seed in SEEDS[:2]:
        quadratic = Quadratic(seed, run.sign)
        multiple = critical_multiple(quadratic, run)
        errors.append(abs(quadratic.ratio(run, multiple) - 1))
        assert quadratic.spectral_radius(run, 0.99 * multiple) < 1 < quadratic.spectral_radius(run, 1.01 * multiple)
        if not any(group.get("weight_decay") for group in run.groups):  # then the ratio grows as the rates do
            assert abs(1 / quadratic.ratio(run) / multiple - 1) <= 1e-3
    print(f"{name:40} off by at most {max(errors):.1e}")
    assert max(errors) <= 1e-3


def test_over_random_quadratics():
    """One run of each family, more quadratics."""
    worst = 0.0
    for name in ("nesterov beside heavy ball", "adamw, mixed groups", "rmsprop, centered, momentum, decay"):
        for seed in SEEDS[2:]:
            quadratic = Quadratic(seed)
            multiple = critical_multiple(quadratic, RUNS[name])
            worst = max(worst, abs(quadratic.ratio(RUNS[name], multiple) - 1))
    print(f"over random quadratics off by at most {worst:.1e}")
    assert worst <= 1e-3


def test_the_map_is_that_of_a_long_run():
    """The spectral radius of one step is the growth of many: momentum, weights and all."""
    run = RUNS["mixed momentum"]
    quadratic = Quadratic(0)
    critical = critical_multiple(quadratic, run)
    for multiple in (0.9 * critical, 1.1 * critical):
        radius = quadratic.spectral_radius(run, multiple)
        with torch.no_grad():
            for p in quadratic.params:
                p.fill_(1.0)
        optimizer, lengths = run.make(quadratic.params, multiple), []
        for _ in range(600):
            optimizer.zero_grad()
            quadratic.loss().backward()
            optimizer.step()
            lengths.append(float(sum(p.detach().square().sum() for p in quadratic.params)) ** 0.5)
        assert (lengths[599] / lengths[299]) ** (1 / 300) == pytest.approx(radius, rel=5e-3)


class Words(nn.Module):
    """A linear reading of an embedding; only the first three rows ever occur in training."""

    def __init__(self, rows):
        super().__init__()
        drawn = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.table, self.read = nn.Embedding(rows, 2).double(), nn.Linear(2, 2).double()
        with torch.no_grad():
            self.table.weight.fill_(0.5)
            self.table.weight[:3] = drawn[:3]
            self.read.weight.copy_(drawn[3:])
            self.read.bias.zero_()

    def forward(self, words):
        return self.read(self.table(words))


SEEN = torch.tensor([0, 1, 2, 1, 0, 0])


def loss_on(words):
    return lambda model: nn.functional.cross_entropy(model(words), words % 2)


def trained(rows, make):
    model = Words(rows)
    optimizer = make(model.parameters())
    for _ in range(8):
        optimizer.zero_grad()
        loss_on(SEEN)(model).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: Adam(p, lr=0.01),
        lambda p: AdamW(p, lr=0.01, amsgrad=True),
        lambda p: RMSprop(p, lr=0.01),
        lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9),
    ],
    ids=["adamw", "adam", "amsgrad", "rmsprop", "rmsprop centered", "sgd"],
)
def test_a_row_that_was_never_seen_does_not_change_it(make):
    found = {}
    for rows in (3, 5):
        model, optimizer = trained(rows, make)
        params = list(model.parameters())
        result = stability_ratio(lambda m=model: loss_on(SEEN)(m), params, optimizer, tol=1e-6, max_matvecs=100)
        assert result.converged
        found[rows] = float(result.values[0])
        unmoved = 0 if isinstance(optimizer, SGD) else 2 * (rows - 3)
        assert stability_scaling(optimizer, params).excluded == unmoved
        assert bool((model.table.weight[3:] == model.table.weight[3:].mean()).all())
    assert found[5] == pytest.approx(found[3], rel=1e-6)


@pytest.mark.parametrize("kind", [AdamW, RMSprop])
def test_nor_does_it_count_where_the_probe_holds_the_word(kind):
    """The row then has curvature, and a second moment of zero: what is left is the ratio of the other coordinates."""
    make = lambda p: kind(p, lr=0.01)  # noqa: E731
    probe = torch.cat([SEEN, torch.tensor([4, 4])])
    model, optimizer = trained(5, make)
    params = list(model.parameters())
    kept = [*range(6), *range(10, 16)]
    hessian = dense_hessian(model, loss_on(probe))
    assert hessian[8:10].abs().max() > 1e-3
    small, its_optimizer = trained(3, make)
    scale = stability_scaling(its_optimizer, list(small.parameters())).scale
    expected = float(torch.linalg.eigvalsh(scale[:, None] * hessian[kept][:, kept] * scale)[-1])
    result = stability_ratio(lambda: loss_on(probe)(model), params, optimizer, tol=1e-6, max_matvecs=100)
    assert float(result.values[0]) == pytest.approx(expected, rel=1e-6)
