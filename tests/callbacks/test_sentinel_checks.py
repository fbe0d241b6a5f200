"""The sentinel: steps that are only checked, and looked at where the check says so."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import DynamicsMonitor
from dynamon.monitoring import DynamicsMonitor as PlainMonitor
from dynamon.monitoring.sentinel import Sentinel
from dynamon.monitoring.sentinel_judge import StepJudge
from dynamon.monitoring.sentinel_norms import StepRow
from dynamon.monitoring.sentinel_pace import Pace
from tests.callbacks.test_sentinel import OPTIMIZERS, Unusual
from tests.helpers import Classifier, batches, fit, same_weights
from tests.spiky import OneOfFour, Spiky, found, relu

pytestmark = pytest.mark.filterwarnings(
    "ignore:DynamicsMonitor", "ignore:step .* the gradient holds", "ignore:sharpness is off"
)
HOW: dict[str, Any] = {"quantities": ["critical"], "strict": True}
STEPS: dict[str, Any] = {"steps": 120, "max_epochs": -1}
AT = (53, 77, 101)


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the 40th step on hardly a step is looked at, and each is checked."""

    def review(pace: Pace, steps: int) -> bool:
        pace.every = [1, 500, 500, 500] if steps >= 40 else [1, 1, 1, 1]
        return False

    monkeypatch.setattr(Pace, "review", review)


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Numbers are there at once, or two steps later as on a GPU."""
    if request.param == "device":
        batches_over, sent = [0], dict[StepRow, int]()
        judge, send = Sentinel._judge_arrived, StepRow.send

        def judge_later(sentinel: Sentinel, run: Any) -> None:
            batches_over[0] += 1
            judge(sentinel, run)

        def send_noted(row: StepRow, *arguments: Any) -> None:
            sent[row] = batches_over[0]
            send(row, *arguments)

        monkeypatch.setattr(Sentinel, "_is_on_host", False)
        monkeypatch.setattr(Sentinel, "_judge_arrived", judge_later)
        monkeypatch.setattr(StepRow, "send", send_noted)
        monkeypatch.setattr(StepRow, "has_arrived", property(lambda row: batches_over[0] > sent[row] + 2))
    return request.param


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are judged from now on."""
    steps: list[int] = []
    judge = StepJudge._judge
    monkeypatch.setattr(
        StepJudge, "_judge", lambda self, look, taken: (steps.append(look.step), judge(self, look, taken))[1]
    )
    return steps


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_spikes_are_found_at_steps_that_are_only_checked(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their batches and layers; few other steps are looked at."""
    steps = looked_at(monkeypatch)
    module, monitor = Spiky(relu(), OPTIMIZERS[name], at=AT), DynamicsMonitor(**HOW)
    fit(module, [monitor], gradient_clip_val=1e-3, **STEPS)
    assert found(monitor) == list(AT) and monitor.failures == 0
    assert monitor.history["spike/batch"].values.tolist() == [at % 8 for at in AT]
    assert "spike/fingerprint" in monitor.history and "spike/lasted" in monitor.history
    gradient = monitor.history["spike/gradient"]
    assert all(gradient.values[gradient.steps == at][0] > 7 for at in AT)
    assert set(AT) <= set(steps) and len(steps) < 90


@pytest.mark.usefixtures("rarely")
def test_a_loss_alone_is_found(where: str) -> None:
    """Its gradients are as ever: a constant was added."""

    class Higher(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + (20 if self.trainer.fit_loop.epoch_loop._batches_that_stepped in AT else 0)

    monitor = DynamicsMonitor(**HOW)
    fit(Higher(relu(), OPTIMIZERS["adamw"]), [monitor], **STEPS)
    assert found(monitor) == list(AT)
    last = [finding for finding in monitor.findings if finding.rule == "spike/deviation"][-1]
    assert last.layers == () and "the loss was" in last.message


@pytest.mark.usefixtures("rarely")
def test_a_loss_that_stays_up_is_found(where: str) -> None:
    class Higher(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            return super().training_step(batch, batch_idx) * (1.3 if step >= 80 else 1.0)

    monitor = DynamicsMonitor(**HOW)
    fit(Higher(relu(), OPTIMIZERS["sgd"]), [monitor], steps=160, max_epochs=-1)
    (shift,) = [f for f in monitor.findings if f.rule == "spike/shift"]
    assert abs(shift.step - 80) <= 2


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_once(value: float, where: str) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (value if self.trainer.fit_loop.epoch_loop._batches_that_stepped >= 60 else 1.0)

    monitor = DynamicsMonitor(quantities=["critical"])  # which cannot be measured of such updates
    fit(Broken(relu(), OPTIMIZERS["sgd"]), [monitor], **STEPS)
    assert found(monitor) == [60]


@pytest.mark.usefixtures("rarely")
def test_of_a_window_any_batch(where: str) -> None:
    monitor = DynamicsMonitor(**HOW)
    fit(OneOfFour(relu(), OPTIMIZERS["adamw"]), [monitor], steps=60, max_epochs=-1, accumulate_grad_batches=4)
    assert found(monitor) == [50] and monitor.failures == 0


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize(("scale", "every", "at"), [(2.0**60, 3, ()), (4.0, 10, (50,))])
def test_the_scale_of_a_scaler_is_no_spike(scale: float, every: int, at: tuple[int, ...], where: str) -> None:
    """One overflows every few steps, one grows all the time."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=every)
    module, monitor = Spiky(relu(), OPTIMIZERS["adamw"], at=at, times=100.0), DynamicsMonitor(**HOW)
    fit(module, [monitor], steps=60, max_epochs=-1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert found(monitor) == list(at) and monitor.failures == 0


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("announces", [True, False])
def test_a_loop_of_your_own(announces: bool, where: str) -> None:
    torch.manual_seed(0)
    model = relu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    monitor = PlainMonitor(**HOW)
    watch = dynamon.Watch(model, optimizer, lambda m, b: cross_entropy(m(b[0]), b[1]), monitors=[monitor])
    for epoch in range(8):
        for index, batch in enumerate(batches()):
            with watch.batch(batch) as this:
                loss = cross_entropy(model(batch[0] * (1000 if (epoch, index) == (6, 3) else 1)), batch[1])
                loss.backward()
                if announces:
                    watch.before_clipping()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()
                this.loss = loss
    watch.close()
    assert found(monitor)[0] == 51 and monitor.failures == 0  # without clipping the model is another one now


@pytest.mark.usefixtures("rarely")
def test_parameters_of_all_kinds(where: str) -> None:
    monitor = DynamicsMonitor(**HOW)
    fit(Spiky(Unusual(), lambda p: torch.optim.SGD(p, lr=0.01), at=(50,)), [monitor], steps=60, max_epochs=-1)
    assert found(monitor) == [50] and monitor.failures == 0


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, where: str) -> None:
    module = Spiky(relu().to(dtype), OPTIMIZERS["sgd"], at=AT)
    module.training_step = lambda batch, index, step=module.training_step: step((batch[0].to(dtype), batch[1]), index)
    monitor = DynamicsMonitor(**HOW)
    fit(module, [monitor], gradient_clip_val=1e-3, **STEPS)
    assert found(monitor) == list(AT)


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("name", ["sgd", "adamw", "fused", "lanton"])
def test_training_is_bitwise_as_without(name: str, where: str) -> None:
    make: Callable[[], Spiky] = lambda: Spiky(nn.Sequential(relu(), nn.Dropout(0.1)), OPTIMIZERS[name], at=AT)  # noqa: E731
    plain, watched = make(), make()
    fit(plain, [], **STEPS)
    monitor = DynamicsMonitor(**HOW)
    fit(watched, [monitor], **STEPS)
    assert same_weights(plain, watched) and AT[0] in found(monitor)


@pytest.mark.usefixtures("rarely")
def test_a_healthy_run_is_hardly_looked_at(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = looked_at(monkeypatch)
    monitor = DynamicsMonitor(**HOW)
    fit(Classifier(relu(), OPTIMIZERS["adamw"]), [monitor], steps=1000, max_epochs=-1)
    assert found(monitor) == [] and len(steps) < 70
    assert np.isfinite(monitor.history["spike/deviation"].values).all()


@pytest.mark.usefixtures("rarely")
@pytest.mark.parametrize("length", [1, 8, 12, 30])
def test_a_long_spike_has_its_length_and_hides_no_other(length: int, where: str) -> None:
    class Long(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            return super().training_step(batch, batch_idx) * (50 if 60 <= step < 60 + length or step == 130 else 1)

    monitor = DynamicsMonitor(**HOW)
    fit(Long(relu(), OPTIMIZERS["sgd"]), [monitor], steps=150, max_epochs=-1, gradient_clip_val=1e-3)
    assert found(monitor) == [60, 130]
    assert monitor.history["spike/lasted"].values.tolist() == [length, 1]


@pytest.mark.usefixtures("rarely")
def test_layers_that_come_and_go(where: str) -> None:
    """Each is left out of half of the steps, and once no gradient is more than zero."""

    class Dropped(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            x = torch.relu(self.network[0](batch[0]))
            generator = torch.Generator().manual_seed(step)
            for layer in self.network[1:-1]:
                if torch.rand((), generator=generator) < 0.5:
                    x = x + torch.relu(layer(x))
            loss = cross_entropy(self.network[-1](x), batch[1])
            return loss * (0.0 if step == 20 else 1000.0 if step in AT else 1.0)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), *(nn.Linear(16, 16) for _ in range(6)), nn.Linear(16, 3))
    monitor = DynamicsMonitor(**HOW)
    fit(Dropped(network, OPTIMIZERS["sgd"]), [monitor], gradient_clip_val=1e-3, **STEPS)
    assert found(monitor) == list(AT)


def test_optimizers_that_take_turns_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """At an even number of steps from look to look."""
    monkeypatch.setattr(Pace, "review", lambda self, steps: setattr(self, "every", [1, 6, 6, 6]) or False)
    looked = Counter[int]()
    judge = StepJudge._judge

    def count(self: StepJudge, look: Any, taken: Any) -> bool:
        looked.update(at for at, _ in taken)
        return judge(self, look, taken)

    class Turns(Classifier):
        def __init__(self) -> None:
            super().__init__(relu())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.network[0], self.network[2])]

    monkeypatch.setattr(StepJudge, "_judge", count)
    fit(Turns(), [DynamicsMonitor(**HOW)], steps=200, max_epochs=-1)
    assert min(looked[0], looked[1]) > 10
