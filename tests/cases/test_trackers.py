"""What trackers do with what is written: rows, names, and what an evaluation of the probe must not reach."""

import importlib
import os
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, LayerwiseLR, NoiseAdaptiveLR, SharpnessMonitor
from dynamon.callbacks.lightning.loggers import mlflow_name
from dynamon.health import Finding
from dynamon.isolation.trackers import mute_trackers
from dynamon.rates import FixedRates
from dynamon.runs import read_run
from tests.helpers import Classifier, batches, fit, mlp

STEPS = 12
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


def _tracker_or_skip(name: str) -> types.ModuleType:
    """The package, which `.ci/run` asks for."""
    if os.environ.get("DYNAMON_TRACKERS") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name)


class Tracked(Classifier):
    """Hands every loss to ``write`` as well, and to Lightning where it logs."""

    def __init__(self, write: Any, logs: bool = False) -> None:
        super().__init__(mlp())
        self.write, self.logs = write, logs

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.write({"mine": loss.item()}, self.global_step)
        if self.logs:
            self.log("train/loss", loss)
        return loss


def monitors() -> list[Any]:
    """Every meter at every step but the first, and steering."""
    return [DynamicsMonitor(every_n_steps=2, strict=True), NoiseAdaptiveLR(warmup=2)]


class Counting(Logger):
    """Counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name, version = "counting", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_one_row_a_measured_step_for_all_callbacks_together() -> None:
    logger = Counting()
    fit(Classifier(mlp()), monitors(), logger=logger, steps=STEPS, log_every_n_steps=1)
    ours = [(step, row) for step, row in logger.rows if "lr/base" in row]
    assert [step for step, _ in ours] == list(range(STEPS))
    measured = [row for step, row in ours if step % 2 == 0]
    assert all({"gradient/norm", "sharpness/probe_loss", "lr/base", "dynamon/overhead"} <= set(row) for row in measured)
    assert len(logger.rows) == 2 * STEPS  # Lightning's own, and this one


def test_one_overhead_a_step_in_the_history() -> None:
    monitor, steering = monitors()
    fit(Classifier(mlp()), [monitor, steering], steps=STEPS)
    assert monitor.history["dynamon/overhead"].steps.tolist() == list(range(0, STEPS, 2))


def test_a_failed_meter_takes_nothing_of_the_others_with_it(monkeypatch) -> None:
    monkeypatch.setattr("dynamon.monitoring.weight_meter.weight_readings", lambda *_: 1 / 0)
    monitor, logger = DynamicsMonitor(every_n_steps=2), Counting()
    with pytest.warns(UserWarning, match="weight measurement failed"):
        fit(Classifier(mlp()), [monitor], steps=6, logger=logger)
    assert monitor.history["gradient/norm"].steps.tolist() == [0, 2, 4]
    assert "weight/operator" not in monitor.history
    assert sum("gradient/norm" in row for _, row in logger.rows) == 3


# Weights & Biases


def _records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format, behind a header of seven bytes."""
    raw, at, out = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        if at + 7 + length > len(raw):  # the rest of it is being written
            return
        piece, at = raw[at + 7 : at + 7 + length], at + 7 + length
        out = piece if kind in (1, 2) else out + piece
        if kind in (1, 4):
            yield out


def _history(folder: Path) -> list[dict[str, str]]:
    """The rows that W&B kept."""
    rows = (record.history.item for record in _written(folder))
    return [{item.key or "/".join(item.nested_key): item.value_json for item in row} for row in rows if row]


