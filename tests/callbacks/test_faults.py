"""Faults in the middle of a run: training ends as if nothing had happened, and measuring goes on afterwards."""

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR, SharpnessMonitor
from dynamon.callbacks.monitor import Monitor
from dynamon.isolation.preserve import preserve_state
from dynamon.isolation.side_effects import changed_names, external_state
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext
from tests.apple import Strategy, apple
from tests.helpers import Classifier, batches, fit, mlp, same_weights


def loss_fn(module, batch) -> torch.Tensor:
    return cross_entropy(module.network(batch[0]), batch[1])


def undisturbed_run(module: Classifier | None = None, **arguments) -> Classifier:
    module = module or Classifier(mlp(0.2))
    fit(module, [], **arguments)
    return module


@contextmanager
def heard():
    """All warnings, and none of them an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def said(caught, words: str) -> list[str]:
    return [str(w.message) for w in caught if words in str(w.message)]


class Memory:
    """A loss that finds no memory for more than so many samples, from some evaluation to another."""

    def __init__(self, fits: int, first: int = 1, last: int = 10**9) -> None:
        self.fits, self.first, self.last, self.calls = fits, first, last, 0

    def __call__(self, module, batch) -> torch.Tensor:
        self.calls += 1
        if len(batch[0]) > self.fits and self.first <= self.calls <= self.last:
            size = 20 * len(batch[0])
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} MiB.")
        return loss_fn(module, batch)


@pytest.mark.parametrize("arguments", [{"probe_fraction": 1.0}, {"probe_size": 20}], ids=["fraction", "size"])
def test_a_probe_that_is_too_large_is_halved_until_it_fits(arguments) -> None:
    """Two halvings, one sentence; then every measurement succeeds, on fewer samples."""
    module, memory = Classifier(mlp(0.2)), Memory(fits=2)
    monitor = SharpnessMonitor(every_n_steps=4, quantities=["stability_ratio"], loss_fn=memory, **arguments)
    with pytest.warns(UserWarning, match="CUDA out of memory") as caught:
        fit(module, [monitor], steps=24, max_epochs=-1)
    assert same_weights(undisturbed_run(steps=24, max_epochs=-1), module)
    assert len(said(caught, "The probe is halved to")) == len(said(caught, "out of memory")) == 1
    samples = monitor.history["sharpness/probe_samples"]
    assert monitor.failures == 2 and len(samples) == 4 and np.all(np.diff(samples.values) == 0)
    assert np.isfinite(monitor.history["dynamon/failures"].values).all()
    assert samples.values[0] == 2


def test_memory_that_never_suffices_pauses_the_probe_and_nothing_else() -> None:
    module = Classifier(mlp(0.2))
    monitor = DynamicsMonitor(every_n_steps=2, loss_fn=Memory(fits=0))
    with heard() as caught:
        fit(module, [monitor])
    assert same_weights(undisturbed_run(), module)
    assert len(said(caught, "It is paused now")) == 2  # along the step, and the eigenvalues
    assert len(said(caught, "It is off from now on")) == 1  # progress, which needs a whole batch
    assert monitor.failures == 7 and len(monitor.history["gradient/norm"]) == 10


@pytest.mark.parametrize("free", [0, 2**40], ids=["no room for vectors", "the smallest probe"])
def test_solves_that_find_no_memory_give_way_to_forward_passes(free, monkeypatch) -> None:
    """At once where the vectors cannot fit, else when there are no samples left to leave out."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module, monitor = Classifier(mlp(0.2)), SharpnessMonitor(every_n_steps=2, quantities=["hessian"], probe_size=4)
    monkeypatch.setattr("dynamon.curvature.solvers.tracker.top_eigenvalues", full)
    monkeypatch.setattr("dynamon.monitoring.eigenvalues.free_memory", lambda device: free)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        fit(module, [monitor], steps=24, max_epochs=-1)
    assert same_weights(undisturbed_run(steps=24, max_epochs=-1), module)
    assert len(said(caught, "critical sharpness, which needs forward passes only, is shown instead")) == 1
    assert len(said(caught, "The probe is halved to 2 samples")) == (free > 0)
    assert monitor.failures == 1 + (free > 0) and len(monitor.history["sharpness/critical"]) >= 2


