"""What compares two successive steps, and what goes on over all of them, on real runs."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, NoiseAdaptiveLR, WeightMonitor
from dynamon.rates import FixedRates
from tests.callbacks.test_values import Witness, norm
from tests.helpers import Classifier, batches, fit, mlp, same_weights


def by_step(monitor, tag: str) -> dict:
    series = monitor.history[tag]
    return dict(zip(series.steps.tolist(), series.values, strict=True))


def cosine(one: dict, other: dict, names) -> float:
    return sum(float((one[n] * other[n]).sum()) for n in names) / norm(one[n] for n in names) / norm(
        other[n] for n in names
    )  # fmt: skip


class Muon(torch.optim.SGD):
    """Descends in spectral norms, to judge by its name."""


@pytest.mark.parametrize("clip", [0.55, 1e-3, None])
def test_clip_share(clip: float | None) -> None:
    monitor, witness = GradientMonitor(every_n_steps=2, strict=True), Witness()
    fit(Classifier(mlp()), [monitor, witness], gradient_clip_val=clip)
    norms = np.array([norm(g.values()) for g in witness.unclipped])[::2]
    acted = norms > (clip or np.inf)
    np.testing.assert_allclose(
        monitor.history["gradient/clip_share"].values, np.cumsum(acted) / np.arange(1, len(acted) + 1)
    )
    assert acted.mean() == {1e-3: 1, None: 0}.get(clip, acted.mean())
    assert clip != 0.55 or 0.1 < acted.mean() < 0.9, norms


@pytest.mark.parametrize("setup", [{}, {"accumulate_grad_batches": 2, "steps": 10}, {"gradient_clip_val": 0.1}])
@pytest.mark.parametrize("every", [1, 3])
def test_update_cosine(every: int, setup: dict) -> None:
    monitor, witness = WeightMonitor(every_n_steps=every, strict=True), Witness()
    fit(Classifier(mlp()), [monitor, witness], **{"max_epochs": -1, "steps": 16, **setup})
    # Without a step no weight changed: of accumulated batches the last one is the step.
    stride = setup.get("accumulate_grad_batches", 1)
    after, names = witness.after[stride - 1 :: stride], list(witness.before[0])
    steps = [{n: a[n] - b[n] for n in names} for a, b in zip(after, witness.before, strict=True)]
    whole, layers = by_step(monitor, "update/cosine"), by_step(monitor, "update/layer_cosine")
    assert list(whole) == list(layers) == [s for s in range(len(steps)) if s % every == 0 and s > 0]
    for step, value in whole.items():
        assert value == pytest.approx(cosine(steps[step], steps[step - 1], names), abs=1e-4)
        expected = [cosine(steps[step], steps[step - 1], [n]) for n in names]
        np.testing.assert_allclose(layers[step], expected, atol=1e-3)
    assert monitor._meters[0]._earlier == {} or every == 1  # held for a pair of steps only


MAKE = {
    "sign": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "euclidean": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "spectral": lambda p: Muon(p, lr=0.1),
}


def smoothness(family: str, change: torch.Tensor, step: torch.Tensor, name: str) -> float:
    """Dual over primal, written out; the head of the network is its last layer."""
    if family == "euclidean":
        return float(change.norm() / step.norm())
    if family == "sign" or name == "network.3.weight":
        return float(change.abs().sum() / step.abs().max())
    if step.ndim == 1:  # rms: sqrt(n) times one over one over sqrt(n) times the other
        return float(change.norm() * step.numel() / step.norm())
    out, inner = step.shape
    values, steps = torch.linalg.svdvals(change), torch.linalg.svdvals(step)
    return float((out / inner) ** 0.5 * values.sum() / ((inner / out) ** 0.5 * steps[0]))


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("family", MAKE)
def test_local_smoothness(family: str, every: int, steered: bool) -> None:
    monitor, witness = GradientMonitor(every_n_steps=every, strict=True), Witness()
    steering = [NoiseAdaptiveLR(warmup=2)] if steered else []
    fit(Classifier(mlp(), optimizer=MAKE[family]), [monitor, *steering, witness], steps=13, max_epochs=-1)
    found, names = by_step(monitor, "gradient/local_smoothness"), monitor.history["gradient/local_smoothness"].layers
    assert list(found) == [s for s in range(1, 13) if s % every == 0]
    for step, row in found.items():
        now, before = witness.unclipped[step], witness.unclipped[step - 1]
        moved = {n: witness.before[step][n] - witness.before[step - 1][n] for n in names}
        expected = [smoothness(family, now[n] - before[n], moved[n], n) for n in names]
        np.testing.assert_allclose(row, expected, rtol=5e-3)


@pytest.mark.parametrize("budget", [{"budget": 50.0}, {"every_n_steps": 1}])
def test_under_a_budget_a_reading_has_its_step_before(budget: dict) -> None:
    monitor = DynamicsMonitor("full", strict=True, **budget)
    fit(Classifier(mlp()), [monitor], steps=40, max_epochs=-1)
    norms, smooth = (len(monitor.history[t]) for t in ("gradient/norm", "gradient/local_smoothness"))
    assert 5 <= smooth and norms - 1 <= smooth <= norms
    weights, cosines = (len(monitor.history[t]) for t in ("weight/rms", "update/cosine"))
    assert 3 <= cosines and weights - 1 <= cosines <= weights


def test_fast_dev_run_reads_everything() -> None:
    monitors = [GradientMonitor(strict=True), WeightMonitor(strict=True)]
    fit(Classifier(mlp()), monitors, fast_dev_run=3)
    assert len(monitors[0].history["gradient/local_smoothness"]) == len(monitors[1].history["update/cosine"]) == 2


class Frozen(Classifier):
    """The first layer is in the optimizer and does not learn; from the third step on its bias does."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.network[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if self.trainer.global_step == 3:
            self.network[0].bias.requires_grad_(True)


