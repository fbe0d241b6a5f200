"""The sentinel: batches that nothing else shows, shifts of the loss, and what it looks at how often."""

import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor
from dynamon.layers import describe_layers
from dynamon.monitoring.fingerprint import fingerprint
from dynamon.monitoring.sentinel import Sentinel
from dynamon.monitoring.sentinel_norms import StepNumbers
from dynamon.monitoring.sentinel_pace import Pace
from dynamon.monitoring.sentinel_tracker import StepTracker
from tests.helpers import Classifier, batches, fit
from tests.spiky import QUIET, Spiky, found, relu

pytestmark = pytest.mark.filterwarnings(
    "ignore:DynamicsMonitor. .*spike", "ignore:sharpness is off", "ignore:The dirpath has changed"
)
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


class Odd(pl.LightningModule):
    """A network with BatchNorm behind its inputs, which takes their size away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def odd_batches(at: int, change: Callable[[Tensor], Tensor], count: int = 120) -> Any:
    """Batches of which one is changed."""
    data = [batch for _ in range(count // 8) for batch in batches()]
    data[at] = [change(data[at][0]), data[at][1]]
    return torch.utils.data.DataLoader(data, batch_size=None)


ODD = {
    r"are [4-9]\d.* times as large as usual": lambda x: x * 64,
    "times as much as usual: samples, or entries of each, are alike": lambda x: x[:1].expand_as(x).clone(),
}


@pytest.mark.parametrize("words", ODD)
def test_a_batch_that_nothing_else_shows_is_a_spike(words: str) -> None:
    monitor = DynamicsMonitor(**QUIET)
    with pytest.warns(UserWarning, match="Step 100 is a spike: .*the batch's inputs"):
        fit(Odd(), [monitor], odd_batches(100, ODD[words]), steps=115, max_epochs=-1)
    assert found(monitor) == [100]
    (finding,) = [f for f in monitor.findings if f.rule == "spike/deviation"]
    assert (
        re.search(words, finding.message)
        and "batch 100 of its epoch" in finding.message
        and finding.severity == "warning"
    )
    assert "running statistics" in finding.advice


def test_of_a_window_the_batch_that_is_unusual_is_named() -> None:
    """Its loss is like that of the others."""
    monitor = DynamicsMonitor(**QUIET)
    data = odd_batches(100, lambda x: x * 64)
    fit(Odd(), [monitor], data, steps=30, max_epochs=-1, accumulate_grad_batches=4)
    assert found(monitor) == [25] and monitor.history["spike/batch"].values.tolist() == [100]
    code = int(monitor.history["spike/fingerprint"].values[0])
    assert [i for i, batch in enumerate(data) if fingerprint(batch) == code] == [100]


class Shifted(Classifier):
    """From a step on the loss is larger, by less than a spike."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        return super().training_step(batch, batch_idx) * (1.3 if 100 <= step < 130 else 1)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_shift_of_the_loss_is_told_with_its_step_and_its_end(resumes: bool, tmp_path) -> None:
    """Also where the run is interrupted in the middle of it."""
    make = lambda: Shifted(relu(), OPTIMIZERS["sgd"])  # noqa: E731
    monitor = DynamicsMonitor(**QUIET)
    if resumes:
        first = DynamicsMonitor(**QUIET)
        keep = lambda name: ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=102, save_top_k=-1)  # noqa: E731
        fit(make(), [first, keep("one")], steps=102, max_epochs=-1, enable_checkpointing=True)
    path = tmp_path / "one" / "step=102.ckpt" if resumes else None
    more = [keep("two")] if resumes else []
    fit(make(), [monitor, *more], steps=150, max_epochs=-1, ckpt_path=path, enable_checkpointing=resumes)
    (finding,) = [f for f in monitor.findings if f.rule == "spike/shift"]
    assert finding.step == 100 and finding.severity == "note"
    assert "From step 100 on the loss was 1.3 times as large as usual" in finding.message.replace("1.29", "1.3")
    lasted = monitor.history["spike/shift_lasted"].values.tolist()
    assert len(lasted) == 1 and 30 <= lasted[0] <= 40 and f"back after {lasted[0]:.0f} steps" in finding.message
    assert found(monitor) == []


def tracker_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> StepTracker:
    return StepTracker(optimizer, describe_layers(model))


@pytest.mark.parametrize(("before", "after", "is_told"), [(0.005, 0.5, False), (0.5, 0.5, True), (0.5, 2.0, True)])
def test_a_warm_restart_is_no_shift(before: float, after: float, is_told: bool) -> None:
    """The loss may rise where the rate goes back to a value that it has had."""
    model = relu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker, noise, told = tracker_of(optimizer, model), np.random.default_rng(0).normal(scale=0.05, size=200), []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.5 if step < 50 else before if step < 150 else after
        loss = float(np.exp(noise[step] + (0.3 if step >= 150 else 0.0)))
        judged = tracker.judge(step, StepNumbers(None, None, [loss], np.zeros(0)), 8)
        told += [] if judged.shift is None else [judged.shift.step]
    assert told == ([150] if is_told else [])


def test_a_state_from_before_batches_were_looked_at_is_taken_up() -> None:
    """Levels go on as they were, and those of the batch begin anew."""
    monitor, model = DynamicsMonitor(**QUIET), relu()
    fit(Classifier(model, OPTIMIZERS["adamw"]), [monitor], steps=40, max_epochs=-1)
    state = monitor.state_dict()["sentinel"]
    tracker = state["levels"]["0"]
    count = 2 * len(tracker["names"]) + 2
    levels = {name: value[..., :count] for name, value in tracker["levels"].items()}
    kept = {key: value for key, value in tracker.items() if key not in ("shift", "rates")}
    fresh = Sentinel(True, "it")
    fresh.load_state_dict({"levels": {"0": {**kept, "levels": levels}}, "record": state["record"]})
    taken = tracker_of(torch.optim.AdamW(model.parameters()), model)
    taken.names = tuple(tracker["names"])  # those of the module around it
    taken.load_state_dict(fresh._judge._saved["0"])
    found = taken.state_dict()["levels"]
    assert all(torch.equal(found[name][..., :count], levels[name]) for name in ("seen", "level", "scale"))
    assert levels["seen"].all() and not found["seen"][count:].any()


@pytest.mark.parametrize("every", [[1, 1, 1, 1], [1, 1, 2, 4], [2, 2, 4, 4], [1, 1, 3, 6]])
def test_what_is_cheap_is_looked_at_more_often(every: list[int], monkeypatch) -> None:
    """A spike of loss and gradient at a step at which gradients are not looked at shows in the loss."""
    monkeypatch.setattr(Pace, "begin", lambda self, step: setattr(self, "_due", [not step % k for k in every]))
    monitor = DynamicsMonitor(**QUIET)
    fit(Spiky(relu(), OPTIMIZERS["adamw"], at=(200, 241)), [monitor], steps=260, max_epochs=-1, gradient_clip_val=1e-3)
    seen = [at for at in (200, 241) if not at % every[1]]
    assert found(monitor) == seen and monitor.failures == 0
    history = monitor.history
    for at in seen:
        gradient = history["spike/gradient"]
        looked = not at % every[2]
        assert bool((gradient.values[gradient.steps == at] > 7).any()) is looked
        assert history["spike/loss"].values[history["spike/loss"].steps == at][0] > 7
