"""SpikeGuard in a Trainer: after all readers and clipping, what Lightning counts, stopping, resuming, processes."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SpikeGuard
from tests.helpers import ByHand, Classifier, fit, mlp, same_weights
from tests.processes import Sharded, fit_in_processes, loader, small

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
AdamW = torch.optim.AdamW


class Spiking(Classifier):
    """The loss of some batches is many times as large."""

    def __init__(self, *arguments: Any, at: tuple[int, ...] = (20,), size: float = 1e4, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.at, self.size, self.seen = at, size, 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen += 1
        return super().training_step(batch, batch_idx) * (self.size if step in self.at else 1.0)


def by_step(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


def guard(**arguments: Any) -> SpikeGuard:
    return SpikeGuard(**{"warmup": 10, **arguments})


LONG = {"steps": 30, "max_epochs": -1}


@pytest.mark.filterwarnings("ignore:DynamicsMonitor. Step 20 is a spike")
@pytest.mark.parametrize("first", [True, False], ids=["guard first", "guard last"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_monitors_and_rules_read_what_they_would_without(first: bool, clip: float | None) -> None:
    """Up to the spike itself: from there on the weights are others."""
    found = []
    for guarded in (False, True):
        monitors = [DynamicsMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=2, apply=False)]
        own = [guard()] if guarded else []
        callbacks = [*own, *monitors] if first else [*monitors, *own]
        fit(Spiking(mlp(), lambda p: torch.optim.SGD(p, 1e-3)), callbacks, gradient_clip_val=clip, **LONG)
        found.append((*monitors, *own))
    for tag in ("gradient/norm", "gradient/norm_clipped", "gradient/l2"):
        one, other = (monitors[0].history[tag].values for monitors in found)
        np.testing.assert_array_equal(other[:21], one[:21])
    assert found[1][0].history["gradient/norm"].values[20] > 1e3
    noise = [monitors[1].history["lr/ratio"].values for monitors in found]
    np.testing.assert_array_equal(noise[1][:21], noise[0][:21])
    factors = found[1][2].history["guard/factor"]
    if clip is None:
        assert factors.values[20].max() < 0.01 and factors.values[:20].min() == 1.0
    else:  # clipping comes first, and leaves no spike
        assert factors.values.min() > 0.2


def test_what_is_logged_is_what_was_done() -> None:
    callback = guard(skip=3.0)
    fit(Spiking(mlp(), at=(12, 20, 21)), [callback], log_every_n_steps=5, **LONG)
    history = callback.history
    assert history["guard/clipped"].steps.tolist() == [4, 9, 14, 19, 24, 29]
    np.testing.assert_allclose(history["guard/clipped"].values, [0, 0, 0.2, 0, 0.4, 0])
    assert history["guard/skipped"].values.tolist() == [0, 0, 1, 1, 3, 3]
    smallest = history["guard/smallest"].values
    assert (smallest < 0.01).tolist() == [False, False, True, False, True, False]
    np.testing.assert_array_equal(history["guard/factor"].values.min(1), smallest)
    assert repr(callback) == "SpikeGuard(3 of 30 steps clipped, 3 skipped)"
    assert set(callback.factors) == set(callback.limits) == {f"network.{n}" for n in (
        "0.weight", "0.bias", "3.weight", "3.bias")}  # fmt: skip


MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "AdamW": lambda p: AdamW(p, 1e-2),
    "AdamW fused": lambda p: AdamW(p, 1e-2, fused=True),
}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", MAKE)
def test_a_skipped_step_counts_as_lightning_counts_what_its_scaler_skips(name: str, precision: str) -> None:
    """Weights and optimizer state stay, ``global_step`` and schedulers go on."""
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    module = Spiking(network, MAKE[name], by_step, at=(12, 20), size=1e3)
    kept, callback = Weights(), guard(skip=2.5, deviations=5.0)
    run = fit(module, [callback, kept], **settings, **LONG)
    still = [step for step, (one, other) in enumerate(zip(kept.seen, kept.seen[1:], strict=False), 1)
             if all(map(torch.equal, one, other))]  # fmt: skip
    assert still == [12, 20] and callback.history["guard/skipped"].values[-1] == 2
    assert run.global_step == 30 and run.lr_scheduler_configs[0].scheduler.last_epoch == 30
    state = run.optimizers[0].state_dict()["state"]
    assert all(int(own.get("step", 28)) == 28 for own in state.values())
    if precision == "16-mixed":
        assert scaler.get_scale() == 2.0**4


class Weights(Callback):
    """Keeps the weights after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        self.seen.append([p.detach().clone() for p in pl_module.parameters()])


