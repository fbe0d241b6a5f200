"""The sentinel: what it finds at single steps, whatever else is measured, and what it leaves alone."""

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import DynamicsMonitor
from dynamon.layers import describe_layers
from dynamon.monitoring import DynamicsMonitor as PlainMonitor
from dynamon.monitoring.fingerprint import fingerprint
from dynamon.monitoring.sentinel_inputs import sample_batch
from dynamon.monitoring.sentinel_norms import OptimizerNorms, StepRow
from dynamon.monitoring.sentinel_pace import BATCH, CHECK, GRADIENT, UPDATE, Pace
from dynamon.optim import Lanton
from tests.helpers import ByHand, Classifier, batches, fit, same_weights, trainer
from tests.launches import Launches, fill_gradients, gpt2
from tests.spiky import NEVER, QUIET, OneOfFour, Spiky, found, relu

pytestmark = pytest.mark.filterwarnings(
    "ignore:DynamicsMonitor. .*spike", "ignore:sharpness is off", "ignore:The dirpath has changed"
)
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "lanton": lambda p: Lanton(p, lr=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-3, max_iter=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_spikes_between_readings_are_found_at_their_step(name: str) -> None:
    """Two of them, of which the first does not hide the second; the batch, and which layer is farthest."""
    module, monitor = Spiky(relu(), OPTIMIZERS[name], at=(50, 70)), DynamicsMonitor(**QUIET)
    fit(module, [monitor], steps=90, max_epochs=-1, gradient_clip_val=1.0)
    history = monitor.history
    assert found(monitor) == [50, 70]
    assert history["spike/batch"].values.tolist() == [50 % 8, 70 % 8]
    data = list(batches())
    assert history["spike/fingerprint"].values.tolist() == [fingerprint(data[50 % 8]), fingerprint(data[70 % 8])]
    assert history["spike/count"].values[-1] == 2 and monitor.failures == 0
    assert ("spike/update" in history) == (name not in ("sgd", "lbfgs"))
    layers = history["spike/layer_deviation"]
    assert layers.layers == tuple(p for p, _ in module.named_parameters())


def test_deviations_are_those_of_the_norms_before_clipping() -> None:
    """A layer's is the larger of gradient and update; without momentum the gradient's."""
    module, monitor = Spiky(relu(), OPTIMIZERS["sgd"], at=(60,)), DynamicsMonitor(**QUIET)
    fit(module, [monitor], steps=62, max_epochs=-1, gradient_clip_val=1e-3)
    norms = np.array(module.norms)
    rise = np.log(norms[60]) - np.log(np.median(norms[40:60], axis=0))
    table = monitor.history["spike/layer_deviation"]
    deviations = table.values[table.steps == 60][0]
    assert np.argmax(deviations[:2]) == np.argmax(rise[:2]) == 0  # the input layer's weight, by which inputs enter
    assert (deviations[rise > 3] > 10).all()


def test_a_spike_is_told_with_its_step_its_layer_and_its_end() -> None:
    monitor = DynamicsMonitor(**QUIET)
    with pytest.warns(UserWarning, match="Step 50 is a spike: the gradient"):
        module = Spiky(relu(), OPTIMIZERS["sgd"], at=(50,))
        fit(module, [monitor], steps=60, max_epochs=-1, gradient_clip_val=1e-3)
    (finding,) = [f for f in monitor.findings if f.rule.startswith("spike/")]
    assert finding.step == 50 and finding.severity == "warning"  # the loss rose as well
    assert finding.layers[0] in finding.message and "batch 2 of its epoch" in finding.message
    assert "It was over after 1 step." in finding.message and finding.advice


def test_many_spikes_are_told_together() -> None:
    at = tuple(range(40, 240, 20))
    monitor = DynamicsMonitor(**QUIET)
    with pytest.warns(UserWarning, match="is a spike"):
        fit(Spiky(relu(), OPTIMIZERS["sgd"], at=at), [monitor], steps=245, max_epochs=-1, gradient_clip_val=0.1)
    rules = {f.rule: f for f in monitor.findings if f.rule.startswith("spike/")}
    assert rules["spike/deviation"].step == 220
    assert f"10 steps are spikes: {', '.join(map(str, at))}." in rules["spike/many"].message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_and_poisons_nothing(value: float) -> None:
    class Broken(Spiky):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step == 40:
                self.network[0].weight.grad.fill_(value)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            before = copy.deepcopy(self.network.state_dict()) if self.trainer.global_step == 40 else None
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            if before is not None:
                self.network.load_state_dict(before)

    class First(pl.Callback):
        """Before the monitor's hook: a module's comes after those of callbacks."""

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            Broken.on_before_optimizer_step(module, optimizer)

    monitor = DynamicsMonitor(**QUIET)
    fit(Broken(relu(), OPTIMIZERS["sgd"], at=(60,)), [First(), monitor], steps=80, max_epochs=-1)
    assert found(monitor) == [40, 60]
    deviation = monitor.history["spike/deviation"]
    assert math.isinf(deviation.values[deviation.steps == 40][0])
    assert np.isfinite(deviation.values[deviation.steps != 40]).all()


def test_the_layer_whose_average_was_corrupted_is_named_before_anything_else_moves() -> None:
    class Corrupt(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 60:
                trainer.optimizers[0].state[module.network[2].weight]["exp_avg_sq"].mul_(1e-6)

    monitor = DynamicsMonitor(**QUIET)
    fit(Classifier(relu(), OPTIMIZERS["adamw"]), [Corrupt(), monitor], steps=70, max_epochs=-1)
    assert found(monitor) == [60]
    (finding,) = [f for f in monitor.findings if f.rule.startswith("spike/")]
    assert finding.layers == ("network.2.weight",) and "the update of network.2.weight" in finding.message


def test_accumulation_names_the_batch_of_the_window() -> None:
    """Of windows of four, the one batch that is out of line."""
    monitor = DynamicsMonitor(**QUIET)
    fit(OneOfFour(relu(), OPTIMIZERS["sgd"]), [monitor], steps=60, max_epochs=-1, accumulate_grad_batches=4)
    assert found(monitor) == [50]
    assert monitor.history["spike/batch"].values[0] % 4 == 2


def test_manual_optimisation_and_two_optimizers() -> None:
    class Two(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for optimizer, part in zip(self.optimizers(), (self.one, self.other), strict=True):
                optimizer.zero_grad()
                step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
                times = 1000 if step == 40 and part is self.other else 1
                loss = cross_entropy(part(times * batch[0]), batch[1])
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9) for part in (self.one, self.other)]

    monitor = DynamicsMonitor(every_n_steps=NEVER, quantities=["critical"])
    fit(Two(), [monitor], steps=120, max_epochs=-1)
    assert found(monitor) == [40]
    assert monitor.findings[0].layers == ("other.weight",) and monitor.failures == 0
    by_hand = DynamicsMonitor(every_n_steps=NEVER, quantities=["critical"])
    fit(ByHand(relu(), OPTIMIZERS["adamw"]), [by_hand], steps=40, max_epochs=-1)
    assert found(by_hand) == [] and by_hand.failures == 0 and by_hand.history["spike/count"].values[-1] == 0


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_spikes(fused: bool) -> None:
    """One scale overflows every few steps; the other grows all the time, and gradients are read without it."""
    for scale, every, at in ((2.0**60, 3, ()), (4.0, 10, (50,))):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=every)
        module = Spiky(relu(), OPTIMIZERS["fused" if fused else "adamw"], at=at, times=100.0)
        monitor = DynamicsMonitor(**QUIET)
        fit(module, [monitor], steps=60, max_epochs=-1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert found(monitor) == list(at) and monitor.failures == 0
        assert scaler.get_scale() != scale and np.isfinite(monitor.history["spike/gradient"].values).all()


class Unusual(nn.Module):
    """Frozen, unused, sparse, empty, 0-d and complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8, sparse=True)
        self.linear, self.unused, self.frozen = nn.Linear(8, 3), nn.Linear(2, 2), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.gain, self.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0))
        self.waves = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(x[:, :4].abs().mul(5).long().clamp(max=19)).mean(1)
        return self.linear(self.gain * self.frozen(x) + words + (x * self.waves).abs()) + self.empty.sum()


def test_parameters_of_all_kinds() -> None:
    monitor = DynamicsMonitor(**QUIET)
    fit(Spiky(Unusual(), lambda p: torch.optim.SGD(p, lr=0.01), at=(50,)), [monitor], steps=60, max_epochs=-1)
    assert found(monitor) == [50] and monitor.failures == 0


@pytest.mark.parametrize("every", [4, 10])
def test_a_run_that_goes_on_from_a_checkpoint_finds_the_same(every: int, tmp_path) -> None:
    """Bitwise the same readings, over a spike soon after the checkpoint."""
    make = lambda: Spiky(relu(), OPTIMIZERS["adamw"], at=(33, 61))  # noqa: E731
    whole = DynamicsMonitor(every_n_steps=every, quantities=["critical"])
    fit(make(), [whole], steps=72, max_epochs=-1)
    first = DynamicsMonitor(every_n_steps=every, quantities=["critical"])
    keep = lambda name: ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=32, save_top_k=-1)  # noqa: E731
    fit(make(), [first, keep("one")], steps=32, max_epochs=-1, enable_checkpointing=True)
    second = DynamicsMonitor(every_n_steps=every, quantities=["critical"])
    fit(
        make(),
        [second, keep("two")],
        steps=72,
        max_epochs=-1,
        ckpt_path=tmp_path / "one" / "step=32.ckpt",
        enable_checkpointing=True,
    )
    assert found(second) == [33, 61]
    for tag in (tag for tag in whole.history if tag.startswith("spike/")):
        one, other = whole.history[tag], second.history[tag]
        late = one.steps >= 32
        assert np.array_equal(one.steps[late], other.steps) and np.array_equal(one.values[late], other.values)


@pytest.mark.parametrize("name", ["sgd", "adamw", "fused", "lanton"])
def test_training_is_bitwise_as_without(name: str) -> None:
    plain, watched = (Spiky(nn.Sequential(relu(), nn.Dropout(0.1)), OPTIMIZERS[name], at=(40,)) for _ in range(2))
    one = fit(plain, [], steps=60, max_epochs=-1)
    monitor = DynamicsMonitor(**QUIET)
    other = fit(watched, [monitor], steps=60, max_epochs=-1)
    assert same_weights(plain, watched) and found(monitor) == [40]
    for own, theirs in zip(one.optimizers[0].state.values(), other.optimizers[0].state.values(), strict=True):
        assert own.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(own[key]), torch.as_tensor(theirs[key])) for key in own)


def test_a_loop_of_your_own() -> None:
    """With Watch: announced before clipping, or not at all."""
    for announces in (True, False):
        torch.manual_seed(0)
        model = relu()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        monitor = PlainMonitor(every_n_steps=NEVER, quantities=["critical"], strict=True)
        watch = dynamon.Watch(model, optimizer, lambda m, b: cross_entropy(m(b[0]), b[1]), monitors=[monitor])
        step = 0
        for _ in range(8):
            for batch in batches():
                with watch.batch(batch) as this:
                    loss = cross_entropy(model(batch[0] * (1000 if step == 50 else 1)), batch[1])
                    loss.backward()
                    if announces:
                        watch.before_clipping()
                        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                    optimizer.step()
                    optimizer.zero_grad()
                    this.loss = loss
                step += 1
        watch.close()
        assert found(monitor) == [50], announces
        assert monitor.failures == 0


def test_without_it_nothing_is_looked_at() -> None:
    monitor = DynamicsMonitor(**QUIET, sentinel=False)
    fit(Spiky(relu(), OPTIMIZERS["sgd"], at=(50,)), [monitor], steps=60, max_epochs=-1)
    assert not [tag for tag in monitor.history if tag.startswith("spike/")]


def test_what_fails_in_it_is_counted_and_ends_no_run(monkeypatch) -> None:
    def broken(self: Any) -> Any:
        raise RuntimeError("no norms today.")

    monkeypatch.setattr(OptimizerNorms, "gradients", broken)
    monitor = DynamicsMonitor(every_n_steps=NEVER, quantities=["critical"])
    with pytest.warns(UserWarning, match="the sentinel measurement failed: no norms today"):
        fit(Classifier(relu()), [monitor], steps=8, max_epochs=-1)
    assert monitor.failures == 3  # then it rests
    with pytest.raises(RuntimeError, match="no norms today"):
        fit(Classifier(relu()), [DynamicsMonitor(**QUIET)], steps=20, max_epochs=-1)


@pytest.mark.parametrize("on_device", [True, False])
def test_device_calls_of_a_look(on_device: bool, monkeypatch) -> None:
    """Of a GPT-2's 148 tensors and a batch: at most twenty, and nobody waits. On a CPU sums are taken one by one."""
    if on_device:
        monkeypatch.setattr("dynamon.monitoring.sentinel_norms._SUMMED", set())
    model = gpt2("cpu", scale=48)
    fill_gradients(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    optimizer.step()
    norms = OptimizerNorms(optimizer, describe_layers(model))
    loss, batch = torch.ones(()), [torch.randn(8, 3, 32, 32), torch.randint(50, (8, 70)), torch.rand(8)]
    with Launches() as launches:
        row = StepRow(norms.gradients(), 1.0)
        row.end(norms.updates(), None)
        row.send([loss], torch.device("cpu"), sample_batch(batch, torch.device("cpu")).entries)
    if on_device:
        assert launches.total <= 20 and not launches.waits, launches
    numbers = row.read(len(norms.layers))
    gradients, updates, losses = numbers.gradients, numbers.updates, numbers.losses
    state = optimizer.state
    for i, layer in enumerate(norms.layers):
        p = layer.parameter
        m, v = state[p]["exp_avg"].double(), state[p]["exp_avg_sq"].double()
        assert math.isclose(gradients[i], float(p.grad.double().norm()), rel_tol=1e-5)
        assert math.isclose(updates[i], float((m.square().mean() / v.mean()).sqrt()), rel_tol=1e-5)
    assert losses == [1.0] and len(numbers.samples) == 8 * 48 + 8 * 35 + 8
    assert numbers.samples[-8:].tolist() == batch[2].tolist()


class Money:
    """A budget with a clock of its own."""

    fraction, grace, training = 0.02, 0.0, 0.0

    def __init__(self) -> None:
        self.spent_on: dict[str, float] = {}

    def book(self, name: str, seconds: float) -> None:
        self.spent_on[name] = self.spent_on.get(name, 0.0) + seconds


@pytest.mark.parametrize(
    ("cost", "step", "grace"), [(1e-4, 0.05, 0.0), (1e-3, 0.05, 0.0), (1e-4, 1e-3, 0.0), (1e-4, 1e-3, 3.0)]
)
def test_it_keeps_to_a_quarter_of_the_budget(cost: float, step: float, grace: float) -> None:
    """As much as a quarter pays for, of the share and of the grace, and the cheapest the most often."""
    money = Money()
    money.grace = grace
    pace, looks = Pace("sentinel", money), [0, 0, 0, 0]
    parts = 0.05 * cost, 0.05 * cost, 0.3 * cost, 0.6 * cost
    for index in range(20_000):
        money.training += step
        pace.begin(index)
        for what, part in enumerate(parts):
            if pace.looks(what):
                assert what == CHECK or pace.looks(BATCH)
                looks[what] += 1
                pace.add(part, what)
        pace.book(pace.looks(BATCH), pace.looks(CHECK))
        pace.review(index + 1)
    allowed = 0.25 * (0.02 * money.training + grace)
    spent = sum(count * part for count, part in zip(looks, parts, strict=True))
    assert math.isclose(spent, money.spent_on["sentinel"])
    assert spent <= 1.05 * allowed + 64 * cost
    assert spent >= 0.6 * min(allowed, 20_000 * cost)
    assert looks == sorted(looks, reverse=True)
    if cost == 1e-3:  # a tenth of it is less than half of the share, and all of it is not
        assert 20_000 >= looks[BATCH] > 19_900 > looks[GRADIENT] > looks[UPDATE] > 100


@pytest.mark.parametrize("grace", [0.0, 0.05])
def test_slow_looks_are_paid_back(grace: float) -> None:
    """Of steps of 4 ms, with the first looks slow and every tenth as well: no more than a quarter is spent."""
    money = Money()
    money.grace = grace
    pace, looks = Pace("sentinel", money), 0
    for index in range(4000):
        money.training += 0.004
        pace.begin(index)
        if pace.looks(BATCH):
            looks += 1
            slow = 20.0 if looks <= 2 else 8.0 if looks % 10 == 0 else 1.0
            for what, part in ((BATCH, 1e-4), (GRADIENT, 1e-4), (UPDATE, 2e-4)):
                if pace.looks(what):
                    pace.add(slow * part, what)
        pace.book(pace.looks(BATCH))
        pace.review(index + 1)
    allowed = 0.25 * (0.02 * money.training + grace)
    assert money.spent_on["sentinel"] <= 1.15 * allowed and looks > 20


def test_paces_are_chosen_now_and_then() -> None:
    """Not at each of the steps from one rare look to the next."""
    money = Money()
    pace, chosen = Pace("sentinel", money), 0
    for index in range(5000):
        money.training += 0.004
        pace.begin(index)
        for what, part in ((CHECK, 1e-4), (BATCH, 1e-3), (GRADIENT, 1e-3), (UPDATE, 2e-3)):
            if pace.looks(what):
                pace.add(part, what)
        before = pace.every
        pace.book(pace.looks(BATCH), pace.looks(CHECK))
        pace.review(index + 1)
        chosen += pace.every is not before
    assert 5000 // 250 - 2 <= chosen <= 5000 // 250 + pace._looks // 32 + 1
    assert pace._looks < 200


def test_it_says_how_often_it_looks(caplog) -> None:
    monitor = DynamicsMonitor(budget=1e-9, grace=0.0, quantities=["critical"])
    with caplog.at_level("INFO", logger="dynamon"):
        fit(Classifier(relu()), [monitor], steps=100, max_epochs=-1)
    (said,) = [record.message for record in caplog.records if "rules on spikes" in record.message]
    assert "they look at batches, gradients and updates at about one step in 1000." in said and "sentinel=False" in said
    free = DynamicsMonitor(budget=None, every_n_steps=NEVER, quantities=["critical"])
    run = trainer([free], steps=100, max_epochs=-1)
    run.fit(Classifier(relu()), batches())
    assert free._sentinel._pace.every == [1, 1, 1, 1]


def test_fingerprints() -> None:
    one, other = torch.arange(6.0), torch.arange(6.0).half()
    known = [
        one,
        other,
        one.view(2, 3),
        {"x": one, "y": other},
        [one, other.flip(0)],
        "words",
        torch.ones(2).to_sparse(),
    ]
    codes = [fingerprint(value) for value in known]
    assert len(set(codes)) == len(codes) and all(0 <= code < 2**24 for code in codes)
    assert codes == [fingerprint(copy.deepcopy(value)) for value in known]
    assert all(np.float32(code) == code for code in codes)  # as event files hold it