def test_what_fits_is_found_out_again_beside_what_training_holds(monkeypatch) -> None:
    """On a device of its own memory is free when a fit starts that training then takes."""
    free = [2**33, 2**33]  # solves, and a density, when the fit starts
    monkeypatch.setattr("dynamon.monitoring.memory_plan.free_memory", lambda device: free.pop() if len(free) > 1 else 0)
    with apple(monkeypatch), pytest.warns(UserWarning, match="critical sharpness, which needs forward") as caught:
        monitor = SharpnessMonitor(every_n_steps=2, quantities=["hessian"], strict=True)
        fit(Classifier(mlp()), [monitor], steps=6, strategy=Strategy())
    assert len(said(caught, "the vectors of an eigenvalue solve take")) == 1
    assert "sharpness/hessian_max" not in monitor.history and len(monitor.history["sharpness/critical"]) >= 1


def test_memory_that_ran_out_once_is_let_go(monkeypatch) -> None:
    """When the cache is emptied nothing of the failed measurement is alive any more."""
    alive = []

    class Large(torch.nn.Module):
        pass

    def failing(module, batch):
        held = Large()
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found, monitor = [], SharpnessMonitor(every_n_steps=4, loss_fn=failing)
    with pytest.warns(UserWarning, match="out of memory"), apple(monkeypatch):
        monkeypatch.setattr(torch.mps, "empty_cache", lambda: found.extend(held() for held in alive))
        fit(Classifier(mlp()), [monitor], steps=8, strategy=Strategy())
    assert found and all(held is None for held in found)


def test_an_error_that_other_processes_have_not_heard_of_keeps_nothing_alive() -> None:
    alive = []

    class Failing(Meter):
        name = "failing"

        def batch_end(self, run) -> None:
            held = torch.nn.Linear(2, 2)
            alive.append(weakref.ref(held))
            raise ValueError("on this process")

    meter = Failing(Cadence(1, 1))
    monitor = Monitor(lambda: [meter])
    unknown = SimpleNamespace(is_collective_failure=lambda error: False)
    monitor._run = SimpleNamespace(ranks=unknown, unsettled={}, steps=SimpleNamespace(remove=lambda: None))
    monitor._run.keep_untold = partial(RunContext.keep_untold, monitor._run)
    monitor._call(meter, "batch_end")
    assert str(monitor._run.unsettled["failing"]) == "on this process" and alive[0]() is None


def test_a_whole_batch_that_does_not_fit_costs_batch_sharpness_only() -> None:
    module = Classifier(mlp(0.2))
    monitor = SharpnessMonitor(every_n_steps=4, quantities=["directional", "batch"], loss_fn=Memory(fits=4))
    with pytest.warns(UserWarning, match="Batch sharpness, which takes a whole batch, is left out") as caught:
        fit(module, [monitor])
    assert same_weights(undisturbed_run(), module) and len(said(caught, "out of memory")) == 1
    assert len(monitor.history["sharpness/directional"]) >= 4 and "sharpness/batch" not in monitor.history


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("arguments", [{"probe_fraction": 1.0}, {"probe_size": 20}], ids=["fraction", "size"])
def test_a_halved_probe_stays_so_after_a_resume(tmp_path, arguments) -> None:
    arguments |= {"every_n_steps": 4, "quantities": ["hessian"]}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16)
    first = SharpnessMonitor(loss_fn=Memory(fits=4), **arguments)
    with pytest.warns(UserWarning, match="The probe is halved"):
        fit(Classifier(mlp()), [first, save], steps=16, enable_checkpointing=True)
    resumed = SharpnessMonitor(loss_fn=Memory(fits=4), **arguments)
    fit(Classifier(mlp()), [resumed], steps=32, max_epochs=-1, ckpt_path=tmp_path / "step=16.ckpt")
    one, other = (m.history["sharpness/probe_samples"].values for m in (first, resumed))
    assert one[-1] == other[0] == other[-1] and resumed.failures == 0


