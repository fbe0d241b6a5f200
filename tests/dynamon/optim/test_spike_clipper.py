"""Clipping by a layer's own level: against an oracle in float64, at rest to the bit, and steps that are skipped."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.optim import LayerwiseRates, SpikeClipper, unguarded_reason
from dynamon.quantities.host_copy import HostCopy
from dynamon.rates import NoiseAdaptiveRates
from tests.conformance.subjects import SAM
from tests.launches import Launches, fill_gradients, gpt2

STEPS = 40
MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "Adam, tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(1e-2)),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, 1e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator)


def train(model, optimizer, steps=range(STEPS), factor=lambda step: 1.0, clipper=None, seen=None) -> None:
    for step in steps:
        x, y = batch(step, next(model.parameters()).dtype)
        loss = nn.functional.cross_entropy(model(x), y) * factor(step)
        optimizer.zero_grad()
        loss.backward()
        if clipper is not None:
            clipper.observe_loss(loss)
        if seen is not None:
            seen.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()


def spikes(step: int) -> float:
    return 1000.0 if step in (20, 33) else 1.0


@pytest.fixture(params=[True, False], ids=["host", "device"])
def either(request, monkeypatch) -> bool:
    """Factors found by the host, as on a CPU, and by the device, as elsewhere."""
    monkeypatch.setattr("dynamon.optim.spike_clipper.reads_are_free", lambda device: request.param)
    return request.param


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("floor", [1e-3, 0.1])
def test_gradients_are_clipped_as_an_oracle_in_float64_does(either, floor):
    """Ten lines, from the gradients of the run: mean and variance of log norms, numbers out of band at its edge."""
    model, used, seen = network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    clipper = SpikeClipper(optimizer, model, deviations=2.0, memory=10, warmup=9, floor=floor)
    optimizer.register_step_post_hook(lambda *_: used.append([p.grad.clone() for p in model.parameters()]))
    factors = []

    def note(*_):
        factors.append(list(clipper.factors.values()))

    optimizer.register_step_post_hook(note)
    train(model, optimizer, factor=spikes, seen=seen)
    state = [[0.0, 0.0] for _ in seen[0]]
    for step, (raw, own) in enumerate(zip(seen, used, strict=True)):
        for layer, gradient in enumerate(raw):
            x, (mean, variance) = math.log(float(gradient.double().norm())), state[layer]
            reach = math.hypot(math.log(2.0), 2.0 * math.sqrt(variance)) if step >= 8 else math.inf
            expected = min(1.0, max(math.exp(mean + reach - x), floor)) if step >= 9 else 1.0
            d, w = max(-reach, min(x - mean, reach)), max(1 / (step + 1), 1 / 10)
            state[layer] = [mean + w * d, (1 - w) * (variance + w * d * d)]
            assert factors[step][layer] == pytest.approx(expected, rel=1e-5)  # norms are float32 here
            if expected == 1.0:
                assert torch.equal(own[layer], gradient)
            else:
                torch.testing.assert_close(own[layer].double(), gradient.double() * expected, rtol=1e-6, atol=0)
    assert min(factors[20]) < 0.3 and np.sum(np.array(factors) < 1) >= 4
    assert clipper.counts.clipped == sum(min(row) < 1 for row in factors) and clipper.counts.steps == STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MAKE)
def test_at_rest_nothing_is_changed_to_the_bit(either, name, dtype):
    """Every gradient is multiplied by 1 on the device path; zeros keep their sign."""
    if name == "SGD fused" and dtype == torch.bfloat16:
        pytest.skip("torch 2.13 leaves entries of this momentum buffer without a value: two plain runs differ")
    plain, guarded = network(dtype), network(dtype)
    optimizers = [MAKE[name](model.parameters()) for model in (plain, guarded)]
    clipper = SpikeClipper(optimizers[1], guarded, warmup=3, deviations=1e4, skip=1e3)
    signs = [p.register_hook(lambda g: torch.where(g.abs() < 1e-3, -0.0 * g.abs(), g)) for p in guarded.parameters()]
    signs += [p.register_hook(lambda g: torch.where(g.abs() < 1e-3, -0.0 * g.abs(), g)) for p in plain.parameters()]
    before, after = [], []
    for optimizer, model in zip(optimizers, (plain, guarded), strict=True):
        train(model, optimizer, range(12), clipper=clipper if model is guarded else None)
    train(guarded, optimizers[1], range(1), seen=before)
    after = [p.grad for p in guarded.parameters()]
    train(plain, optimizers[0], range(1))
    assert equal(plain, guarded) and clipper.counts.clipped == clipper.counts.skipped == 0
    assert all(torch.equal(torch.signbit(a), torch.signbit(b)) for a, b in zip(before[0], after, strict=True))
    assert any((torch.signbit(g) & (g == 0)).any() for g in after)
    for one, other in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one if one[k] is not None)


@pytest.mark.parametrize("bad", ["scale", "NaN", "infinite", "loss"])
@pytest.mark.parametrize("name", MAKE)
def test_a_skipped_step_leaves_weights_and_state_as_if_it_had_not_been(name, bad):
    """The run that skips bad batches is bitwise the run that never sees them, from the first step on."""
    at = (20, 31) if bad in ("scale", "loss") else (0, 20, 31)
    size = {"scale": 1e6, "NaN": math.nan, "infinite": math.inf, "loss": 1e6}[bad]
    plain, guarded = network(), network()
    train(plain, MAKE[name](plain.parameters()), [step for step in range(STEPS) if step not in at])
    optimizer = MAKE[name](guarded.parameters())
    clipper = SpikeClipper(optimizer, guarded, warmup=12, deviations=10.0, skip=2.0)
    for step in range(STEPS):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(guarded(x), y)
        is_bad = step in at
        loss = loss * size if is_bad and bad != "loss" else loss
        optimizer.zero_grad()
        loss.backward()
        clipper.observe_loss(loss * size if is_bad and bad == "loss" else loss)
        gradients = [p.grad for p in guarded.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(guarded.parameters(), gradients, strict=True))
    assert equal(plain, guarded)
    clipper.settle()
    assert clipper.counts.skipped == len(at) and not hasattr(optimizer, "found_inf")
    state = optimizer.state_dict()["state"]
    assert all(int(own.get("step", STEPS - len(at))) == STEPS - len(at) for own in state.values())


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_keeps_its_scale_and_its_own_skips(fused):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    clipper = SpikeClipper(optimizer, model, warmup=5, skip=4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    limits = []
    for step in range(30):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y) * {15: 1e6, 25: math.inf}.get(step, 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = weights(model)
        clipper.observe_loss(loss) if step != 25 else None
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, weights(model))) == (step in (15, 25))
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        limits.append(max(clipper.limits.values()) if step >= 6 else 0.0)
    assert scaler.get_scale() == 2.0**9  # halved by the infinity, not by the step that the guard skipped
    assert clipper.counts.skipped == 1 and clipper.counts.steps == 29
    assert limits[25] == limits[24] and max(limits) < 1e3  # of unscaled gradients


def test_scales_do_not_change_what_is_clipped():
    found = []
    for scale in (1.0, 2.0**12):
        model = network(torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        clipper = SpikeClipper(optimizer, model, warmup=5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        for step in range(30):
            x, y = batch(step, torch.float64)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y) * spikes(step)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append((clipper.counts, weights(model), list(clipper.limits.values())))
    assert found[0][0] == found[1][0] and found[0][0].clipped >= 1
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_a_dry_run_is_bitwise_the_run_without_and_counts_what_it_would_do(name):
    plain, dry = network(), network()
    train(plain, MAKE[name](plain.parameters()), factor=spikes)
    optimizer = MAKE[name](dry.parameters())
    clipper = SpikeClipper(optimizer, dry, warmup=12, skip=3.0, apply=False)
    train(dry, optimizer, factor=spikes, clipper=clipper)
    clipper.settle()
    assert equal(plain, dry) and clipper.counts.clipped >= 1 and clipper.counts.skipped >= 1
    assert "dry run" in repr(clipper)


@pytest.mark.parametrize("skip", [None, 3.0])
@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_a_resumed_run_is_the_run_that_never_stopped(either, name, skip):
    def begun():
        model = network()
        optimizer = MAKE[name](model.parameters())
        return model, optimizer, SpikeClipper(optimizer, model, warmup=10, memory=15, deviations=2.0, skip=skip)

    whole = begun()
    train(*whole[:2], factor=spikes, clipper=whole[2])
    model, optimizer, clipper = begun()
    train(model, optimizer, range(21), factor=spikes, clipper=clipper)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), clipper.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, clipper = begun()
    for each, state in zip((model, optimizer, clipper), saved, strict=True):
        each.load_state_dict(state)
    train(model, optimizer, range(21, STEPS), factor=spikes, clipper=clipper)
    assert equal(model, whole[0]) and clipper.state_dict() == whole[2].state_dict()
    assert whole[2].counts.clipped >= 2


@pytest.mark.parametrize("skip", [None, 3.0], ids=["clips", "skips"])
def test_device_calls_a_step_do_not_grow_with_the_layers(monkeypatch, skip):
    """148 tensors on a device whose numbers cannot be read, and six; a fused optimizer is never waited for."""
    found = []
    monkeypatch.setattr(HostCopy, "wait", lambda copy: torch.ones(copy._host.shape))
    for model in (gpt2("meta"), nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(3)))):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        optimizer._step_supports_amp_scaling = skip is not None
        launches = Launches()
        nothing = torch.optim.Optimizer.profile_hook_step(lambda self: None)
        monkeypatch.setattr(optimizer, "step", nothing.__get__(optimizer))
        clipper = SpikeClipper(optimizer, model, warmup=1, skip=skip)
        for _ in range(4):
            fill_gradients(model)
            clipper.observe_loss(torch.ones((), device="meta"))
            clipper.settle()
            with launches:
                launches.reset()
                optimizer.step()
        found.append((launches.total, launches.waits))
    assert found[0] == found[1] and found[0][1] == 0
    assert 6 <= found[0][0] <= (9 if skip is None else 20), launches


class Nested(torch.optim.SGD):
    """Its step calls that of its base class, with hooks of its own."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("how", ["closure", "nested", "nested with a closure", "SAM"])
