"""A loop of one's own under Watch: the same training, the same readings as under the Lightning callback."""

import random
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricPrecision
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import dynamon
from dynamon.callbacks import DynamicsMonitor as Callback
from dynamon.monitoring.dynamics_monitor import DynamicsMonitor
from dynamon.monitoring.failures import first_line
from dynamon.monitoring.gradient_monitor import GradientMonitor
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.monitoring.weight_monitor import WeightMonitor
from dynamon.quantities import REGISTRY
from dynamon.runs import read_run_data
from tests.helpers import Classifier, batches, fit
from tests.processes import in_processes

CLOCKS = {"dynamon/overhead"}  # two runs take different times
STEPS, CLIP = 8, 0.3
OURS = tuple({f"{quantity.tag.split('/')[0]}" for quantity in REGISTRY.values()})


def network() -> nn.Module:
    """With buffers and dropout, so that a trace of an evaluation would show."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


class Net(nn.Module):
    """The network under the name that it has in the LightningModule, so that layers are called alike."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def autocast_loss(dtype: torch.dtype) -> Any:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return loss_fn(model, batch)

    return loss


def monitor(kind: type, **settings: Any) -> Any:
    return kind("full", strict=True, **{"every_n_steps": 2, "histograms": True, **settings})


def adamw(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, **settings)


def own_loop(
    watched: bool = True,
    loss: Any = loss_fn,
    accumulate: int = 1,
    clip: bool = True,
    scaler: Any = None,
    make: Any = adamw,
    says: bool = True,
    steps: int = STEPS,
    **settings: Any,
) -> tuple[nn.Module, Any]:
    """Train by hand, with a watch if wanted; the model and the watch."""
    model, data = Net(), batches()
    optimizer = make(model.parameters())
    settings = {"monitors": [monitor(DynamicsMonitor)], **settings} if watched else {}
    watch = None
    if watched:
        watch = dynamon.Watch(
            model, optimizer, loss_fn=loss, accumulate=accumulate, scaler=scaler, loader=data, **settings
        )
    torch.manual_seed(3)  # as fit does
    done = passes = 0
    while done < steps:
        for batch in data:
            with nullcontext() if watch is None else watch.batch(batch) as taken:
                value = loss(model, batch)
                if taken is not None:
                    taken.loss = value
                value = value / accumulate
                (value if scaler is None else scaler.scale(value)).backward()
                passes += 1
                if passes % accumulate == 0:
                    if scaler is not None and clip:
                        scaler.unscale_(optimizer)
                    if watch is not None and says:
                        watch.before_clipping()
                    if clip:
                        clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step() if scaler is None else scaler.step(optimizer)
                    if scaler is not None:
                        scaler.update()
                    optimizer.zero_grad()
                    done += 1
            if done == steps:
                break
    if watch is not None:
        watch.close()
    return model, watch


def lightning_run(accumulate: int = 1, clip: bool = True, make: Any = adamw, **settings: Any) -> tuple[Any, Any]:
    """Train the same with a Trainer and the callback."""
    module, callback = Classifier(network(), make), monitor(Callback)
    clipping = {"gradient_clip_val": CLIP} if clip else {}
    fit(module, [callback], steps=STEPS, max_epochs=-1, accumulate_grad_batches=accumulate, **clipping, **settings)
    return module, callback


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def assert_same_readings(expected: Any, found: Any, rtol: float = 0.0) -> None:
    assert set(expected) == set(found)
    for tag in set(expected) - CLOCKS:
        a, b = expected[tag], found[tag]
        assert a.steps.tolist() == b.steps.tolist() and a.layers == b.layers, tag
        np.testing.assert_allclose(b.values, a.values, rtol=rtol, atol=0.0, err_msg=tag)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": False},
        {"accumulate": 2},
        {"accumulate": 4, "clip": False},
        {"make": lambda p: adamw(p, fused=True)},
        {"make": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    ],
    ids=["clipping", "no clipping", "accumulation", "long accumulation", "fused", "SGD"],
)
def test_readings_and_weights_are_those_of_the_callback(settings: dict[str, Any]) -> None:
    plain, _ = own_loop(watched=False, **settings)
    model, watch = own_loop(**settings)
    module, callback = lightning_run(**settings)
    assert_same_weights(plain, model)
    assert_same_weights(module, model)
    assert_same_readings(callback.history, watch.history)
    assert len(watch.history) > 100 and watch.failures == 0
    assert watch.metrics["gradient/norm"] == watch.history["gradient/norm"].values[-1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, fused: bool) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return adamw(parameters, fused=fused)

    scaled = precision == "16-mixed"
    # A scale at which the first steps are skipped.
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20) if scaled else None for _ in range(3)]
    loss = autocast_loss(torch.float16 if scaled else torch.bfloat16)
    settings: dict[str, Any] = {"make": make, "clip": not fused}  # which Lightning refuses to clip
    plain, _ = own_loop(watched=False, loss=loss, scaler=scalers[0], **settings)
    model, watch = own_loop(loss=loss, scaler=scalers[1], **settings)
    plugin = MixedPrecision(precision, "cpu", scalers[2])  # the Trainer itself does not want fp16 on a CPU
    module, callback = lightning_run(plugins=[plugin], **settings)
    assert_same_weights(plain, model)
    assert_same_weights(module, model)
    assert_same_readings(callback.history, watch.history)
    assert not scaled or scalers[1].get_scale() < 2.0**20


