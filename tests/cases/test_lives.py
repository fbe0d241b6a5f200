"""The lives of a callback: searches and checkpoints in mid-fit, several fits, copies, and how they end."""

import copy
import io
import pickle
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import dynamon
from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.curvature import HessianOperator, top_eigenvalues
from dynamon.monitoring.budget import Budget
from tests.helpers import Classifier, batches, fit, mlp, same_weights, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:You defined a `validation_step` but have no"
)
RATE, DECAY = 1e-2, 0.1


class Learner(Classifier):
    """AdamW with decay; the rate and the batch size are attributes, as finders want them."""

    def __init__(self) -> None:
        super().__init__(mlp(), partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY))
        self.lr, self.batch_size = RATE, 8

    def train_dataloader(self) -> Any:
        return batches(size=self.batch_size)


def train(callbacks: list[Any], epochs: int = 4, module: Any = None, **arguments: Any) -> tuple[Any, Any]:
    module = module or Learner()
    torch.manual_seed(3)
    run = trainer(callbacks, max_steps=-1, max_epochs=epochs, **arguments)
    run.fit(module)
    return run, module


class AtEpoch(pl.Callback):
    """Does something at the start of an epoch, once, as documented for finders."""

    def __init__(self, epoch: int, action: Any) -> None:
        self.epoch, self.action, self.done = epoch, action, False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and not self.done:
            self.done = True
            self.action(trainer, pl_module)


def rate_search(trainer: Any, module: Any) -> None:
    finder = LearningRateFinder(num_training_steps=20, update_attr=False, early_stop_threshold=None)
    finder.lr_find(trainer, module)


def size_search(trainer: Any, module: Any) -> None:
    finder = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=2)
    finder.scale_batch_size(trainer, module)
    module.batch_size = 8
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.setup_data()


def updates(steering: Any) -> int:
    return steering.state_dict()["optimizers"][0]["rule"]["updates"]


def test_a_rate_search_in_mid_fit_teaches_nothing_and_leaves_nothing(tmp_path: Any) -> None:
    counted = []

    def act(trainer: Any, module: Any) -> None:
        counted.append(updates(found[1]))
        rate_search(trainer, module)
        counted.append(updates(found[1]))

    def monitors() -> list[Any]:
        return [WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)]

    found, right = monitors(), monitors()
    run, module = train([*found, AtEpoch(2, act)], default_root_dir=tmp_path)
    _, without = train([*right, AtEpoch(2, lambda trainer, module: trainer.fit_loop.setup_data())])
    assert counted == [15, 15]
    assert same_weights(module, without) and found[1].ratios == right[1].ratios
    assert updates(found[1]) == updates(right[1]) == 31
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["WeightMonitor"]["weight"]
    assert found[0]._meters[0].points == saved["points"] == 32
    for mine, other in zip(found, right, strict=True):
        assert set(mine.history) == set(other.history)
        for tag in set(mine.history) - {"dynamon/overhead", "dynamon/steering_overhead"}:
            np.testing.assert_array_equal(mine.history[tag].steps, other.history[tag].steps)
            np.testing.assert_array_equal(mine.history[tag].values, other.history[tag].values, err_msg=tag)


def test_a_batch_size_search_in_mid_fit_teaches_nothing_and_leaves_nothing(tmp_path: Any) -> None:
    """Lightning itself takes other batches after such a search, so it is the same search without us that is right."""
    monitor, steering = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    counted = []

    def act(trainer: Any, module: Any) -> None:
        counted.append(updates(steering))
        size_search(trainer, module)
        counted.append(updates(steering))

    run, _ = train([monitor, steering, AtEpoch(2, act)], default_root_dir=tmp_path)
    assert counted == [15, 15] and updates(steering) == run.global_step - 1
    assert len(monitor.history["weight/rms"]) == len(steering.history["lr/ratio"]) == run.global_step
    right = np.cumprod(1 - RATE * DECAY * steering.history["lr/ratio"].values[:, 0])
    np.testing.assert_allclose(monitor.history["weight/initial_fraction"].values[:, 0], right, rtol=1e-5)
    _, watched = train([WeightMonitor(every_n_steps=1), AtEpoch(2, size_search)], default_root_dir=tmp_path)
    _, alone = train([AtEpoch(2, size_search)], default_root_dir=tmp_path)
    assert same_weights(watched, alone)