def test_the_scaler_of_lightning_counts_the_same_way() -> None:
    """What the test above compares with: a step that overflows, without a guard."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
    module = Spiking(mlp(), MAKE["AdamW"], by_step, at=(12,), size=math.inf)
    run = fit(module, [], plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **LONG)
    assert run.global_step == 30 and run.lr_scheduler_configs[0].scheduler.last_epoch == 30
    assert all(int(own["step"]) == 29 for own in run.optimizers[0].state_dict()["state"].values())


def test_a_loss_that_is_far_out_skips_the_step_of_its_window() -> None:
    """Gradients of zero, so that the loss alone decides; two batches a step."""

    class Flat(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            return loss + (1e3 if step == 15 and batch_idx % 2 else 0.0)

    callback = guard(skip=3.0)
    fit(Flat(mlp()), [callback], steps=24, max_epochs=-1, accumulate_grad_batches=2)
    skipped = callback.history["guard/skipped"]
    assert skipped.values[-1] == 1 and skipped.steps[np.argmax(skipped.values)] == 15


def test_training_stops_with_the_last_checkpoint_before_the_trouble(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    module = Spiking(mlp(), at=tuple(range(18, 40)), size=math.nan)
    callback = guard(skip=3.0, stop_after=5)
    with pytest.warns(UserWarning, match="SpikeGuard stops training at step 22: the last 5 steps were") as warned:
        run = fit(module, [save, callback], enable_checkpointing=True, steps=40, max_epochs=-1)
    assert run.global_step == 23 and run.should_stop
    path = tmp_path / "step=16.ckpt"
    assert f"The last checkpoint before is {path}." in callback.stopped
    assert callback.stopped in [str(each.message) for each in warned]
    calm = Spiking(mlp(), at=())
    again = fit(calm, [guard(skip=3.0, stop_after=5)], ckpt_path=str(path), steps=40, max_epochs=-1)
    assert again.global_step == 40 and all(p.isfinite().all() for p in calm.parameters())


def test_without_a_checkpoint_the_sentence_says_so_and_a_dry_run_never_stops() -> None:
    callback, dry = guard(skip=3.0, stop_after=2), guard(skip=3.0, stop_after=2, apply=False)
    with pytest.warns(UserWarning, match="No checkpoint was saved before"):
        run = fit(Spiking(mlp(), at=(15, 16)), [callback], **LONG)
    assert run.global_step == 17
    assert fit(Spiking(mlp(), at=(15, 16)), [dry], **LONG).global_step == 30 and dry.stopped is None
    with pytest.warns(UserWarning, match="stops training"):  # clipped without skipping
        assert fit(Spiking(mlp(), at=(15, 16)), [guard(stop_after=2)], **LONG).global_step == 17


@pytest.mark.parametrize("skip", [None, 3.0])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, skip: float | None) -> None:
    """Weights and history to the bit, levels and counts too."""
    settings = {"max_epochs": -1, "log_every_n_steps": 3}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    at, arguments = (14, 20), {"skip": skip, "memory": 12, "deviations": 2.0, "stop_after": 9}
    whole, first = Spiking(mlp(), at=at), guard(**arguments)
    fit(whole, [first, save], enable_checkpointing=True, steps=30, **settings)
    rest, second = Spiking(mlp(), at=at), guard(**arguments)
    fit(rest, [second], ckpt_path=str(tmp_path / "step=16.ckpt"), steps=30, **settings)
    assert same_weights(whole, rest)
    assert first.state_dict()["optimizers"] == second.state_dict()["optimizers"]
    assert first.state_dict()["optimizers"][0]["counts"]["clipped"] >= 2
    for tag, series in second.history.items():
        own = first.history[tag]
        places = [own.steps.tolist().index(step) for step in series.steps]
        assert series.steps.tolist() == [17, 20, 23, 26, 29]
        np.testing.assert_array_equal(series.values, own.values[places])
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == second.state_dict()


def test_a_checkpoint_resumes_without_the_guard(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    fit(Spiking(mlp()), [guard(), save], enable_checkpointing=True, **LONG)
    assert fit(Spiking(mlp()), [], ckpt_path=str(tmp_path / "step=16.ckpt"), **LONG).global_step == 30


def test_manual_optimisation_is_guarded() -> None:
    class Jumping(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            kept = batch[0] * (1e4 if step == 20 else 1.0)
            super().training_step([kept, batch[1]], batch_idx)

    callback = guard(skip=3.0)
    run = fit(Jumping(nn.Sequential(nn.Linear(8, 3))), [callback], **LONG)
    assert callback.history["guard/skipped"].values[-1] == 1 and run.global_step == 30


def test_one_of_a_kind_and_what_is_refused() -> None:
    with pytest.raises(ValueError, match="SpikeGuard and SpikeGuard in callbacks; keep one"):
        fit(Classifier(mlp()), [guard(), guard()], steps=1)
    with pytest.raises(ValueError, match="SpikeGuard: LBFGS cannot be guarded: it uses several gradients"):
        fit(Classifier(mlp(), torch.optim.LBFGS), [guard()], steps=1)
    with pytest.raises(ValueError, match="stop_after must be a whole number of 1 or more steps, or None, got 0"):
        guard(stop_after=0)
    with pytest.raises(ValueError, match="skip must be above 1"):
        guard(skip=0.5)
    with pytest.raises(ValueError, match="layers must be a list of names, got the string"):
        guard(layers="*.weight")

    class Early(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            pl_module.network[2].weight = nn.Parameter(pl_module.network[2].weight.detach().to("meta"))
            pl_module.cpu = lambda: pl_module  # at teardown, which nothing on meta survives

    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="cannot guard this run: the model's parameters are on cpu and meta"):
        fit(Classifier(network), [Early(), guard()], steps=1)


class Bursts(Spiking):
    """Of one process's batches in some steps; the other sees nothing but the mean of the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        kept, self.at = self.at, self.at if self.trainer.global_rank == self.trainer.world_size - 1 else ()
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.at = kept