def fabric_loop(watched: bool, fabric: Any, accumulate: int) -> tuple[nn.Module, Any]:
    """The same by Fabric, which clips and scales by itself."""
    inner = Net()
    model, optimizer = fabric.setup(inner, adamw(inner.parameters()))
    data = batches()
    watch = None
    if watched:
        own = monitor(DynamicsMonitor)
        watch = dynamon.Watch(model, optimizer, loss_fn, accumulate=accumulate, monitors=[own], loader=data)
    torch.manual_seed(3)
    done = passes = 0
    while done < STEPS:
        for batch in data:
            with nullcontext() if watch is None else watch.batch(batch) as taken:
                value = loss_fn(model, batch)
                if taken is not None:
                    taken.loss = value
                fabric.backward(value / accumulate)
                passes += 1
                if passes % accumulate == 0:
                    if watch is not None:
                        watch.before_clipping(optimizer)
                    fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
            if done == STEPS:
                break
    if watch is not None:
        watch.close()
    return inner, watch


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision: str, accumulate: int) -> None:
    scaled = precision == "16-mixed"

    def plugin(kind: type) -> dict[str, Any]:
        if precision == "32-true":
            return {}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20) if scaled else None
        return {"plugins": [kind(precision, "cpu", scaler)]}

    runs = []
    for watched in (False, True):
        fabric = L.Fabric(accelerator="cpu", devices=1, **plugin(FabricPrecision))
        runs.append(fabric_loop(watched, fabric, accumulate))
    (plain, _), (model, watch) = runs
    assert_same_weights(plain, model)
    assert watch.failures == 0 and len(watch.history) > 100
    module, callback = lightning_run(accumulate, **plugin(MixedPrecision))
    assert_same_weights(module, model)
    assert_same_readings(callback.history, watch.history, rtol=0.0 if precision == "32-true" else 1e-6)


def test_random_numbers_are_those_of_the_loop_without_it() -> None:
    def streams() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    found = []
    for watched in (False, True):
        random.seed(1)
        np.random.seed(1)
        own_loop(watched)
        found.append(streams())
    assert found[0] == found[1]


def names_of_histograms(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder), {"histograms": 1})
    return set(events.Reload().Tags()["histograms"])


def test_event_files_hold_what_the_callback_writes(tmp_path: Path) -> None:
    own_loop(logdir=tmp_path / "own")
    logger = TensorBoardLogger(tmp_path, name="lightning", version="")
    lightning_run(logger=logger)
    own, other = read_run_data(tmp_path / "own"), read_run_data(tmp_path / "lightning")
    lightnings = {tag for tag in other.scalars if not tag.startswith(OURS)}
    assert lightnings == {"train/loss", "epoch"} and set(own.scalars) == set(other.scalars) - lightnings
    assert set(own.tables) == set(other.tables) and len(own.tables) > 15
    scalars = {tag: series for tag, series in other.scalars.items() if tag not in lightnings}
    assert_same_readings({**scalars, **other.tables}, {**own.scalars, **own.tables})
    assert names_of_histograms(tmp_path / "own") == names_of_histograms(tmp_path / "lightning") != set()


def test_without_a_word_before_clipping_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, announced = own_loop()
    assert "call watch.before_clipping()" not in caplog.text
    _, watch = own_loop(says=False)
    assert caplog.text.count("call watch.before_clipping()") == 1
    left_out = {"gradient/norm_clipped", "gradient/clip_coefficient", "gradient/clip_share"}
    assert set(announced.history) - set(watch.history) == left_out
    clipped = announced.history["gradient/norm_clipped"].values
    np.testing.assert_allclose(watch.history["gradient/norm"].values, clipped, rtol=1e-5)
    same = ("weight/operator", "sharpness/hessian_max", "update/ratio")
    assert all(np.array_equal(watch.history[tag].values, announced.history[tag].values) for tag in same)


