"""The promises of the design, each with a test that fails if it is broken."""

import random
import time
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torchmetrics import MeanMetric

from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.cli.language_model import LanguageModel
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.quantities import REGISTRY, Condition
from dynamon.rates import FixedRates
from tests.helpers import Classifier, batches, cnn, fit, mlp, same_weights, trainer

# What every run here fulfils: AdamW or SGD alone, automatic optimisation, a loss in float32. Whether a signal stands
# out, a spectrum has a power law or a loss bends upwards is a matter of chance.
EVERYWHERE = (
    Condition.AUTOMATIC
    | Condition.RETURNED_LOSS
    | Condition.COMPARABLE
    | Condition.STABILITY_FORMULA
    | Condition.COMPUTED_STEP
    | Condition.CONVERGED
    | Condition.OTHER_SAMPLES
    | Condition.KNOWN_SAMPLES
    | Condition.TRUSTED_LOSS
)
ADAMW = Condition.SECOND_MOMENT | Condition.DECOUPLED_DECAY
BY_SETUP = ADAMW | Condition.INDEPENDENT_GRADIENTS | Condition.CONVOLUTIONS | Condition.ONE_THRESHOLD


class Streams(Callback):
    """Notes the state of every random stream and of the user's metrics at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        numpy_state = np.random.get_state()[1].tobytes()
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        self.seen.append((torch.get_rng_state().numpy().tobytes(), numpy_state, hash(random.getstate()), loss))


class Busy(Classifier):
    """A module whose training_step counts, collects, draws random numbers and updates a metric."""

    def __init__(self, network: nn.Module, **arguments) -> None:
        super().__init__(network, **arguments)
        self.metric, self.calls, self.collected = MeanMetric(), 0, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.calls += 1
        self.collected.append(batch_idx + random.random() + np.random.rand())
        self.metric.update(loss.detach())
        return loss


def all_monitors() -> list:
    return [
        GradientMonitor(every_n_steps=1, strict=True),
        WeightMonitor(every_n_steps=1, strict=True, convolutions=True),
        SharpnessMonitor(every_n_steps=2, strict=True, probe_fraction=0.5, quantities=QUANTITIES),
    ]


def image_batches():
    return batches(count=128, features=(2, 8, 8))


CASES = {
    "mlp adamw": (ADAMW, lambda: Busy(mlp(0.3)), batches),
    "mlp accumulated": (ADAMW | Condition.INDEPENDENT_GRADIENTS, lambda: Busy(mlp(0.3)), batches, 3),
    "cnn sgd": (
        Condition.CONVOLUTIONS | Condition.ONE_THRESHOLD,
        lambda: Busy(cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
        image_batches,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_promise_1_invisible(case: str) -> None:
    """Weights, buffers, optimizer state, random streams, metrics and counters are bitwise those without."""
    holds, make, data, *windows = CASES[case]
    results = []
    for monitors in ([], all_monitors()):
        module, streams = make(), Streams()
        random.seed(0), np.random.seed(0)
        settings = {"max_epochs": -1, "gradient_clip_val": 0.5, "accumulate_grad_batches": windows[0] if windows else 1}
        run = fit(module, [*monitors, streams], data(), steps=14, **settings)
        results.append((module, streams.seen, run.optimizers[0].state_dict(), monitors))
    (plain, plain_streams, plain_state, _), (seen, seen_streams, seen_state, monitors) = results
    assert same_weights(plain, seen)
    assert plain_streams == seen_streams
    assert plain.calls == seen.calls >= 14 and plain.collected == seen.collected
    assert torch.equal(plain.metric.compute(), seen.metric.compute())
    for index, state in plain_state["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(seen_state["state"][index][k])) for k, v in state.items()
        )
    _at_least_five_finite_readings(monitors, holds)


def _at_least_five_finite_readings(monitors: list, holds: Condition) -> None:
    """A monitor that measures nothing is invisible too."""
    for monitor in monitors:
        for tag in (tag for meter in monitor._meters for tag in [*meter.tags, *meter.quantities]):
            condition = REGISTRY[tag].condition
            if condition & BY_SETUP & ~holds:
                assert _finite_readings(monitor, tag) == 0, tag
            elif condition in EVERYWHERE | holds:
                # What did not converge has a tag of its own; which solves do depends on the machine's rounding.
                found = _finite_readings(monitor, tag) + _finite_readings(monitor, f"{tag}_unconverged")
                assert found >= (5 if REGISTRY[tag].every == 1 else 1), tag


def _finite_readings(monitor, tag: str) -> int:
    if tag not in monitor.history:
        return 0
    values = monitor.history[tag].values
    return int(np.isfinite(values).reshape(len(values), -1).any(1).sum())


@pytest.mark.slow
def test_promise_1_invisible_on_the_demo_model() -> None:
    """The same on the language model of the demo, shortened."""
    text = torch.randint(256, (64, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for monitors in ([], [DynamicsMonitor("full", every_n_steps=5, strict=True)]):
        torch.manual_seed(0)
        module = LanguageModel(steps=30, context=16)
        data = torch.utils.data.DataLoader(text, batch_size=4)
        run = trainer(monitors, steps=30, max_epochs=-1, gradient_clip_val=1.0, val_check_interval=7)
        run.fit(module, data, torch.utils.data.DataLoader(text[:8], batch_size=4))
        results.append((module, monitors))
    assert same_weights(results[0][0], results[1][0])
    _at_least_five_finite_readings(results[1][1], ADAMW)


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
@pytest.mark.parametrize("steering", [lambda: LayerwiseLR(FixedRates({"*": 1.0})), lambda: NoiseAdaptiveLR(floor=1.0)])
def test_promise_1_steering_with_ones_is_invisible(steering, clip: dict) -> None:
    """Ratios of one leave the run bitwise as it was, clipping included."""
    plain, steered = Classifier(mlp(0.3)), Classifier(mlp(0.3))
    fit(plain, [], **clip)
    fit(steered, [steering()], **clip)
    assert same_weights(plain, steered)


def test_promise_2_correct_or_marked() -> None:
    """A value that did not converge goes under its own tag, and never under the plain one."""
    monitor = SharpnessMonitor(every_n_steps=2, tol=1e-9, max_matvecs=8, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Classifier(mlp()), [monitor])
    history = monitor.history
    assert len(history["sharpness/stability_ratio_unconverged"]) >= 5
    assert len(history.get("sharpness/stability_ratio", ())) == 0
    assert len(history["sharpness/stability_ratio_residual"]) >= 5
    assert (history["sharpness/matvecs"].values > 0).all()


class _Transfers(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _transfers_a_step(callbacks: list, steps: int) -> list[int]:
    class Counter(Callback):
        counts: list[int] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            Counter.counts.append(mode.count)
            mode.count = 0

    Counter.counts = []
    data = batches(count=8 * steps)
    with _Transfers() as mode:
        fit(
            Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True)),
            [*callbacks, Counter()],
            data,
            steps=steps,
        )
    return Counter.counts


def test_promise_3_few_transfers() -> None:
    """Steps that measure nothing read nothing from the device, and a gradient reading is one copy."""
    plain = _transfers_a_step([], 12)
    monitored = _transfers_a_step([DynamicsMonitor(every_n_steps=5)], 12)
    quiet = [step for step in range(2, 12) if step % 5]
    assert [monitored[s] for s in quiet] == [plain[s] for s in quiet]


def test_promise_4_budgeted(monkeypatch) -> None:
    """A share of 5 % and a grace are kept over a run, and every default quantity is read; others' time is not ours."""
    monkeypatch.setattr("dynamon.monitoring.budget.time.perf_counter", time.process_time)

    class Slow(Classifier):
        def training_step(self, batch, batch_idx):
            torch.randn(700, 700) @ torch.randn(700, 700)
            return super().training_step(batch, batch_idx)

    monitor = DynamicsMonitor(budget=0.05, grace=0.5, strict=True)
    fit(Slow(mlp()), [monitor], batches(count=2400), steps=300)
    training = monitor._budget.training
    # A reading that takes longer than the ones before is made up for later.
    assert monitor.overhead * training <= (0.05 * training + 0.5) * 1.25
    for tag in ("gradient/norm", "weight/operator", "sharpness/directional"):
        assert len(monitor.history[tag]) >= 1, tag


