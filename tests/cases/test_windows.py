"""Gradients are compared over alike windows only: equal batches have no noise, whatever becomes of the windows."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dynamon.callbacks import GradientMonitor, NoiseAdaptiveLR
from dynamon.optim import LayerwiseRates
from dynamon.quantities.windows import Window
from dynamon.rates import NoiseAdaptiveRates
from tests.helpers import Classifier, fit, mlp
from tests.processes import fit_in_processes, loader

SMALL = 1e-3  # what curvature times step leaves at a rate of 1e-3; a gradient has length 0.8


class Net(pl.LightningModule):
    """Cross-entropy; ``skipped`` batches of an epoch have no loss, and ``meddle`` is called at their start."""

    def __init__(self, skipped: tuple[int, ...] = (), meddle: Any = None, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.skipped, self.meddle = skipped, meddle
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=1e-3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.meddle is not None:
            self.meddle(self, batch_idx)
        if batch_idx in self.skipped:
            return None
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def one_batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 8, generator=generator), torch.randint(3, (size,), generator=generator)


def equal(count: int) -> DataLoader[Any]:
    """Batches of eight samples, all the same."""
    x, y = one_batch()
    return DataLoader(TensorDataset(x.repeat(count, 1), y.repeat(count)), 8)


class Stream(IterableDataset[Any]):
    """As many equal batches, of which nobody knows how many there are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        x, y = one_batch()
        return iter([(a, b) for _ in range(self.count) for a, b in zip(x, y, strict=True)])


def watched(net: pl.LightningModule, data: Any, epochs: int = 4, others: Any = (), before: Any = (), **settings: Any):
    """The history of a run, its steering, and the smallest and the largest ratio that it ever took.

    The monitor shows the steering's noise, which is one step behind.
    """
    monitor, steering = GradientMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=0)
    ratios: list[float] = []

    class Extremes(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ratios.extend(steering.ratios.values())

    callbacks = [*before, monitor, steering, *others, Extremes()]
    fit(net, callbacks, data, steps=-1, max_epochs=epochs, **settings)
    return monitor.history, steering, (min(ratios), max(ratios))


def most(history: Any, tag: str) -> float:
    """The largest value of a tag, 0 where it was never known."""
    values = history[tag].values if tag in history else np.zeros(1)
    return float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0


def no_noise(history: Any) -> None:
    assert most(history, "noise/dual") < SMALL and most(history, "noise/independent") < 1e-6
    assert most(history, "noise/scale") < SMALL and most(history, "gradient/local_smoothness") < 3


@pytest.mark.parametrize("data", [equal(9), DataLoader(Stream(9), 8)], ids=["known", "unknown length"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 20])
def test_a_short_last_window(length: int, data: Any) -> None:
    history, steering, _ = watched(Net(), data, accumulate_grad_batches=length)
    no_noise(history)
    norm = history["gradient/norm"].values
    short = 9 % length or length if length <= 9 else 9
    np.testing.assert_allclose(norm.min() / norm.max(), min(short, length) / length if length <= 9 else 1, rtol=0.03)
    assert set(steering.ratios.values()) == {1.0}
    assert length in (4, 7) or np.isfinite(history["noise/dual"].values[-1]).all()


def test_windows_that_alternate_are_never_compared() -> None:
    """Windows of 4 and 2 in turn: no two successive gradients are alike, and only whole windows have halves."""
    history, steering, _ = watched(Net(), equal(6), accumulate_grad_batches=4)
    assert "noise/dual" not in history and "gradient/cosine" not in history
    known = np.isfinite(history["noise/independent"].values).all(1)
    assert list(known) == [True, False] * 4 and most(history, "noise/independent") < 1e-6
    assert set(steering.ratios.values()) == {1.0}


def test_a_scheduler_changes_the_length() -> None:
    """From 1 to 2 to 4 batches: noise by halves begins with the second, and starts anew with each."""
    history, _, _ = watched(Net(), equal(8), 9, [GradientAccumulationScheduler({0: 1, 3: 2, 6: 4})])
    no_noise(history)
    known = history["noise/independent"]
    assert known.steps[np.isfinite(known.values).all(1)][0] == 24
    assert set(history["noise/scale"].steps) == set(known.steps[np.isfinite(known.values).all(1)])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [(0,), (1,), (2, 3), (0, 5), (7,), (4, 5, 6)])