def test_a_window_that_ends_early_is_not_compared_with_a_whole_one() -> None:
    """A loop may step before its window is full; halves are then not halves."""
    model, data = Net(), list(batches())
    optimizer = adamw(model.parameters())
    own = GradientMonitor(every_n_steps=1, strict=True)
    watch = dynamon.Watch(model, optimizer, loss_fn, accumulate=4, monitors=[own])
    for index, batch in enumerate(data * 2, start=1):
        with watch.batch(batch):
            (loss_fn(model, batch) / 4).backward()
            if index in (4, 8, 10, 14):
                optimizer.step()
                optimizer.zero_grad()
    independent = own.history["noise/independent"]
    assert independent.steps.tolist() == [0, 1, 2, 3]
    assert np.isfinite(independent.values).any(axis=1).tolist() == [True, True, False, True]


def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped() -> None:
    def train(watch: Any, model: nn.Module, optimizer: Any, data: list[Any]) -> None:
        for batch in data:
            with watch.batch(batch):
                loss_fn(model, batch).backward()
                watch.before_clipping()
                optimizer.step()
                optimizer.zero_grad()

    def make() -> tuple[Any, Any, Any]:
        model = Net()
        optimizer = adamw(model.parameters())
        own = monitor(DynamicsMonitor, every_n_steps=1)
        return model, optimizer, dynamon.Watch(model, optimizer, loss_fn, monitors=[own])

    data = list(batches())
    model, optimizer, whole = make()
    torch.manual_seed(3)
    train(whole, model, optimizer, data[:4])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "watch": whole.state_dict()}
    saved = torch.load(_stored(saved), weights_only=True)
    random_state = torch.get_rng_state()
    train(whole, model, optimizer, data[4:])

    again, second, resumed = make()
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["watch"])
    torch.set_rng_state(random_state)
    train(resumed, again, second, data[4:])
    assert_same_weights(model, again)
    for tag in set(resumed.history) - CLOCKS:
        expected, found = whole.history[tag], resumed.history[tag]
        later = expected.steps >= 4
        assert found.steps.tolist() == expected.steps[later].tolist(), tag
        np.testing.assert_array_equal(found.values, expected.values[later], err_msg=tag)


def _stored(state: dict[str, Any]) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


