"""The activation monitor in runs: values, the probe, compiled modules, processes, resume, device calls, memory."""

import gc
import os
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import ActivationMonitor, DynamicsMonitor, SharpnessMonitor
from dynamon.monitoring.activation_monitor import ActivationMonitor as Plain
from dynamon.monitoring.activation_watch import ActivationWatch
from dynamon.monitoring.probe import ProbeMeter
from tests.helpers import Classifier, batches, cnn, fit, mlp, same_weights
from tests.launches import Launches, gpt2
from tests.peak import Peak
from tests.processes import Sharded, fit_in_processes, loader

EVERY = {"every_n_steps": 2, "strict": True}
OWN = re.compile(r"(activation|attention)/[a-z_]+(?<!_p10)(?<!_median)(?<!_p90)")


def own(monitor: Any) -> dict[str, np.ndarray]:
    return {tag: series.values for tag, series in monitor.history.items() if OWN.fullmatch(tag)}


class Catch(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: p.clone() for name, p in pl_module.state_dict().items()})


def test_readings_are_of_the_probe_at_the_weights_after_the_step() -> None:
    monitor, catch = ActivationMonitor(**EVERY, probe_fraction=1.0), Catch()
    fit(Classifier(mlp()), [catch, monitor], steps=5)
    series = monitor.history["activation/rms"]
    assert series.steps.tolist() == [0, 2, 4] and series.layers == ("network.0", "network.1", "network.3")
    inputs, labels = next(iter(batches()))
    for step, row, graded in zip((0, 2, 4), series.values, monitor.history["activation/gradient"].values, strict=True):
        module = Classifier(mlp()).double()
        module.load_state_dict(catch.weights[step])
        hidden = module.network[0](inputs.double())
        logits = module.network[3](hidden.tanh())
        expected = [float(t.detach().square().mean().sqrt()) for t in (hidden, hidden.tanh(), logits)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
        assert graded[2] == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-6)
    assert monitor.history["activation/probe_samples"].values.tolist() == [8.0] * 3


@pytest.mark.parametrize(("preset", "is_there"), [("economy", False), ("standard", True), ("full", True)])
def test_presets(preset, is_there) -> None:
    monitor = DynamicsMonitor(preset)
    assert any(meter.name == "activation" for meter in monitor._meters) == is_there
    assert sum(isinstance(meter, ProbeMeter) for meter in monitor._meters) == 1


def test_a_part_measures_on_the_probe_of_sharpness_what_it_measures_alone() -> None:
    alone = ActivationMonitor(**EVERY, probe_fraction=0.5)
    whole = DynamicsMonitor(**EVERY, probe_fraction=0.5, activations=ActivationMonitor())
    chosen = DynamicsMonitor(**EVERY, activations=ActivationMonitor(4, layers=["network.1"]))
    for monitor in (alone, whole, chosen):
        fit(Classifier(mlp()), [monitor], steps=5)
    assert own(alone).keys() == own(whole).keys()
    assert all(np.array_equal(values, own(whole)[tag]) for tag, values in own(alone).items())
    assert chosen.history["activation/rms"].layers == ("network.1",)
    assert chosen.history["activation/rms"].steps.tolist() == [0, 4]


