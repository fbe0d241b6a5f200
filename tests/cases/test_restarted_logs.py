"""Runs that were stopped and went on in the same folder, and folders that hold more than runs.

The oracle is TensorBoard's own EventAccumulator; where a session has no start that it could see, what it gives is put
through the rule of TensorBoard's data server, which it lacks: a point removes those of its tag that are not before it.
"""

import csv
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from dynamon.board.live import LiveFolder, LoggedRun
from dynamon.callbacks import GradientMonitor
from dynamon.cli import main
from dynamon.health import findings
from dynamon.runs import read_run, read_run_data
from dynamon.runs.event_files import EventFile
from tests.dynamon.board.test_live import Reader, client
from tests.dynamon.runs.test_reading import add_row, series
from tests.helpers import Classifier, fit, mlp

LOSS = {step: 1 - 0.004 * step + 0.01 * (-1) ** step for step in range(151)}


def write_file(path, events):
    """One event file of events, each with its own time, as TensorBoard's own writer frames them."""
    with path.open("ab") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def version(wall_time):
    return Event(wall_time=wall_time, file_version="brain.Event:2")


def start(step, wall_time):
    return Event(wall_time=wall_time, step=step, session_log=SessionLog(status=SessionLog.START))


def point(tag, step, value, wall_time):
    return Event(wall_time=wall_time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def tensorboard_shows(folder):
    """By tag, steps and values of EventAccumulator, in the order in which they were written."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def preempted(points):
    """The rule of the data server, by a loop."""
    kept = []
    for step, value in points:
        kept = [*(one for one in kept if one[0] < step), (step, value)]
    return dict(kept)


def expected_of(folder):
    return {tag: found for tag, points in tensorboard_shows(folder).items() if (found := preempted(points))}


def abandon(folder, purge_step):
    """A run that goes wrong from step 120 on and is killed at 150; the next goes on from the checkpoint of step 100."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(151):
            writer.add_scalar("train_loss", LOSS[step] + max(step - 120, 0) ** 2 / 18, step)
            writer.add_scalar("gradient/norm", 1.0 if step < 120 else 100.0, step)
    with SummaryWriter(str(folder), purge_step=purge_step) as writer:
        for step in range(101, 131):
            writer.add_scalar("train_loss", LOSS[step], step)
            writer.add_scalar("gradient/norm", 1.0, step)


@pytest.mark.parametrize("purge_step", [101, None])
def test_what_was_abandoned_is_gone_in_report_schedule_and_tab(tmp_path, capsys, purge_step):
    abandon(tmp_path, purge_step)
    shown = tensorboard_shows(tmp_path)["train_loss"]
    assert len(shown) == (181 if purge_step is None else 131) and shown[-1][0] == 130
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run["train_loss"].steps, np.arange(131))
    np.testing.assert_allclose(run["train_loss"].values, [LOSS[step] for step in range(131)], atol=1e-6)
    assert findings(read_run_data(tmp_path)) == []
    assert main(["report", str(tmp_path), "--text"]) == 0
    text = capsys.readouterr().out
    assert "131 steps" in text and "nothing looks wrong" in text and "loss: train_loss, by its name" in text
    factors = tmp_path / "factors.json"
    assert main(["schedule", str(tmp_path), "-o", str(factors)]) == 0
    assert "131 steps, from 131 readings" in capsys.readouterr().out
    np.testing.assert_allclose(json.loads(factors.read_text()), np.arange(130, -1, -1) / 130)  # constant norms
    tab = LoggedRun(tmp_path)
    reader = Reader(tab)
    reader.ask()
    reader.check(tmp_path)
    assert tab.findings() == []


def test_lightning_hands_the_step_on(tmp_path):
    """A tag that the new run logs seldom is void as well where ``purge_step`` is given."""
    for purge, steps in ((None, 60), (40, 50)):
        logger = TensorBoardLogger(tmp_path, name=None, version="run", **({} if purge is None else {"purge_step": 40}))
        monitor = GradientMonitor(every_n_steps=2)
        fit(Classifier(mlp()), [monitor], logger=logger, steps=steps, max_epochs=-1)
        for step in (45, 55) if purge is None else ():
            logger.experiment.add_scalar("seldom", 1.0, step)
        logger.experiment.close()
    run = read_run(tmp_path / "run")
    assert "seldom" not in run
    assert series(run) == expected_of(tmp_path / "run")