OPTIMIZER = adamw(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch optimizer or a list of them, got NoneType"),
        ({"optimizer": []}, TypeError, "optimizer must be"),
        ({"loss_fn": 1.0}, TypeError, "loss_fn must be a function of .model, batch., got float"),
        ({"accumulate": 0}, ValueError, "accumulate must be a whole number of 1 or more, got 0"),
        ({"total_steps": 0.5}, ValueError, "total_steps must be a whole number of 1 or more, got 0.5"),
        ({"monitors": [print]}, TypeError, "monitors must be monitors of dynamon.monitoring"),
        (
            {"monitors": [DynamicsMonitor(), GradientMonitor()]},
            ValueError,
            "DynamicsMonitor and GradientMonitor, which measure the same",
        ),
        ({"monitors": 5}, TypeError, "monitors must be monitors of dynamon.monitoring, got int"),
        ({"loss_fn": nn.CrossEntropyLoss()}, TypeError, "got CrossEntropyLoss, which takes outputs and targets. Write"),
        ({"loss_fn": cross_entropy}, TypeError, "got cross_entropy, which takes outputs and targets"),
        ({"loss_fn": lambda batch: 0.0}, TypeError, "loss_fn must be a function of .model, batch., got <lambda>"),
        ({"loss_fn": lambda model, x, y: 0.0}, TypeError, "loss_fn must be a function of .model, batch."),
        ({"scaler": 65536.0}, TypeError, "scaler must be a torch.amp.GradScaler, or None, got float"),
        ({"loader": 5}, TypeError, "loader must give batches"),
        ({"schedulers": "cosine"}, TypeError, "schedulers must be learning rate schedulers, got str"),
        ({"logdir": 5}, TypeError, "logdir must be the path of a folder, or None, got int"),
        ({"logdir": __file__}, ValueError, "logdir must be a folder, and .* is a file"),
        ({"optimizer": adamw(nn.Linear(2, 2).parameters())}, ValueError, "AdamW has no parameter of Net"),
        ({"optimizer": [OPTIMIZER, OPTIMIZER]}, ValueError, "optimizer has the same optimizer twice"),
        ({"monitors": [GradientMonitor(loggers=["csv"])]}, ValueError, "matches no logger of Watch, which has: none"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    model = Net()
    given = {"model": model, "optimizer": adamw(model.parameters()), "loss_fn": loss_fn, **change}
    with pytest.raises(error, match=sentence):
        dynamon.Watch(**given)


def test_one_monitor_and_one_scheduler_need_no_list() -> None:
    model = Net()
    optimizer, own = adamw(model.parameters()), GradientMonitor()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    watch = dynamon.Watch(model, optimizer, loss_fn, monitors=own, schedulers=scheduler)
    assert watch.monitors == [own] and watch._loop.schedulers == [scheduler]
    for state in ({}, {**watch.state_dict(), "monitors": []}):
        with pytest.raises(ValueError, match="state must be what state_dict.. of a Watch"):
            watch.load_state_dict(state)
    watch.load_state_dict(watch.state_dict())


def test_calls_in_the_wrong_place_are_named() -> None:
    model, data = Net(), next(iter(batches()))
    watch = dynamon.Watch(model, adamw(model.parameters()), loss_fn)
    with pytest.raises(RuntimeError, match="before_clipping.. inside of"):
        watch.before_clipping()
    with watch.batch(data), pytest.raises(RuntimeError, match="inside of another one"), watch.batch(data):
        pass
    watch.close()
    with pytest.raises(RuntimeError, match="after watch.close"), watch.batch(data):
        pass


def test_an_exception_goes_through_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model, data = Net(), list(batches())
    optimizer = adamw(model.parameters())
    own = monitor(DynamicsMonitor, every_n_steps=1)
    watch = dynamon.Watch(model, optimizer, loss_fn, logdir=tmp_path, monitors=[own])
    with pytest.raises(ZeroDivisionError):
        for index, batch in enumerate(data):
            with watch.batch(batch):
                loss_fn(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                if index == 3:
                    raise ZeroDivisionError
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert read_run_data(tmp_path).scalars["gradient/norm"].steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_a_loop_that_catches_an_exception_goes_on_as_without_a_watch(strict: bool, tmp_path: Path) -> None:
    def train(logdir: Path | None) -> tuple[nn.Module, Any, list[Any]]:
        model, data = Net(), list(batches())
        optimizer = adamw(model.parameters())
        own = [DynamicsMonitor("full", every_n_steps=1, strict=strict)]
        watch = None if logdir is None else dynamon.Watch(model, optimizer, loss_fn, logdir=logdir, monitors=own)
        torch.manual_seed(3)
        for index, batch in enumerate(data):
            try:
                with nullcontext() if watch is None else watch.batch(batch):
                    loss_fn(model, batch).backward()
                    if index in (2, 4):
                        raise MemoryError
                    if watch is not None:
                        watch.before_clipping()
                    clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
            except MemoryError:
                pass
            optimizer.zero_grad()
        return model, watch, [torch.get_rng_state(), len(data)]

    plain, _, (state, _) = train(None)
    with pytest.warns(UserWarning, match="Watch is off: an exception ended a watch.batch block, at step 2") as told:
        model, watch, (other, _) = train(tmp_path)
    assert len([w for w in told if "Watch is off" in str(w.message)]) == 1
    assert_same_weights(plain, model)
    assert torch.equal(state, other) and watch.history["gradient/norm"].steps.tolist() == [0, 1]
    watch.close()
    with pytest.raises(RuntimeError, match="after watch.close"), watch.batch(None):
        pass


def test_a_batch_that_cannot_begin_does_not_end_a_loop_that_catches_that() -> None:
    model, data = Net(), list(batches())
    optimizer = adamw(model.parameters())
    watch = dynamon.Watch(model, optimizer, loss_fn, monitors=[GradientMonitor(layers=["no such *"])])
    with pytest.raises(ValueError, match="matches no layer"), watch.batch(data[0]):
        pass
    with pytest.warns(UserWarning, match="Watch is off"), watch.batch(data[1]):
        loss_fn(model, data[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_before_a_reading_is_due_is_called_short(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    own_loop(steps=steps, monitors=DynamicsMonitor())
    assert f"it ended after {steps} step{'s' * (steps - 1)}, before the first was due" in caplog.text
    assert "Raise budget" not in caplog.text


def test_steps_that_no_given_optimizer_takes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    def train(outside: bool) -> None:
        model = Net()
        optimizer = adamw(model.parameters())
        with dynamon.Watch(model, optimizer, loss_fn, monitors=DynamicsMonitor()) as watch:
            for batch in [*batches()] * 4:
                with watch.batch(batch):
                    loss_fn(model, batch).backward()
                    if not outside:
                        watch.before_clipping()
                if outside:
                    optimizer.step()
                optimizer.zero_grad()

    for outside in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(outside)
        said = caplog.text + "".join(str(one.message) for one in told)
        assert "none of the optimizers that Watch was given" in said or "no optimizer that Watch was given" in said
        assert not any(word in said for word in ("scaler", "the module", "Raise budget", "before the first was due"))
        caplog.clear()


def test_a_failure_without_a_full_stop_gets_one() -> None:
    assert first_line(RuntimeError("no such thing\nat all")) == "no such thing."
    assert first_line(RuntimeError("No such thing. ")) == "No such thing." and first_line(KeyError()) == "KeyError."


def test_a_loop_resumes_in_the_middle_of_a_window() -> None:
    model = Net()
    watches = [dynamon.Watch(model, adamw(model.parameters()), loss_fn, accumulate=3) for _ in range(2)]
    for batch in list(batches())[:5]:
        with watches[0].batch(batch):
            loss_fn(model, batch).backward()
            if watches[0]._loop.window_position()[0] == 3:
                watches[0]._loop.optimizers[0].step()
    watches[1].load_state_dict(watches[0].state_dict())
    assert watches[1]._loop.window_position() == watches[0]._loop.window_position() == (3, 3)
    assert watches[1].step == 1


def test_batches_that_are_skipped_and_several_optimizers() -> None:
    model, data = Net(), list(batches())
    first, second = adamw(model.network[0].parameters()), adamw(model.network[4].parameters())
    own = [GradientMonitor(every_n_steps=1, strict=True), WeightMonitor(every_n_steps=1, strict=True)]
    with dynamon.Watch(model, [first, second], monitors=own) as watch:
        for index, batch in enumerate(data):
            with watch.batch(batch):
                if index == 2:
                    continue
                loss_fn(model, batch).backward()
                watch.before_clipping()
                first.step()
                second.step()
                model.zero_grad()
        assert watch.step == len(data) - 1
    table = watch.history["weight/operator"]
    assert table.steps.tolist() == list(range(len(data) - 1)) and watch.failures == 0
    assert np.isfinite(watch.history["update/ratio"].values[:, [0, 1, 4, 5]]).all()


NO_LIGHTNING = """
import sys


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            raise ImportError(f"{name} is not to be imported")


sys.meta_path.insert(0, Refused())
"""
WITHOUT_LIGHTNING = """
import torch
from torch import nn
import dynamon
from dynamon.monitoring.dynamics_monitor import DynamicsMonitor

try:
    import lightning
except ImportError:
    pass
else:
    raise SystemExit("lightning was imported")

torch.manual_seed(1)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Tanh(), nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = [(torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))) for _ in range(12)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


monitor = DynamicsMonitor(
    "full", every_n_steps=2, quantities=sys.argv[2].split(","), strict=True, histograms=True, convolutions=True
)
watch = dynamon.Watch(model, optimizer, loss_fn, accumulate=2, logdir=sys.argv[1], monitors=[monitor])
for index, batch in enumerate(data):
    with watch.batch(batch):
        (loss_fn(model, batch) / 2).backward()
        if index % 2:
            watch.before_clipping()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
watch.close()
print(*sorted(watch.history), sep="\\n")
print("points", {meter.name: meter.points for meter in monitor._meters})
print("modules", [name for name in sys.modules if name.startswith(("lightning", "pytorch_lightning"))])
"""


def test_every_meter_runs_where_lightning_cannot_be_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            NO_LIGHTNING + WITHOUT_LIGHTNING,
            str(tmp_path),
            ",".join(QUANTITIES),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *tags, points, modules = done.stdout.splitlines()
    assert modules == "modules []"
    assert points == (
        "points {'gradient': 3, 'weight': 3, 'probe': 0, 'steps': 3, 'sharpness': 3, 'progress': 2, 'activation': 3, "
        "'sentinel': 0}"
    )
    declared = {tag for meter in DynamicsMonitor("full", quantities=QUANTITIES)._meters for tag in meter.quantities}
    absent = {"update/layer_cosine", "weight/initial_fraction", "gradient/local_smoothness"}
    absent |= {"attention/max_logit", "attention/entropy", "activation/residual"}  # the model has neither
    assert declared - set(tags) <= absent
    run = read_run_data(tmp_path)
    assert set(tags) >= set(run.tables) and {tag for tag in tags if "layers" not in tag} >= set(run.tables)
    assert "sharpness/hessian_max" in run.scalars


def test_the_commands_for_finished_runs_do_without_lightning(tmp_path: Path) -> None:
    own_loop(steps=40, logdir=tmp_path, monitors=[monitor(DynamicsMonitor, every_n_steps=1)])

    def command(*arguments: str) -> Any:
        script = f"{NO_LIGHTNING}from dynamon.cli import main\nsys.exit(main({list(arguments)!r}))"
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    for name, *options in (("report", "--text"), ("schedule",)):
        done = command(name, str(tmp_path), *options)
        assert done.returncode == 0 and done.stdout, done.stderr
    refused = command("demo")
    assert refused.returncode == 2 and "is not to be imported" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def _on_two_processes(rank: int, folder: Path, watched: bool) -> dict[str, Any]:
    inner = Net()
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = adamw(inner.parameters())
    own = monitor(DynamicsMonitor, histograms=False)
    watch = dynamon.Watch(model, optimizer, loss_fn, logdir=folder / "log", monitors=[own]) if watched else None
    torch.manual_seed(rank)
    for batch in list(batches())[rank::2]:
        with nullcontext() if watch is None else watch.batch(batch):
            loss_fn(model, batch).backward()
            if watch is not None:
                watch.before_clipping()
            clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    if watch is not None:
        watch.close()
    readings = ("sharpness/probe_samples", "noise/independent", "gradient/norm") if watch is not None else ()
    return {"weights": inner.state_dict(), **{tag: torch.from_numpy(watch.history[tag].values) for tag in readings}}


@pytest.mark.processes
def test_processes_under_ddp_measure_together(tmp_path: Path) -> None:
    plain, seen = (
        in_processes(partial(_on_two_processes, folder=tmp_path, watched=watched), group=True)[0]
        for watched in (False, True)
    )
    assert all(torch.equal(plain["weights"][name], tensor) for name, tensor in seen["weights"].items())
    assert seen["sharpness/probe_samples"].unique().tolist() == [16.0]  # a batch of each process
    assert seen["noise/independent"].isfinite().all() and len(seen["gradient/norm"]) == 2
    assert len(list((tmp_path / "log").iterdir())) == 1  # the first process writes


def _sharded(rank: int, world: int, watched: bool) -> dict[str, Any]:
    """Train in float64 under FSDP2, or alone on the batches of all processes."""
    model = Net().double()
    model.network[3].p = 0.0  # masks would be of half the batch
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.network[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = adamw(model.parameters())
    own = DynamicsMonitor("standard", every_n_steps=2, probe_fraction=1.0, strict=True)
    watch = dynamon.Watch(model, optimizer, loss_fn, monitors=own) if watched else None
    data = [[inputs.double(), labels] for inputs, labels in batches(size=8)]
    model.network[1].eval()  # statistics too
    for first in range(0, len(data), 2):
        pair = data[first : first + 2]
        batch = pair[rank] if world > 1 else [torch.cat(parts) for parts in zip(*pair, strict=True)]
        with nullcontext() if watch is None else watch.batch(batch):
            loss_fn(model, batch).backward()
            if watch is not None:
                watch.before_clipping()
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: p.full_tensor() if world > 1 else p.detach() for name, p in model.named_parameters()}
    if watch is None:
        return {"weights": weights}
    watch.close()
    shown = {tag: watch.history[tag].values for tag in watch.history if tag not in CLOCKS}
    return {"weights": weights, "shown": {tag: torch.as_tensor(values) for tag, values in shown.items()}}


@pytest.mark.processes
def test_processes_under_fsdp2_show_what_one_process_does() -> None:
    plain, seen = (
        in_processes(partial(_sharded, world=2, watched=watched), group=True)[0] for watched in (False, True)
    )
    alone = _sharded(0, 1, True)
    assert all(torch.equal(plain["weights"][name], tensor) for name, tensor in seen["weights"].items())
    for tag in ("gradient/norm", "gradient/dual", "weight/operator", "update/ratio", "sharpness/hessian_max"):
        np.testing.assert_allclose(seen["shown"][tag], alone["shown"][tag], rtol=1e-5, err_msg=tag)
    assert seen["shown"]["sharpness/probe_samples"].unique().tolist() == [16.0]
