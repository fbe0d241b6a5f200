"""Modules and set-ups that people really have, each of which once broke something."""

import copy
import gc
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from dynamon import measure
from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.optim import LayerwiseRates
from dynamon.rates import FixedRates
from tests.helpers import Classifier, batches, fit, mlp, same_weights


class Teacher(Classifier):
    """Averages a teacher, clips weights in place and draws from generators of its own in training_step."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)
        self.own, self.other = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.table = np.zeros(3)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for p, q in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                p.mul_(0.9).add_(q, alpha=0.1)
                q.data.mul_(0.999)
        self.table += self.other.random(3)
        noise = torch.randn(batch[0].shape, generator=self.own)
        return cross_entropy(self.network(batch[0] + 0.1 * noise), batch[1])


def test_training_steps_that_write_parameters_and_draw_numbers() -> None:
    plain, seen = Teacher(), Teacher()
    fit(plain, [])
    monitor = SharpnessMonitor(every_n_steps=2, strict=True)
    fit(seen, [monitor])
    assert same_weights(plain, seen)
    np.testing.assert_array_equal(plain.table, seen.table)
    assert len(monitor.history["sharpness/probe_loss"]) == 10


class Batch(dict):
    """A batch of a class of the user's own."""


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_loads_whatever_the_batches_are(tmp_path) -> None:
    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.network(batch.pop("x")), batch.pop("y"))

    def data() -> DataLoader:
        pairs = [(x, y) for x, y in batches().dataset]
        return DataLoader(
            pairs,
            8,
            collate_fn=lambda rows: Batch(x=torch.stack([r[0] for r in rows]), y=torch.stack([r[1] for r in rows])),
        )

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8)
    monitor = SharpnessMonitor(every_n_steps=2, strict=True)
    fit(Module(mlp()), [monitor, save], data(), steps=8, max_epochs=-1, enable_checkpointing=True)
    for callbacks in ([], [SharpnessMonitor(every_n_steps=2, strict=True)]):
        run = fit(Module(mlp()), callbacks, data(), steps=12, max_epochs=-1, ckpt_path=tmp_path / "step=8.ckpt")
        assert run.global_step == 12


def test_reentrant_checkpointing_is_measured_by_differences(caplog) -> None:
    """It has no second derivative; the same eigenvalue comes from differences of gradients, and that is said."""

    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_(True)
            return cross_entropy(self.network[3](checkpoint(self.network[:3], x, use_reentrant=True)), batch[1])

    plain, checkpointed = (SharpnessMonitor(every_n_steps=2, strict=True) for _ in range(2))
    fit(Classifier(mlp()), [plain])
    with caplog.at_level(logging.INFO):
        fit(Module(mlp()), [checkpointed])
    assert "Finite differences of gradients are used instead" in caplog.text
    values = [monitor.history["sharpness/hessian_max"].values for monitor in (plain, checkpointed)]
    assert len(values[1]) >= 5
    np.testing.assert_allclose(*values, rtol=5e-3)


def test_parameter_hooks_are_for_training_gradients_only() -> None:
    values = []
    for hooked in (False, True):
        network, calls = mlp(), []
        loss_fn = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731
        if hooked:
            for p in network.parameters():
                p.register_hook(lambda g: calls.append(1) or g.clamp(-1e-3, 1e-3))  # noqa: B023
        values.append(measure(network, next(iter(batches())), loss_fn=loss_fn)["sharpness/hessian_max"])
        assert not calls
    assert values[0] == values[1]
    loss_fn(network, next(iter(batches()))).backward()
    assert calls  # and they are back


def test_a_dead_bias_is_no_yardstick_for_its_group() -> None:
    """A bias before BatchNorm has a gradient of rounding errors only."""

    def network(bias: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16, bias=bias), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    found = []
    for bias in (False, True):
        callback = NoiseAdaptiveLR(warmup=0, alpha=0.0)
        fit(Classifier(network(bias)), [callback], batches(count=256), steps=30, max_epochs=-1)
        found.append(callback.ratios)
    assert found[1].pop("network.0.bias") == 1.0
    assert found[1]["network.1.weight"] > 0.4
    assert max(found[1][n] for n in ("network.1.weight", "network.1.bias", "network.3.bias")) == 1.0