@pytest.mark.parametrize("length", [2, 4])
def test_a_skipped_pass_is_no_pass(skipped: tuple[int, ...], length: int) -> None:
    history, steering, _ = watched(Net(skipped), equal(8), accumulate_grad_batches=length)
    no_noise(history)
    assert set(steering.ratios.values()) == {1.0}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_halves_of_what_is_left_have_the_unit_of_the_window() -> None:
    """Of three passes of four, the first two are not a half: the share is counted, not read off the position."""
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(32, 8, generator=generator), torch.arange(32) % 3), 8)
    net, seen = Net((3,)), []

    class PerBatch(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            seen.append([p.grad.double().clone() for p in pl_module.parameters()])

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    fit(net, [monitor, PerBatch()], data, steps=1, accumulate_grad_batches=4)
    assert len(seen) == 3
    factor = (2 / (2 / 3 * 1 / 3)) ** 0.5
    expected = [factor * float((part - 2 / 3 * whole).norm()) for part, whole in zip(seen[1], seen[2], strict=True)]
    np.testing.assert_allclose(monitor.history["noise/independent"].values[0], expected, rtol=1e-4)


def test_a_smaller_last_batch() -> None:
    """Of 8, 8 and 3 samples only the gradients of eight are compared with each other."""
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(19, 8, generator=generator), torch.arange(19) % 3), 8)
    monitor = GradientMonitor(every_n_steps=1, strict=True)
    fit(Net(), [monitor], data, steps=-1, max_epochs=4)
    history = monitor.history
    assert list(history["noise/dual"].steps) == list(history["gradient/cosine"].steps) == [1, 4, 7, 10]


def clip(net: pl.LightningModule, *_: Any) -> None:
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if gradients:
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)


def scale_one(net: pl.LightningModule, *_: Any) -> None:
    if net.net[2].bias.grad is not None:
        net.net[2].bias.grad.mul_(0.5)


def replace(net: pl.LightningModule, *_: Any) -> None:
    for p in net.parameters():
        p.grad = None if p.grad is None else p.grad * 0.5


def zero(net: pl.LightningModule, *_: Any) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad.zero_()


def forget(net: pl.LightningModule, *_: Any) -> None:
    net.zero_grad()


class Hooked(Callback):
    """Changes gradients in a hook of a callback, or of the module through it."""

    def __init__(self, hook: str, change: Any) -> None:
        setattr(self, hook, lambda trainer, module, *rest: change(module))


CHANGES = {f.__name__: f for f in (clip, scale_one, replace, zero, forget)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [2, 3])
def test_gradients_that_were_changed_in_mid_window_have_no_halves(change: str, length: int) -> None:
    """At the start of ``training_step``, which is between two backward passes."""
    history, steering, _ = watched(Net(meddle=CHANGES[change]), equal(6), accumulate_grad_batches=length)
    no_noise(history)
    assert set(steering.ratios.values()) == {1.0}


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_before_backward",
                                  "on_after_backward", "on_before_optimizer_step"])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_wherever_it_happens(hook: str, first: bool) -> None:
    meddler = [Hooked(hook, clip)]
    settings = {"before" if first else "others": meddler}
    history, _, _ = watched(Net(), equal(6), accumulate_grad_batches=2, **settings)
    no_noise(history)


@pytest.mark.parametrize("kind", ["tensor", "post accumulate"])
def test_hooks_on_parameters(kind: str) -> None:
    """A hook on what a pass gives is part of that pass; one on what has been accumulated so far is not."""
    net = Net()
    for p in net.parameters():
        if kind == "tensor":
            p.register_hook(lambda g: g / g.norm())
        else:
            p.register_post_accumulate_grad_hook(lambda p: None if p.grad.div_(p.grad.norm()) is None else None)
    history, _, _ = watched(net, equal(6), accumulate_grad_batches=2)
    assert most(history, "noise/independent") < 1e-6
    assert np.isfinite(history["noise/independent"].values).all() == (kind == "tensor")


def test_a_window_that_was_changed_once_is_not_compared_with_the_others() -> None:
    def once(net: pl.LightningModule, batch_idx: int) -> None:
        if batch_idx == 3:
            clip(net)

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    fit(Net(meddle=once), [monitor], equal(8), steps=-1, max_epochs=2, accumulate_grad_batches=2)
    no_noise(monitor.history)
    assert list(monitor.history["noise/dual"].steps) == [3, 4, 7]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_keeps_its_halves(precision: str) -> None:
    """Unscaling writes to the gradients too, and is no change; what rounds is not steered by."""
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    history, steering, _ = watched(Net(), equal(8), accumulate_grad_batches=2, **settings)
    assert np.isfinite(history["noise/independent"].values).all() and most(history, "noise/independent") < 0.02
    assert set(steering.ratios.values()) == {1.0}


