"""The health rules on real runs: healthy ones raise nothing, faults are found where they are made."""

import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.health import findings
from dynamon.runs import read_run_data
from tests.helpers import Classifier, cnn, fit, mlp
from tests.models import GPT


def samples(*features: int, count: int = 512, size: int = 32) -> DataLoader:
    """Three classes that a linear map of the inputs decides, with noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, *features, generator=generator)
    scores = inputs.flatten(1) @ torch.randn(inputs[0].numel(), 3, generator=generator)
    labels = (scores + 0.5 * torch.randn(count, 3, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(inputs, labels), batch_size=size)


def tokens() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(512, 7, dtype=torch.long)
    text[:, 0] = torch.randint(11, (512,), generator=generator)
    for i in range(1, 7):
        text[:, i] = (3 * text[:, i - 1] + torch.randint(3, (512,), generator=generator)) % 11
    return DataLoader(TensorDataset(text), batch_size=16)


class LanguageModel(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self.network(batch[0][:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())
        self.log("train/loss", loss)
        return loss


class Regression(Classifier):
    def training_step(self, batch, batch_idx):
        loss = mse_loss(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss


class Dying(Classifier):
    """At step 60 the second ReLU dies."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 60:
            with torch.no_grad():
                self.network[2].weight.abs_().neg_()  # its inputs are never negative
                self.network[2].bias.fill_(-0.5)


class Breaking(Classifier):
    """From step 100 on the loss is NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step >= 100 else loss


class Stuck(Classifier):
    """From step 80 on every step sees the same batch."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step <= 80:
            self.kept = batch
        return super().training_step(self.kept, batch_idx)


class Choked(Classifier):
    """From step 80 on clipping leaves next to nothing."""

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.gradient_clip_val = 0.01 if self.trainer.global_step >= 80 else 10.0


class Hurried(Classifier):
    """From step 83 on the rate of the second group is eight times as large."""

    def configure_optimizers(self):
        first, *others = self.parameters()
        groups = [{"params": [first], "lr": 0.05}, {"params": others, "lr": 0.01}]
        return torch.optim.SGD(groups)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 83:
            self.optimizers().param_groups[1]["lr"] = 0.08


class Limited(Classifier):
    """From step 80 on gradients are clipped, as they were not before."""

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.gradient_clip_val = 0.1 if self.trainer.global_step >= 80 else None