class Flaky(Logger):
    """An in-memory logger that fails from some call of ours to another."""

    name = version = "flaky"

    def __init__(self, first: int = 1, last: int = 10**9) -> None:
        super().__init__()
        self.first, self.last, self.calls, self.written = first, last, 0, []

    def log_metrics(self, metrics, step=None) -> None:
        if any("/" in tag and not tag.startswith("train/") for tag in metrics):
            self.calls += 1
            if self.first <= self.calls <= self.last:
                raise ConnectionError("the server is gone")
            self.written.append((step, metrics))

    def log_hyperparams(self, params, *_, **__) -> None:
        pass


def test_a_logger_that_fails_costs_one_warning_and_what_it_missed() -> None:
    module, plain = Classifier(mlp(0.2)), Classifier(mlp(0.2))
    steered = [NoiseAdaptiveLR(warmup=2, group_by="all") for _ in range(2)]
    fit(plain, [steered[0]])
    flaky, sound = Flaky(3, 12), Flaky(0, 0)
    monitor = DynamicsMonitor(every_n_steps=2)
    with pytest.warns(UserWarning, match="Flaky failed to write dynamon's readings: the server is gone") as caught:
        fit(module, [monitor, steered[1]], logger=[flaky, sound])
    assert same_weights(plain, module) and steered[0].ratios == steered[1].ratios
    assert len(said(caught, "the server is gone")) == 2  # one of the monitor, one of steering
    assert monitor.failures + steered[1].failures == 10
    assert len(sound.written) == len(flaky.written) + 10
    assert flaky.written[-1][0] == sound.written[-1][0] == 19 or flaky.written[-1] == sound.written[-1]
    assert len(monitor.history["gradient/norm"]) == 10
    with pytest.raises(ConnectionError, match="the server is gone"):
        fit(Classifier(mlp()), [DynamicsMonitor(every_n_steps=2, strict=True)], logger=Flaky())


