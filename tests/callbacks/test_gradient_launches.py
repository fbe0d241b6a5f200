"""Calls of the device, and waits for it, that reading gradients adds to training steps."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dynamon.callbacks import GradientMonitor, NoiseAdaptiveLR
from dynamon.monitoring import gradient_meter
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.readings import PendingReadings
from tests.helpers import Classifier, batches, fit, mlp
from tests.launches import Launches, gpt2, pretended

EVERY, STEPS = 4, 10


class LanguageModel(pl.LightningModule):
    """148 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.network = gpt2("cpu", scale=48)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, foreach=True)


class Begin(pl.Callback):
    """Each batch is counted from zero."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches

    def on_train_batch_start(self, *_: Any) -> None:
        self.launches.reset()


class End(Begin):
    """Keeps what was counted."""

    def __init__(self, launches: Launches) -> None:
        super().__init__(launches)
        self.calls: list[Counter[str]] = []
        self.waits: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls.append(self.launches.calls.copy())
        self.waits.append(self.launches.waits)


def counted(callbacks: list[Any]) -> End:
    launches = Launches()
    end = End(launches)
    data = DataLoader(torch.randint(1000, (4 * STEPS, 9)), batch_size=4)
    with pretended(launches), launches:
        fit(LanguageModel(), [Begin(launches), *callbacks, end], data, steps=STEPS)
    return end


@pytest.fixture(scope="module")
def plain() -> End:
    return counted([])


def added(found: End, plain: End) -> list[int]:
    return [(one - other).total() for one, other in zip(found.calls, plain.calls, strict=True)]


def test_a_monitor_s_reading_and_steps_that_measure_nothing(plain: End) -> None:
    found = counted([GradientMonitor(every_n_steps=EVERY)])
    calls = added(found, plain)
    for step in range(1, STEPS):
        if step % EVERY == 0:
            assert calls[step] <= 30, found.calls[step] - plain.calls[step]
            assert found.waits[step] - plain.waits[step] <= 1
        elif step % EVERY == EVERY - 1:  # keeps gradients and weights for the next
            assert calls[step] <= 2 and found.waits[step] == plain.waits[step]
        else:
            assert calls[step] == 0 and found.waits[step] == plain.waits[step]


def test_what_steering_reads_at_each_step(plain: End) -> None:
    found = counted([NoiseAdaptiveLR()])
    assert max(added(found, plain)) <= 40
    assert found.waits == plain.waits


class InStep(pl.Callback):
    """Knows whether a step is being taken."""

    inside = False

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.inside = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.inside = False


@pytest.mark.parametrize("steers", [False, True])
def test_nothing_is_waited_for_between_the_gradients_and_the_end_of_the_batch(steers: bool, monkeypatch: Any) -> None:
    watch, seen, wait = InStep(), [], PendingReadings.wait

    def watched(self: PendingReadings) -> Any:
        seen.append(watch.inside)
        return wait(self)

    monkeypatch.setattr(PendingReadings, "wait", watched)
    monitor = GradientMonitor(every_n_steps=2, strict=True)
    steering = [NoiseAdaptiveLR()] if steers else []
    fit(Classifier(mlp()), [watch, *steering, monitor], batches(), steps=8)
    assert not any(seen[: None if not steers else 0]) and len(seen) >= 4
    assert len(monitor.history["gradient/norm"]) >= 4


def test_a_state_saved_in_mid_step_holds_what_was_read() -> None:
    """Whoever asks for a state before the batch ends gets the noise of this step's reading too."""

    class Saves(pl.Callback):
        def __init__(self, monitor: GradientMonitor, in_step: bool) -> None:
            self.monitor, self.in_step, self.states = monitor, in_step, []

        def on_train_batch_end(self, *_: Any) -> None:
            if not self.in_step:
                self.save()

        def optimizer_step_begins(self, *_: Any) -> None:
            if self.in_step:
                self.save()

        def save(self) -> None:
            (meter,) = self.monitor._meters
            self.states.append(meter.state_dict()["noise"])

    found = []
    for in_step in (True, False):
        monitor = GradientMonitor(every_n_steps=2, strict=True)
        saves = Saves(monitor, in_step)
        module = Classifier(mlp())
        module.optimizer_step = lambda *a, m=module, s=saves, **k: (  # type: ignore[method-assign]
            pl.LightningModule.optimizer_step(m, *a, **k),
            s.optimizer_step_begins(),
        )
        fit(module, [monitor, saves], batches(), steps=8)
        found.append(saves.states)
    assert found[0] == found[1] and found[0][-1]


def test_what_is_launched_is_compiled_before_the_first_batch(monkeypatch: Any) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gradient_meter, "warm_up", lambda device, dtypes: seen.append(f"{device} {set(dtypes)}"))
    monkeypatch.setattr(GradientReader, "warm_up", lambda self: seen.append("steering"))

    class First(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append("batch")

    fit(Classifier(mlp()), [First(), NoiseAdaptiveLR(), GradientMonitor(every_n_steps=2)], batches(), steps=2)
    assert sorted(seen[:2]) == ["cpu {torch.float32}", "steering"] and seen[2:] == ["batch", "batch"]
