"""Runs in half precision: readings against the weights themselves, findings, and training that is left alone."""

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.callbacks import DynamicsMonitor, WeightMonitor
from dynamon.optim import Lanton
from tests.helpers import Classifier, batches, fit, mlp

EVERY = {"every_n_steps": 1, "strict": True}
pytestmark = pytest.mark.filterwarnings("ignore:DynamicsMonitor|WeightMonitor")


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))


def adamw(lr=1e-4, **others):
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, **others)


def run(optimizer, precision="bf16-true", steps=8, monitors=None, network=normed, **settings):
    torch.manual_seed(0)
    module = Classifier(network(), optimizer=optimizer)
    monitors = [WeightMonitor(**EVERY)] if monitors is None else monitors
    fit(module, monitors, batches(32 * steps), steps=steps, precision=precision, **settings)
    return module, monitors[0] if monitors else None


OPTIMIZERS = {
    "AdamW": adamw(),
    "fused": adamw(fused=True),
    "foreach": adamw(foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "descent": lambda p: torch.optim.SGD(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-4),
    "Lanton": lambda p: Lanton(p, lr=1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lost_updates_are_entries_that_stay_although_they_have_a_gradient(name):
    import lightning.pytorch as pl

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.weights: list[dict[str, torch.Tensor]] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    keep, monitor = Keep(), WeightMonitor(**EVERY)
    run(OPTIMIZERS[name], monitors=[monitor, keep])
    series = monitor.history["precision/update_lost"]
    assert np.isfinite(series.values).all() and (monitor.history["precision/bits"].values == 8).all()
    stayed = np.array(
        [
            [float((a[n] == b[n]).double().mean()) for n in series.layers]
            for a, b in zip(keep.weights, keep.weights[1:], strict=False)
        ]
    )
    # All that is lost stayed; what stayed and was not lost has a step of zero (dead units).
    assert (series.values <= stayed + 1e-6).all()
    norm, matrix = series.layers.index("network.1.weight"), series.layers.index("network.0.weight")
    assert (series.values[:, norm] > 0.7).all() and (stayed - series.values)[:, matrix].max() < 0.3


def test_mixed_precision_loses_nothing():
    for precision in ("bf16-mixed", "32-true"):
        _, monitor = run(adamw(), precision)
        assert (monitor.history["precision/update_lost"].values == 0).all()
        assert (monitor.history["precision/bits"].values == 24).all()
        assert np.nanmin(monitor.history["precision/update_size"].values) > 10


def test_dtypes_may_be_mixed_in_one_model():
    def network() -> nn.Module:
        whole = normed()
        whole[0].to(torch.bfloat16)
        return nn.Sequential(Cast(torch.bfloat16), whole[0], Cast(torch.float32), *whole[1:])

    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    _, monitor = run(adamw(), "32-true", network=network)
    lost = monitor.history["precision/update_lost"]
    low = [name.startswith("network.1.") for name in lost.layers]
    assert (lost.values[:, np.array(low)].max() > 0.5) and (lost.values[:, ~np.array(low)] == 0).all()


def test_decay_that_is_lost_is_not_counted():
    for optimizer in (adamw(), adamw(fused=True), OPTIMIZERS["Lanton"]):
        _, monitor = run(optimizer, steps=40)
        lost, left = monitor.history["precision/decay_lost"], monitor.history["weight/initial_fraction"]
        norm = lost.layers.index("network.1.weight")
        assert np.median(lost.values[:, norm]) == 1 and left.values[-1, norm] > 1 - 2e-5
        usage = monitor.history["weight/constraint_usage"].values[:, norm]
        assert np.isnan(usage[lost.values[:, norm] == 1]).all()
    _, monitor = run(adamw(), "32-true", steps=40)
    assert monitor.history["weight/initial_fraction"].values[-1] == pytest.approx((1 - 1e-5) ** 40, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_swallows_its_updates_is_told_and_a_sensible_one_is_not():
    for precision, lr, expected in (("bf16-true", 1e-5, True), ("bf16-true", 2e-2, False), ("32-true", 1e-5, False)):
        _, monitor = run(adamw(lr), precision, steps=40, monitors=[DynamicsMonitor(**EVERY)], network=mlp)
        found = [one for one in monitor.findings if one.rule == "precision/swallowed"]
        assert bool(found) == expected, (precision, lr)
        if found:
            assert found[0].severity == "fault" and "bfloat16" in found[0].message and found[0].step <= 1
            multiples = monitor.history["sharpness/critical_multiple"].values
            assert not (multiples == 0).any()  # what rounding hides is not known


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", ["fused", "foreach", "momentum", "Lanton"])
def test_training_is_left_alone(name, precision):
    plain, _ = run(OPTIMIZERS[name], precision, monitors=[])
    seen, monitor = run(OPTIMIZERS[name], precision)
    assert "precision/gradient_underflow_fp16" in monitor.history
    for one, other in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(one, other)