@pytest.mark.parametrize("method", ["add_custom_scalars", "_get_file_writer", "add_histogram_raw"])
def test_a_tensorboard_writer_that_fails(tmp_path, method, monkeypatch) -> None:
    logger = TensorBoardLogger(tmp_path)
    writer, module = logger.experiment, Classifier(mlp(0.2))

    def broken(*_, **__):
        raise OSError("No space left on device")

    working = getattr(writer, method)
    uses = itertools.count()

    def seldom(*arguments, **named):  # _get_file_writer also serves the scalars of torch's own writer
        return (
            broken()
            if method != "_get_file_writer" or sys._getframe(1).f_code.co_name == "write_table"
            else working(*arguments, **named)
        )

    monkeypatch.setattr(writer, method, seldom)
    monitor = DynamicsMonitor("full", every_n_steps=4, loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        fit(module, [monitor], logger=logger)
    assert same_weights(undisturbed_run(), module) and len(said(caught, "No space left")) == 1
    assert len(monitor.history["gradient/norm"]) == 5 and next(uses) == 0
    assert (monitor.failures > 0) == (method != "add_custom_scalars")


class Nan(Classifier):
    """The loss is NaN at some steps; gradients that are not finite are dropped before the step, as many do."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step in (6, 7, 13) else loss

    def configure_gradient_clipping(self, optimizer, *_, **__) -> None:
        for p in self.parameters():
            torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)


def test_a_loss_that_is_nan_for_some_steps() -> None:
    """Gradients of these steps are marked; the noise, the ratios and the readings after them are finite."""
    plain, module = Nan(), Nan()
    fit(plain, [], steps=24, max_epochs=-1)
    dry = NoiseAdaptiveLR(warmup=2, group_by="all", apply=False)
    monitor = DynamicsMonitor(every_n_steps=1)
    with heard() as caught:
        fit(module, [monitor, dry], steps=24, max_epochs=-1)
    assert same_weights(plain, module)
    assert len(said(caught, "values that are NaN or infinite")) == 1
    bad = monitor.history["gradient/nonfinite"]
    assert bad.steps[bad.values > 0].tolist() == [6, 7, 13]
    assert np.isfinite(monitor.history["gradient/norm"].values[14:]).all()
    assert np.isfinite(monitor.history["noise/dual"].values[-5:]).all()
    assert all(0.1 <= ratio <= 1 for ratio in dry.ratios.values()) and min(dry.ratios.values()) < 1
    steps = monitor.history["sharpness/probe_loss"].steps
    # A measurement follows its step: the module counts one step more by then.
    assert set(steps.tolist()) == set(range(24)) - {5, 6, 12}


def test_weights_that_are_nan_for_good() -> None:
    """Nothing can be measured then; the run goes on as it would have."""

    class Gone(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step == 5 else loss

    module, monitor = Gone(mlp()), DynamicsMonitor(every_n_steps=2)
    with heard() as caught:
        run = fit(module, [monitor, NoiseAdaptiveLR(warmup=2)])
    assert run.global_step == 20 and all(p.isnan().all() for p in module.network[3].parameters())
    assert len(said(caught, "the loss on the probe is not finite")) == 1 or monitor.failures <= 8
    assert len(monitor.history["gradient/nonfinite"]) == 10


class Kill(Callback):
    """Ends its own process the hard way, before it could tidy anything up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run_callbacks() -> list:
    return [DynamicsMonitor("standard", every_n_steps=3, loss_fn=loss_fn), NoiseAdaptiveLR(warmup=3, group_by="all")]


def killed_run(folder: str) -> None:
    """What the process that is killed does; checkpoints at the ends of epochs, after 8, 16 and 24 steps."""
    warnings.simplefilter("ignore")
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    callbacks = [*killed_run_callbacks(), save, Kill(21)]
    fit(Classifier(mlp()), callbacks, steps=32, max_epochs=-1, enable_checkpointing=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path) -> None:
    """Weights, ratios and readings are those of the run that was not killed."""
    root = Path(__file__).parents[2]
    program = "import sys; from tests.callbacks.test_faults import killed_run; killed_run(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=16.ckpt", "step=8.ckpt"]
    whole, resumed = Classifier(mlp()), Classifier(mlp())
    callbacks, going_on = killed_run_callbacks(), killed_run_callbacks()
    fit(whole, callbacks, steps=32, max_epochs=-1)
    fit(resumed, going_on, steps=32, max_epochs=-1, ckpt_path=tmp_path / "step=16.ckpt")
    assert same_weights(whole, resumed) and callbacks[1].ratios == going_on[1].ratios
    assert min(going_on[1].ratios.values()) < 1
    for tag in ("gradient/norm", "noise/dual", "update/operator", "sharpness/hessian_max"):
        late = callbacks[0].history[tag]
        np.testing.assert_array_equal(late.values[late.steps >= 16], going_on[0].history[tag].values, err_msg=tag)


class Tally:
    """An object of the user's own: nobody can know how to put it back."""

    def __init__(self) -> None:
        self.samples, self.losses = 0, []


class Counts(Classifier):
    """Counts on such an object in training_step."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))
        self.tally = Tally()

    def training_step(self, batch, batch_idx):
        self.tally.samples += len(batch[0])
        return super().training_step(batch, batch_idx)


class Writes(Classifier):
    """Writes a line a step into a file of its own."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))
        self.file = tempfile.TemporaryFile(buffering=0)
        weakref.finalize(self, self.file.close)

    def training_step(self, batch, batch_idx):
        self.file.write(b"a step\n")
        return super().training_step(batch, batch_idx)


class Draws(Classifier):
    """Takes a second batch from an iterator of its own, which moves the loss."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))
        self.extra = ((x, y) for _ in range(100) for x, y in batches(40, 4))

    def training_step(self, batch, batch_idx):
        x, y = next(self.extra)
        return super().training_step(batch, batch_idx) + cross_entropy(self.network(x), y)


class Augments(Classifier):
    """Adds noise from the generator of an object of its own."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))
        self.augment = Tally()
        self.augment.generator = np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        noise = torch.tensor(self.augment.generator.normal(size=8), dtype=torch.float32)
        return cross_entropy(self.network(batch[0] + 0.5 * noise), batch[1])