def test_memory_after_a_search_is_a_product_over_the_steps_of_training(tmp_path: Any) -> None:
    monitor = WeightMonitor(every_n_steps=1)
    run, _ = train([monitor, AtEpoch(2, rate_search)], default_root_dir=tmp_path)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert monitor.history["weight/initial_fraction"].values[-1][0] == pytest.approx((1 - RATE * DECAY) ** 32, rel=1e-6)
    again = WeightMonitor(every_n_steps=1)
    trainer([again], max_steps=-1, max_epochs=5).fit(Learner(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert again.history["weight/initial_fraction"].steps[0] == 32
    assert again.history["weight/initial_fraction"].values[0][0] == pytest.approx((1 - RATE * DECAY) ** 33, rel=1e-6)


def test_going_back_to_a_checkpoint_undoes_what_came_after(tmp_path: Any) -> None:
    """Some callbacks load the last good checkpoint in the middle of a fit, where a loss has run away."""
    path = tmp_path / "good.ckpt"

    def go_back(trainer: Any, module: Any) -> None:
        trainer._checkpoint_connector.restore(path, weights_only=True)
        trainer.fit_loop.restarting = trainer.fit_loop.epoch_loop.restarting = False

    gradients, weights, steering = GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1), NoiseAdaptiveLR()
    told = AtEpoch(1, lambda trainer, module: trainer.save_checkpoint(path)), AtEpoch(3, go_back)
    run, module = train([gradients, weights, steering, *told], epochs=5)
    right = GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1), NoiseAdaptiveLR()
    other, without = train(list(right), epochs=run.global_step // 8)
    assert run.global_step == 4 * 8 and same_weights(module, without)
    for mine, one in zip((gradients, weights, steering), right, strict=True):
        for tag in (
            "gradient/norm",
            "gradient/cosine",
            "noise/dual",
            "weight/initial_fraction",
            "update/cosine",
            "lr/ratio",
        ):
            if tag in one.history:
                np.testing.assert_array_equal(mine.history[tag].steps, one.history[tag].steps, err_msg=tag)
                np.testing.assert_array_equal(mine.history[tag].values, one.history[tag].values, err_msg=tag)


@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_a_search_before_training_leaves_nothing(tmp_path: Any, caplog: Any, how: str) -> None:
    monitor, steering = DynamicsMonitor(every_n_steps=2), NoiseAdaptiveLR(warmup=0)
    train([monitor, steering])  # somebody else's run, before
    finder = LearningRateFinder(num_training_steps=10, update_attr=False, early_stop_threshold=None)
    module, callbacks = Learner(), [monitor, steering, *([finder] if how == "callback" else [])]
    run = trainer(callbacks, max_steps=-1, max_epochs=2, default_root_dir=tmp_path)
    with caplog.at_level("INFO"):
        if how == "tuner":
            Tuner(run).lr_find(module, num_training=10, update_attr=False, early_stop_threshold=None)
        torch.manual_seed(3)
        run.fit(module)
    assert "did not hold the probe" not in caplog.text and monitor.failures == 0
    right = DynamicsMonitor(every_n_steps=2), NoiseAdaptiveLR(warmup=0)
    _, without = train(list(right), epochs=2)
    assert same_weights(module, without) and updates(steering) == updates(right[1]) == 15
    assert monitor.history["gradient/norm"].steps.tolist() == list(range(0, 16, 2))
    for tag in ("gradient/norm", "noise/dual", "sharpness/stability_ratio", "weight/initial_fraction"):
        np.testing.assert_allclose(monitor.history[tag].values, right[0].history[tag].values, err_msg=tag, rtol=1e-6)


def test_time_of_a_search_is_not_training_time(tmp_path: Any, monkeypatch: Any) -> None:
    monitor = GradientMonitor(every_n_steps=1)

    def slow(trainer: Any, module: Any) -> None:
        before.append(monitor._budget.running)
        clock[0] += 1000.0
        rate_search(trainer, module)

    before: list[float] = []
    clock = [0.0]

    def tick() -> float:
        clock[0] += 0.001
        return clock[0]

    monkeypatch.setattr("dynamon.monitoring.budget.time.perf_counter", tick)
    train([monitor, AtEpoch(2, slow)], default_root_dir=tmp_path)
    assert before[0] < 100 and monitor._budget.running < 3 * before[0]


def test_another_run_begins_anew() -> None:
    monitor, steering = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    train([monitor, steering])
    first = monitor.history
    other = Classifier(nn.Linear(8, 3), lambda p: torch.optim.SGD(p, lr=0.1))
    train([monitor, steering], epochs=1, module=_with_data(other))
    assert monitor.history is not first and monitor.history["weight/rms"].layers == ("network.weight", "network.bias")
    assert monitor.history["weight/rms"].steps.tolist() == list(range(8)) and updates(steering) == 7
    assert set(steering.ratios) == {"network.weight", "network.bias"} and len(first["weight/rms"]) == 32


def _with_data(module: Any) -> Any:
    module.train_dataloader = lambda: batches()
    return module


@pytest.mark.parametrize("between", ["nothing", "validation", "checkpoint of another run"])
def test_the_same_run_goes_on(tmp_path: Any, between: str) -> None:
    """Fitted once more, with more epochs: readings, counters and ratios go on; a validation does not count."""
    monitor, steering = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    module = Learner()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run, _ = train([monitor, steering], epochs=2, module=module, num_sanity_val_steps=0)
    if between == "validation":
        run.validate(module, batches(), verbose=False)
    if between == "checkpoint of another run":
        other = train([WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)], epochs=5)[0]
        other.save_checkpoint(tmp_path / "other.ckpt")
        weights = copy.deepcopy(module.state_dict())
        run.validate(module, batches(), ckpt_path=tmp_path / "other.ckpt", weights_only=True, verbose=False)
        module.load_state_dict(weights)
    run.fit_loop.max_epochs = 4
    run.fit(module)
    assert monitor.history["weight/initial_fraction"].steps.tolist() == list(range(32))
    assert monitor._meters[0].points == 32
    ratios = steering.history["lr/ratio"].values[:, 0]
    right = np.cumprod(1 - RATE * DECAY * ratios)
    np.testing.assert_allclose(monitor.history["weight/initial_fraction"].values[:, 0], right, rtol=1e-5)
    assert updates(steering) == 31