class ShardedBursts(Sharded, Bursts):
    """The same under FSDP2."""

    def __init__(self, *arguments: Any, at: tuple[int, ...]) -> None:
        super().__init__(*arguments)
        self.at = at


def ended(module: Any) -> Any:
    (callback,) = [c for c in module.trainer.callbacks if isinstance(c, SpikeGuard)]
    return callback.state_dict()["optimizers"], callback.factors, module.trainer.global_step


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Bursts, ShardedBursts])
def test_processes_decide_together(kind: type) -> None:
    """The spike is on one process; all clip, skip and stop alike, to the bit."""
    arguments = {"data": loader(), "steps": 40, "log_every_n_steps": 4}
    make = lambda: kind(small(), MAKE["AdamW"], at=(14, *range(24, 40)))  # noqa: E731
    found = fit_in_processes(make, [guard(skip=4.0, stop_after=4)], 2, ended, **arguments)
    (one, factors, steps), (other, *_) = (each["more"] for each in found)
    assert one == other and found[0]["more"][1:] == found[1]["more"][1:]
    assert one[0]["counts"]["skipped"] >= 4 and min(factors.values()) < 0.01
    assert 28 <= steps <= 32
    assert found[0]["warned"] == [w for w in found[0]["warned"] if "stops training" in w] and found[0]["warned"]
    for key, weight in found[0]["weights"].items():
        assert torch.equal(weight, found[1]["weights"][key])


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Bursts, ShardedBursts])
def test_levels_are_those_of_one_process_and_rest_is_invisible(kind: type) -> None:
    arguments = {"data": loader(), "steps": 30}
    make = lambda: kind(small(), MAKE["AdamW"], at=())  # noqa: E731
    plain = fit_in_processes(make, [], 2, **arguments)
    seen = fit_in_processes(make, [guard(skip=50.0), GradientMonitor(every_n_steps=5)], 2, ended, **arguments)
    (alone,) = fit_in_processes(make, [guard(skip=50.0)], 1, ended, **arguments)
    for one, other in zip(plain, seen, strict=True):
        assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])
    for name, (mean, variance, count) in alone["more"][0][0]["levels"].items():
        assert seen[0]["more"][0][0]["levels"][name] == pytest.approx([mean, variance, count], rel=1e-5)