class ByHand(Net):
    """Accumulates over four batches by hand; what is left at the end of an epoch makes a short window."""

    def __init__(self, flush: bool, to_none: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.flush, self.to_none = False, flush, to_none

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 4 == 0:
            optimizer.zero_grad(set_to_none=self.to_none)
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]) / 4)
        if batch_idx % 4 == 3 or self.flush and batch_idx == 8:
            optimizer.step()


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_windows_by_hand(flush: bool, to_none: bool) -> None:
    history, steering, _ = watched(ByHand(flush, to_none), equal(9))
    no_noise(history)
    assert most(history, "noise/dual") > 0
    assert set(steering.ratios.values()) == {1.0}


class Two(Net):
    """Two optimizers by hand, the second steps at every second batch only, over two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        if batch_idx % 2 == 0:
            second.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        first.step()
        if batch_idx % 2 or batch_idx == 4:
            second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.net[0], self.net[2])]


def test_two_optimizers_with_windows_of_their_own() -> None:
    """Five batches: the second optimizer's last window holds one pass instead of two."""
    history, steering, _ = watched(Two(), equal(5))
    assert most(history, "noise/dual") < 4 * SMALL and most(history, "gradient/local_smoothness") < 6
    assert set(steering.ratios.values()) == {1.0}


def test_limits_and_overfitting() -> None:
    for settings in ({"limit_train_batches": 5}, {"overfit_batches": 3}):
        history, steering, _ = watched(Net(), equal(9), accumulate_grad_batches=4, **settings)
        no_noise(history)
        assert set(steering.ratios.values()) == {1.0}


@pytest.mark.filterwarnings("ignore:.*mid-epoch.*", "ignore:Be aware that when using `ckpt_path`")
def test_a_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The readings are those of the run that never stopped, also at the first step after it."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole, again = ([GradientMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)] for _ in range(2))
    arguments: dict[str, Any] = {"steps": -1, "max_epochs": 2, "accumulate_grad_batches": 4}
    fit(Net(), [*whole, save], equal(22), enable_checkpointing=True, **arguments)
    fit(Net(), again, equal(22), ckpt_path=tmp_path / "step=4.ckpt", **arguments)
    for tag in ("noise/dual", "noise/independent", "gradient/cosine", "noise/scale"):
        first, second = whole[0].history[tag], again[0].history[tag]
        late = first.steps >= 4
        assert late.any() and list(first.steps[late]) == list(second.steps)
        np.testing.assert_array_equal(first.values[late], second.values)
    assert whole[1].ratios == again[1].ratios


def test_one_tag_has_one_meaning() -> None:
    """The noise scale rests on halves in every row, or is left out: it never goes over to successive gradients."""
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(72, 8, generator=generator), torch.arange(72) % 3), 8)
    history, _, _ = watched(Net(), data, accumulate_grad_batches=4)
    halves = history["noise/independent"]
    known = halves.steps[np.isfinite(halves.values).all(1)]
    assert list(history["noise/scale"].steps) == list(history["noise/snr"].steps) == list(known)
    assert list(known) == [0, 1, 3, 4, 6, 7, 9, 10]


# Averages that outlive their data


class Freezing(Net):
    """The first layer is trained from some step on, and to another."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        self.begin, self.end = begin, end

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(self.begin <= self.global_step < self.end)


def noisy(count: int = 64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(count, 8, generator=generator), torch.arange(count) % 3), 8)


def test_a_layer_that_is_frozen_in_mid_run() -> None:
    """What is left is alone in its role and keeps the base rate, as where the layer was frozen from the start."""
    history, steering, (least, _) = watched(Freezing(0, 20), noisy(), 5)
    noise = history["noise/dual"]
    assert np.isfinite(noise.values[noise.steps < 20]).all() and np.isnan(noise.values[noise.steps >= 20, :2]).all()
    assert np.isfinite(noise.values[:, 2:]).all()
    assert set(steering.ratios.values()) == {1.0} and least < 0.9


def test_a_layer_that_thaws_begins_anew() -> None:
    class Pause(Freezing):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(not 10 <= self.global_step < 20)

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    seen: list[list[torch.Tensor]] = []
    look = Hooked("on_before_optimizer_step", lambda m: seen.append([p.grad.clone() for p in m.net[0].parameters()
                                                                      if p.grad is not None]))  # fmt: skip
    fit(Pause(0, 0), [monitor, look], noisy(), steps=22, max_epochs=-1)
    noise = monitor.history["noise/dual"]
    first = noise.values[noise.steps == 21, 0]
    change = float((seen[21][0] - seen[20][0]).abs().sum())
    np.testing.assert_allclose(first, change, rtol=1e-4)
    assert np.isnan(noise.values[(noise.steps > 9) & (noise.steps < 21), 0]).all()


class Rare(Net):
    """The first layer gets gradients at first only, without anybody having frozen it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        hidden = self.net[0](batch[0])
        return cross_entropy(self.net[1:](hidden if self.global_step < 20 else hidden.detach()), batch[1])


