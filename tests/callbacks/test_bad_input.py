"""Bad input gets one clear sentence."""

import inspect
import logging
import math

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon import callbacks
from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.rates import FixedRates
from tests.helpers import ByHand, Classifier, batches, fit, mlp, same_weights


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DynamicsMonitor(preset="luxury"), "preset must be one of economy, standard, full, got 'luxury'"),
        (lambda: DynamicsMonitor(budget=-0.1), "budget must be positive"),
        (lambda: DynamicsMonitor(budget=0), "budget must be positive"),
        (lambda: GradientMonitor(every_n_steps=0), "every_n_steps must be a whole number of 1 or more"),
        (lambda: WeightMonitor(every_n_steps=-3), "every_n_steps must be"),
        (lambda: SharpnessMonitor(every_n_steps=0), "every_n_steps must be"),
        (lambda: SharpnessMonitor(probe_batches=0), "probe_batches must be at least 1"),
        (lambda: SharpnessMonitor(probe_fraction=1.5), "probe_fraction must lie in"),
        (lambda: SharpnessMonitor(tol=0), "tol must lie between"),
        (lambda: SharpnessMonitor(max_matvecs=2), "max_matvecs must be at least 8"),
        (lambda: SharpnessMonitor(loss_fn="loss"), "loss_fn must be a function"),
        (lambda: NoiseAdaptiveLR(floor=0), "floor must lie in"),
        (lambda: NoiseAdaptiveLR(alpha=-1), "alpha must be zero or positive"),
        (lambda: NoiseAdaptiveLR(beta2=1), "beta2 must lie in"),
        (lambda: NoiseAdaptiveLR(group_by="size"), "group_by must be one of"),
        (lambda: NoiseAdaptiveLR(warmup=-1), "warmup must be zero or more"),
        (lambda: NoiseAdaptiveLR(lag=2), "lag must be 0 or 1"),
        (lambda: LayerwiseLR({"*": 1.0}), "rule must be a dynamon.rates.Rule"),
        (lambda: FixedRates({"*": -1.0}), "must be positive and finite"),
    ],
)
def test_arguments_are_refused_at_construction(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("kind", [DynamicsMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("grace", value) for value in ("3s", "3", None, True)),
        *(("budget", value) for value in ("2%", "auto", [0.02])),
        *(("probe_size", "8"), ("probe_fraction", "a"), ("probe_batches", "1"), ("memory_limit", "4G")),
        *(("tol", "a"), ("max_matvecs", None), ("layers", 5)),
        *((name, math.nan) for name in ("probe_size", "probe_batches", "max_matvecs")),
    ],
)
def test_arguments_of_the_wrong_type_are_named(kind, name: str, value: object) -> None:
    if name not in inspect.signature(kind).parameters:
        return
    with pytest.raises(TypeError, match=f"^{name} must be an? (number, like .*|list|int), got "):
        kind(**{name: value})


SWITCHES = [
    (kind, name)
    for kind in (getattr(callbacks, name) for name in callbacks.__all__)
    if inspect.isclass(kind) and issubclass(kind, pl.Callback)
    for name, argument in inspect.signature(kind).parameters.items()
    if isinstance(argument.default, bool)
]


def test_there_are_switches() -> None:
    assert {name for _, name in SWITCHES} >= {"strict", "apply", "save_probe", "sentinel", "histograms"}