def test_a_gradient_is_handled_once_whatever_steps(how):
    """The gradient that moves the weights is clipped; each step counts once."""
    model, raw = network(), []
    base = (Nested if "nested" in how else torch.optim.SGD)(model.parameters(), 0.05)
    optimizer = SAM(base) if how == "SAM" else base
    clipper = SpikeClipper(optimizer, model, warmup=10)
    moved = []
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x=x, y=y, step=step):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) * spikes(step)
            loss.backward()
            raw.append([p.grad.clone() for p in model.parameters()])
            return loss

        before = weights(model)
        if how == "nested":
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
        moved.append([(b - a) / 0.05 for b, a in zip(before, weights(model), strict=True)])
        if step == 20:
            for factor, change, gradient in zip(clipper.factors.values(), moved[-1], raw[-1], strict=True):
                assert factor < 0.1
                torch.testing.assert_close(change, gradient * factor, rtol=1e-3, atol=1e-4)
    clipper.settle()
    assert clipper.counts.steps == STEPS and clipper.counts.clipped == 2


class Odd(nn.Module):
    """Tied, frozen, unused, sparse, complex, without dimensions, without entries, and lazy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4, sparse=True)
        self.one, self.lazy, self.unused = nn.Linear(4, 4), nn.LazyLinear(4), nn.Linear(2, 2)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.two.bias.requires_grad_(False)
        self.scale, self.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0))
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.lazy(self.two(torch.tanh(self.one(self.table(tokens)))))
        return self.scale * (x * self.phase.abs()).sum() + self.empty.sum()


def test_odd_parameters(either):
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    clipper = SpikeClipper(optimizer, model, warmup=5)
    tokens = torch.tensor([1, 1, 3])
    for step in range(12):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        (model(tokens) * (1e4 if step == 11 else 1.0)).backward()
        raw = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if step < 11:
            for name, p in model.named_parameters():
                assert p.grad is None or torch.equal(p.grad.to_dense(), raw[name].to_dense())
    factors = clipper.factors
    assert set(factors) == {n for n, _ in model.named_parameters()} - {"phase", "empty"}
    for name, p in model.named_parameters():
        changes = name in ("table.weight", "one.weight", "one.bias", "lazy.weight", "lazy.bias", "scale")
        assert (factors.get(name, 1.0) < 0.01) == changes, name
        if changes:
            expected = raw[name].to_dense() * factors[name]
            torch.testing.assert_close(p.grad.to_dense(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.phase.grad, raw["phase"])


def test_layers_that_join_keep_the_levels_of_the_others():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), 1e-2)
    clipper = SpikeClipper(optimizer, model, warmup=5)
    train(model, optimizer, range(10))
    known = copy.deepcopy(clipper.state_dict()["levels"]["0.weight"])
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.zero_grad()
    optimizer.step()
    assert list(clipper.limits) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert clipper.state_dict()["levels"]["0.weight"] == known and clipper.limits["2.weight"] == math.inf


def test_rules_of_rates_read_before_the_guard_clips():
    found = []
    for guarded in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        clipper = SpikeClipper(optimizer, model, warmup=5) if guarded else None
        rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), model)
        read, settle = [], rates.rule.update
        rates.rule.update = lambda readings, settle=settle, read=read: (
            read.append(readings.l2.copy()),
            settle(readings),
        )
        if clipper is not None:
            clipper.act_last()  # what a callback does before each step
            levels = clipper.levels
        train(model, optimizer, range(22), factor=lambda step: 1e3 if step == 20 else 1.0)
        rates.settle()
        found.append(read)
        if clipper is not None:
            assert clipper.counts.clipped == 1 and len(set(rates.applied.values())) > 1
            assert clipper.levels is levels  # groups that steering shows to a step are not taken for new ones
    np.testing.assert_allclose(found[1][20], found[0][20], rtol=1e-4)


def test_a_step_that_raises_gives_hidden_gradients_back():
    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("broken")

    model = network()
    optimizer = Raises(model.parameters(), 1e-2)
    clipper = SpikeClipper(optimizer, model, skip=2.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    clipper.restore()
    assert all(p.grad is not None for p in model.parameters())


def test_one_guard_an_optimizer_and_what_is_removed_acts_no_more():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    clipper = SpikeClipper(optimizer, model)
    with pytest.raises(ValueError, match="this SGD is guarded already; remove the other guard first"):
        SpikeClipper(optimizer, model)
    clipper.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"deviations": 0}, ValueError, "deviations must be above 0 and finite, got 0"),
        ({"deviations": "4"}, TypeError, "deviations must be a number, got '4'"),
        ({"memory": 0}, ValueError, "memory must be 1 or more steps, got 0"),
        ({"warmup": 2.5}, TypeError, "warmup must be a whole number of steps, got 2.5"),
        ({"floor": 0.0}, ValueError, "floor must be above 0 and at most 1, got 0.0"),
        ({"skip": 1.0}, ValueError, "skip must be above 1, so that a step is clipped before it is skipped"),
        ({"skip": True}, TypeError, "skip must be a number or None, got True"),
        ({"model": None}, TypeError, "model must be of type Module, got NoneType"),
        ({"optimizer": None}, TypeError, "optimizer must be of type Optimizer, got NoneType"),
        ({"model": nn.Linear(2, 2)}, ValueError, "the optimizer holds no parameter of the model: there is nothing to"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.raises(error, match=message):
        SpikeClipper(**{"optimizer": optimizer, "model": model, **arguments})


def test_what_cannot_be_guarded_says_why():
    model = network()
    with pytest.raises(ValueError, match="LBFGS cannot be guarded: it uses several gradients"):
        SpikeClipper(torch.optim.LBFGS(model.parameters()), model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    assert "another optimizer steps during backward" in unguarded_reason(torch.optim.SGD(model.parameters(), 1e-2))
    model = network()
    sam = SAM(torch.optim.SGD(model.parameters(), 1e-2))
    assert unguarded_reason(sam) is None
    with pytest.raises(ValueError, match="steps of SAM cannot be skipped: it steps another optimizer"):
        SpikeClipper(sam, model, skip=2.0)
    model[2].weight = nn.Parameter(model[2].weight.detach().to("meta"))
    with pytest.raises(ValueError, match="spikes cannot be watched: the model's parameters are on cpu and meta"):
        SpikeClipper(torch.optim.SGD(model.parameters(), 1e-2), model)
    assert unguarded_reason(object()) == "object cannot be guarded: it is not a torch.optim.Optimizer."


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    SpikeClipper(optimizer, model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    model(batch(0)[0]).sum().backward()
    with pytest.raises(Exception, match="cannot be guarded in a step that is compiled"):
        step()
    torch._dynamo.reset()