def test_measure_sees_the_rates_in_force() -> None:
    network, batch = mlp(), next(iter(batches()))
    loss_fn = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    plain = measure(network, batch, loss_fn=loss_fn, optimizer=optimizer)["sharpness/stability_ratio"]
    rates = LayerwiseRates(optimizer, FixedRates({"*": 0.1}), network)
    steered = measure(network, batch, loss_fn=loss_fn, optimizer=optimizer)["sharpness/stability_ratio"]
    assert steered == pytest.approx(plain / 10, rel=1e-4)
    rates.remove()


def test_an_optimizer_that_wraps_another_is_steered() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__(base.param_groups, {})
            self.base, self.param_groups = base, base.param_groups

        def step(self, closure=None):
            loss = closure() if closure is not None else None
            self.base.step()
            return loss

    moved = []
    for ratio in (1.0, 0.25):
        network = mlp()
        optimizer = Wrapper(torch.optim.SGD(network.parameters(), lr=0.1))
        before = [p.detach().clone() for p in network.parameters()]
        LayerwiseRates(optimizer, FixedRates({"*": ratio}), network)
        cross_entropy(network(torch.ones(2, 8)), torch.tensor([0, 1])).backward()
        optimizer.step()
        moved.append(sum(float((p.detach() - b).norm()) for p, b in zip(network.parameters(), before, strict=True)))
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=1e-4)