@pytest.mark.parametrize(("kind", "name"), SWITCHES)
@pytest.mark.parametrize("value", ["no", None, 1])
def test_switches_are_true_or_false(kind, name: str, value: object) -> None:
    needed = {LayerwiseLR: {"rule": FixedRates({})}, callbacks.Monitor: {"make_meters": list}}.get(kind, {})
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got "):
        kind(**needed, **{name: value})


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        (lambda: [DynamicsMonitor(), DynamicsMonitor()], "DynamicsMonitor and DynamicsMonitor in callbacks; keep one"),
        (lambda: [GradientMonitor(), DynamicsMonitor()], "GradientMonitor and DynamicsMonitor in callbacks"),
        (lambda: [NoiseAdaptiveLR(), LayerwiseLR(FixedRates({}))], "NoiseAdaptiveLR and LayerwiseLR in callbacks"),
        (lambda: [DynamicsMonitor(layers=["no such *"])], "matches no layer of Classifier"),
        (lambda: [DynamicsMonitor(loggers=["wandb"])], "matches no logger of the Trainer, which has: none"),
        (lambda: [LayerwiseLR(FixedRates({"nothing": 0.5}))], "'nothing' matches no layer"),
    ],
)
def test_combinations_are_refused_at_fit_start(callbacks, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(Classifier(mlp()), callbacks())


def test_three_single_monitors_go_together() -> None:
    monitors = [GradientMonitor(every_n_steps=5), WeightMonitor(every_n_steps=5), SharpnessMonitor(every_n_steps=5)]
    fit(Classifier(mlp()), monitors)
    assert all(len(monitor.history) for monitor in monitors)


@pytest.mark.parametrize("callback", [DynamicsMonitor, NoiseAdaptiveLR])
def test_the_other_lightning_is_named(callback, tmp_path) -> None:
    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = pytorch_lightning.Trainer(
        callbacks=[callback()], max_steps=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    with pytest.raises(TypeError, match="works with lightning.pytorch, but this Trainer comes from pytorch_lightning"):
        run.fit(Module(), batches())


def test_no_logger_is_said_and_the_run_goes_on(caplog) -> None:
    monitor = DynamicsMonitor(every_n_steps=5)
    with caplog.at_level(logging.INFO):
        run = fit(Classifier(mlp()), [monitor])
    assert "no logger; readings are in its .history only" in caplog.text
    assert run.global_step == 20 and len(monitor.history["gradient/norm"]) == 4


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones_measures_nothing_and_still_steers() -> None:
    monitor, steering = DynamicsMonitor(), NoiseAdaptiveLR(warmup=2, group_by="all")
    run = pl.Trainer(barebones=True, max_steps=20, max_epochs=-1, callbacks=[monitor, steering], accelerator="cpu")
    run.fit(Classifier(mlp()), batches())
    assert len(monitor.history) == 0
    assert min(steering.ratios.values()) < 1


def test_fast_dev_run_measures_everything_once() -> None:
    monitor = DynamicsMonitor("full", strict=True)
    run = pl.Trainer(
        fast_dev_run=True, callbacks=[monitor, NoiseAdaptiveLR()], accelerator="cpu", enable_progress_bar=False
    )
    run.fit(Classifier(mlp()), batches())
    for tag in ("gradient/norm", "weight/operator", "update/ratio", "sharpness/stability_ratio"):
        assert len(monitor.history[tag]) == 1


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:.LightningModule.configure_optimizers.")
def test_a_module_without_parameters() -> None:
    class Empty(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="DynamicsMonitor is off: Empty has no trainable parameter"):
        fit(Empty(), [DynamicsMonitor()], steps=3)
    with pytest.warns(UserWarning, match="NoiseAdaptiveLR steers nothing: Empty has no trainable parameter"):
        fit(Empty(), [NoiseAdaptiveLR()], steps=3)


@pytest.mark.parametrize(
    ("loss_fn", "sentence"),
    [
        (lambda module, batch: 3.0, "loss_fn must return a scalar tensor as loss, got float"),
        (lambda module, batch: module.network(batch[0]), r"loss_fn must return a scalar loss, got shape \([28], 3\)"),
        (lambda module, batch: torch.zeros(()), "does not depend on any parameter"),
    ],
)
def test_a_loss_that_cannot_be_measured(loss_fn, sentence: str) -> None:
    plain, module = Classifier(mlp()), Classifier(mlp())
    fit(plain, [])
    with pytest.warns(UserWarning, match=sentence):
        fit(module, [DynamicsMonitor(every_n_steps=2, loss_fn=loss_fn)])
    assert same_weights(plain, module)


def test_an_optimizer_that_cannot_be_steered_is_named() -> None:
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.raises(ValueError, match="LBFGS cannot take layerwise rates: it evaluates the closure many times"):
        fit(module, [NoiseAdaptiveLR()])


def test_an_optimizer_without_stability_condition_is_said(caplog) -> None:
    monitor = SharpnessMonitor(every_n_steps=5, strict=True)
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp(), optimizer=lambda p: torch.optim.NAdam(p, lr=1e-3)), [monitor])
    assert "NAdam has no known stability condition" in caplog.text
    assert "sharpness/stability_ratio" not in monitor.history and len(monitor.history["sharpness/hessian_max"]) == 4


def test_manual_optimisation_without_loss_fn_is_said() -> None:
    monitor, steering = DynamicsMonitor(every_n_steps=2, strict=True), NoiseAdaptiveLR(warmup=2, group_by="all")
    with pytest.warns(UserWarning, match="with manual optimisation training_step would train; pass loss_fn"):
        fit(ByHand(mlp()), [monitor, steering], max_epochs=-1)
    assert "sharpness/stability_ratio" not in monitor.history
    assert len(monitor.history["gradient/norm"]) == 10 and min(steering.ratios.values()) < 1

    monitor = DynamicsMonitor(every_n_steps=2, strict=True, loss_fn=lambda m, b: cross_entropy(m.network(b[0]), b[1]))
    fit(ByHand(mlp()), [monitor], max_epochs=-1)
    assert len(monitor.history["sharpness/stability_ratio"]) >= 5


def test_a_gradient_that_is_not_finite_is_told_once() -> None:
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 5 else loss

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    broken = pytest.warns(UserWarning, match="The training loss is not finite from step 5 on")
    holds = "step 5: the gradient holds .* NaN or infinite, first in network.0.weight"
    with broken, pytest.warns(UserWarning, match=holds):
        fit(Broken(mlp()), [monitor], steps=8)
    assert monitor.history["gradient/nonfinite"].values[5] == 195