TAGS = ("train_loss", "gradient/norm", "seldom")
POINTS = st.lists(st.tuples(st.sampled_from(TAGS), st.integers(0, 12)), max_size=12)
SESSIONS = st.lists(
    st.tuples(st.booleans(), st.none() | st.integers(0, 12), POINTS, st.integers(0, 2)), min_size=1, max_size=4
)


def write_sessions(folder, sessions):
    """Files of a few sessions: with a version or not, with a start or not, of the same second or not."""
    clock, second, value = 1000.0, 1000, 0.0
    for number, (has_version, begin, points, later) in enumerate(sessions):
        second += later
        events = [version(clock)] if has_version or begin is not None else []  # a start comes with a version
        events += [start(begin, clock)] if begin is not None else []
        for tag, step in points:
            clock, value = clock + 0.01, value + 1
            events.append(point(tag, step, value, clock))
        write_file(folder / f"events.out.tfevents.{second:010d}.host.7.{number}", events)


@settings(max_examples=100, deadline=None)
@given(SESSIONS)
def test_sessions_of_all_kinds_are_read_as_tensorboard_reads_them(tmp_path_factory, sessions):
    folder = tmp_path_factory.mktemp("run")
    write_sessions(folder, sessions)
    assert series(read_run(folder)) == expected_of(folder)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=4))
def test_with_session_starts_it_is_exactly_what_tensorboard_shows(tmp_path_factory, restarts):
    """Writers that go on from where they say; the abandoned branch may be longer than the new one."""
    folder = tmp_path_factory.mktemp("run")
    sessions = [
        (True, None if not number else begin, [(tag, step) for step in range(begin, begin + length) for tag in TAGS], 1)
        for number, (begin, length) in enumerate(restarts)
    ]
    write_sessions(folder, sessions)
    shown = {tag: dict(points) for tag, points in tensorboard_shows(folder).items() if points}
    assert series(read_run(folder)) == shown


@settings(max_examples=100, deadline=None)
@given(SESSIONS, st.integers(0, 2**32))
def test_the_tab_has_the_same_whatever_the_order_in_which_files_grow(tmp_path_factory, sessions, seed):
    """Writers that live at the same time; the browser appends what comes and drops what it is told to."""
    folder, source, chance = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("source"), random.Random(seed)
    write_sessions(source, sessions)
    rest = {path.name: path.read_bytes() for path in source.iterdir()}
    reader = Reader(LoggedRun(folder))
    while any(rest.values()):
        name = chance.choice([name for name, data in rest.items() if data])
        size = chance.randint(1, 300)
        with (folder / name).open("ab") as file:
            file.write(rest[name][:size])
        rest[name] = rest[name][size:]
        reader.ask()
        reader.check(folder)


def test_files_of_one_second_are_sorted_by_their_first_record_once_it_is_whole(tmp_path):
    """The writer that began first is the later one by its name, and half of its first record came first."""
    whole = []
    for value, name in ((1.0, "b"), (2.0, "a")):
        path = tmp_path / f"events.out.tfevents.1.{name}"
        write_file(path, [point("x", 0, value, value)])
        whole.append((path, path.read_bytes()))
        path.unlink()
    (first, content), (second, other) = whole
    reader = Reader(LoggedRun(tmp_path))
    for path, data in ((first, content[:12]), (second, other), (first, content)):
        path.write_bytes(data)
        reader.ask()
    assert reader.scalars["x"][1].tolist() == [2.0] == read_run(tmp_path)["x"].values.tolist()