class Stopped(RuntimeError):
    pass


def test_a_run_goes_on_after_an_exception() -> None:
    monitor, steering, module = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0), Learner()
    stop = AtEpoch(2, lambda *_: (_ for _ in ()).throw(Stopped()))
    run = trainer([monitor, steering, stop], max_steps=-1, max_epochs=4)
    with pytest.raises(Stopped):
        run.fit(module)
    _leaves_no_hook(run, module)
    run.fit(module)
    assert monitor.history["weight/initial_fraction"].steps.tolist() == list(range(run.global_step))
    ratios = steering.history["lr/ratio"].values[:, 0]
    right = np.cumprod(1 - RATE * DECAY * ratios)
    np.testing.assert_allclose(monitor.history["weight/initial_fraction"].values[:, 0], right, rtol=1e-5)


def _leaves_no_hook(run: Any, module: nn.Module) -> None:
    for optimizer in run.optimizers:
        for name in ("step_pre", "step_post", "state_dict_pre", "load_state_dict_pre"):
            assert not getattr(optimizer, f"_optimizer_{name}_hooks"), name
        assert len(optimizer.param_groups) == 1
    for p in module.parameters():
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and not part._state_dict_hooks


class InMidStep(pl.Callback):
    """Copies and saves things in the middle of a run, as averaging and sweeps do."""

    def __init__(self, step: int) -> None:
        self.step, self.copies = step, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            stream = io.BytesIO()
            torch.save(pl_module, stream)
            stream.seek(0)
            self.copies = [
                copy.deepcopy(pl_module),
                torch.load(stream, weights_only=False),
                copy.deepcopy(optimizer),
                pickle.loads(pickle.dumps(optimizer)),
            ]


def test_copies_in_mid_run_have_no_hooks_and_disturb_nothing() -> None:
    spy = InMidStep(5)
    run, module = train([DynamicsMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0), spy], epochs=1)
    _leaves_no_hook(run, module)
    for one in spy.copies[:2]:
        _leaves_no_hook(type("Nothing", (), {"optimizers": spy.copies[2:]}), one)
    _, without = train([DynamicsMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)], epochs=1)
    assert same_weights(module, without)


