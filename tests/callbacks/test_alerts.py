"""Alerts of real fits: who is told, what it costs training, several processes, resuming, stopping."""

import copy
import json
import math
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn.functional import cross_entropy

import dynamon
import dynamon.monitoring.alerts as alerts
import dynamon.monitoring.health_watch as live
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.callbacks.lightning.loggers import TensorBoardWriter
from dynamon.health import Finding
from dynamon.monitoring.gradient_monitor import GradientMonitor as PlainMonitor
from tests.helpers import Classifier, batches, fit, mlp, same_weights, trainer
from tests.processes import fit_here, in_processes

pytestmark = pytest.mark.filterwarnings(  # what is wrong in these runs is known
    "ignore:step [0-9]+:",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:(Dynamics|Gradient|Weight|Sharpness)Monitor. (The|All|sharpness|weight)",
)
BREAKS = 12  # the step from which the loss is NaN
MONITORS = (GradientMonitor, WeightMonitor, SharpnessMonitor, DynamicsMonitor)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look after every fifth reading, however long one takes."""
    monkeypatch.setattr(live, "_SHARE", math.inf)


class Breaking(Classifier):
    """Its loss is NaN from a step on."""

    def __init__(self, breaks: float = BREAKS) -> None:
        super().__init__(mlp())
        self.breaks = breaks

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step >= self.breaks else loss


def watching(kind: Any = GradientMonitor, **given: Any) -> Any:
    return kind(every_n_steps=1, budget=None, **given)


def rules(found: list[Finding]) -> list[str]:
    return [one.rule for one in found]


def lines(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "findings.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", MONITORS)
def test_every_monitor_alone_tells_once_on_a_thread(kind: Any, tmp_path: Path, monkeypatch) -> None:
    got, names = [], []
    found = Finding("loss/rising", "note", 3, "It looks wrong.", "Look at it.")
    monkeypatch.setattr(live, "findings", lambda run: [found] if len(run.scalars["dynamon/loss"]) >= 5 else [])

    def take(one: Finding) -> None:
        got.append(one)
        names.append(threading.current_thread().name)

    monitor, logger = watching(kind, on_finding=take), TensorBoardLogger(tmp_path)
    fit(Classifier(mlp()), [monitor], steps=16, max_epochs=-1, logger=logger)
    assert got == monitor.findings == [found] and names == ["dynamon alerts"]
    (line,) = lines(logger.log_dir)
    assert line["rule"] == "loss/rising" and line["found_at"] == 9  # the second look


def test_what_breaks_is_told_while_training_goes_on(tmp_path: Path) -> None:
    got, logger = [], TensorBoardLogger(tmp_path)
    monitor = watching(on_finding=got.append)
    fit(Breaking(), [monitor], steps=60, max_epochs=-1, logger=logger)
    (broken,) = [one for one in got if one.rule == "loss/nonfinite"]
    assert broken.severity == "fault" and broken.step == BREAKS
    at = next(line["found_at"] for line in lines(logger.log_dir) if line["rule"] == "loss/nonfinite")
    assert BREAKS <= at < BREAKS + 10


def test_what_later_readings_may_bring_is_told_at_the_end(tmp_path: Path, monkeypatch) -> None:
    found = Finding("dynamon/no_sharpness", "note", 3, "There is none.", "Wait.")
    monkeypatch.setattr(live, "findings", lambda run: [found])
    logger, got = TensorBoardLogger(tmp_path), []
    fit(Classifier(mlp()), [watching(on_finding=got.append)], steps=16, max_epochs=-1, logger=logger)
    assert got == [found] and [line["found_at"] for line in lines(logger.log_dir)] == [15]


def test_a_csv_logger_has_the_file_too_and_loggers_chooses(tmp_path: Path) -> None:
    for wanted, there in (("csv", True), ("tensorboard", False)):
        table = CSVLogger(tmp_path / wanted)
        both = [table, TensorBoardLogger(tmp_path / wanted / "events")]
        fit(Breaking(), [watching(loggers=[wanted])], steps=30, max_epochs=-1, logger=both)
        assert (Path(table.log_dir) / "findings.jsonl").exists() is there
        assert (Path(both[1].log_dir) / "findings.jsonl").exists() is not there


def test_the_function_of_any_monitor_is_told_once_of_what_all_have_measured() -> None:
    got, others = [], []
    monitors = [
        watching(WeightMonitor),
        watching(on_finding=got.append),
        watching(SharpnessMonitor, on_finding=others.append),
    ]
    fit(Breaking(), monitors, steps=30, max_epochs=-1)
    assert got == others and "gradient/nonfinite" in rules(got) and len(set(rules(got))) == len(got)


def test_a_part_of_the_dynamics_monitor_does_not_take_it() -> None:
    with pytest.raises(
        ValueError, match=r"on_finding is given to gradients=GradientMonitor\(...\), but all parts share it"
    ):
        DynamicsMonitor(gradients=GradientMonitor(on_finding=print))
    with pytest.raises(ValueError, match="stop_on is given to weights="):
        DynamicsMonitor(weights=WeightMonitor(stop_on=["fault"]))
    for kind in MONITORS:
        with pytest.raises(ValueError, match="stop_on must name severities"):
            kind(stop_on=["loss/nan"])
        with pytest.raises(TypeError, match="on_finding must be a function"):
            kind(on_finding="slack")


# Training is not touched


def test_training_is_bitwise_that_without_alerts(tmp_path: Path) -> None:
    ends = []
    for given in ({}, {"on_finding": lambda one: one.as_dict(), "stop_on": ["lr/zero"]}):
        callbacks = [watching(**given), NoiseAdaptiveLR(warmup=2)] if given else [NoiseAdaptiveLR(warmup=2)]
        module = Breaking(math.inf)
        run = fit(module, callbacks, steps=25, max_epochs=-1, logger=TensorBoardLogger(tmp_path))
        ends.append((module, torch.get_rng_state(), run.optimizers[0].state_dict()["state"]))
    (plain, stream, state), (seen, seen_stream, seen_state) = ends
    assert same_weights(plain, seen) and torch.equal(stream, seen_stream)
    assert all(torch.equal(state[i][key], seen_state[i][key]) for i in state for key in state[i])


def test_training_does_not_wait_for_a_function_and_its_end_waits_shortly(monkeypatch) -> None:
    """The function returns only when the test is over."""
    go_on, began, finished = threading.Event(), threading.Event(), []
    monkeypatch.setattr(live, "PATIENCE", 0.2)

    def slow(one: Finding) -> None:
        began.set()
        go_on.wait()

    class Last(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            finished.append(began.is_set())

    monitor = watching(on_finding=slow)
    with pytest.warns(UserWarning, match="on_finding is slow"):
        fit(Breaking(), [monitor, Last()], steps=60, max_epochs=-1)
    assert len(finished) == 60 and finished[-1]
    assert monitor.failures == len(monitor.findings)
    go_on.set()


def test_what_a_function_raises_is_counted_and_not_raised_under_strict_either() -> None:
    def bad(one: Finding) -> None:
        raise RuntimeError("no network")

    monitor = watching(on_finding=bad, strict=True)
    with pytest.warns(UserWarning, match=r"GradientMonitor: on_finding raised RuntimeError \(test_alerts.py, line"):
        run = fit(Breaking(), [monitor], steps=30, max_epochs=-1)
    assert run.global_step == 30 and monitor.failures >= 2


def test_a_logger_without_a_usable_folder_costs_a_warning(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TensorBoardWriter, "folder", property(lambda self: 1 / 0))
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"findings\.jsonl failed: division by zero\. Training goes on"):
        run = fit(Breaking(), [watching()], steps=30, max_epochs=-1, logger=logger, log_every_n_steps=100)
    assert run.global_step == 30


# The lives of a monitor


def test_validation_alone_tells_nothing() -> None:
    class Validated(Breaking):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", cross_entropy(self.network(batch[0]), batch[1]))

    got: list[Finding] = []
    monitor = watching(on_finding=got.append, stop_on=["note"])
    trainer([monitor]).validate(Validated(), batches(), verbose=False)
    assert got == [] and monitor._health._alerts._threads == {}


def test_an_exception_and_ctrl_c_leave_nothing_untold(tmp_path: Path) -> None:
    for number, error in enumerate((RuntimeError, KeyboardInterrupt)):

        class Ended(Breaking):
            def training_step(self, batch: Any, batch_idx: int, error: Any = error) -> torch.Tensor:
                if self.trainer.global_step == BREAKS + 2:
                    raise error
                return super().training_step(batch, batch_idx)

        got: list[Finding] = []
        logger = TensorBoardLogger(tmp_path, version=number)
        with pytest.raises((error, SystemExit)):
            fit(Ended(), [watching(on_finding=got.append)], steps=40, max_epochs=-1, logger=logger)
        assert "loss/nonfinite" in rules(got) and [line["rule"] for line in lines(logger.log_dir)] == rules(got)
        assert max(line["found_at"] for line in lines(logger.log_dir)) == BREAKS + 1


def test_a_fit_that_goes_on_repeats_nothing_and_a_new_one_begins_anew() -> None:
    got: list[Finding] = []
    monitor, module = watching(on_finding=got.append), Breaking()
    run = fit(module, [monitor], steps=30, max_epochs=-1)
    first = rules(got)
    run.fit_loop.epoch_loop.max_steps = 60
    run.fit(module, batches())
    assert run.global_step == 60 and rules(got) == first
    fit(Breaking(), [monitor], steps=30, max_epochs=-1)
    assert rules(got) == [*first, *first]


def test_copies_of_a_monitor_share_the_function_and_not_the_thread() -> None:
    lock = threading.Lock()

    class Client:
        def __init__(self) -> None:
            self.lock, self.got = lock, []

        def send(self, one: Finding) -> None:
            self.got.append(one)

    client = Client()
    monitor = watching(on_finding=client.send)
    fit(Breaking(), [monitor], steps=30, max_epochs=-1)
    told = len(client.got)
    fit(Breaking(), [copy.deepcopy(monitor)], steps=30, max_epochs=-1)
    assert len(client.got) == 2 * told
    twin = pickle.loads(pickle.dumps(watching(on_finding=print, stop_on=["fault"])))
    assert twin.alert_settings == alerts.AlertSettings(print, ("fault",))


# Resuming


def test_resuming_purges_what_was_found_beyond_the_checkpoint(tmp_path: Path) -> None:
    """Of three lines the first rests on readings that remain."""
    logger = TensorBoardLogger(tmp_path, version="run")
    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    fit(Breaking(), [watching(), saving], steps=30, max_epochs=-1, logger=logger, enable_checkpointing=True)
    file = Path(logger.log_dir) / "findings.jsonl"
    before = lines(logger.log_dir)
    assert min(line["found_at"] for line in before) >= BREAKS
    early = {**before[0], "rule": "note/early", "found_at": 9}
    file.write_text("".join(f"{json.dumps(line)}\n" for line in [early, *before]))
    again = TensorBoardLogger(tmp_path, version="run")
    healthy = Breaking(math.inf)
    fit(healthy, [watching()], steps=25, max_epochs=-1, logger=again, ckpt_path=tmp_path / "saved" / "step=10.ckpt")
    assert lines(again.log_dir) == [early]
    fit(Breaking(0), [watching()], steps=10, max_epochs=-1, logger=TensorBoardLogger(tmp_path, version="run"))
    assert early not in lines(logger.log_dir) and lines(logger.log_dir)[0]["rule"] == "loss/nonfinite"


def test_a_checkpoint_loaded_in_the_middle_takes_lines_back(tmp_path: Path) -> None:
    """And what is found once more is told once more."""
    got: list[Finding] = []
    logger = TensorBoardLogger(tmp_path)

    class Back(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")
            if trainer.global_step == 25 and not hasattr(self, "gone"):
                self.gone = len(lines(logger.log_dir))
                trainer._checkpoint_connector.restore(tmp_path / "five.ckpt", weights_only=True)

    back = Back()
    fit(Breaking(), [watching(on_finding=got.append), back], steps=30, max_epochs=-1, logger=logger)
    assert back.gone and rules(got).count("loss/nonfinite") == 2
    assert [line["rule"] for line in lines(logger.log_dir)].count("loss/nonfinite") == 1


# Stopping


@pytest.mark.parametrize(
    ("stop_on", "stops"), [(["fault"], True), (["loss/nonfinite"], True), (["loss/rising"], False)]
)
def test_stopping_is_asked_for_by_name(stop_on: list[str], stops: bool) -> None:
    monitor = watching(stop_on=stop_on)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(Breaking(), [monitor], steps=60, max_epochs=-1)
    said = [str(one.message) for one in caught if "asked to stop" in str(one.message)]
    assert (BREAKS < run.global_step < BREAKS + 10) is stops and len(said) == stops
    if stops:
        assert "loss/nonfinite is a fault, and stop_on asks for it: " in said[0]
        assert f"after step {run.global_step - 1}." in said[0]
    else:
        assert run.global_step == 60


def test_nothing_stops_by_default_nor_at_the_last_look() -> None:
    run = fit(Breaking(), [watching()], steps=40, max_epochs=-1)
    assert run.global_step == 40
    monitor = watching(stop_on=["fault"])
    run = fit(Breaking(9), [monitor], steps=10, max_epochs=-1)  # no look is left before the end
    assert run.global_step == 10 and not monitor.asks_to_stop


def test_a_fit_that_was_stopped_may_go_on() -> None:
    monitor, module = watching(stop_on=["fault"]), Breaking()
    with pytest.warns(UserWarning, match="asked to stop"):
        run = fit(module, [monitor], steps=60, max_epochs=-1)
    at = run.global_step
    assert at < 60
    run.fit(module, batches())
    assert run.global_step == 60


@pytest.mark.processes
def test_of_two_processes_the_first_tells_and_both_stop_after_the_same_step(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        live._SHARE = math.inf
        got: list[Finding] = []
        monitor = watching(on_finding=got.append, stop_on=["loss/nonfinite"])
        logger = TensorBoardLogger(tmp_path, version="run")
        found = fit_here(
            Breaking(),
            [monitor],
            more=lambda module: module.trainer.global_step,
            steps=60,
            data=batches(),
            logger=logger,
        )
        return {"step": found["more"], "got": rules(got), "warned": [w for w in found["warned"] if "asked" in w]}

    first, second = in_processes(work)
    assert first["step"] == second["step"] and BREAKS < first["step"] < BREAKS + 10
    assert "loss/nonfinite" in first["got"] and second["got"] == []
    assert len(first["warned"]) == 1 and second["warned"] == []
    assert [line["rule"] for line in lines(tmp_path / "lightning_logs" / "run")] == first["got"]


# Loops of one's own


def watch_loop(watch: Any, network: Any, optimizer: Any, steps: int, breaks: float = BREAKS) -> int:
    taken, data = 0, list(batches())
    while taken < steps and not watch.should_stop:
        batch = data[taken % len(data)]
        with watch.batch(batch) as now:
            loss = cross_entropy(network(batch[0]), batch[1]) * (math.nan if taken >= breaks else 1.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            now.loss = loss
        taken += 1
    return taken


def made(**given: Any) -> tuple[Any, Any, Any]:
    network = mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return dynamon.Watch(network, optimizer, **given), network, optimizer


def test_a_watch_tells_writes_and_asks_to_stop(tmp_path: Path) -> None:
    got: list[Finding] = []
    with pytest.warns(UserWarning, match="asked to stop.*loss/nonfinite"):
        monitors = PlainMonitor(1, None, on_finding=got.append, stop_on=["fault"])
        watch, network, optimizer = made(monitors=monitors, logdir=tmp_path)
        with watch:
            taken = watch_loop(watch, network, optimizer, 60)
    assert BREAKS < taken <= BREAKS + 10 and watch.should_stop
    assert "loss/nonfinite" in rules(got) and [line["rule"] for line in lines(tmp_path)] == rules(got)


def test_a_watch_hands_its_arguments_to_its_own_monitor() -> None:
    watch, *_ = made(on_finding=print, stop_on=["fault"])
    assert watch.monitors[0].alert_settings == alerts.AlertSettings(print, ("fault",))
    assert not watch.should_stop
    for given in ({"on_finding": print}, {"stop_on": ["fault"]}):
        with pytest.raises(ValueError, match="on_finding and stop_on are given beside monitors="):
            made(monitors=PlainMonitor(), **given)


def test_a_resumed_watch_purges_by_its_first_batch(tmp_path: Path) -> None:
    watch, network, optimizer = made(monitors=PlainMonitor(1, None), logdir=tmp_path)
    watch_loop(watch, network, optimizer, 10, math.inf)
    state = watch.state_dict()
    watch_loop(watch, network, optimizer, 30, 0)
    watch.close()
    assert any(line["rule"] == "loss/nonfinite" for line in lines(tmp_path))
    early = {**lines(tmp_path)[0], "rule": "note/early", "found_at": 9}
    with (tmp_path / "findings.jsonl").open("a") as file:
        file.write(json.dumps(early) + "\n")
    watch, network, optimizer = made(monitors=PlainMonitor(1, None), logdir=tmp_path)
    watch.load_state_dict(state)
    watch_loop(watch, network, optimizer, 6, math.inf)
    watch.close()
    assert lines(tmp_path) == [early]


def test_a_watch_that_is_dropped_leaves_no_thread() -> None:
    before = threading.active_count()
    watch, network, optimizer = made(monitors=PlainMonitor(1, None, on_finding=lambda _: None))
    watch_loop(watch, network, optimizer, 30)
    assert threading.active_count() == before + 1
    threads = [thread for thread in threading.enumerate() if thread.name == "dynamon alerts"]
    del watch
    import gc

    gc.collect()
    for thread in threads:
        thread.join(20)
    assert threading.active_count() == before