def test_a_start_that_is_read_with_the_points_it_makes_void(tmp_path):
    """All in one answer: the browser is told nothing of what is void already."""
    write_file(tmp_path / "events.out.tfevents.1.a", [version(1), *(point("x", s, 1.0, 1) for s in range(9))])
    reader = Reader(LoggedRun(tmp_path))
    reader.ask()
    epoch = reader.epoch
    more = [point("x", 9, 1.0, 2), point("y", 9, 1.0, 2)]
    write_file(tmp_path / "events.out.tfevents.1.a", more)
    write_file(tmp_path / "events.out.tfevents.2.a", [version(3), start(5, 3), point("z", 5, 1.0, 3)])
    reader.ask()
    reader.check(tmp_path)
    assert reader.epoch != epoch and reader.scalars["x"][0].tolist() == list(range(5)) and "y" not in reader.scalars


def test_tables_follow_the_same_rule(tmp_path):
    reader = Reader(LoggedRun(tmp_path))
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20):
            add_row(writer, "gradient/dual", step, ["a", "b"], [step, 0.5])
        add_row(writer, "weight/rms", 19, ["a"], [1.0])
    reader.ask()
    assert len(reader.table("gradient/dual")[0]) == 20
    with SummaryWriter(str(tmp_path), purge_step=10) as writer:
        add_row(writer, "gradient/dual", 10, ["a", "b"], [100.0, 0.5])
        writer.flush()
        reader.ask()
        tables = read_run_data(tmp_path).tables
        assert list(tables) == ["gradient/dual"] and tables["gradient/dual"].steps.tolist() == list(range(11))
        assert tables["gradient/dual"].values[-1].tolist() == [100.0, 0.5]
        reader.check(tmp_path)
        assert reader.quantities == ["gradient/dual"]