def _written(folder: Path) -> list[Any]:
    """What W&B keeps, once another process has written it all."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(600):
        files = list(folder.glob("wandb/offline*/*.wandb"))
        records = [wandb_internal_pb2.Record.FromString(raw) for file in files for raw in _records(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise TimeoutError(f"no end of the run in {files}")


@theirs
@pytest.mark.parametrize("is_stepped", [True, False])
def test_wandb_keeps_every_point_of_the_users(tmp_path: Path, monkeypatch, is_stepped: bool) -> None:
    """Beside Lightning's rows and those of two callbacks, and each of ours with its own step."""
    wandb = _tracker_or_skip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    module = Tracked(lambda row, step: wandb.log(row, step=step if is_stepped else None), logs=True)
    fit(module, monitors(), logger=logger, steps=STEPS, log_every_n_steps=1)
    wandb.finish()
    rows = _history(tmp_path)
    assert sum("mine" in row for row in rows) == STEPS
    assert sum("train/loss" in row for row in rows) == STEPS
    read = [row for row in rows if "gradient/norm" in row]
    assert [int(row["trainer/global_step"]) for row in read] == list(range(0, STEPS, 2))
    assert sum("lr/base" in row for row in rows) == STEPS


@theirs
@pytest.mark.parametrize("chosen", [None, ["tensorboard"]])
def test_wandb_keeps_an_alert_for_each_fault(tmp_path: Path, monkeypatch, chosen: list[str] | None) -> None:
    """With its advice, and without HTML; none where another logger was asked for. The rows stay what they are."""
    wandb = _tracker_or_skip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = [
        Finding("update/stopped", "warning", 3, "<b>net</b>\x1b[31m stopped.", "Look at it.", ("<b>net</b>",)),
        Finding("gradient/unused", "note", 3, "Not for people.", ""),
    ]
    monkeypatch.setattr("dynamon.monitoring.health_watch.findings", lambda run: found)
    loggers = [WandbLogger(offline=True, save_dir=tmp_path), TensorBoardLogger(tmp_path / "events")]
    monitor = DynamicsMonitor(every_n_steps=2, loggers=chosen)
    with pytest.warns(UserWarning, match="stopped"):
        fit(Classifier(mlp()), [monitor], logger=loggers, steps=STEPS, log_every_n_steps=1)
    wandb.finish()
    records = _written(tmp_path)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert monitor.failures == 0
    if chosen:
        assert alerts == []
        return
    (alert,) = alerts
    assert (alert.title, alert.level) == ("dynamon: update/stopped, warning", "WARN")
    assert alert.text == "From step 3: &lt;b&gt;net&lt;/b&gt; [31m stopped. Look at it."
    assert len([record for record in records if record.history.item]) >= STEPS


# MLflow


class Relations(Classifier):
    """Layers whose names hold characters that MLflow does not take."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({name: nn.Linear(8, 3) for name in ("paper->cites", "paper<-cites", "a/b")}))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(sum(layer(batch[0]) for layer in self.network.values()), batch[1])
        self.log("lr", 0.1)
        return loss


@theirs
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_keeps_layers_apart_and_the_users_metrics(tmp_path: Path, monkeypatch, store: str) -> None:
    """A file store has folders for groups: the user's ``lr`` and our ``lr/base`` must both be there."""
    tracking = _tracker_or_skip("mlflow.tracking")
    _tracker_or_skip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path}/m.db" if store == "sqlite" else f"file:{tmp_path}/runs"
    logger = MLFlowLogger("e", tracking_uri=uri)
    steering = LayerwiseLR(FixedRates({"network.paper->cites.*": 0.25}))
    fit(Relations(), [steering], logger=logger, steps=4)
    assert steering.failures == 0
    client = tracking.MlflowClient(tracking_uri=uri)
    found = client.get_run(logger.run_id).data.metrics
    assert found["lr"] == pytest.approx(0.1)
    assert found["lr.base" if store == "file" else "lr/base"] == pytest.approx(1e-2)
    ratios = [found[name] for name in found if "ratio" in name and name.endswith("cites.weight")]
    assert sorted(ratios) == [0.25, 1.0]


def test_mlflow_names_are_taken_as_they_are_and_differ() -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_/. -")
    tags = [
        "lr.ratio/a->b",
        "lr.ratio/a<-b",
        "lr.ratio/a-b",
        "lr.ratio/a/b",
        "lr.ratio/a/../b",
        "lr.ratio/é",
        "lr/base",
    ]
    names = [mlflow_name(tag) for tag in tags]
    assert len(set(names)) == len(tags)
    assert all(set(name) <= allowed and name.count("/") == 1 for name in names)
    assert names[-1] == "lr/base"
    assert mlflow_name("gradient.dual/net.0.weight") == "gradient.dual/net.0.weight"