class Turns(Classifier):
    """Takes turns by a state that nobody can look at, which moves the loss by one part in ten thousand."""

    def __init__(self) -> None:
        super().__init__(mlp(0.2))
        self.turns = itertools.cycle([1.0, 1.0001, 1.0002])

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * next(self.turns)


SIDE_EFFECTS = {
    Counts: "it changes Counts.tally.samples",
    Writes: "it changes Writes.file",
    Draws: "on the same samples with the same random numbers its loss was",
    Augments: "it changes Augments.augment.generator",
    Turns: "on the same samples with the same random numbers its loss was",
}


@pytest.mark.parametrize("make", SIDE_EFFECTS)
def test_effects_outside_the_module_are_found_before_the_first_measurement(make) -> None:
    """Sharpness goes off with one sentence that names loss_fn; with it, nothing is disturbed and all is measured."""
    module, monitor = make(), DynamicsMonitor(every_n_steps=2)
    with pytest.warns(UserWarning, match="sharpness is off: training_step has effects outside") as caught:
        fit(module, [monitor])
    (sentence,) = said(caught, "sharpness is off")
    assert SIDE_EFFECTS[make] in sentence and "pass loss_fn=lambda module, batch: ..." in sentence
    assert not any(tag.startswith("sharpness/") for tag in monitor.history)
    assert len(monitor.history["gradient/norm"]) == 10 and monitor.failures == 0
    if make in (Counts, Writes):  # what it has no effect on the weights is at most two evaluations off
        assert same_weights(undisturbed_run(make()), module)
    if make is Counts:
        assert module.tally.samples == 20 * 8 + 2 * 2

    plain, module, monitor = undisturbed_run(make()), make(), DynamicsMonitor(every_n_steps=2, loss_fn=loss_fn)
    fit(module, [monitor])
    assert same_weights(plain, module) and monitor.failures == 0
    assert len(monitor.history["sharpness/probe_loss"]) >= 9
    with pytest.raises(ValueError, match="training_step has effects outside the module"):
        fit(make(), [DynamicsMonitor(every_n_steps=2, strict=True)])


def test_a_cache_that_fills_once_is_no_effect() -> None:
    class Caches(Counts):
        def training_step(self, batch, batch_idx):
            if not self.tally.losses:
                self.tally.losses.append(1)
            return Classifier.training_step(self, batch, batch_idx)

    monitor = SharpnessMonitor(every_n_steps=2, strict=True)
    fit(Caches(), [monitor])
    assert len(monitor.history["sharpness/probe_loss"]) >= 9


COUNTED = {"calls": 0}


def test_what_a_training_step_can_reach_is_looked_at() -> None:
    """Each of these has a mark that changes with it; what the probe puts back has none."""
    held, teacher = Tally(), torch.nn.Linear(2, 2)
    held.table, held.own, held.other = torch.zeros(2), torch.Generator(), random.Random(0)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.count, self.seen = torch.nn.Linear(2, 2), 0, [Tally()]
            self.numbers, self.items, self.teachers = itertools.count(), iter([1, 2, 3]), [teacher]
            self.loader = iter(batches())

        def training_step(self, batch):
            self.count += 1
            self.layer.weight.data.mul_(0.9)
            self.seen[0].samples += 1
            COUNTED["calls"] += 1
            held.table.add_(1), torch.rand(1, generator=held.own), held.other.random()
            next(self.numbers), next(self.items), next(self.loader)
            with torch.no_grad():
                teacher.weight.mul_(0.9)

    module = Module()
    before = external_state(module, module.training_step)
    with preserve_state(module):
        module.training_step(None)
    found = changed_names(before, external_state(module, module.training_step))
    assert "Module.count" not in found and not any("layer" in name for name in found)
    for name in (
        "Module.seen[0].samples",
        "COUNTED['calls']",
        "held.table",
        "held.own",
        "held.other",
        "Module.numbers",
        "Module.items",
        "Module.loader._num_yielded",
        "Module.teachers[0]",
    ):
        assert name in found, (name, found)
    with preserve_state(module):
        pass
    now = external_state(module, module.training_step)
    assert changed_names(now, external_state(module, module.training_step)) == []