def test_a_test_run_afterwards_leaves_the_training_alone(tmp_path):
    """``trainer.test`` of a fresh Trainer writes a file of its own at step 0, with tags of its own and ``epoch``."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(30):
            writer.add_scalar("train_loss", 1.0, step)
            writer.add_scalar("epoch", step // 10, step)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("test_loss", 0.5, 0)
        writer.add_scalar("epoch", 0, 0)
    run = read_run(tmp_path)
    assert len(run["train_loss"]) == 30 and len(run["test_loss"]) == 1 and len(run["epoch"]) == 1


def damaged(folder, change):
    """A run of 100 steps and another of 20 behind it, the first file changed at byte ``change[0]``."""
    write_file(
        folder / "events.out.tfevents.1.a", [version(1), *(point("x", step, step, 1 + step) for step in range(100))]
    )
    write_file(
        folder / "events.out.tfevents.2.a", [version(500), *(point("x", s, s, 500 + s) for s in range(100, 120))]
    )
    path = folder / "events.out.tfevents.1.a"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def offsets(path):
    file, found = EventFile(path), [0]
    for _ in file.records():
        found.append(file.offset)
    return found


@pytest.mark.parametrize("byte", [0, 1, 7, 8, 11, 12])
def test_a_flipped_byte_costs_one_record_and_is_said(tmp_path, byte):
    """In the length, in its checksum, and in the data where they cannot be read any more."""
    places = {}

    def flip(content):
        (tmp_path / "copy").write_bytes(content)
        places["record"] = offsets(tmp_path / "copy")[51]  # the version, and steps 0 to 49
        content[places["record"] + byte] ^= 0x47

    path = damaged(tmp_path, flip)
    (tmp_path / "copy").unlink()
    first = places["record"]
    with pytest.warns(UserWarning, match=f"{path.name} is damaged: bytes {first} to {first + 39} were skipped"):
        run = read_run(tmp_path)
    assert run["x"].steps.tolist() == [*range(50), *range(51, 120)]
    live = LoggedRun(tmp_path)
    assert (
        live.updates(0, 0)["damage"]
        == live.updates(0, 0)["damage"]
        == [f"{path} is damaged: bytes {first} to {first + 39} were skipped."]
    )


@pytest.mark.parametrize("command", ["report", "schedule"])
def test_the_commands_say_what_is_damaged(tmp_path, capsys, command):
    fill(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b"\xff" * 20)
    assert main([command, str(tmp_path), *(["--text"] if command == "report" else [])]) == 0
    told = capsys.readouterr()
    assert told.err.startswith(f"dynamon {command}: {path} is damaged: bytes ") and told.err.count("\n") == 1
    assert "20 " in told.out


def test_a_hole_of_zeros_and_an_end_that_is_none(tmp_path):
    path = damaged(tmp_path, lambda content: content.__setitem__(slice(1000, 2000), bytes(1000)))
    with pytest.warns(UserWarning, match="damaged"):
        steps = read_run(tmp_path)["x"].steps.tolist()
    assert 60 < len(steps) < 120 and steps[0] == 0 and steps[-1] == 119
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"\xff" * 50)
    reader = Reader(LoggedRun(tmp_path))
    reader.ask()
    assert "bytes" in reader.ask()["damage"][0]
    with path.open("ab") as file:  # a writer that goes on behind the damage
        RecordWriter(file).write(point("x", 60, 0.25, 3.0).SerializeToString())
    reader.ask()
    with pytest.warns(UserWarning, match="were skipped"):
        reader.check(tmp_path)
    assert 60 in reader.scalars["x"][0]


def test_a_file_that_is_written_anew_under_its_name(tmp_path):
    """Shorter, and then longer than what was read before anyone looked again."""
    path = tmp_path / "events.out.tfevents.1.a"
    reader = Reader(LoggedRun(tmp_path))
    for length, wall_time in ((50, 1.0), (20, 2.0), (90, 3.0)):
        path.unlink(missing_ok=True)
        write_file(path, [version(wall_time), *(point("x", step, wall_time, wall_time) for step in range(length))])
        reader.ask()
        reader.check(tmp_path)
        assert len(reader.scalars["x"][0]) == length


def test_a_copy_of_a_growing_file_is_not_read_anew(tmp_path):
    """rsync puts a new file in the place of the old one: the same beginning, and more."""
    path = tmp_path / "events.out.tfevents.1.a"
    write_file(path, [version(1.0), *(point("x", step, 1.0, 2.0) for step in range(50))])
    reader = Reader(LoggedRun(tmp_path))
    reader.ask()
    before = reader.epoch
    shutil.copy(path, tmp_path / "copy")
    write_file(tmp_path / "copy", [point("x", 50, 1.0, 3.0)])
    (tmp_path / "copy").replace(path)
    reader.ask()
    reader.check(tmp_path)
    assert reader.epoch == before and reader.sent == 51


def test_files_that_vanish_and_files_that_cannot_be_read(tmp_path, monkeypatch):
    damaged(tmp_path, lambda content: None)
    real = Path.open

    def refused(self, *arguments, **named):
        if self.name.endswith("2.a"):
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.warns(UserWarning, match=r"tfevents.2.a cannot be read \(Permission denied\)"):
        assert len(read_run(tmp_path)["x"]) == 100
    assert len(LoggedRun(tmp_path).updates(0, 0)["damage"]) == 1
    monkeypatch.undo()
    reader = Reader(LoggedRun(tmp_path))
    reader.ask()
    (tmp_path / "events.out.tfevents.2.a").unlink()
    reader.ask()
    reader.check(tmp_path)
    shutil.rmtree(tmp_path)
    assert reader.ask()["last_step"] == -1


def csv_rows(path, steps, value, **more):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train_loss", *more])
        writer.writerows([0, step, value(step), *(of(step) for of in more.values())] for step in steps)


def test_a_table_that_a_resume_wiped_is_filled_from_event_files(tmp_path):
    """Both loggers in one folder, as Lightning has it: the second CSVLogger deletes the first one's table."""
    loggers = [CSVLogger(tmp_path, name="", version="run"), TensorBoardLogger(tmp_path, name=None, version="run")]
    fit(Classifier(mlp()), [GradientMonitor(every_n_steps=2)], logger=loggers, steps=60, max_epochs=-1)
    loggers = [TensorBoardLogger(tmp_path, name=None, version="run"), CSVLogger(tmp_path, name="", version="run")]
    with pytest.warns(UserWarning, match="will be deleted"):
        _ = loggers[1].experiment
    for logger in loggers:  # from a checkpoint of step 40
        for step in range(40, 55):
            logger.log_metrics({"train/loss": 1.0 / 3 + step, "gradient/norm": 5.0 / 7}, step)
        logger.finalize("success")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert min(int(row["step"]) for row in csv.DictReader(file)) == 40
    run = read_run_data(tmp_path / "run")
    loss = run.scalars["train/loss"]
    assert loss.steps.tolist() == list(range(55)) and run.scalars["gradient/norm"].steps[-1] == 54
    assert loss.values[40:].tolist() == [1.0 / 3 + step for step in range(40, 55)]  # not rounded to float32
    first = tensorboard_shows(tmp_path / "run")["train/loss"][:40]
    assert loss.values[:40].tolist() == [value for _, value in first]
    assert run.tables["gradient/dual"].steps[0] == 0