def test_frozen_layers_have_no_direction_and_do_not_decay() -> None:
    plain, module = Frozen(), Frozen()
    fit(plain, [], steps=8)
    monitors = [GradientMonitor(every_n_steps=1, strict=True), WeightMonitor(every_n_steps=1, strict=True)]
    fit(module, monitors, steps=8)
    assert same_weights(plain, module)
    gradients, weights = (m.history for m in monitors)
    names = weights["update/layer_cosine"].layers
    for tag, history in (
        ("update/layer_cosine", weights),
        ("weight/initial_fraction", weights),
        ("gradient/local_smoothness", gradients),
    ):
        values = history[tag].values
        assert np.isnan(values[:, names.index("network.0.weight")]).all(), tag
        assert np.isfinite(values[-1, [names.index("network.0.bias"), names.index("network.3.weight")]]).all(), tag
    bias, head = (
        weights["weight/initial_fraction"].values[-1, names.index(n)] for n in ("network.0.bias", "network.3.bias")
    )
    assert bias == pytest.approx(0.9999**5, rel=1e-6) and head == pytest.approx(0.9999**8, rel=1e-6)


class TwoOptimizers(Classifier):
    """Manual optimisation: the second optimizer steps in every third batch only, the first one twice then."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.network[0].parameters(), lr=0.1, momentum=0.5)
        return [first, torch.optim.AdamW(self.network[3].parameters(), lr=1e-2, weight_decay=0.5)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in [first, second, first] if batch_idx % 3 == 0 else [first]:
            loss = cross_entropy(self.network(batch[0]), batch[1])
            self.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_several_optimizers_each_have_their_own_pairs() -> None:
    plain, module = TwoOptimizers(), TwoOptimizers()
    fit(plain, [], steps=20)
    monitors = [GradientMonitor(every_n_steps=1, strict=True), WeightMonitor(every_n_steps=1, strict=True)]
    fit(module, monitors, steps=20)
    assert same_weights(plain, module)
    gradients, weights = (m.history for m in monitors)
    names = list(weights["update/layer_cosine"].layers)
    head, body = names.index("network.3.weight"), names.index("network.0.weight")
    directions = weights["update/layer_cosine"].values
    assert np.isfinite(directions[:, body]).all() and np.isnan(directions[:, head]).all()  # never two in a row
    memory = weights["weight/initial_fraction"].values
    steps = np.cumsum(np.arange(len(memory)) % 8 % 3 == 0)  # eight batches an epoch
    np.testing.assert_allclose(memory[:, head], 0.995**steps, rtol=1e-6)
    assert np.isnan(memory[:, body]).all()
    smooth = gradients["gradient/local_smoothness"].values
    assert np.isfinite(smooth[:, body]).all() and (smooth[np.isfinite(smooth)] > 0).all()


class Decaying(Classifier):
    """Zero gradients: AdamW does nothing but decay."""

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:WeightMonitor. The training loss is exactly 0")  # so that decay alone moves
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_memory_is_what_is_left_of_the_weights(rate, scaled: bool) -> None:
    """Scheduled, steered, read now and then, with one group that does not decay."""
    if isinstance(rate, torch.Tensor):
        rate = rate.clone()

    def optimizer(parameters):
        first, *others = parameters
        groups = [{"params": [first], "weight_decay": 0.0}, {"params": others}]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.5)

    module = Decaying(mlp(), optimizer, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))
    start = {n: p.detach().clone().double() for n, p in module.named_parameters()}
    monitor = WeightMonitor(every_n_steps=4, strict=True)
    steering = LayerwiseLR(FixedRates({"network.3.weight": 0.5}), scale_weight_decay=scaled)
    fit(module, [monitor, steering], steps=13, max_epochs=-1)
    series = monitor.history["weight/initial_fraction"]
    row = dict(zip(series.layers, series.values[-1], strict=True))
    assert len(series) == 4 and np.isnan(row.pop("network.0.weight"))
    for name, left in row.items():
        torch.testing.assert_close(dict(module.named_parameters())[name].detach().double(), start[name] * left,
                                   rtol=1e-5, atol=0)  # fmt: skip
    assert (row["network.3.weight"] > 1.01 * row["network.3.bias"]) == scaled


def test_constraint_usage_takes_the_rate_of_the_step_and_not_of_the_next() -> None:
    module = Classifier(mlp(), lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5),
                        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))  # fmt: skip
    monitor = WeightMonitor(every_n_steps=1, strict=True)
    fit(module, [monitor], steps=4)
    history = monitor.history
    for step in range(4):
        rate = 0.02 * 0.5**step
        np.testing.assert_allclose(
            history["weight/effective_rate"].values[step], rate / history["weight/frobenius"].values[step] ** 2
        )


def test_without_decoupled_decay_there_is_no_memory() -> None:
    monitor = WeightMonitor(every_n_steps=1, strict=True)
    fit(Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)), [monitor])
    assert "weight/initial_fraction" not in monitor.history


RESUMED = {
    "alone": lambda n: [GradientMonitor(every_n_steps=n, strict=True), WeightMonitor(every_n_steps=n, strict=True)],
    "steered": lambda n: [DynamicsMonitor("full", every_n_steps=n, strict=True), NoiseAdaptiveLR(warmup=3)],
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("every", [1, 4, 5])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_shows_the_same(tmp_path, kind: str, every: int) -> None:
    """Also where the first reading after the resume compares with the last step before it (every 1 and 4)."""

    def make() -> Classifier:
        return Classifier(mlp(), scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97))

    arguments = {"max_epochs": -1, "gradient_clip_val": 0.55}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    whole, again = RESUMED[kind](every), RESUMED[kind](every)
    fit(make(), [*whole, save], steps=32, enable_checkpointing=True, **arguments)
    fit(make(), again, steps=32, ckpt_path=tmp_path / "step=16.ckpt", **arguments)
    compared = set()
    for first, second in zip(whole, again, strict=True):
        for tag, series in first.history.items():
            late = series.steps >= 16
            if late.any() and not tag.startswith(("dynamon/", "sharpness/")):
                np.testing.assert_array_equal(series.values[late], second.history[tag].values, err_msg=tag)
                compared.add(tag)
    assert {"gradient/clip_share", "update/cosine", "update/layer_cosine", "weight/initial_fraction"} <= compared
    assert {"gradient/local_smoothness", "noise/dual", "gradient/cosine"} <= compared


@pytest.mark.parametrize(
    ("arguments", "held"),
    [
        ({"every_n_steps": 1}, True),
        ({"every_n_steps": 4}, True),
        ({"every_n_steps": 3}, False),
        ({"budget": 50}, False),
    ],
)
def test_checkpoints_hold_weights_only_where_the_next_step_is_read(arguments: dict, held: bool) -> None:
    monitor = DynamicsMonitor("full", **arguments)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            state = monitor.state_dict()
            seen.append((state["gradient"]["weights"], state["weight"]["earlier"]))

    fit(Classifier(mlp()), [monitor, Look()], steps=8)
    gradients, weights = seen[-1]
    assert bool(gradients) == bool(weights) == held
    assert all(gradients[name] is weights[name] for name in weights)  # one copy serves both


class Snapshots(Callback):
    """Weights after, and gradients before, each step."""

    def __init__(self) -> None:
        self.weights: list[dict] = []
        self.gradients: list[dict] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def test_histograms_read_back_from_the_event_file(tmp_path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name=None, version="tb"), CSVLogger(tmp_path, name="csv", version=0)]
    monitor, seen = DynamicsMonitor("full", every_n_steps=1, strict=True), Snapshots()
    fit(Classifier(mlp()), [monitor, seen], logger=loggers, steps=12, max_epochs=-1, gradient_clip_val=0.1)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0})
    events.Reload()
    names = list(seen.weights[0])
    expected = {f"{kind}/histogram/{n}" for kind in ("weight", "gradient") for n in names}
    assert set(events.Tags()["histograms"]) == expected
    for kind, kept in (("weight", seen.weights), ("gradient", seen.gradients)):
        for name in names:
            first, second = events.Histograms(f"{kind}/histogram/{name}")
            assert (first.step, second.step) == (0, 10)  # every tenth reading
            for event in (first, second):
                values = kept[event.step][name].double().numpy().ravel()
                found = event.histogram_value
                assert (found.min, found.max, found.num) == (values.min(), values.max(), values.size)
                edges = np.array([-np.inf, *found.bucket_limit])
                np.testing.assert_array_equal(np.histogram(values, edges)[0], found.bucket)
    assert "histogram" not in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


def test_tensorboard_shows_all_of_a_histogram(tmp_path) -> None:
    """What its page is given begins and ends with the extremes and holds every entry."""
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    module = Classifier(mlp())
    fit(module, [WeightMonitor(every_n_steps=1, strict=True, histograms=True)], logger=logger, steps=1)
    (path,) = (tmp_path / "tb").glob("events*")
    values = [v for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
    (shown,) = (v for v in values if v.tag == "weight/histogram/network.0.weight")
    from tensorboard.util import tensor_util

    buckets = tensor_util.make_ndarray(shown.tensor)
    weight = module.network[0].weight.detach()
    assert buckets[0, 0] == weight.min() and buckets[-1, 1] == weight.max() and buckets[:, 2].sum() == weight.numel()
    assert (buckets[:, 1] >= buckets[:, 0]).all()


def test_histograms_are_off_unless_asked_for(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    fit(Classifier(mlp()), [DynamicsMonitor("standard", every_n_steps=1, strict=True)], logger=logger, steps=2)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["histograms"] == []


def test_histograms_leave_out_what_is_not_finite(tmp_path) -> None:
    class Broken(Classifier):
        def on_after_backward(self) -> None:
            self.network[0].bias.grad[0] = torch.nan
            self.network[3].bias.grad.fill_(torch.inf)

    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    monitor = GradientMonitor(every_n_steps=1, strict=True, histograms=True)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        fit(Broken(mlp()), [monitor], batches(), logger=logger, steps=1)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "gradient/histogram/network.3.bias" not in events.Tags()["histograms"]
    (event,) = events.Histograms("gradient/histogram/network.0.bias")
    assert event.histogram_value.num == 15


class SaveFirst(Callback):
    """Saves as soon as the step is over, before the monitors look at it."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_in_between_does_not_move_the_rates_that_are_shown(tmp_path) -> None:
    seen = []
    for first in ([], [SaveFirst(tmp_path / "x.ckpt")]):
        monitor, steering = WeightMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=0, group_by="all")
        module = Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5))
        fit(module, [*first, monitor, steering], steps=8)
        tags = ("weight/initial_fraction", "weight/effective_rate", "weight/constraint_usage")
        seen.append([monitor.history[tag].values for tag in tags])
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)