@theirs
@pytest.mark.parametrize("prefix", ["", "run"])
def test_one_name_that_mlflow_finds_too_long_costs_none_of_the_others(tmp_path: Path, monkeypatch, prefix: str) -> None:
    """MLflow refuses the whole row for it. Two long ones that differ at their end stay two."""
    tracking = _tracker_or_skip("mlflow.tracking")
    _tracker_or_skip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("e", tracking_uri=f"sqlite:///{tmp_path}/m.db", prefix=prefix)
    long = "x" * 245
    network = nn.Sequential()
    network.add_module(f"{long}a", nn.Linear(8, 8))
    network.add_module(f"{long}b", nn.Linear(8, 3))
    steering = LayerwiseLR(FixedRates({f"network.{long}a.*": 0.25}))
    fit(Classifier(network), [steering], logger=logger, steps=4)
    assert steering.failures == 0
    found = tracking.MlflowClient(tracking_uri=logger._tracking_uri).get_run(logger.run_id).data.metrics
    assert max(map(len, found)) <= 250
    assert sorted(value for name, value in found.items() if "lr.ratio/" in name) == [0.25, 0.25, 1.0, 1.0]


# CSV


def test_csv_rows_are_one_a_step_and_are_saved_at_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10_000)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            table = Path(logger.log_dir) / "metrics.csv"
            seen.append(table.read_text().count("\n") if table.exists() else 0)

    fit(Classifier(mlp()), [*monitors(), Look()], logger=logger, steps=6, log_every_n_steps=10_000)
    assert seen == [0, 2, 2, 3, 3, 4]  # a header, and a row at steps 0, 2 and 4
    assert len(read_run(logger.log_dir)["gradient/norm"]) == 3


# What an evaluation must not reach


def _evaluating() -> SharpnessMonitor:
    return SharpnessMonitor(every_n_steps=2, quantities=["hessian", "directional", "critical"], strict=True)


def test_the_probe_writes_nothing_to_a_summary_writer_of_the_users(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        write = lambda row, step: writer.add_scalar("mine", row["mine"], len(calls))  # noqa: E731
        calls: list[float] = []
        fit(Tracked(lambda row, step: (write(row, step), calls.append(0.0))), [_evaluating()], steps=STEPS)
    # Points are numbered by all calls, those of evaluations included, which the module's own list forgets nothing of.
    assert len(read_run(tmp_path)["mine"]) == STEPS


def test_the_probe_writes_nothing_to_lightnings_loggers(tmp_path: Path) -> None:
    """By ``self.log``, ``self.logger``, and a logger object of the user's own."""
    logger, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")

    class Whole(Tracked):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.logger.experiment.add_scalar("by_logger", 1.0, self.global_step)
            table.log_metrics({"by_table": 1.0}, self.global_step)
            return super().training_step(batch, batch_idx)

    module = Whole(lambda *_: None, logs=True)
    fit(module, [_evaluating()], logger=logger, steps=STEPS, log_every_n_steps=1)
    table.save()
    run = read_run(logger.log_dir)
    assert len(run["by_logger"]) == len(run["train/loss"]) == len(read_run(table.log_dir)["by_table"]) == STEPS


@theirs
def test_mlflow_and_wandb_functions_are_muted(tmp_path: Path, monkeypatch) -> None:
    wandb = _tracker_or_skip("wandb")
    mlflow = _tracker_or_skip("mlflow")
    _tracker_or_skip("sqlalchemy")
    monkeypatch.setenv("WANDB_SILENT", "true")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    kept = wandb.init(mode="offline", dir=str(tmp_path)).log  # bound before anything is muted
    counts = {"step": 0}

    def write(row: dict[str, float], step: int) -> None:
        counts["step"] += 1
        mlflow.log_metric("one", row["mine"], step=counts["step"])
        mlflow.log_metrics({"two": row["mine"]}, step=counts["step"])
        wandb.log(row)
        kept({"kept": row["mine"]})

    with mlflow.start_run() as run:
        fit(Tracked(write), [_evaluating()], steps=STEPS)
    wandb.finish()
    assert counts["step"] > 2 * STEPS  # the loss was evaluated that often
    client = mlflow.tracking.MlflowClient()
    assert [len(client.get_metric_history(run.info.run_id, key)) for key in ("one", "two")] == [STEPS, STEPS]
    rows = _history(tmp_path)
    assert [sum(key in row for row in rows) for key in ("mine", "kept")] == [STEPS, STEPS]


def _tracker(monkeypatch, name: str, module: str, **members: Any) -> types.ModuleType:
    """A module as if the tracker had been imported."""
    made = types.ModuleType(module)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module, made)
    return made