def test_optimizers_replaced_in_mid_run_are_steered() -> None:
    class Replace(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 10:
                trainer.strategy.setup_optimizers(trainer)
            if trainer.global_step == 12:
                self.before = copy.deepcopy(pl_module.state_dict())

    replace, module = Replace(), Classifier(mlp())
    fit(module, [LayerwiseLR(FixedRates({"*": 1e-9})), replace], steps=16, max_epochs=-1)
    assert all(torch.allclose(v, module.state_dict()[k], atol=1e-7) for k, v in replace.before.items())


def test_steering_keeps_nothing_alive() -> None:
    network = mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    LayerwiseRates(optimizer, FixedRates({"*": 0.5}), network)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


class Alternating(Classifier):
    """Two optimizers by hand, on alternate batches."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        halves = self.network[0].parameters(), self.network[3].parameters()
        return [torch.optim.SGD(half, lr=0.1) for half in halves]


def test_alternating_optimizers_keep_one_history() -> None:
    loss_fn = lambda module, batch: cross_entropy(module.network(batch[0]), batch[1])  # noqa: E731
    monitor = DynamicsMonitor(every_n_steps=1, strict=True, loss_fn=loss_fn)
    fit(Alternating(), [monitor, LayerwiseLR(FixedRates({"network.0.*": 0.5}))], steps=16, max_epochs=-1)
    table = monitor.history["gradient/l2"]
    assert table.values.shape == (16, 4)
    assert np.isfinite(table.values).sum() == 32  # half of the layers at each step
    assert "gradient/norm_clipped" not in monitor.history


def test_rates_are_logged_as_they_were_applied() -> None:
    module = Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=0.1), lambda o: ExponentialLR(o, 0.5))
    callback = LayerwiseLR(FixedRates({"network.3.*": 0.5}))
    fit(module, [callback], steps=4)
    np.testing.assert_allclose(callback.history["lr/base"].values, [0.1, 0.05, 0.025, 0.0125])
    np.testing.assert_allclose(callback.history["lr/effective"].values[:, 3], [0.05, 0.025, 0.0125, 0.00625])


def test_a_frozen_optimizer_beside_others_is_left_alone() -> None:
    module = Alternating()
    for p in module.network[3].parameters():
        p.requires_grad_(False)
    fit(module, [LayerwiseLR(FixedRates({"*": 0.5}))], steps=4)


def test_sharpness_is_that_of_the_parameters_that_are_trained() -> None:
    module = Classifier(mlp(), lambda p: torch.optim.AdamW(list(p)[:2], lr=1e-2))
    monitor = SharpnessMonitor(every_n_steps=2, strict=True)
    fit(module, [monitor])
    assert len(monitor.history["sharpness/hessian_max"]) >= 5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_another_rule_starts_it_anew(tmp_path) -> None:
    run = fit(Classifier(mlp()), [LayerwiseLR(FixedRates({"*": 0.5}))], steps=8)
    run.save_checkpoint(tmp_path / "last.ckpt")
    callback = NoiseAdaptiveLR(warmup=0, group_by="all")
    callback.__class__.__qualname__, name = "LayerwiseLR", callback.__class__.__qualname__
    try:
        fit(Classifier(mlp()), [callback], steps=16, max_epochs=-1, ckpt_path=tmp_path / "last.ckpt")
    finally:
        callback.__class__.__qualname__ = name
    assert min(callback.ratios.values()) < 1


@pytest.mark.parametrize("make", [DynamicsMonitor, GradientMonitor, WeightMonitor, SharpnessMonitor, NoiseAdaptiveLR])
def test_callbacks_can_be_pickled(make) -> None:
    callback = pickle.loads(pickle.dumps(make()))
    fit(Classifier(mlp()), [copy.deepcopy(callback)], steps=4)


def test_what_was_never_measured_is_said(caplog) -> None:
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp()), [DynamicsMonitor(budget=1e-7, grace=0)])
    assert "no sharpness reading in this run: " in caplog.text
    assert "Raise budget or grace, or set every_n_steps." in caplog.text


def test_what_training_step_writes_to_its_logger_is_written_once(tmp_path) -> None:
    class Writes(Classifier):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"mine": 1.0}, step=batch_idx)
            return super().training_step(batch, batch_idx)

    class Counts(TensorBoardLogger):
        written = 0

        def log_metrics(self, metrics, step=None) -> None:
            Counts.written += "mine" in metrics

    fit(Writes(mlp()), [SharpnessMonitor(every_n_steps=2, strict=True)], logger=Counts(tmp_path))
    assert Counts.written == 20


@pytest.mark.parametrize("arguments", [{"layers": "network.*"}, {"loggers": "csv"}])
def test_a_string_is_not_a_list_of_names(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be a list of names, got the string"):
        DynamicsMonitor(**arguments)
    with pytest.raises(ValueError, match="every_n_steps must be a whole number"):
        DynamicsMonitor(every_n_steps=2.5)


def test_a_second_fit_begins_with_an_empty_history() -> None:
    monitor, steering = DynamicsMonitor(every_n_steps=5), NoiseAdaptiveLR()
    for _ in range(2):
        fit(Classifier(mlp()), [monitor, steering])
        assert len(monitor.history["gradient/norm"]) == 4 and len(steering.history["lr/base"]) == 20


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_validation_after_training_does_not_run_the_clock() -> None:
    class Validates(Classifier):
        def validation_step(self, batch, batch_idx) -> None:
            torch.randn(300, 300) @ torch.randn(300, 300)

    monitor, module = DynamicsMonitor(every_n_steps=2), Validates(mlp())
    run = fit(module, [monitor], limit_val_batches=0)
    before = monitor.overhead
    run.limit_val_batches = 1.0
    run.validate(module, batches(), verbose=False)
    assert monitor.overhead == before


class Quantised(torch.nn.Module):
    """A frozen layer of eight-bit integers beside a trained one, and numbers that are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 3)
        self.frozen = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
        self.waves = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x @ self.frozen.float()) * self.waves.abs()


def test_integers_are_left_out_and_complex_weights_are_not_steered(caplog) -> None:
    monitors = [GradientMonitor(every_n_steps=1, strict=True), WeightMonitor(every_n_steps=1, strict=True)]
    plain, steered = Classifier(Quantised()), NoiseAdaptiveLR(warmup=0, floor=1.0)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(plain, [*monitors, steered], steps=5)
    real = {"network.linear.weight", "network.linear.bias"}
    assert set(monitors[1].history["weight/frobenius"].layers) == real | {"network.waves"}
    assert set(steered.ratios) == real and set(monitors[0].history["gradient/l2"].layers) == real | {"network.waves"}
    assert "GradientMonitor leaves out 1 layers in int8, first network.frozen" in caplog.text
    assert caplog.text.count("1 complex weights keep ratio 1, first network.waves") == 1