@pytest.mark.parametrize("table_is_later", [True, False])
def test_table_and_event_files_of_two_sessions(tmp_path, table_is_later):
    """One logger in each session: from the step on at which they differ the later one counts."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(150):
            writer.add_scalar("train_loss", LOSS[step] + (step > 100), step)
            writer.add_scalar("only/events", 1.0, step)
            add_row(writer, "gradient/dual", step, ["a"], [step])
    csv_rows(tmp_path / "metrics.csv", range(130), LOSS.get, only_table=float)
    os.utime(tmp_path / "metrics.csv", (time.time() + 9, time.time() + 9) if table_is_later else (1, 1))
    run = read_run_data(tmp_path)
    lengths = {tag: len(run.scalars[tag]) for tag in ("train_loss", "only/events", "only_table")}
    if table_is_later:
        assert lengths == {"train_loss": 130, "only/events": 101, "only_table": 130} and run.last_step == 129
        assert run.scalars["train_loss"].values.tolist() == [LOSS[step] for step in range(130)]
        assert len(run.tables["gradient/dual"]) == 101
    else:
        assert lengths == {"train_loss": 150, "only/events": 150, "only_table": 101}
        np.testing.assert_allclose(run.scalars["train_loss"].values[101:], [LOSS[s] + 1 for s in range(101, 150)], 1e-6)


def test_a_table_in_which_steps_go_back(tmp_path):
    csv_rows(tmp_path / "metrics.csv", [*range(151), *range(101, 131)], LOSS.get)
    loss = read_run(tmp_path)["train_loss"]
    assert loss.steps.tolist() == list(range(131)) and loss.values.tolist() == [LOSS[step] for step in range(131)]


def test_a_table_whose_end_is_a_hole(tmp_path):
    csv_rows(tmp_path / "metrics.csv", range(20), LOSS.get)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"\0" * 200_000)
    with pytest.warns(UserWarning, match=r"metrics.csv is damaged: line 22"):
        assert len(read_run(tmp_path)["train_loss"]) == 20


def fill(folder, tag="gradient/norm", steps=20, written=None):
    with SummaryWriter(str(folder)) as writer:
        for step in range(steps):
            writer.add_scalar("train_loss", 1.0 / (step + 1), step)
            writer.add_scalar(tag, 1.0, step)
    if written is not None:
        for path in folder.glob("*tfevents*"):
            os.utime(path, (written, written))
    return folder


def test_curves_and_hyperparameters_within_a_run_are_no_runs(tmp_path):
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        for step in range(20):
            writer.add_scalar("train_loss", 1.0, step)
            writer.add_scalar("gradient/norm", 1.0, step)
        writer.add_scalars("val", {"a": 1.0, "b": 2.0}, 20)
        writer.add_hparams({"lr": 0.1}, {"final": 0.5})
    fill(tmp_path / "baseline", tag="other")
    SummaryWriter(str(tmp_path / "begun")).close()
    with SummaryWriter(str(tmp_path / "notes")) as writer:
        writer.add_text("gradient/notes", "no number\n gradient/norm weight/operator")
    fill(tmp_path / "long" / "version_1", written=1e9)
    assert len(list(tmp_path.rglob("*tfevents*"))) == 8
    assert LiveFolder(tmp_path).names() == ["version_0", "long/version_1", "baseline"]
    assert read_run_data(tmp_path / "version_0").last_step == 19


def test_readings_that_come_late_are_found_when_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("dynamon.board.live._SEARCH_EVERY", 0)
    folder = LiveFolder(tmp_path)
    fill(tmp_path / "first", written=1e9)
    with SummaryWriter(str(tmp_path / "second")) as writer:
        assert folder.names() == ["first"] and client(tmp_path)("/runs").json["runs"] == ["first"]
        writer.add_scalar("train_loss", 1.0, 0)
        writer.flush()
        assert folder.names() == ["first", "second"]
        for step in range(1000):
            writer.add_scalar("train_loss", 1.0, step)
        writer.add_scalar("sharpness/hessian_max", 1.0, 1000)
        writer.flush()
        assert folder.names() == ["second", "first"]


@pytest.mark.parametrize("command", ["report", "schedule"])
def test_a_folder_above_runs_stands_for_the_newest_that_can_be_shown(tmp_path, capsys, command):
    fill(tmp_path / "model" / "version_9", written=1e9)
    run = fill(tmp_path / "model" / "version_10", written=1e9)
    fill(tmp_path / "older" / "version_0", written=5e8)
    fill(tmp_path / "plain" / "version_0", tag="other", written=2e9)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    arguments = ["--text"] if command == "report" else []
    assert main([command, str(tmp_path), *arguments]) == 0
    told = capsys.readouterr().out
    assert f"run           {run}, the newest that can be shown below {tmp_path}" in told
    assert main([command, str(run), *arguments]) == 0
    assert "the newest" not in capsys.readouterr().out
    with pytest.raises(
        FileNotFoundError, match=f"Runs below it, the newest first: {tmp_path}/plain/version_0, {run}, "
    ):
        read_run(tmp_path)


@pytest.mark.parametrize("command", ["report", "schedule"])
def test_a_folder_whose_runs_hold_nothing(tmp_path, capsys, command):
    for name in "ab":
        SummaryWriter(str(tmp_path / name)).close()
    assert main([command, str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "holds 2 runs without a single value" in told.err and told.err.count("\n") == 1 and not told.out


def test_tables_alone_below_a_folder(tmp_path, capsys):
    for name in ("version_0", "version_1"):
        (tmp_path / name).mkdir()
        csv_rows(
            tmp_path / name / "metrics.csv", range(20), LOSS.get, **{"gradient/norm": float} if "0" in name else {}
        )
    assert main(["schedule", str(tmp_path)]) == 0
    assert f"run           {tmp_path / 'version_0'}," in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="names there are text")
def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = fill(tmp_path / "run").rename(os.fsdecode(os.fsencode(tmp_path) + b"/r\xffun"))
    get = client(tmp_path)
    (name,) = get("/runs").json["runs"]
    assert name == "r\\xffun" and get("/run", run=name).json["last_step"] == 19
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert "r\\xffun" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path), "--text"]) == 0
    assert "r\\xffun" in capsys.readouterr().out


def test_tags_with_another_axis_do_not_lengthen_the_run(tmp_path, capsys):
    """``self.log("step", samples)`` puts what is logged with it at samples."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(150):
            writer.add_scalar("train_loss", 1.0, step)
            writer.add_scalar("gradient/norm", 1.0, step)
            writer.add_scalar("accuracy", 1.0, 64 * step)
            writer.add_scalar("val", 1.0, step // 10)
    assert read_run_data(tmp_path).last_step == 149
    assert main(["schedule", str(tmp_path)]) == 0
    assert "150 steps, from 150 readings" in capsys.readouterr().out
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train_loss", 1.0, 9600)
    assert main(["schedule", str(tmp_path)]) == 0
    assert "the readings end at step 149, other tags at step 9600" in capsys.readouterr().out