def test_only_the_evaluating_thread_is_muted(monkeypatch) -> None:
    """And what was replaced is back afterwards, an exception in between or not."""
    seen = []

    class CometExperiment:
        def log_metric(self, value: str) -> None:
            seen.append(value)

    original = CometExperiment.log_metric
    _tracker(monkeypatch, "comet_ml", "comet_ml.experiment", CometExperiment=CometExperiment)
    experiment = CometExperiment()
    with pytest.raises(KeyError), mute_trackers():
        with mute_trackers():
            assert not experiment.log_metric("muted")
        assert not experiment.log_metric("muted").anything.of("it")
        other = threading.Thread(target=experiment.log_metric, args=("other thread",))
        other.start(), other.join()
        raise KeyError
    experiment.log_metric("afterwards")
    assert seen == ["other thread", "afterwards"]
    assert CometExperiment.log_metric is original


def test_the_loggers_of_other_threads_are_not_muted(monkeypatch) -> None:
    logger, started, go_on = Counting(), threading.Event(), threading.Event()

    def report(trainer: pl.Trainer) -> None:
        assert started.wait(20)
        for one in trainer.loggers:
            one.log_metrics({"background": 1.0}, step=0)
        go_on.set()

    def loss(module: Any, batch: Any) -> torch.Tensor:
        module.logger.log_metrics({"probe": 1.0}, step=0)
        if not started.is_set():
            started.set()
            assert go_on.wait(20)
        return cross_entropy(module.network(batch[0]), batch[1])

    class Background(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.thread = threading.Thread(target=report, args=(trainer,))
            self.thread.start()

    background = Background()
    fit(Classifier(mlp()), [SharpnessMonitor(every_n_steps=1, loss_fn=loss), background], logger=logger, steps=2)
    background.thread.join()
    written = [key for _, row in logger.rows for key in row]
    assert "background" in written and "probe" not in written


def test_a_tracker_that_cannot_be_muted_is_named_once(monkeypatch) -> None:
    _tracker(monkeypatch, "comet_ml", "comet_ml.experiment")
    monkeypatch.setattr("dynamon.isolation.trackers._told", set())
    with pytest.warns(UserWarning, match="comet_ml cannot be muted.*loss_fn") as seen:
        for _ in range(3):
            with mute_trackers():
                pass
    assert len(seen) == 1


def test_loggers_are_chosen_by_name_class_or_object() -> None:
    for wanted in ("counting", Counting, None):
        logger, other = Counting(), CSVLogger("unused")
        chosen = [logger if wanted is None else wanted]
        monitor = DynamicsMonitor(every_n_steps=2, loggers=chosen)
        fit(Classifier(mlp()), [monitor], batches(), logger=logger, steps=4)
        assert any("gradient/norm" in row for _, row in logger.rows)
        with pytest.raises(ValueError, match="matches no logger"):
            fit(Classifier(mlp()), [DynamicsMonitor(every_n_steps=2, loggers=chosen)], logger=other, steps=4)
