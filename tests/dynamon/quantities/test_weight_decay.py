"""What decoupled decay leaves, against the weights of optimizers whose gradients are zero."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynamon.layers import describe_layers
from dynamon.quantities.weight_decay import DecayRetention, decoupled_decay
from tests.launches import Launches


class Descent(torch.optim.SGD):
    """A class of the user's own."""


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), 0.1),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), 0.0),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True), 0.1),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1), 0.0),
        (lambda p: torch.optim.RAdam(p, weight_decay=0.1, decoupled_weight_decay=True), 0.1),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), 0.0),
        (lambda p: Descent(p, lr=0.1, weight_decay=0.1), 0.0),
        (lambda p: torch.optim.Adadelta(p, weight_decay=0.1), 0.0),
        (lambda p: torch.optim.Adafactor(p, weight_decay=0.1), 0.1),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), 0.0),
    ],
)
def test_which_decay_is_decoupled_is_what_the_optimizer_does(make, expected: float) -> None:
    """Where it is, a large weight without a gradient shrinks by rate x decay in a step."""
    weight = nn.Parameter(torch.full((3,), 1e6))
    optimizer = make([weight])
    assert decoupled_decay(optimizer, optimizer.param_groups[0]) == expected
    weight.grad = torch.zeros(3)
    rate = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    if expected and type(optimizer).__name__ != "Adafactor":
        torch.testing.assert_close(weight.detach(), torch.full((3,), 1e6 * (1 - rate * expected)), rtol=1e-6, atol=2.0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_memory_is_what_is_left_of_the_weights(as_tensor: bool) -> None:
    """Under zero gradients AdamW does nothing but decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    start = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    names = {id(layer.parameter): layer.name for layer in describe_layers(model)}
    rate = torch.tensor(0.1) if as_tensor else 0.1
    groups = [{"params": list(model[0].parameters()), "weight_decay": 0.5}, {"params": list(model[1].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    memory = DecayRetention()
    for step in range(12):
        for name, p in model.named_parameters():
            p.grad = None if name == "0.bias" and step % 3 == 0 else torch.zeros_like(p)
        memory.note(optimizer)
        optimizer.step()
        schedule.step()
        memory.take(optimizer, lambda: names)
        if step == 5:  # as a checkpoint does
            state, memory = memory.state_dict(), DecayRetention()
            memory.load_state_dict(state)
    row = memory.row(list(start))
    assert row.dtype == torch.float32
    for (name, p), left in zip(model.named_parameters(), row.tolist(), strict=True):
        if name.startswith("1"):
            assert left != left  # never decayed
        else:
            torch.testing.assert_close(p.detach().double(), start[name] * left, rtol=1e-5, atol=0)
    assert row[0] < row[1]  # the bias missed every third step


def test_ratios_scale_the_decay() -> None:
    layer = nn.Linear(2, 2)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.5)
        memory = DecayRetention()
        names = {id(layer.weight): "weight", id(layer.bias): "bias"}
        for _ in range(2):  # one step, said twice, as where an optimizer steps another one
            memory.note(optimizer)
        for _ in range(2):
            memory.take(optimizer, lambda: names, {"weight": 0.5})  # noqa: B023
        assert memory.row(["weight", "bias"]).tolist() == pytest.approx([0.975, 0.95], rel=1e-6)


class Waits(TorchDispatchMode):
    """Fails where a number is read from a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_rate_on_a_device_is_never_read() -> None:
    layer, rate = nn.Linear(2, 2), torch.tensor(0.1)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.5)
    memory = DecayRetention()
    with Waits():
        for _ in range(3):
            memory.note(optimizer)
            rate.mul_(0.5)  # as schedulers change tensor rates: in place
            memory.take(optimizer, lambda: {id(layer.weight): "weight", id(layer.bias): "bias"}, {"weight": 0.5})
        row = memory.row(["weight"])
    assert row.tolist() == pytest.approx([0.975 * 0.9875 * 0.99375], rel=1e-6)


@pytest.mark.parametrize("many", [1, 3, 70])
def test_steps_that_a_device_skips_cost_no_calls_until_somebody_asks(many: int) -> None:
    """As fused optimizers under 16-mixed do it: only the device knows whether a step was taken."""
    layer = nn.Linear(2, 2)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    flags = [torch.tensor(float(step % 3 == 1)) for step in range(many)]
    memory, names = DecayRetention(), {id(layer.weight): "weight", id(layer.bias): "bias"}
    with Launches() as launches:
        for flag in flags:
            optimizer.param_groups[0]["lr"] *= 0.99
            memory.note(optimizer)
            memory.take(optimizer, lambda: names, {"weight": 0.5}, flag)
    assert launches.total <= 15 * (many // 64), launches
    rates = [0.1 * 0.99 ** (step + 1) for step in range(many)]
    taken = [rate for rate, flag in zip(rates, flags, strict=True) if not flag]
    expected = [math.prod(1 - 0.5 * scale * rate for rate in taken) for scale in (0.5, 1.0)]
    assert memory.row(["weight", "bias"]).tolist() == pytest.approx(expected, rel=1e-6)
    resumed = DecayRetention()
    resumed.load_state_dict(memory.state_dict())
    assert torch.equal(resumed.row(["weight", "bias"]), memory.row(["weight", "bias"]))


def test_quiet_steps_are_a_multiplication_a_group(monkeypatch) -> None:
    """However many layers there are; what joins or loses its gradient is noticed."""
    layers = [nn.Linear(2, 2, bias=False) for _ in range(30)]
    names = {id(layer.weight): f"{i}" for i, layer in enumerate(layers)}
    for layer in layers:
        layer.weight.grad = torch.zeros(2, 2)
    optimizer = torch.optim.AdamW([layer.weight for layer in layers[:-1]], lr=0.1, weight_decay=0.5)
    memory, asked = DecayRetention(), []

    def known() -> dict[int, str]:
        asked.append(0)
        return names

    def step() -> None:
        memory.note(optimizer)
        memory.take(optimizer, known)

    step()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_multiply_each", None)
        for _ in range(3):
            step()
    assert len(asked) == 1
    optimizer.param_groups[0]["params"].append(layers[-1].weight)
    layers[0].weight.grad = None
    step()
    expected = [0.95**4, *[0.95**5] * 28, 0.95]
    assert memory.row(list(names.values())).tolist() == pytest.approx(expected, rel=1e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    fresh = DecayRetention()
    fresh.note(optimizer)
    fresh.take(optimizer, known)
    assert fresh.row(["0", "1"]).isnan().tolist() == [True, False] and fresh.state_dict()["1"] == 1.0