class Overwritten(Classifier):
    """At step 82 somebody writes to a bias."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 82:
            with torch.no_grad():
                self.network[2].bias.sub_(1.0)


class Decaying(Classifier):
    """A schedule that goes down to a tenth within 100 steps."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - 0.009 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def relu() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def smooth() -> tuple[nn.Module, DataLoader]:
    """What full-batch gradient descent takes to the edge of stability."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]
    return network, DataLoader(TensorDataset(inputs, targets), batch_size=256)


def run_of(tmp_path, module, data, steps=200, every=5, callbacks=(), logger=TensorBoardLogger):
    monitor = DynamicsMonitor(every_n_steps=every)
    fit(module, [monitor, *callbacks], data, logger=logger(tmp_path, name="", version="r"), steps=steps, max_epochs=-1)
    return read_run_data(tmp_path / "r"), monitor


def sgd(rate, **others):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **others)


def adam(rate):
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


HEALTHY = {
    "mlp, AdamW": lambda: (Classifier(mlp(), adam(1e-2)), samples(8)),
    "cnn, AdamW": lambda: (Classifier(cnn(), adam(1e-2)), samples(2, 8, 8)),
    "cnn, momentum": lambda: (Classifier(cnn(), sgd(0.02, momentum=0.9)), samples(2, 8, 8)),
    "gpt, AdamW": lambda: (LanguageModel(GPT(), adam(3e-3)), tokens()),
    "gpt, SGD at the edge": lambda: (LanguageModel(GPT(), sgd(0.5)), tokens()),
    "relu, AdamW": lambda: (Classifier(relu(), adam(1e-2)), samples(8)),
}


QUICK = ("cnn, AdamW", "gpt, SGD at the edge")  # one of each optimizer


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in HEALTHY])
def test_healthy_runs(name, tmp_path):
    torch.manual_seed(0)
    run, monitor = run_of(tmp_path, *HEALTHY[name]())
    assert findings(run) == [] and findings(monitor.history) == []
    assert run.scalars["train/loss"].values[-1] < run.scalars["train/loss"].values[0] / 1.3


@pytest.mark.slow
def test_gradient_descent_at_the_edge_of_stability(tmp_path):
    network, data = smooth()
    run, monitor = run_of(tmp_path, Regression(network, sgd(0.1)), data, steps=1000, every=10, logger=CSVLogger)
    assert run.scalars["sharpness/stability_ratio"].values.max() > 1
    notes = {("spike/deviation", "note"), ("spike/shift", "note")}  # where it jumps over the edge the loss goes up
    for found in (findings(run), findings(monitor.history)):
        assert {(one.rule, one.severity) for one in found} <= notes


def test_a_steered_run(tmp_path):
    run, _ = run_of(tmp_path, Classifier(mlp(), adam(1e-2)), samples(8), callbacks=[NoiseAdaptiveLR()])
    assert "lr/bounded" in run.scalars and findings(run) == []


@pytest.mark.filterwarnings("ignore:DynamicsMonitor. the")
def test_a_run_that_diverges(tmp_path):
    run, _ = run_of(tmp_path, Classifier(mlp(), sgd(300.0)), samples(8))
    assert findings(run)[0].rule == "loss/rising" and findings(run)[0].severity == "fault"


@pytest.mark.filterwarnings("ignore:DynamicsMonitor. (the|Step)", "ignore:step 100. the gradient holds")
def test_a_run_of_nan(tmp_path):
    run, monitor = run_of(tmp_path, Breaking(mlp(), adam(1e-2)), samples(8), steps=150)
    first, second, *rest = findings(run)
    assert {first.rule, second.rule} == {"gradient/nonfinite", "loss/nonfinite"}
    assert first.severity == second.severity == "fault" and {first.step, second.step} <= {100, 101}
    assert len((first if first.layers else second).layers) == 4
    assert {f.rule for f in rest} <= {"dynamon/failures", "spike/deviation"}  # what cannot be measured on NaN
    assert {f.rule for f in findings(monitor.history)[:2]} == {first.rule, second.rule}


@pytest.mark.filterwarnings("ignore:DynamicsMonitor. (The training loss rose|From step 60 on the loss was)")
@pytest.mark.parametrize("optimizer", [adam(1e-2), pytest.param(sgd(0.1), marks=pytest.mark.slow)])
def test_a_run_with_a_dead_layer(optimizer, tmp_path):
    with pytest.warns(UserWarning, match="DynamicsMonitor: The gradient of network.0.weight and .* is zero at step 60"):
        run, _ = run_of(tmp_path, Dying(relu(), optimizer), samples(8))
    found = {finding.rule: finding for finding in findings(run)}
    dead = found.pop("gradient/dead")
    assert dead.step == 60 and set(found) <= {"loss/rising", "update/stopped", "weight/changed", "spike/shift"}
    assert set(dead.layers) >= {f"network.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    assert "network.4.bias" not in dead.layers


@pytest.mark.parametrize(
    ("module", "rule"), [(Stuck, "gradient/repeated"), (Choked, "gradient/clipping")], ids=["repeated", "clipping"]
)
@pytest.mark.filterwarnings("ignore:DynamicsMonitor. ")
def test_a_run_that_goes_nowhere(module, rule, tmp_path):
    run, monitor = run_of(tmp_path, module(mlp(), sgd(0.05)), samples(8, size=16), steps=160)
    (found,) = [one for one in findings(run) if one.rule == rule]
    assert 80 <= found.step <= 85 and found.severity == "warning"
    assert [one.step for one in monitor.findings if one.rule == rule] == [found.step]


CHANGED = {
    Hurried: ("lr/jump", {83}, ()),
    Limited: ("gradient/limit", range(80, 91), ()),
    Overwritten: ("weight/changed", {85}, ("network.2.bias",)),
}


@pytest.mark.parametrize("module", CHANGED)
@pytest.mark.parametrize("has_sentinel", [True, False])
@pytest.mark.filterwarnings("ignore:DynamicsMonitor. ")
def test_what_is_changed_in_mid_run(module, has_sentinel):
    rule, steps, layers = CHANGED[module]
    monitor = DynamicsMonitor(every_n_steps=5, quantities=["directional"], sentinel=has_sentinel)
    fit(module(relu(), sgd(0.05)), [monitor], samples(8), steps=130, max_epochs=-1)
    if module is Hurried and not has_sentinel:
        steps = {85}
    (found,) = [one for one in monitor.findings if one.rule == rule]
    assert found.step in steps and found.layers == layers
    assert {one.rule for one in monitor.findings} <= {rule, "spike/deviation", "dynamon/no_sharpness"}


@pytest.mark.parametrize("is_forgotten", [True, False])
def test_a_schedule_that_begins_anew_after_a_resume(is_forgotten, tmp_path):
    def monitor():
        return DynamicsMonitor(every_n_steps=5, quantities=["directional"])

    first = fit(Decaying(mlp(), sgd(0.05)), [monitor()], samples(8), steps=100, max_epochs=-1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    if is_forgotten:
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)
        state["lr_schedulers"][0]["last_epoch"] = 0
        state["optimizer_states"][0]["param_groups"][0]["lr"] = 0.05
        torch.save(state, tmp_path / "a.ckpt")
    resumed = monitor()
    fit(Decaying(mlp(), sgd(0.05)), [resumed], samples(8), steps=140, max_epochs=-1, ckpt_path=tmp_path / "a.ckpt")
    found = [(one.step, one.numbers["times"]) for one in resumed.findings if one.rule == "lr/jump"]
    assert found == ([(100, pytest.approx(1 / 0.109))] if is_forgotten else [])
