"""Progress in a run: values by a loop of its own, what serves as probe, what a checkpoint holds, where it is off."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynamon import Watch
from dynamon.callbacks import DynamicsMonitor, LayerwiseLR, SharpnessMonitor
from dynamon.monitoring import SharpnessMonitor as PlainSharpnessMonitor
from dynamon.rates import FixedRates
from tests.helpers import Classifier, batches, fit, mlp, same_weights

TAGS = ("decrease", "first_order", "curvature_cost", "overshoot")


def progress(every: int = 1, **arguments: Any) -> SharpnessMonitor:
    return SharpnessMonitor(every_n_steps=every, quantities=["progress"], **{"strict": True, **arguments})


class Diary(Callback):
    """Weights and batch at the start of every batch."""

    def __init__(self) -> None:
        self.pages: list[tuple[int, dict[str, Tensor], Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.pages.append((step, weights, [t.clone() for t in batch]))


def slopes(module: nn.Module, weights: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    own = copy.deepcopy(module.network)
    own.load_state_dict({name.removeprefix("network."): w for name, w in weights.items()})
    own.zero_grad()
    cross_entropy(own(batch[0]), batch[1]).backward()
    return {f"network.{name}": p.grad for name, p in own.named_parameters()}


def by_hand(module: nn.Module, before: Any, after: Any, batch: Any, left: float) -> tuple[np.ndarray, np.ndarray]:
    """First-order decrease and curvature cost of every layer, written out."""
    rows = []
    for weights in (before, after):
        gradient = slopes(module, weights, batch)
        rows.append([float((gradient[n] * (after[n] - left * before[n])).sum()) for n in before])
    b, a = np.array(rows)
    return -b, a - b


@pytest.mark.parametrize("every", [1, 3])
def test_values_are_those_of_a_loop_of_its_own(every: int) -> None:
    module = Classifier(mlp().double(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3))
    diary, monitor = Diary(), progress(every)
    data = batches()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    fit(module, [diary, LayerwiseLR(FixedRates({"network.0.*": 2.0})), monitor], data, steps=8)
    history = monitor.history
    assert history["progress/decrease"].steps.tolist() == [s for s in range(1, 8) if s % every == 0]
    names = list(history["progress/decrease"].layers)
    for row, step in enumerate(history["progress/decrease"].steps):
        (_, before, _), (_, after, batch) = diary.pages[step - 1 : step + 1]
        for name in names:
            left = 1 - 0.003 * (2 if name.startswith("network.0") else 1)
            first, cost = by_hand(module, before, after, batch, left)
            column = names.index(name)
            found = {tag: history[f"progress/{tag}"].values[row, column] for tag in TAGS}
            expected = list(before).index(name)
            assert found["first_order"] == pytest.approx(first[expected], rel=1e-6)
            assert found["curvature_cost"] == pytest.approx(cost[expected], rel=1e-6)
            assert found["decrease"] == pytest.approx(first[expected] - cost[expected] / 2, rel=1e-6)


def test_the_discrepancy_and_the_decay_add_up_to_the_decrease_of_the_loss() -> None:
    module = Classifier(mlp().double(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.3))
    diary, monitor = Diary(), progress()
    data = batches()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    fit(module, [diary, monitor], data, steps=6)
    history = monitor.history
    for row, step in enumerate(history["progress/discrepancy"].steps):
        (_, before, _), (_, after, batch) = diary.pages[step - 1 : step + 1]
        losses = []
        for weights in (before, after):
            own = copy.deepcopy(module.network)
            own.load_state_dict({name.removeprefix("network."): w for name, w in weights.items()})
            losses.append(float(cross_entropy(own(batch[0]), batch[1]).detach()))
        parts = [history[f"progress/{tag}"].values[row] for tag in ("total_decrease", "total_decay_decrease")]
        missed = history["progress/discrepancy"].values[row]
        assert sum(parts) - missed == pytest.approx(losses[0] - losses[1], abs=1e-12)
        assert abs(missed) < 0.01 * abs(sum(parts))


def test_under_accumulation_the_first_batch_of_the_next_window_serves() -> None:
    module = Classifier(mlp().double(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    diary, monitor = Diary(), progress()
    data = batches()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    fit(module, [diary, monitor], data, steps=3, accumulate_grad_batches=2)
    for row, step in enumerate(monitor.history["progress/decrease"].steps):
        (_, before, _), (_, after, batch) = diary.pages[2 * step - 2], diary.pages[2 * step]
        first, _ = by_hand(module, before, after, batch, 1.0)
        np.testing.assert_allclose(monitor.history["progress/first_order"].values[row], first, rtol=1e-6)


class Everything(Classifier):
    """Dropout, and every random stream in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn = random.random() + np.random.rand() + float(torch.rand(()))
        return super().training_step(batch, batch_idx)