def test_a_layer_that_gets_no_gradient_any_more() -> None:
    history, steering, (least, _) = watched(Rare(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)), noisy(), 12)
    noise = history["noise/dual"]
    assert np.isnan(noise.values[noise.steps >= 20, :2]).all() and np.isfinite(noise.values[:, 2:]).all()
    assert set(steering.ratios.values()) == {1.0} and least < 0.9


# Where there is no noise, the noise rule steers nothing


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.3), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: torch.optim.SGD(p, lr=1e-7),
], ids=["SGD", "momentum", "AdamW", "rounding"])  # fmt: skip
def test_full_batch_training_is_not_steered(optimizer: Any) -> None:
    x, y = one_batch(32)
    _, steering, _ = watched(Net(optimizer=optimizer), DataLoader(TensorDataset(x, y), 32), 60)
    assert set(steering.ratios.values()) == {1.0}


def test_noise_is_steered_by() -> None:
    _, steering, _ = watched(Net(optimizer=lambda p: torch.optim.SGD(p, lr=0.05)), noisy(), 5)
    assert min(steering.ratios.values()) < 0.9


def test_a_plain_loop_can_say_what_its_windows_are() -> None:
    """Windows of four passes and of one: with them said, the rule never sees the difference."""
    ratios = []
    for says in (True, False):
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), net, lag=0)
        x, y = one_batch()
        for step in range(24):
            passes = 1 if step % 3 == 2 else 4
            optimizer.zero_grad()
            for _ in range(passes):
                (cross_entropy(net.net(x), y) / 4).backward()
            rates.observe(window=Window(passes, 4) if says else None)
            optimizer.step()
        ratios.append(copy.copy(rates.ratios))
    assert set(ratios[0].values()) == {1.0} and min(ratios[1].values()) < 0.9


def _series(samples: Any) -> Any:
    """Time before samples."""
    x = torch.stack([x for x, _ in samples])
    return x.repeat(4, 1, 1), torch.stack([y for _, y in samples])


def _token_series(samples: Any) -> Any:
    """The same, and the labels too, as a language model has them."""
    x, y = _series(samples)
    return [x, y.repeat(4, 1)]


def _images(samples: Any) -> Any:
    """Lists of one tensor and of one dictionary a sample, as detection has them."""
    boxes = [{"class": y, "boxes": torch.zeros(i + 1, 4)} for i, (_, y) in enumerate(samples)]
    return [x.repeat(3, 1) for x, _ in samples], boxes


def _weighted(samples: Any) -> Any:
    """With weights of the classes, which are no samples."""
    x, y = _series(samples)
    return {"x": x[0], "y": y, "weights": torch.ones(3)}