def test_promise_5_never_the_cause_of_a_crash() -> None:
    """A measurement that fails costs one warning, is counted, and is paused after three in a row."""

    def broken(module, batch):
        raise RuntimeError("no such luck")

    plain, module = Classifier(mlp()), Classifier(mlp())
    fit(plain, [])
    monitor = DynamicsMonitor(every_n_steps=2, loss_fn=broken)
    with pytest.warns(UserWarning, match="measurement failed: no such luck"):
        fit(module, [monitor])
    assert same_weights(plain, module)
    assert monitor.failures == 9  # three of each meter that needs the loss
    assert monitor.history["dynamon/failures"].values[-1] == 9
    assert len(monitor.history["gradient/norm"]) >= 5
    with pytest.raises(RuntimeError, match="no such luck"):
        fit(Classifier(mlp()), [DynamicsMonitor(every_n_steps=2, loss_fn=broken, strict=True)])


def test_promise_6_steering_is_bounded_and_reversible() -> None:
    """Ratios keep their bounds, and groups are the user's own outside of a step."""
    bounds = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            bounds.append(steering.ratios.values())
            assert len(trainer.optimizers[0].param_groups) == 1
            assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2

    steering = NoiseAdaptiveLR(warmup=2, floor=0.4, group_by="all")
    fit(Classifier(mlp()), [steering, Look()])
    assert all(0.4 <= ratio <= 1 for ratios in bounds for ratio in ratios)
    assert any(ratio < 1 for ratio in bounds[-1])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_promise_7_resumable(tmp_path) -> None:
    """Stop, load, go on: weights, ratios and panels are bitwise those of the run that never stopped."""

    def callbacks() -> list:
        return [DynamicsMonitor("standard", every_n_steps=3, strict=True), NoiseAdaptiveLR(warmup=3)]

    def make() -> Classifier:
        return Classifier(mlp(), scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97))

    # Saved at the end of an epoch, where a run without dynamon resumes bitwise too.
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    whole, whole_callbacks = make(), callbacks()
    fit(whole, [*whole_callbacks, save], steps=32, max_epochs=-1, enable_checkpointing=True)
    resumed, resumed_callbacks = make(), callbacks()
    fit(resumed, resumed_callbacks, steps=32, max_epochs=-1, ckpt_path=tmp_path / "step=16.ckpt")
    assert same_weights(whole, resumed)
    assert whole_callbacks[1].ratios == resumed_callbacks[1].ratios
    for quantity, series in whole_callbacks[0].history.items():
        late = series.steps >= 16
        if quantity.startswith("dynamon/") or not late.any():
            continue  # time differs
        again = resumed_callbacks[0].history[quantity]
        np.testing.assert_array_equal(series.values[late], again.values, err_msg=quantity)


SETUPS = {
    "accumulation": {"accumulate_grad_batches": 2, "steps": 10},
    "bf16": {"precision": "bf16-mixed"},
    "clipping": {"gradient_clip_val": 0.1},
    "overfit": {"overfit_batches": 2},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_promise_8_everywhere_lightning_runs(setup: str) -> None:
    """Common Trainer settings: everything is measured and nothing changes."""
    arguments = {"max_epochs": -1, **SETUPS[setup]}
    plain, module = Classifier(mlp(0.2)), Classifier(mlp(0.2))
    fit(plain, [], **arguments)
    monitor = DynamicsMonitor("standard", every_n_steps=1, strict=True)
    fit(module, [monitor], **arguments)
    assert same_weights(plain, module)
    assert (
        len(monitor.history["sharpness/stability_ratio"])
        + len(monitor.history.get("sharpness/stability_ratio_unconverged", ()))
        >= 5
    )
    assert np.isfinite(monitor.history["noise/dual"].values).any()