class Streams(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].tolist()
        self.seen.append((state, batch[0].sum().item(), pl_module.drawn))


def shuffled() -> Any:
    """Batches in an order that the global random numbers decide, by a loader whose workers do."""
    from torch.utils.data import DataLoader

    return DataLoader(batches().dataset, batch_size=8, shuffle=True)


def run(monitors: list[Any], folder: Path | None = None, **arguments: Any) -> tuple[Any, Any]:
    random.seed(0)
    np.random.seed(0)
    module, streams = Everything(mlp(0.4)), Streams()
    fit(module, [*monitors, streams], shuffled(), max_epochs=-1, **{"steps": 20, **arguments})
    return module, streams.seen


def test_order_and_random_streams_of_training_are_not_touched() -> None:
    plain, seen = run([]), run([progress(2)])
    assert same_weights(plain[0], seen[0]) and plain[1] == seen[1]


def saved(folder: Path, step: int, monitor: SharpnessMonitor) -> Path:
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit(Classifier(mlp()), [monitor, save], steps=24, max_epochs=-1, enable_checkpointing=True)
    return folder / f"step={step}.ckpt"


def resumed(path: Path, monitor: SharpnessMonitor) -> SharpnessMonitor:
    fit(Classifier(mlp()), [monitor], steps=24, max_epochs=-1, ckpt_path=path)
    return monitor


def kept_in(path: Path) -> dict[str, Any]:
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (value for key, value in states.items() if key.startswith("SharpnessMonitor"))
    return state["progress"]["kept"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_shows_what_the_whole_one_does(tmp_path: Path, every: int) -> None:
    """The checkpoint of step 16 lies between a step and the next batch that is read."""
    whole = progress(every)
    path = saved(tmp_path, 16, whole)
    assert set(kept_in(path)["before"]) == {name for name, _ in Classifier(mlp()).named_parameters()}
    rest = resumed(path, progress(every))
    for tag in ("decrease", "first_order", "curvature_cost", "decay_decrease", "discrepancy"):
        one, other = whole.history[f"progress/{tag}"], rest.history[f"progress/{tag}"]
        later = one.steps >= 16
        assert one.steps[later].tolist() == other.steps.tolist() and other.steps[0] == 16
        np.testing.assert_array_equal(one.values[later], other.values)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_without_the_kept_weights_that_reading_is_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path, 16, progress(save_probe=False))
    assert kept_in(path) == {}
    rest = resumed(path, progress(save_probe=False))
    assert rest.history["progress/decrease"].steps.tolist() == list(range(17, 24))


def test_under_a_budget_no_weights_are_saved(tmp_path: Path) -> None:
    monitor = SharpnessMonitor(quantities=["progress"], budget=None)
    path = saved(tmp_path, 3, monitor)
    assert kept_in(path) == {}
    assert len(monitor.history["progress/decrease"]) >= 1


def test_the_last_step_has_no_reading() -> None:
    monitor = progress()
    fit(Classifier(mlp()), [monitor], steps=4)
    assert monitor.history["progress/decrease"].steps.tolist() == [1, 2, 3]
    assert monitor.failures == 0


