"""The plugin of TensorBoard without a browser: what it reads while files grow, and what it answers."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from tensorboard.plugins import base_plugin
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from dynamon.board import live
from dynamon.board.live import LiveFolder, LoggedRun
from dynamon.board.payload import display_hints
from dynamon.board.plugin import DynamonPlugin
from dynamon.health import findings
from dynamon.runs import read_run_data
from tests.dynamon.runs.test_reading import add_row
from tests.test_report import array


def fill(writer, steps, names=("a", "b")):
    for step in steps:
        writer.add_scalar("train/loss", float(np.sin(step)), step)
        if step % 3 == 0:
            writer.add_scalar("gradient/norm", float(step), step)
            add_row(writer, "gradient/dual", step, list(names), np.arange(len(names)) + float(step))
            writer.add_scalar("gradient/dual_median", float(step), step)
            writer.add_scalar("gradient.dual/a", float(step), step)
    writer.flush()


def begin(folder):
    with SummaryWriter(str(folder)) as writer:
        fill(writer, range(1))


class Reader:
    """What the browser knows after each answer, appended by its rules."""

    def __init__(self, run):
        self.run, self.epoch, self.count = run, 0, 0
        self.scalars, self.tables, self.sent = {}, {}, 0

    def ask(self):
        news = self.run.updates(self.epoch, self.count)
        if news["epoch"] != self.epoch:
            self.scalars, self.tables = {}, {}
        self.epoch, self.count = int(float(news["epoch"])), news["count"]  # a browser's numbers are floats
        for tag, part in news.get("scalars", {}).items():
            self.sent += len(array(part["steps"]))
            self.scalars[tag] = self.joined(self.scalars.get(tag), part, array(part["values"]))
        self.quantities = news.get("quantities", getattr(self, "quantities", []))
        self.shown = news.get("shown", getattr(self, "shown", {}))
        return news

    def table(self, quantity):
        since, known = self.tables.get(quantity, (0, None))
        news = self.run.table(quantity, self.epoch, since)
        if "values" in news:
            known = self.joined(known, news, array(news["values"], "<f4").reshape(-1, len(news["layers"])))
            known = (*known, news["layers"])
        self.tables[quantity] = news["count"], known
        return known

    def joined(self, known, part, values):
        if "from" not in part:
            return array(part["steps"]), values
        assert part["from"] == len(known[0]) and part["total"] == len(known[0]) + len(values)
        return np.concatenate([known[0], array(part["steps"])]), np.concatenate([known[1], values])

    def check(self, folder):
        """What came in pieces is what the whole file holds."""
        expected = read_run_data(folder)
        assert set(self.scalars) == set(expected.scalars) and set(self.quantities) == set(expected.tables)
        assert self.shown == display_hints(self.quantities)
        for tag, series in expected.scalars.items():
            np.testing.assert_array_equal(self.scalars[tag], (series.steps, series.values))
        for quantity, table in expected.tables.items():
            steps, values, layers = self.table(quantity)
            assert tuple(layers) == table.layers
            np.testing.assert_array_equal(steps, table.steps)
            np.testing.assert_array_equal(values, table.values)


def test_a_run_that_grows_is_read_once(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        fill(writer, range(30))
        reader = Reader(LoggedRun(tmp_path))
        assert reader.ask()["share"] == 1 and reader.sent == 30 + 10 + 10
        reader.check(tmp_path)
        before = reader.count
        assert reader.ask() == {"epoch": reader.epoch, "count": before, "share": 1.0}
        fill(writer, range(30, 36))
        news = reader.ask()
        assert reader.sent == 50 + 6 + 2 + 2 and news["last_step"] == 35  # only what is new
        assert news["scalars"]["train/loss"]["from"] == 30
        reader.check(tmp_path)
    assert reader.epoch == reader.run.updates(0, 0)["epoch"]


def test_a_record_that_is_cut_off_comes_when_it_is_whole(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    with SummaryWriter(str(source)) as writer:
        fill(writer, range(12))
    (file,) = source.iterdir()
    whole = file.read_bytes()
    folder.mkdir()
    reader = Reader(LoggedRun(folder))
    for end in [0, 10, *range(40, len(whole), 97), len(whole)]:
        (folder / file.name).write_bytes(whole[:end])
        assert reader.ask()["share"] == 1  # as far as it goes, so that nobody asks again at once
    reader.check(folder)
    assert reader.sent == 12 + 4 + 4


def test_a_resumed_run_and_other_layers(tmp_path):
    reader = Reader(LoggedRun(tmp_path))
    with SummaryWriter(str(tmp_path)) as writer:
        fill(writer, range(20))
    reader.ask()
    with SummaryWriter(str(tmp_path), filename_suffix=".2") as writer:
        fill(writer, range(12, 30), names=("b", "c"))
        reader.ask()
        reader.check(tmp_path)
        fill(writer, range(30, 40), names=("b", "c"))
        reader.ask()
        reader.check(tmp_path)


def test_a_file_that_is_replaced_or_gone(tmp_path):
    reader = Reader(LoggedRun(tmp_path / "run"))
    with SummaryWriter(str(tmp_path / "run")) as writer:
        fill(writer, range(20))
    reader.ask()
    epoch = reader.epoch
    shutil.rmtree(tmp_path / "run")
    with SummaryWriter(str(tmp_path / "run")) as writer:
        fill(writer, range(5))
    reader.ask()
    assert reader.epoch != epoch
    reader.check(tmp_path / "run")
    (file,) = (tmp_path / "run").iterdir()
    file.write_bytes(b"")
    assert reader.ask()["last_step"] == -1 and not reader.scalars


def test_big_files_come_in_pieces(tmp_path, monkeypatch):
    with SummaryWriter(str(tmp_path)) as writer:
        fill(writer, range(60))
    monkeypatch.setattr(LoggedRun.updates, "__defaults__", (0,))  # one record an answer
    reader, shares = Reader(LoggedRun(tmp_path)), []
    while not shares or shares[-1] < 1:
        shares.append(reader.ask()["share"])
    assert len(shares) > 100 and (np.diff(shares) > 0).all()
    reader.check(tmp_path)


def test_long_series_are_sent_whole_and_thinned(tmp_path, monkeypatch):
    for module in (live, sys.modules["dynamon.board.payload"]):
        monkeypatch.setattr(module, "SCALAR_POINTS", 40)
        monkeypatch.setattr(module, "TABLE_POINTS", 6)
    with SummaryWriter(str(tmp_path)) as writer:
        fill(writer, range(90))
        run = LoggedRun(tmp_path)
        first = run.updates(0, 0)
        fill(writer, range(90, 100))
        news = run.updates(first["epoch"], first["count"])
    loss = news["scalars"]["train/loss"]
    assert "from" not in loss and loss["total"] == 100 and len(array(loss["steps"])) <= 40
    table = run.table("gradient/dual", first["epoch"], first["count"])
    assert "from" not in table and table["total"] == 34 and len(array(table["steps"])) <= 6


def test_findings_are_those_of_the_report(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(40):
            writer.add_scalar("train/loss", 1.0 if step < 20 else float("nan"), step)
        writer.flush()
        run = LoggedRun(tmp_path)
        run.updates(0, 0)
        assert [(f["rule"], f["step"]) for f in run.findings()] == [("loss/nonfinite", 20), ("dynamon/nothing", 39)]
        assert run.findings() is run.findings()


def test_names_are_those_of_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_SEARCH_EVERY", 0)
    for name in (".", "a/version_0", "a/version_1", "b"):
        begin(tmp_path / "logs" / name)
    (tmp_path / "logs" / "empty").mkdir()
    (tmp_path / "logs" / "b" / "loop").symlink_to(tmp_path / "logs")
    folder = LiveFolder(tmp_path / "logs")
    assert sorted(folder.names()) == [".", "a/version_0", "a/version_1", "b"]
    os.utime(next((tmp_path / "logs" / "b").glob("*tfevents*")), (2e9, 2e9))
    assert folder.names()[0] == "b"  # the last to be written
    kept = folder.run("b")
    assert folder.run("b") is kept
    shutil.rmtree(tmp_path / "logs" / "b")
    assert "b" not in folder.names()
    with pytest.raises(KeyError):
        folder.run("b")
    assert LiveFolder(tmp_path / "nowhere").names() == []


def test_few_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_KEPT", 2)
    for name in "abc":
        begin(tmp_path / name)
    folder = LiveFolder(tmp_path)
    first, second = folder.run("a"), folder.run("b")
    assert folder.run("a") is first
    folder.run("c")
    assert folder.run("a") is first and folder.run("b") is not second


def test_rows_of_all_runs_come_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_SEARCH_EVERY", 0)
    monkeypatch.setattr(live, "_AGAIN", 0)
    for age, name in enumerate("abc"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            fill(writer, range(10 * (age + 1)))
        (file,) = (tmp_path / name).iterdir()
        os.utime(file, (1e9 - age, 1e9 - age))  # the newest first
    folder = LiveFolder(tmp_path)
    kept = folder.run("b")
    shares = [[row["share"] for row in folder.rows(read_for=0)]]
    while sum(shares[-1]) < 3:
        shares.append([row["share"] for row in folder.rows(read_for=0)])
    assert shares[0] == [0, 0, 0] and [1, 0, 0] in shares and [1, 1, 0] in shares  # a record an answer
    rows = folder.rows()
    for row in rows:
        data = read_run_data(tmp_path / row["name"])
        loss = data.scalars["train/loss"].values
        assert row["steps"] == len(loss) and row["loss"] == "train/loss" and row["ratio"] is None
        assert row["final"] == np.median(loss[-5:])
        assert sum(row["counts"].values()) == len(findings(data))
    assert [row["name"] for row in rows] == ["a", "b", "c"] and folder.run("b") is kept
    with SummaryWriter(str(tmp_path / "b"), filename_suffix=".2") as writer:
        fill(writer, range(20, 60))
    rows = {row["name"]: row["steps"] for row in folder.rows()}
    assert rows == {"a": 10, "b": 60, "c": 30}


def client(folder):
    """A route by its name, as TensorBoard serves it."""
    routes = DynamonPlugin(base_plugin.TBContext(logdir=str(folder))).get_plugin_apps()

    def get(route, **asked):
        return Client(routes[route]).get(route, query_string=asked)

    return get


def test_answers_of_the_plugin(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        fill(writer, range(20))
    get = client(tmp_path)
    listing = get("/runs")
    assert listing.json == {"runs": ["run"], "folder": str(tmp_path)}
    assert listing.headers["X-Content-Type-Options"] == "nosniff"
    news = get("/run", run="run").json
    np.testing.assert_array_equal(array(news["scalars"]["gradient/norm"]["values"]), np.arange(0.0, 20, 3))
    assert get("/run", run="run", epoch=news["epoch"], since=news["count"]).json.keys() == {"epoch", "count", "share"}
    assert get("/table", run="run", quantity="gradient/dual").json["layers"] == ["a", "b"]
    assert (
        "values"
        not in get("/table", run="run", quantity="gradient/dual", epoch=news["epoch"], since=news["count"]).json
    )
    health = get("/health", run="run").json
    assert health["findings"] == [] and [c["value"] for c in health["checks"] if c["words"] == "loss is finite"] == [
        "0 of 20 readings not finite"
    ]
    (row,) = get("/rows").json["rows"]
    assert row == {"name": "run", **health["summary"]} and row["steps"] == 20
    packed = Client(DynamonPlugin(base_plugin.TBContext(logdir=str(tmp_path))).get_plugin_apps()["/run"]).get(
        "/run?run=run", headers={"Accept-Encoding": "gzip"}
    )
    assert packed.headers["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("name", ["..", "../secret", "run/../../secret", "/etc", "", "run/", "./run", "%2e%2e/secret"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    for folder in ("secret", "logs/run"):
        with SummaryWriter(str(tmp_path / folder)) as writer:
            fill(writer, range(3))
    get = client(tmp_path / "logs")
    for route in ("/run", "/table", "/health"):
        assert get(route, run=name, quantity="gradient/dual").json == {"problem": "This run no longer exists."}


def test_what_cannot_be_shown_is_said(tmp_path, monkeypatch):
    for folder, said in (
        ("s3://bucket/logs", "s3://bucket/logs is remote"),
        ("gs://bucket", "gs://bucket is remote"),
        ("", "start TensorBoard with --logdir FOLDER"),
    ):
        assert said in client(folder)("/runs").json["problem"]
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"\xff" * 300)
    assert client(tmp_path)("/runs").json == {"runs": [], "folder": str(tmp_path), "unread": 1}
    news = LoggedRun(tmp_path).updates(0, 0)
    assert news["scalars"] == {} and news["quantities"] == [] and "bytes 0 to 300" in news["damage"][0]
    monkeypatch.setitem(sys.modules, "dynamon.board.live", None)  # as where it cannot be imported
    assert "ModuleNotFoundError" in client(tmp_path)("/runs").json["problem"]


def test_files_of_the_front_end(tmp_path):
    get = client(tmp_path)
    assert (
        get("/tab.js").content_type.startswith("text/javascript")
        and "export async function render" in get("/tab.js").text
    )
    assert get("/board.css").content_type.startswith("text/css")
    routes = DynamonPlugin(base_plugin.TBContext(logdir=str(tmp_path))).get_plugin_apps()
    assert "/plugin.py" not in routes and not any("*" in route for route in routes)
    plugin = DynamonPlugin(base_plugin.TBContext(logdir=str(tmp_path)))
    assert plugin.frontend_metadata().es_module_path in routes and plugin.frontend_metadata().tab_name == "Dynamon"
    assert set(plugin.data_plugin_names()) == {"scalars", "dynamon"} and plugin.is_active() is False


def test_several_threads(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        fill(writer, range(300))
        get, failures = client(tmp_path), []

        def ask():
            for _ in range(10):
                answers = [
                    get("/run", run="run"),
                    get("/table", run="run", quantity="gradient/dual"),
                    get("/health", run="run"),
                ]
                failures.extend(answer.json["problem"] for answer in answers if "problem" in answer.json)

        get("/run", run="run")
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        fill(writer, range(300, 400))
        for thread in threads:
            thread.join()
    assert not failures
    loss = get("/run", run="run").json["scalars"]["train/loss"]
    np.testing.assert_array_equal(array(loss["steps"]), np.arange(400))


@pytest.mark.processes
def test_tensorboard_starts_without_torch():
    """The plugin is imported at every start of TensorBoard: it must be light, and so must what it reads with."""
    code = (
        "import sys, dynamon.board.plugin; first = set(sys.modules); import dynamon.board.live; "
        "heavy = {'torch', 'lightning', 'scipy', 'matplotlib'}; "
        "print([sorted(heavy & first), sorted(heavy & set(sys.modules)), 'dynamon.board.live' in first])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed.replace("'", '"').replace("False", "false")) == [[], [], False]


@pytest.mark.processes
def test_the_package_has_what_it_had_with_torch_in_it():
    """Functions and modules come when they are asked for, in whatever order."""
    code = (
        "import dynamon, dynamon.monitoring.snapshot; from dynamon import measure; "
        "assert dynamon.measure is measure is dynamon.monitoring.snapshot.measure; "
        "assert dynamon.describe_layers is dynamon.layers.describe_layers; "
        "dynamon.kernels.gram_iteration, dynamon.norms.get_norm, dynamon.callbacks.DynamicsMonitor; "
        "assert not hasattr(dynamon, 'nothing') and not hasattr(dynamon, '_nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
