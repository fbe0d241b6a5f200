"""A step observed in a plain loop: values, what training may not notice, and what is refused."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from dynamon.monitoring.step_probe import StepObserver
from dynamon.optim import Lanton, LayerwiseRates
from dynamon.rates import FixedRates


class Noisy(nn.Module):
    """BatchNorm, dropout, and numbers drawn from every stream in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop, self.calls = nn.Dropout(0.3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = 1e-3 * (random.random() + np.random.rand() + torch.rand(()))
        return self.last(self.drop(torch.relu(self.norm(self.first(x))))) + noise


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def data(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(16, 6, generator=generator, dtype=dtype), torch.randint(3, (16,), generator=generator)


def streams() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def run(make: Callable[[Any], Optimizer], every: int, act: str = "read") -> tuple[Any, ...]:
    """Train a noisy net; every k-th step is observed, 0 for none."""
    seed_everything(0)
    model = Noisy()
    optimizer = make(model)
    observer = StepObserver(model, optimizer, loss_fn) if every else None
    gradients = []
    for t, batch in enumerate(data(8)):
        if observer is not None and observer.is_kept:
            if act == "read":
                observer.read(batch)
            else:
                observer.couplings(batch, {"first": ["first.weight"], "rest": ["last.weight", "norm.weight"]})
        loss_fn(model, batch).backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if observer is not None and t % every == 0:
            observer.keep()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return model.state_dict(), gradients, streams(), model.calls, model.training


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "lanton": lambda m: Lanton(m, 1e-2),
}


@pytest.mark.parametrize("act", ["read", "couplings"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_does_not_notice(name: str, act: str) -> None:
    plain, observed = run(OPTIMIZERS[name], 0), run(OPTIMIZERS[name], 1, act)
    assert all(torch.equal(plain[0][key], observed[0][key]) for key in plain[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], observed[1], strict=True))
    assert plain[2:] == observed[2:]


def one_step(
    model: nn.Module, optimizer: Optimizer, steps: int = 1
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Take steps between keep() and read(); the reading, weights before and after, and the probe."""
    dtype = next(model.parameters()).dtype
    observer = StepObserver(model, optimizer, loss_fn)
    *trained, probe = data(steps + 1, dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    observer.keep()
    for batch in trained:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    reading = observer.read(probe)
    observer.close()
    return reading, before, after, probe


def gradient(model: nn.Module, weights: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """The gradient of the loss at some weights, by a copy of the model."""
    own = copy.deepcopy(model)
    own.load_state_dict(weights, strict=False)
    own.zero_grad()
    loss_fn(own, batch).backward()
    return {name: p.grad for name, p in own.named_parameters()}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def inner(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[float]:
    return [float((one[name].double() * other[name].double()).sum()) for name in one]


def check(reading: Any, model: nn.Module, before: Any, after: Any, probe: Any, left: dict[str, float]) -> None:
    """Compare a reading with inner products that are written out."""
    decay = {name: (left.get(name, 1.0) - 1) * before[name] for name in before}
    step = {name: after[name] - before[name] - decay[name] for name in before}
    for weights, rows in ((before, ("before", "decay_before")), (after, ("after", "decay_after"))):
        slopes = gradient(model, weights, probe)
        for row, along in zip(rows, (step, decay), strict=True):
            np.testing.assert_allclose(getattr(reading, row), inner(slopes, along), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 10])
def test_decoupled_decay_is_told_apart(steps: int) -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "weight_decay": 0.5}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    reading, before, after, probe = one_step(model, optimizer, steps)
    check(reading, model, before, after, probe, {"0.weight": 0.995**steps, "0.bias": 0.995**steps})
    assert (reading.decay_before[:2] != 0).all() and (reading.decay_before[2:] == 0).all()


def test_coupled_decay_belongs_to_the_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    reading, before, after, probe = one_step(model, optimizer, 3)
    check(reading, model, before, after, probe, {})


@pytest.mark.parametrize("scales", [True, False])
def test_steering_scales_the_decay_or_does_not(scales: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    LayerwiseRates(optimizer, FixedRates({"0.*": 4.0}), model, scale_weight_decay=scales)
    reading, before, after, probe = one_step(model, optimizer)
    left = {name: 1 - 0.005 * (4 if scales and name[0] == "0" else 1) for name in before}
    check(reading, model, before, after, probe, left)


def test_lanton_decays_apart() -> None:
    model = net(torch.float32)
    optimizer = Lanton(model, 0.01, weight_decay=0.5, noise_adaptive=False)
    reading, before, after, _ = one_step(model, optimizer)
    assert (reading.decay_before != 0).all()
    assert abs(reading.discrepancy) < 0.05 * abs(reading.loss_before - reading.loss_after)


def test_both_sides_have_the_same_masks() -> None:
    """Without a step, the two gradients are the same to the last bit, and so are the losses."""
    seed_everything(0)
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reading, *_ = one_step(model, optimizer)
    assert reading.loss_before == reading.loss_after
    np.testing.assert_array_equal(reading.before, 0.0)
    observer = StepObserver(model, optimizer, loss_fn)
    probe = next(data(1))
    losses = set()
    for _ in range(3):
        observer.keep()
        optimizer.step()  # each reading has masks of its own
        losses.add(observer.read(probe).loss_after)
    assert len(losses) == 3


def test_the_discrepancy_is_small_with_dropout_and_batchnorm() -> None:
    seed_everything(0)
    model = Noisy().double()
    reading, *_ = one_step(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    assert abs(reading.discrepancy) < 1e-4 * abs(reading.total_decrease)


@pytest.mark.parametrize("kind", ["compile", "autocast", "checkpoint"])
def test_precision_and_wrappers(kind: str) -> None:
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own = copy.deepcopy(model)
    exact, *_ = one_step(own, torch.optim.SGD(own.parameters(), lr=0.5))
    wrapped: Any = torch.compile(model, backend="eager") if kind == "compile" else model

    def loss(module: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            if kind == "checkpoint":
                out = torch.utils.checkpoint.checkpoint(module, batch[0], use_reentrant=True)
            else:
                out = module(batch[0])
        return cross_entropy(out.float(), batch[1])

    observer = StepObserver(wrapped, optimizer, loss)
    batch, probe = data(2)
    batch[0].requires_grad_()
    probe[0].requires_grad_()
    observer.keep()
    loss_fn(model, batch).backward()
    optimizer.step()
    reading = observer.read(probe)
    size = np.abs(exact.before).max()
    tolerance = 0.03 * size if kind == "autocast" else 1e-6
    np.testing.assert_allclose(reading.before, exact.before, atol=tolerance)
    np.testing.assert_allclose(reading.after, exact.after, atol=tolerance)


def test_several_optimizers_and_frozen_layers() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    optimizers = [torch.optim.SGD([model[0].weight], lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.1)]
    observer = StepObserver(model, optimizers, loss_fn)
    assert [la.name for la in observer.layers] == ["0.weight", "2.weight", "2.bias"]
    batch, probe = data(2, dtype=torch.float64)
    observer.keep()
    loss_fn(model, batch).backward()
    optimizers[1].step()
    reading = observer.read(probe)
    assert reading.before[0] == 0 and (reading.before[1:] != 0).all()
    assert not observer.is_kept and observer.read(probe) is None


def test_what_cannot_be_observed_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter of the model"):
        StepObserver(net(), optimizer, loss_fn)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="backward pass"):
        StepObserver(model, optimizer, loss_fn)
    mixed = net()
    mixed[0].float()
    with pytest.raises(ValueError, match="several dtypes"):
        StepObserver(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1), loss_fn)


def test_close_leaves_no_hook() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
    StepObserver(model, optimizer, loss_fn).close()
    assert (len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)) == hooks


def test_a_batch_that_the_loss_changes_is_trained_on_as_it_was() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer = StepObserver(model, optimizer, lambda m, b: loss_fn(m, (b[0].mul_(2), b[1])))
    batch, probe = data(2, dtype=torch.float64)
    kept = probe[0].clone()
    observer.keep()
    loss_fn(model, batch).backward()
    optimizer.step()
    observer.read(probe)
    assert torch.equal(probe[0], kept)
