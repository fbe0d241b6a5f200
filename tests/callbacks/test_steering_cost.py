"""What steering costs a step beside the reading of the gradients: calls of Python and of the device, waits."""

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import dynamon
from dynamon.callbacks import LayerwiseLR, NoiseAdaptiveLR, SpikeGuard
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.kernels import GradientStats
from dynamon.optim import LayerwiseRates
from dynamon.quantities.readings import GradientReadings, PendingReadings
from dynamon.rates import BalancedRates, FixedRates, NoiseAdaptiveRates
from tests.helpers import Classifier, fit
from tests.launches import Launches, fill_gradients, gpt2

HERE = Path(dynamon.__file__).parents[1]
OURS = tuple(str(HERE / folder) for folder in ("callbacks", "dynamon", "kernels"))
AdamW = torch.optim.AdamW


def deep() -> nn.Module:
    """Fifty tensors."""
    torch.manual_seed(0)
    inner = [layer for _ in range(24) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(8, 3))


class Calls(pl.Callback):
    """Counts calls of Python functions of ours, those of generators included, over twenty steps."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 40:
            sys.setprofile(self.see)
        elif trainer.global_step == 60:
            sys.setprofile(None)

    def see(self, frame, event, _) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            self.calls[f"{Path(code.co_filename).name} {code.co_qualname}"] += 1

    @property
    def a_step(self) -> float:
        return self.calls.total() / 20


@pytest.mark.parametrize(
    ("steering", "most"),
    [
        (lambda: NoiseAdaptiveLR(), 350),
        (lambda: LayerwiseLR(FixedRates({"network.0.*": 0.5})), 150),
        (lambda: LayerwiseLR(BalancedRates(["network.0.*", "network.*"], every=1000)), 150),  # no reading among them
        (lambda: SpikeGuard(), 100),
    ],
    ids=["noise", "by hand", "balanced", "guard"],
)
def test_python_calls_a_step(steering, most) -> None:
    calls = Calls()
    try:
        fit(Classifier(deep()), [calls, steering()], steps=62, max_epochs=-1, log_every_n_steps=50)
    finally:
        sys.setprofile(None)
    assert 10 < calls.a_step <= most, calls.calls.most_common(20)


def canned(pending: PendingReadings) -> GradientReadings:
    """Readings of noise that differs by layer, without asking the device."""
    present = pending.context.present
    layers = len(present)
    size = np.random.default_rng(0).permutation(np.geomspace(0.01, 10, layers))
    nothing, ones = np.full(layers, np.nan), np.ones(layers)
    return GradientReadings(
        *(present, size, size, nothing, 0 * ones, size, size, 0.5 * size, present, nothing, nothing),
        trend=-0.5 * ones,
        rounding=1e-4 * ones,
        frozen=~present,
        window=None,
    )


MOST = 60  # reading, rule and view


def two_calls(gradients, previous=None, dtype=None, *, scale=1.0):
    """Stands for the Triton twin of the statistics: a pass over all gradients and a sum of its parts."""
    rows = torch.ones(6, len(gradients), dtype=dtype, device=gradients[0].device).neg()
    return GradientStats(*rows) if previous is not None else GradientStats(*rows[:3])


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
def test_device_calls_a_step_of_gpt2(monkeypatch, is_tensor) -> None:
    """148 tensors in 16 groups, on a device whose numbers cannot be read: nothing waits, and calls are few."""
    model, seen = gpt2("meta"), []
    optimizer = AdamW(model.parameters(), lr=torch.tensor(1e-3) if is_tensor else 1e-3, foreach=not is_tensor)
    monkeypatch.setattr(PendingReadings, "wait", canned)
    monkeypatch.setattr("dynamon.quantities.gradient_statistics.gradient_stats", two_calls)
    with Launches() as launches:
        optimizer.register_step_pre_hook(lambda *_: launches.reset())
        rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), model)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append((len(o.param_groups), launches.total)))
        for step in range(4):
            fill_gradients(model)
            launches.reset()
            rates.observe(key=step)
            reading = launches.total
            optimizer.step()
    groups, view = seen[-1]
    assert groups == 16 and len(set(rates.applied.values())) == 16
    assert view == 2 * is_tensor  # rule and merging are the host's; rates that are tensors are copied and scaled
    assert 10 <= reading + view <= MOST, reading


class Asked:
    """How often a scaler was asked for its scale in a way that waits for its device."""

    def __init__(self, monkeypatch) -> None:
        self.times = 0
        inner = torch.amp.GradScaler.get_scale

        def get_scale(scaler):
            self.times += 1
            return inner(scaler)

        monkeypatch.setattr(torch.amp.GradScaler, "get_scale", get_scale)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_gradient_scaler_is_not_waited_for(monkeypatch, fused) -> None:
    """Fused optimizers unscale in their step: what steering reads is brought to size without asking the host."""

    def run(scale):
        steering = NoiseAdaptiveLR(warmup=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        module = Classifier(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
        module.make_optimizer = lambda p: AdamW(p, lr=1e-2, fused=fused)
        fit(module, [steering], steps=12, max_epochs=-1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return steering

    asked = Asked(monkeypatch)
    small, large = run(2.0), run(256.0)
    assert asked.times == 0
    for name, ratio in small.ratios.items():  # gradients are those of one loss, but for what half precision loses
        assert large.ratios[name] == pytest.approx(ratio, rel=0.05)
    noise = [one.history["noise/dual"].values[-1] for one in (small, large)]
    np.testing.assert_allclose(noise[0], noise[1], rtol=0.05)
    assert min(small.ratios.values()) < 1.0


def test_monitor_and_steering_are_one_sentence_on_several_devices() -> None:
    """Parts of a model dealt out by hand: ``meta`` stands for the second device."""

    class Early(pl.Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            pl_module.network[2].weight = nn.Parameter(pl_module.network[2].weight.detach().to("meta"))
            pl_module.cpu = lambda: pl_module  # at teardown, which nothing on meta survives

    def network():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    with pytest.raises(ValueError, match="NoiseAdaptiveLR cannot steer this run: .*are on cpu and meta, and gradients"):
        fit(Classifier(network()), [Early(), NoiseAdaptiveLR()], steps=1)

    model = network()
    model[2].weight = nn.Parameter(model[2].weight.detach().to("meta"))
    reason = TrainerLoop(SimpleNamespace(strategy=object()), Classifier(model)).off_reason()
    assert reason == "the model's parameters are on cpu and meta, and gradients are read on one device."