class Summed(Net):
    """A loss that is the sum over the samples of whatever batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            x, y = batch["x"], batch["y"]
        elif isinstance(batch[1][0], dict):
            x, y = torch.stack(list(batch[0])).mean(1), torch.stack([one["class"] for one in batch[1]])
        else:
            x, y = batch[0].mean(0), batch[1] if batch[1].ndim == 1 else batch[1][0]
        return cross_entropy(self.net(x), y, reduction="sum")


@pytest.mark.parametrize(
    "collate, is_ready",
    [(_series, False), (_token_series, False), (_images, False), (_weighted, False), (_series, True), (_images, True)],
)
def test_a_smaller_last_batch_of_any_shape_is_no_noise(collate: Any, is_ready: bool) -> None:
    """All samples are the same one: only a sum over fewer of them differs; loaders of ready-made batches too."""
    x, y = one_batch()
    samples = [(x[0], y[0])] * 35
    data: Any = DataLoader(samples, 8, collate_fn=collate)
    if is_ready:
        data = DataLoader([collate(samples[i : i + 8]) for i in range(0, 35, 8)], batch_size=None)
    history, _, ratios = watched(Summed(optimizer=lambda p: torch.optim.SGD(p, lr=1e-6)), data)
    assert set(history["gradient/cosine"].steps % 5) == {1, 2, 3}
    assert np.nanmax(history["noise/dual"].values) < SMALL and ratios == (1, 1)


def test_the_number_of_nodes_of_graphs_is_none_of_samples() -> None:
    """Four graphs in every batch, of other numbers of nodes each time: all batches may be compared."""

    class Graphs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = torch.zeros(4, 8).index_add(0, batch["graph"], batch["x"])
            return cross_entropy(self.net(x), batch["y"])

    def graphs(count: int) -> Any:
        return {"x": torch.randn(count, 8), "graph": torch.arange(count) % 4, "y": torch.arange(4) % 3}

    monitor = GradientMonitor(every_n_steps=1, strict=True)
    data = DataLoader([graphs(count) for count in (9, 12, 7, 10, 11, 14)], batch_size=None)
    fit(Graphs(), [monitor], data, steps=6)
    assert monitor.history["gradient/cosine"].steps.tolist() == [1, 2, 3, 4, 5]


class Thawing(Net):
    """The first layer is not trained from step 3 to 5, and gradients are set to zero and not to None."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(not 3 <= self.trainer.global_step < 6)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_zeros_in_the_place_of_a_gradient_are_none(length: int, clip: float | None) -> None:
    """Equal batches: what a layer has left while it is frozen is no gradient, and the first one after it no noise."""
    monitor, steering = GradientMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=0)
    fit(Thawing(), [monitor], equal(12 * length), accumulate_grad_batches=length, steps=12, gradient_clip_val=clip)
    history = monitor.history
    frozen = np.isnan(history["gradient/l2"].values)
    assert frozen[3:6, :2].all() and frozen.sum() == 6
    noise, smoothness = history["noise/dual"], history["gradient/local_smoothness"].values
    assert np.nanmax(noise.values) < SMALL and np.isfinite(noise.values[noise.steps > 6]).all()
    assert np.nanmax(smoothness) < 3 and np.isnan(smoothness[2:6, :2]).all()
    assert history["gradient/norm_clipped"].steps.tolist() == list(range(12))
    fit(Thawing(), [steering], equal(12 * length), accumulate_grad_batches=length, steps=12, gradient_clip_val=clip)
    assert set(steering.ratios.values()) == {1.0}


def test_frozen_between_two_readings() -> None:
    """At every second step is read, and what is kept for it in between is of what is trained."""
    monitor = GradientMonitor(every_n_steps=2, strict=True)
    fit(Thawing(), [monitor], equal(12), steps=12)
    assert np.nanmax(monitor.history["noise/dual"].values) < SMALL


# Several processes decide alike


def _noise_of(callback: Any) -> Any:
    return lambda module: [rates.rule.state_dict()["noise"] for rates in callback._steered.values()]


@pytest.mark.processes
@pytest.mark.parametrize("monitored", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2])
def test_processes_with_batches_of_different_sizes_decide_alike(monitored: int, length: int) -> None:
    """The first process has eight samples in every batch, the second four in the last of an epoch."""
    steering = NoiseAdaptiveLR(warmup=1)
    monitors = [GradientMonitor(every_n_steps=monitored, strict=True)] if monitored else []
    ranks = fit_in_processes(lambda: Classifier(mlp().double(), lambda p: torch.optim.SGD(p, lr=0.05)),
                      [*monitors, steering], more=_noise_of(steering), data=loader(16, 92, bounds=[8]), steps=18,
                      accumulate_grad_batches=length)  # fmt: skip
    first, second = ranks
    assert first["ratios"] == second["ratios"] and first["more"] == second["more"]
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    # Of windows of two one pair an epoch is compared, always of the same batches: a change that repeats is no noise.
    assert (min(first["ratios"][-1].values()) < 1) == (length == 1)
    if monitored == 1:
        steps = 6 // length  # in an epoch: the last one's window is like neither of its neighbours
        seen = {step % steps for step in first["tables"]["gradient/cosine"]["steps"]}
        assert seen == set(range(1, steps - 1))


# What is not known of a change is not that it is none


class Broken(Net):
    """The gradient of some steps is not finite, and the module puts zeros in its place."""

    def __init__(self, broken: Any) -> None:
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.broken = broken

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.broken(self.trainer.global_step) else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


class Branched(Net):
    """A branch has a gradient at two steps of four, and no influence on those of the rest."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.branch = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-3 * self.branch(batch[0]).square().mean() if batch_idx % 4 < 2 else loss


@pytest.mark.parametrize(
    "make", [lambda: Broken(lambda step: step == 5), lambda: Broken(lambda step: step % 3 == 2), Branched]
)
def test_changes_that_go_on_are_followed_across_gaps(make: Any) -> None:
    """Full-batch training is not steered either where a gradient is not finite, or layers come and go."""
    steering = NoiseAdaptiveLR(warmup=0)
    fit(make(), [steering], equal(40), steps=40)
    assert set(steering.ratios.values()) == {1.0}