def sentences(caught: Any) -> list[str]:
    return [str(one.message) for one in caught if "is off" in str(one.message)]


def told(module: Any, monitor: Any, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [monitor], steps=6, **arguments)
    return sentences(caught)


SEEN: list[int] = []


class Leaks(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        SEEN.append(batch_idx)
        return super().training_step(batch, batch_idx)


def test_effects_outside_of_the_module_switch_it_off(caplog) -> None:
    monitor = progress(strict=False)
    (said,) = told(Leaks(mlp()), monitor)
    assert said.startswith("progress is off: training_step has effects outside the module") and "SEEN" in said
    assert "progress/decrease" not in monitor.history
    both = SharpnessMonitor(every_n_steps=1, quantities=["progress", "hessian"])
    with caplog.at_level("INFO", "dynamon"):
        assert len(told(Leaks(mlp()), both)) == 1
    assert "is off for the same reason." in caplog.text
    with pytest.raises(ValueError, match="progress is off: training_step has effects"):
        fit(Leaks(mlp()), [progress()], steps=6)


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
        self.optimizers().step()


def test_manual_optimisation_needs_a_loss_function(caplog) -> None:
    """Sharpness, which cannot be measured either, warns of it."""
    with caplog.at_level("INFO", "dynamon"):
        assert len(told(ByHand(), progress())) == 1
    assert "progress is off: with manual optimisation" in caplog.text
    monitor = progress(loss_fn=lambda module, batch: cross_entropy(module.network(batch[0]), batch[1]))
    assert told(ByHand(), monitor) == []
    assert monitor.history["progress/decrease"].steps.tolist() == [1, 2, 3, 4, 5]


def test_too_little_memory_is_said() -> None:
    monitor = progress(memory_limit=1e-6)
    assert any(
        "7 copies of the weights take" in line and "Raise memory_limit" in line
        for line in told(Classifier(mlp()), monitor)
    )
    assert "progress/decrease" not in monitor.history


def test_hooks_in_the_backward_pass_are_refused() -> None:
    module = Classifier(mlp())
    module.network[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    assert any("progress is off: hooks work in the backward pass" in line for line in told(module, progress()))


def test_out_of_memory_switches_it_off_and_training_goes_on() -> None:
    def loss_fn(module: Any, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain, seen = Classifier(mlp()), Classifier(mlp())
    fit(plain, [], steps=6)
    with pytest.warns(UserWarning, match="It is off from now on: its copies of the weights do not fit"):
        fit(seen, [progress(loss_fn=loss_fn, strict=False)], steps=6)
    assert same_weights(plain, seen)


def test_a_plain_loop_shows_the_same() -> None:
    module, monitor = Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), progress()
    fit(module, [monitor], steps=7)
    network = mlp()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    loss_fn = lambda m, b: cross_entropy(m(b[0]), b[1])  # noqa: E731
    own = PlainSharpnessMonitor(every_n_steps=1, quantities=["progress"], strict=True)
    watch = Watch(network, optimizer, loss_fn, monitors=own)
    for batch in list(batches())[:7]:
        with watch.batch(batch):
            loss_fn(network, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    watch.close()
    for tag in TAGS:
        one, other = monitor.history[f"progress/{tag}"], watch.history[f"progress/{tag}"]
        assert one.steps.tolist() == other.steps.tolist()
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize("preset", ["economy", "standard", "full"])
def test_every_preset_has_it(preset: str) -> None:
    monitor = DynamicsMonitor(preset, every_n_steps=2, strict=True)
    fit(Classifier(mlp()), [monitor], steps=5)
    assert monitor.history["progress/decrease"].steps.tolist() == [2, 4]


def test_the_budget_pays_for_it() -> None:
    monitor = DynamicsMonitor(budget=0.5, strict=True)
    fit(Classifier(mlp()), [monitor], steps=120, max_epochs=-1)
    assert len(monitor.history["progress/decrease"]) >= 1
    assert monitor._budget.spent_on["progress"] > 0