def test_what_is_given_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(TypeError, match="activations must be an ActivationMonitor, or None, got SharpnessMonitor"):
        DynamicsMonitor(activations=SharpnessMonitor())
    for option in ({"probe_size": 8}, {"loss_fn": lambda m, b: m(b)}, {"strict": True}):
        with pytest.raises(
            ValueError, match=f"{next(iter(option))} is given to activations=.*give it to DynamicsMonitor"
        ):
            DynamicsMonitor(activations=ActivationMonitor(**option))
    with pytest.raises(ValueError, match="probe_fraction must lie in"):
        ActivationMonitor(probe_fraction=2.0)
    with pytest.raises(ValueError, match=r"layers=\['nothing'\] matches no module of Classifier"):
        fit(Classifier(mlp()), [ActivationMonitor(layers=["nothing"])])
    with pytest.warns(UserWarning, match=r"hold others, such as network: .* 'network\.\*' names what"):
        fit(Classifier(mlp()), [ActivationMonitor(layers=["network"])])
    for row in ("*.heads", "*.relu*"):  # what attention and activation functions would be called: not known before
        fit(Classifier(mlp()), [ActivationMonitor(every_n_steps=1, layers=[row])], steps=2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_module_keeps_its_graphs(backend) -> None:
    """As many graphs as without the monitor, and bitwise the same weights."""
    if backend == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")
    counts, weights = [], []
    for callbacks in ([], [ActivationMonitor(every_n_steps=1, strict=True)]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = Classifier(torch.compile(mlp(), backend=backend))
        fit(module, callbacks, steps=4)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        weights.append(module)
    assert counts[0] == counts[1] > 0 and same_weights(*weights)
    assert callbacks[0].history["activation/rms"].layers == ("network.0", "network.1", "network.3")


def test_training_has_no_hook() -> None:
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            seen.append(any(m._forward_hooks or m._forward_pre_hooks for m in pl_module.modules()))

    fit(Classifier(cnn()), [ActivationMonitor(**EVERY), Look()], batches(features=(2, 8, 8)), steps=4)
    assert seen == [False] * 4


def test_a_failing_measurement_costs_a_warning() -> None:
    def loss_fn(module: Any, batch: Any) -> Tensor:
        raise RuntimeError("no loss today")

    monitor = ActivationMonitor(every_n_steps=1, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="the activation measurement failed: no loss today"):
        fit(Classifier(mlp()), [monitor], steps=2)
    assert monitor.failures >= 1 and "activation/rms" not in monitor.history


class Manual(Classifier):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return loss


def test_under_manual_optimisation_all_that_is_off_is_said_and_how_to_have_it() -> None:
    monitor = DynamicsMonitor("standard", every_n_steps=1)
    with pytest.warns(UserWarning, match=r"^sharpness is off, and so are activations: with manual .* pass loss_fn="):
        fit(Manual(mlp()), [monitor], steps=4)
    alone = ActivationMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="^activation is off: with manual optimisation"):
        fit(Manual(mlp()), [alone], steps=4)
    for one in (monitor, alone):
        (note,) = [found for found in one.findings if found.rule.startswith("dynamon/")]
        assert "here the log says that" in note.advice and "is off, do as it says there" in note.advice
    monitor = DynamicsMonitor(every_n_steps=1, strict=True, activations=ActivationMonitor(), loss_fn=_loss)
    fit(Manual(mlp()), [monitor], steps=4)
    assert len(monitor.history["activation/rms"]) == 4


def _loss(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module.network(batch[0]), batch[1])


def test_mixed_precision_is_measured_as_it_is_computed() -> None:
    """Float16 with a scaled loss, and bfloat16: outputs by hand under autocast, gradients without the scale."""
    for precision, dtype in (("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype == torch.float16 else None
        monitor, catch = ActivationMonitor(**EVERY, probe_fraction=1.0), Catch()
        fit(Classifier(mlp()), [catch, monitor], steps=3, plugins=[MixedPrecision(precision, "cpu", scaler)])
        module = Classifier(mlp())
        module.load_state_dict(catch.weights[2])
        inputs, labels = next(iter(batches()))
        with torch.autocast("cpu", dtype):
            hidden = module.network[0](inputs)
            logits = module.network[3](module.network[2](module.network[1](hidden)))
            loss = cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, hidden)
        found = {tag: row[-1] for tag, row in own(monitor).items()}
        assert found["activation/rms"][0] == pytest.approx(float(hidden.detach().double().square().mean().sqrt()))
        size = float(gradient.double().square().mean().sqrt())
        assert found["activation/gradient"][0] == pytest.approx(size, rel=0.02)


def test_where_the_loss_cannot_be_evaluated_again_it_is_off() -> None:
    class Outside(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            counted.append(batch_idx)
            return super().training_step(batch, batch_idx)

    counted: list[int] = []
    Outside.training_step.__globals__["counted"] = counted
    with pytest.warns(UserWarning, match="activation is off: training_step has effects outside the module"):
        fit(Outside(mlp()), [ActivationMonitor(every_n_steps=1)], steps=3)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_resumed_run_measures_what_the_whole_run_does(tmp_path) -> None:
    whole, first, second = (ActivationMonitor(**EVERY) for _ in range(3))
    fit(Classifier(mlp()), [whole], steps=16, max_epochs=-1)
    save = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=8)
    fit(Classifier(mlp()), [first, save], steps=8, max_epochs=-1, enable_checkpointing=True)
    fit(Classifier(mlp()), [second], steps=16, max_epochs=-1, ckpt_path=tmp_path / "half.ckpt")
    assert second.history["activation/rms"].steps.tolist() == [8, 10, 12, 14]
    for tag, values in own(second).items():
        assert np.array_equal(values, own(whole)[tag][-len(values) :])


def test_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = lambda m, b: cross_entropy(m(b[0]), b[1])  # noqa: E731
    with dynamon.Watch(model, optimizer, loss_fn, monitors=Plain(every_n_steps=1, strict=True)) as watch:
        for batch in batches(16):
            with watch.batch(batch):
                loss_fn(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert watch.history["activation/rms"].layers == ("0", "1", "3") and len(watch.history["activation/rms"]) == 2


class Attends(nn.Module):
    """Four tokens of two features each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Linear(2, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.unflatten(1, (4, 2)))).mean(1))


@pytest.mark.processes
@pytest.mark.parametrize("kind", [Classifier, Sharded], ids=["DDP", "FSDP2"])
def test_processes_find_what_one_finds_on_all_samples(kind) -> None:
    def make() -> Any:
        return kind(Attends().double(), None)

    settings: dict[str, Any] = {"data": loader(8), "steps": 5}
    monitor = [ActivationMonitor(**EVERY, probe_fraction=1.0)]
    (one,) = fit_in_processes(make, monitor, 1, **settings)
    several = fit_in_processes(make, monitor, 2, **settings)
    compared = {tag for tag in one["tables"] if OWN.fullmatch(tag)}
    assert {"activation/residual", "activation/saturated", "attention/max_logit", "activation/gradient"} <= compared
    assert compared == {tag for tag in several[0]["tables"] if OWN.fullmatch(tag)}
    for tag in compared:
        alone, together = one["tables"][tag], several[0]["tables"][tag]
        assert alone["steps"] == together["steps"] and several[0]["failures"] == [0]
        torch.testing.assert_close(together["values"], alone["values"], rtol=1e-6, atol=1e-12, equal_nan=True)
        assert torch.equal(together["values"], several[1]["tables"][tag]["values"])


def test_device_calls_of_a_reading(monkeypatch) -> None:
    """Those of the watch, beyond the loss and its gradient: by output, activation function and attention."""
    model = gpt2("cpu", scale=48)
    tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(0))

    def evaluate(watch: ActivationWatch) -> int:
        with Launches() as launches:
            watch.loss(model(tokens).square().mean()).backward()
        model.zero_grad()
        return launches.total

    monkeypatch.setattr("dynamon.kernels.lengths.reads_are_free", lambda device: False)  # as on a GPU
    plain, watch = evaluate(ActivationWatch(model)), ActivationWatch(model)
    with watch.watching():
        extra = evaluate(watch) - plain
    outputs, functions, calls = len(watch.rows), 12, len(watch.heads)
    assert (outputs, calls) == (12 * 8 + 4, 12)
    assert extra <= 14 * outputs + 2 * functions + 34 * calls, extra


def test_memory_beyond_a_gradient() -> None:
    """Of the largest output one copy in float32, and three of the parameters."""
    stated = re.search(
        r"(\w+) copies of the parameters, and (\w+) copy", re.sub(r"\s+", " ", ActivationMonitor.__doc__)
    )
    copies = {"three": 3, "one": 1}
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    inputs = torch.randn(500, 4)
    largest = 500 * 300 * 4

    def most(watched: bool) -> int:
        gc.collect()
        watch = ActivationWatch(model)
        with Peak(model.parameters()) as peak:
            if watched:
                with watch.watching():
                    watch.loss(model(inputs).square().mean()).backward()
            else:
                model(inputs).square().mean().backward()
        model.zero_grad()
        return peak.most

    extra = (most(True) - most(False)) / largest
    assert extra <= copies[stated[2]] + 0.3
    size = sum(p.numel() for p in model.parameters())
    assert copies[stated[1]] == 3 and size > 0