MAKERS = {
    "dynamics": lambda: DynamicsMonitor(every_n_steps=2),
    "sharpness": lambda: SharpnessMonitor(every_n_steps=4, quantities=("hessian", "blocks")),
    "weights": lambda: WeightMonitor(every_n_steps=1),
    "noise": lambda: NoiseAdaptiveLR(warmup=0),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_callbacks_can_be_copied_at_any_time(kind: str, way: Any) -> None:
    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                copies.append(way(original))

    original: Any = MAKERS[kind]()
    copies = [way(original)]
    run, _ = train([original, Copying()], epochs=1)
    copies.append(way(original))
    for one in copies[1:]:
        assert one.history and repr(one) and one.failures == 0 and one.state_dict()
        assert all(one.history[tag].steps[0] == original.history[tag].steps[0] for tag in one.history)
    assert len(pickle.dumps(copies[-1])) < 1_000_000  # no model, no Trainer
    reference: Any = MAKERS[kind]()
    train([reference], epochs=2)
    for one in copies:
        train([one], epochs=2)
        for tag in reference.history:
            assert one.history[tag].steps.tolist() == reference.history[tag].steps.tolist(), tag
            if not tag.endswith("overhead"):
                np.testing.assert_allclose(one.history[tag].values, reference.history[tag].values, rtol=1e-5)


def test_monitors_say_one_overhead_and_one_number_of_failures(tmp_path: Any, monkeypatch: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitors = [GradientMonitor(every_n_steps=4), WeightMonitor(every_n_steps=4), SharpnessMonitor(every_n_steps=4)]
    monkeypatch.setattr("dynamon.monitoring.weight_meter.weight_readings", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="the weight measurement failed"):
        train(monitors, epochs=1, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    last = events.Scalars("dynamon/overhead")[-1].value  # written before the run ended: of a little less time
    spent, running = sum(monitor._budget.spent for monitor in monitors), monitors[0]._budget.running
    assert max(monitor.overhead for monitor in monitors) < last < 2 * spent / (running - spent)
    assert events.Scalars("dynamon/failures")[-1].value == 2  # at steps 0 and 4
    assert monitors[0].failures == 0 and monitors[1].failures == 2


def test_panels_show_what_is_switched_on_when_training_starts(tmp_path: Any) -> None:
    monitor = SharpnessMonitor(every_n_steps=2, quantities=("stability_ratio",))
    logger = TensorBoardLogger(tmp_path)
    module = _with_data(Classifier(nn.Linear(8, 3, bias=False), lambda p: torch.optim.Muon(p, lr=1e-2)))
    train([monitor, NoiseAdaptiveLR()], epochs=1, module=module, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert "sharpness/directional" in monitor.history and b"sharpness/directional" in layout.replace(b"\\", b"")


@pytest.mark.parametrize(
    ("watcher", "said"),
    [
        (lambda tag: EarlyStopping(tag), "EarlyStopping watches gradient/norm, .*Set every_n_steps in GradientMonitor"),
        (
            lambda tag: ModelCheckpoint(monitor=tag),
            "ModelCheckpoint watches gradient/norm, .*every_n_steps in Gradient",
        ),
    ],
)
def test_who_watches_a_tag_under_a_budget_is_told(tmp_path: Any, watcher: Any, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        callbacks = [GradientMonitor(budget=1e9), watcher("gradient/norm")]
        train(callbacks, epochs=1, default_root_dir=tmp_path, enable_checkpointing=True)


@pytest.mark.parametrize(
    "watcher",
    [EarlyStopping("gradient/norm", strict=False), EarlyStopping("train/loss"), ModelCheckpoint(monitor="train/loss")],
)
def test_who_watches_something_else_or_can_wait_is_not(tmp_path: Any, watcher: Any) -> None:
    train([GradientMonitor(budget=1e9), watcher], epochs=1, default_root_dir=tmp_path, enable_checkpointing=True)
    train([GradientMonitor(every_n_steps=1), EarlyStopping("gradient/norm")], epochs=1)


def test_a_scheduler_that_watches_a_tag_is_told() -> None:
    class Plateau(Learner):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "noise/dual_median"}}

    class Known(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.callback_metrics["noise/dual_median"] = torch.tensor(1.0)

    with pytest.warns(UserWarning, match="ReduceLROnPlateau watches noise/dual_median, which has one value a layer"):
        train([GradientMonitor(every_n_steps=1), Known()], epochs=1, module=Plateau())


@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 0, "max_epochs": 4}, {"limit_train_batches": 0}, {"max_epochs": 0}],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_fit_without_steps(arguments: dict[str, Any]) -> None:
    monitor, steering = DynamicsMonitor(budget=None), NoiseAdaptiveLR()
    run = trainer([monitor, steering], **{"max_steps": -1, "max_epochs": 4, **arguments})
    run.fit(Learner())
    assert not monitor.history and monitor.failures == 0 and copy.deepcopy(monitor).state_dict()
    train([monitor, steering], epochs=1)
    assert "gradient/norm" in monitor.history


def test_trying_out_after_a_real_run() -> None:
    monitor, steering = DynamicsMonitor(every_n_steps=4), NoiseAdaptiveLR()
    train([monitor, steering], epochs=1)
    trainer([monitor, steering], max_steps=-1, max_epochs=1, fast_dev_run=2).fit(Learner())
    assert monitor.history["gradient/norm"].steps.tolist() == [0, 1] and monitor.failures == 0


def test_a_search_for_a_batch_size_that_validates_at_the_start(tmp_path: Any) -> None:
    monitor, steering = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    finder = BatchSizeFinder(steps_per_trial=2, init_val=8, max_trials=2)
    run, module = train([monitor, steering, finder], epochs=2, default_root_dir=tmp_path)
    assert monitor.history["weight/rms"].steps.tolist() == list(range(run.global_step))
    assert updates(steering) == run.global_step - 1


def test_the_failure_to_settle_does_not_hide_what_went_wrong(monkeypatch: Any) -> None:
    """After a fault on the device, waiting for a reading raises too; the user's own error is what is shown."""
    stop = AtEpoch(1, lambda *_: (_ for _ in ()).throw(Stopped()))
    steering = NoiseAdaptiveLR(warmup=0)

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    class Break(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            monkeypatch.setattr("dynamon.quantities.readings.PendingReadings.wait", broken)

    with pytest.raises(Stopped):
        train([steering, Break(), stop])


def test_noise_read_through_the_steering_is_that_of_training(tmp_path: Any) -> None:
    gradients, steering = GradientMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    train([gradients, steering, AtEpoch(2, rate_search)], default_root_dir=tmp_path)
    right = GradientMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    train(list(right))
    for tag in ("gradient/norm", "gradient/cosine", "noise/dual", "gradient/local_smoothness"):
        np.testing.assert_array_equal(gradients.history[tag].values, right[0].history[tag].values, err_msg=tag)


def test_what_is_printed() -> None:
    monitor, steering = WeightMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)
    assert repr(monitor) == "WeightMonitor(no readings, 0 quantities in .history)"
    fit(Classifier(mlp()), [monitor, steering], steps=4)
    assert "4 weight readings" in repr(monitor) and "NoiseAdaptiveRates, ratios" in repr(steering)


def test_what_is_printed_of_curvature() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    operator = HessianOperator(lambda: (weight**4).sum(), [weight])  # 12 w^2 on the diagonal
    assert repr(operator) == "HessianOperator(3 x 3, float64 on cpu, double_backward)"
    assert repr(2 * operator).startswith("Combined(3 x 3, float64 on cpu")
    found = top_eigenvalues(operator)
    assert repr(found).startswith("Eigenpairs(108 (residual ") and "converged, double_backward)" in repr(found)
    assert "tensor" not in repr(found)


def test_dir_lists_what_can_be_asked_for() -> None:
    listed = set(dir(dynamon))
    assert {"measure", "describe_layers", "callbacks", "kernels", "curvature", "rates", "runs"} <= listed
    assert not {"import_module", "Any"} & listed
    for name in listed:
        assert getattr(dynamon, name, None) is not None or name.startswith("__"), name


def test_a_reading_before_an_exception_is_written_at_its_own_step(tmp_path: Any) -> None:
    """The exception comes between two of our callbacks, in a run that then goes on."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6 and not stopped:
                stopped.append(True)
                raise Stopped

    stopped: list[bool] = []
    logger, module = TensorBoardLogger(tmp_path), Learner()
    monitor = GradientMonitor(every_n_steps=5)
    run = trainer([monitor, Stop(), NoiseAdaptiveLR()], max_steps=-1, max_epochs=2, logger=logger)
    with pytest.raises(Stopped):
        run.fit(module)
    run.fit(module)
    events = {event.step: event.value for event in EventAccumulator(logger.log_dir).Reload().Scalars("gradient/norm")}
    known = monitor.history["gradient/norm"]
    assert 5 in events and set(events) == set(known.steps.tolist())
    for step, value in zip(known.steps.tolist(), known.values.tolist(), strict=True):
        assert events[step] == pytest.approx(value, rel=1e-6)


def test_events_of_steering_do_not_pile_up(monkeypatch: Any) -> None:
    """Nobody asks for the overhead where nothing is logged; the events that time a GPU are read all the same."""

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self, _: Any) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Any) -> float:
            return 2000.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: None)
    budget = Budget(None)
    for _ in range(100):
        with budget.charge("steering", torch.device("cuda", 0)):
            pass
    assert len(budget._events) <= 64 and budget.overhead > 0 and budget.spent == pytest.approx(200, rel=0.01)
    assert pickle.loads(pickle.dumps(budget)).spent == budget.spent
