"""``dynamon report`` on real runs, with both loggers, and on names that try to be more than names."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from dynamon.board.page import MODULES, embedded, module, module_names, page
from dynamon.board.payload import SCALAR_POINTS, TABLE_POINTS, payload
from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.cli import main
from dynamon.cli.report import sparkline
from dynamon.quantities import REGISTRY
from dynamon.runs import read_run_data
from dynamon.runs.history import RunData, Series
from tests.helpers import Classifier, fit, mlp

NASTY = "</script><script>alert(1)</script><!--<script>\u2028\"'&\x1b[31m"


class Page(HTMLParser):
    """Elements with attributes and text, as a browser splits them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[int, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text[len(self.elements) - 1] = self.text.get(len(self.elements) - 1, "") + data

    def data(self):
        (place,) = [i for i, (_, attrs) in enumerate(self.elements) if attrs.get("id") == "data"]
        return json.loads(self.text[place])


def array(text, kind="<f8"):
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    loggers = [TensorBoardLogger(root, name="run", version="tb"), CSVLogger(root, name="run", version="csv")]
    callbacks = [DynamicsMonitor(every_n_steps=4), NoiseAdaptiveLR()]
    fit(Classifier(mlp()), callbacks, logger=loggers, steps=60, max_epochs=-1)
    return root / "run"


def report(tmp_path, *arguments) -> Page:
    output = tmp_path / "page.html"
    assert main(["report", *map(str, arguments), "-o", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def test_numbers_of_the_page_are_those_of_the_event_file(runs, tmp_path, capsys):
    (run,) = report(tmp_path, runs / "tb").data()
    assert "page.html" in capsys.readouterr().out
    events = EventAccumulator(str(runs / "tb"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tables = [tag for tag in events.Tags()["tensors"] if tag.endswith("/layers")]
    assert set(run["tables"]) <= {tag.removesuffix("/layers") for tag in tables} and len(tables) > 20
    for tag in tables:
        points = events.Tensors(tag)
        table = run["tables"].get(tag.removesuffix("/layers"))
        if table is None:  # it never had a value
            assert all(np.isnan(make_ndarray(point.tensor_proto)).all() for point in points)
            continue
        names = json.loads(events.SummaryMetadata(tag).plugin_data.content)["layers"]
        assert table["layers"] == names and table["total"] == len(points)
        np.testing.assert_array_equal(array(table["steps"]), [point.step for point in points])
        expected = np.stack([make_ndarray(point.tensor_proto) for point in points])
        np.testing.assert_array_equal(array(table["values"], "<f4").reshape(len(points), len(names)), expected)
    single = {f"{q.replace('/', '.')}/{layer}" for q, table in run["tables"].items() for layer in table["layers"]}
    assert set(run["scalars"]) == set(events.Tags()["scalars"]) - single
    for tag, scalar in run["scalars"].items():
        points = {point.step: point.value for point in events.Scalars(tag)}  # of several at a step the last
        np.testing.assert_array_equal(array(scalar["steps"]), list(points))
        np.testing.assert_array_equal(array(scalar["values"]), list(points.values()))
    assert run["loss"] == "dynamon/loss" and run["name"] == "run/tb" and run["findings"] == []


def test_csv_logger_gives_the_same(runs, tmp_path):
    (events,), (table,) = (report(tmp_path, runs / name).data() for name in ("tb", "csv"))
    assert set(table["tables"]) == set(events["tables"]) and set(events["scalars"]) - set(table["scalars"]) <= {
        "hp_metric"
    }
    for quantity, found in table["tables"].items():
        other = events["tables"][quantity]
        rows = array(other["values"], "<f4").reshape(-1, len(other["layers"]))
        rows = np.where(np.isfinite(rows), rows, np.nan)
        known = {name for name, column in zip(other["layers"], rows.T, strict=True) if np.isfinite(column).any()}
        assert set(found["layers"]) == known  # in another order: the table's columns are sorted
        order, read = [other["layers"].index(name) for name in found["layers"]], np.isfinite(rows).any(1)
        np.testing.assert_array_equal(array(found["steps"]), array(other["steps"])[read])
        own = array(found["values"], "<f4").reshape(-1, len(order))
        np.testing.assert_allclose(own, rows[read][:, order], rtol=1e-6)
    for tag, found in table["scalars"].items():
        np.testing.assert_allclose(array(found["values"]), array(events["scalars"][tag]["values"]), rtol=1e-6)


def test_the_page_stands_alone(runs, tmp_path):
    found = report(tmp_path, runs / "tb", runs / "csv")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [run["name"] for run in found.data()] == ["run/tb", "run/csv"]
    assert not [tag for tag, attrs in found.elements if {"src", "href", "onclick", "onload"} & set(attrs)]
    assert [tag for tag, _ in found.elements].count("script") == 2
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"^(import|export) ", text, re.M)
    assert "prefers-color-scheme" in text and "@import" not in text and "innerHTML" not in text


def test_modules_come_after_those_they_import_and_share_no_name():
    folder = Path(sys.modules["dynamon.board"].__file__).parent
    assert {path.stem for path in folder.glob("*.js")} == set(module_names()) - {"uplot"}
    defined: dict[str, str] = {"uPlot": "uplot"}
    for place, name in enumerate(module_names()):  # the last is for TensorBoard alone
        source = module(name)
        assert set(re.findall(r'from "\./(\w+)\.js"', source)) <= set(MODULES[:place])
        for found in re.findall(r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)", source, re.M):
            assert defined.setdefault(found, name) == name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(tmp_path):
    script = re.search(r'<script type="module">(.*)</script>', page([]), re.S)
    (tmp_path / "all.mjs").write_text(script[1])
    subprocess.run(["node", "--check", tmp_path / "all.mjs"], check=True)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_arrays_and_colours_in_the_browser_are_those_packed(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    values = np.array([0.1, np.nan, np.inf, -2.5e-9, 3e30])
    packed = payload(RunData({"a/b": Series(np.arange(5), values)}, {}), "x")["scalars"]["a/b"]["values"]
    folder = Path(sys.modules["dynamon.board"].__file__).parent
    for path in folder.glob("*.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    names = [f"net.blocks.{i}.{j}.weight" for i in range(2) for j in "ab"] + ["net.head.weight", "net.head.bias"]
    (tmp_path / "run.js").write_text(
        'import { decoded, logTicks, nearest, ticks } from "./numbers.js";\n'
        'import { colorTable } from "./colors.js";\nimport { groupsOf } from "./heatmap.js";\n'
        f"const values = [...decoded({json.dumps(packed)}, 'f8')].map(String);\n"
        "const steps = [0, 4, 8];\n"
        "console.log(JSON.stringify({values, viridis: colorTable('viridis'), cividis: colorTable('cividis'),\n"
        f"  groups: groupsOf({json.dumps(names)}).map((g) => [g.key, g.members.map((m) => m.label)]),\n"
        "  nearest: [-1, 1, 3, 7, 99].map((step) => nearest(steps, step)), ticks: ticks(0, 9.9, 5),\n"
        "  logs: [logTicks(0.3, 4, 5), logTicks(1e-6, 1e3, 5), logTicks(2.1, 2.2, 3)]}));"
    )
    done = subprocess.run(["node", tmp_path / "run.js"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    np.testing.assert_array_equal([float(v.replace("Infinity", "inf")) for v in found["values"]], values)
    for name in ("viridis", "cividis"):
        expected = 255 * matplotlib.colormaps[name](np.arange(256))[:, :3]
        assert np.abs(np.array(found[name]) - expected).max() < 12  # linear between 17 of its colours
    assert found["groups"] == [
        ["blocks.0", ["a.weight", "b.weight"]],
        ["blocks.1", ["a.weight", "b.weight"]],
        ["head", ["weight", "bias"]],
    ]
    assert found["nearest"] == [0, 0, 1, 2, 2] and found["ticks"] == [0, 2, 4, 6, 8]
    assert found["logs"][0] == [0.5, 1, 2] and found["logs"][1] == [1e-6, 1e-4, 1e-2, 1, 100] and found["logs"][2]


def test_names_are_never_more_than_names(tmp_path, capsys):
    table = Series(np.arange(30), np.ones((30, 1)), (NASTY,))
    table.values[10:] = 0
    other = Series(table.steps, np.column_stack([table.values, np.ones(30)]), (NASTY, "other"))
    run = RunData({NASTY: Series(np.arange(2), np.ones(2)), "gradient/norm": Series(np.arange(2), np.ones(2))}, {})
    run.tables.update({NASTY: table, "gradient/l2": other})
    found = Page(page([payload(run, NASTY)]))
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert found.data() == json.loads(json.dumps([payload(run, NASTY)]))
    assert found.data()[0]["findings"][0]["layers"] == [NASTY]
    assert not set("<>&") & set(embedded([NASTY])) and json.loads(embedded([NASTY])) == [NASTY]
    (tmp_path / "metrics.csv").write_text("step,train/loss\x1b[31m</script>,gradient/norm\n0,1.0,1.0\n1,2.0,1.0\n")
    assert main(["report", str(tmp_path), "--text"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_words_and_scales_are_those_of_the_registry():
    table = Series(np.arange(2), np.ones((2, 1)), ("a",))
    packed = payload(RunData({}, {"gradient/dual": table, "lr/ratio": table, "mine/own": table}), "x")
    assert packed["shown"] == {
        tag: {"words": REGISTRY[tag].words, "scale": REGISTRY[tag].scale, "rows": "layer"}
        for tag in ("gradient/dual", "lr/ratio")
    }
    assert packed["shown"]["lr/ratio"] == {"words": "rate ratio", "scale": "linear", "rows": "layer"}


def test_long_series_are_thinned_and_say_so():
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[60_000] = 99.0, np.nan
    table = Series(np.arange(9_000), np.arange(18_000.0).reshape(9_000, 2), ("a", "b"))
    packed = payload(RunData({"x": Series(np.arange(100_000), values)}, {"y/z": table}), "long")
    scalar, found = packed["scalars"]["x"], packed["tables"]["y/z"]
    steps, kept = array(scalar["steps"]), array(scalar["values"])
    assert scalar["total"] == 100_000 and len(kept) <= SCALAR_POINTS and (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(kept, values[steps.astype(int)])
    assert np.nanmax(kept) == 99 and np.nanmin(kept) == np.nanmin(values) and np.isnan(kept).any()
    assert found["total"] == 9_000 and len(array(found["steps"])) == 3_000 <= TABLE_POINTS
    np.testing.assert_array_equal(array(found["values"], "<f4").reshape(-1, 2), table.values[::3])


def test_text(runs, capsys):
    assert main(["report", str(runs / "tb"), "--text"]) == 0
    text = capsys.readouterr().out
    data = read_run_data(runs / "tb")
    loss = data.scalars["dynamon/loss"].values
    (row,) = re.findall(r"^  loss +(\S+) +(\S+) +(\S+) +(\S+)  [▁-█]", text, re.M)
    expected = (loss[0], loss[-1], loss.min(), loss.max())
    np.testing.assert_allclose([float(cell) for cell in row], expected, rtol=5e-3)
    for word in ("stability ratio", "base rate", "noise/dual", "network.0.weight", "health: nothing looks wrong"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 160


def test_several_runs_make_a_table(tmp_path, capsys, runs):
    """Names tell runs apart, however far up their folders differ; a run that ended in NaN counts as a fault."""
    for name in ("one/run/tb", "two/run/tb", "three/run/tb"):
        shutil.copytree(runs / "tb", tmp_path / name)
    lines = [f"{i},{1.0 if i < 30 else 'nan'},1.0" for i in range(50)]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.csv").write_text("\n".join(["step,train/loss,gradient/norm", *lines]))
    folders = [tmp_path / name for name in ("one/run/tb", "two/run/tb", "three/run/tb", "broken")]
    packs = report(tmp_path, *folders).data()
    names = [pack["name"] for pack in packs]
    assert names == [
        *(f"{name}/run/tb" for name in ("one", "two", "three")),
        f"{tmp_path.parent.name}/{tmp_path.name}/broken",
    ]
    whole = report(tmp_path, runs / "tb").data()[0]
    assert len(array(packs[0]["scalars"]["dynamon/loss"]["steps"])) == len(
        array(whole["scalars"]["dynamon/loss"]["steps"])
    )
    capsys.readouterr()
    assert main(["report", *map(str, folders), "--text"]) == 0
    table, *_ = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line.split(maxsplit=6)[1:] for line in table.splitlines()[1:]}
    loss = read_run_data(runs / "tb").scalars["dynamon/loss"].values
    ratio = read_run_data(runs / "tb").scalars["sharpness/stability_ratio"].values
    for name in names[:3]:
        steps, rate, final, lowest, highest, health = rows[name]
        assert steps == "60" and float(rate) == 0.01 and health == "nothing looks wrong"
        assert (final, highest) == (f"{np.median(loss[-5:]):.4g}", f"{ratio.max():.4g}")
        assert loss.min() <= float(lowest) <= float(final)
    assert rows[names[3]] == ["50", "-", "nan", "1", "-", "1 fault"]


def test_pages_of_many_runs_hold_fewer_points_of_each():
    table = Series(np.arange(9_000), np.arange(18_000.0).reshape(9_000, 2), ("a", "b"))
    run = RunData({"x": Series(np.arange(100_000), np.arange(100_000.0))}, {"y/z": table})
    packed = payload(run, "one of eight", runs=8)
    assert len(array(packed["scalars"]["x"]["steps"])) == SCALAR_POINTS // 4
    assert len(array(packed["tables"]["y/z"]["steps"])) == 1_000 == TABLE_POINTS // 4


def test_text_where_the_terminal_knows_ascii_only(runs):
    command = [sys.executable, "-m", "dynamon.cli", "report", str(runs / "csv"), "--text"]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.returncode == 0 and not done.stderr and b"loss" in done.stdout and done.stdout.isascii()


def test_a_row_of_blocks():
    series = Series(np.array([0, 1, 2, 3, 9]), np.array([0.0, 7.0, np.nan, 3.5, 7.0]))
    assert sparkline(series, 9, width=10) == "▁█x▅     █"  # 3.5 of 7 rounds to the even height 4
    assert sparkline(Series(np.array([5]), np.array([2.0])), 5, width=6) == "     ▄"
    assert sparkline(Series(np.array([0]), np.array([np.inf])), 0, width=2) == "x "


def test_json(runs, tmp_path, capsys):
    assert main(["report", str(runs / "tb"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["run"], run["loss"], run["findings"]) == ("run/tb", "dynamon/loss", [])
    loss = read_run_data(runs / "tb").scalars["dynamon/loss"].values
    (check,) = [check for check in run["checks"] if check["words"] == "loss is finite"]
    assert check["value"] == f"0 of {len(loss)} readings not finite" and check["severity"] is None
    assert run["summary"]["steps"] == 60 and loss.min() <= run["summary"]["lowest"] <= run["summary"]["final"]
    lines = [f"{i},{1.0 if i < 30 else 'nan'},{0 if i < 30 else 'inf'}" for i in range(50)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train/loss,gradient/nonfinite", *lines]))
    assert main(["report", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert [(f["rule"], f["severity"], f["step"]) for f in run["findings"]] == [
        ("loss/nonfinite", "fault", 30),
        ("gradient/nonfinite", "fault", 30),
    ]
    assert run["findings"][1]["numbers"] == {"values": "inf", "readings": 20}


def test_a_run_without_dynamon_says_what_to_add(tmp_path, capsys, runs):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n1,0.5\n")
    for form in ([], ["--text"], ["--json"]):
        assert main(["report", str(tmp_path), *form]) == 2
        told = capsys.readouterr()
        assert "This run holds no readings of dynamon. Add DynamicsMonitor()" in told.err
        assert told.err.count("\n") == 1 and not told.out
    both = report(tmp_path, runs / "tb", tmp_path).data()  # the baseline of a comparison may be one
    assert [f["rule"] for f in both[1]["findings"]] == ["dynamon/nothing"]


def test_an_event_file_that_was_cut_off(tmp_path, capsys, runs):
    (file,) = (runs / "tb").glob("*tfevents*")
    whole = file.read_bytes()
    (tmp_path / file.name).write_bytes(whole[: len(whole) // 2])
    (run,) = report(tmp_path, tmp_path).data()
    (complete,) = report(tmp_path, runs / "tb").data()
    assert 10 < run["last_step"] < complete["last_step"]
    steps, values = (array(run["scalars"]["gradient/norm"][key]) for key in ("steps", "values"))
    np.testing.assert_array_equal(values, array(complete["scalars"]["gradient/norm"]["values"])[: len(steps)])
    (tmp_path / file.name).write_bytes(whole[:40])  # its version, and half a record
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("holds a run without a single value") == 1


def test_errors(tmp_path, capsys, runs):
    def says(*arguments):
        assert main(["report", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("dynamon report: ") and captured.err.count("\n") == 1 and not captured.out
        return captured.err

    assert "nowhere is not a folder" in says(tmp_path / "nowhere")
    assert "holds neither event files nor metrics.csv." in says(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    assert "holds a run without a single value" in says(tmp_path)
    assert (
        "holds no my/loss; tags with 'loss' in their name: dynamon/loss, sharpness/probe_loss, spike/loss, train/loss"
        in says(runs / "csv", "--loss", "my/loss")
    )
    assert "--text and --json print, so leave it out" in says(runs / "csv", "--text", "-o", tmp_path / "x.html")


def test_without_o_no_file_is_replaced(tmp_path, capsys, monkeypatch, runs):
    """The page goes to the first name that is free, and the one that was kept is named."""
    monkeypatch.chdir(tmp_path)
    Path("report.html").write_text("mine")
    Path("report-2.html").write_text("mine too")
    for name in ("report-1.html", "report-3.html"):
        assert main(["report", str(runs / "tb")]) == 0
        told = capsys.readouterr().out
        assert f"report        {name} (" in told and "report.html was kept, -o report.html replaces it)" in told
        assert Page(Path(name).read_text(encoding="utf-8")).data()[0]["name"] == "run/tb"
    assert Path("report.html").read_text() == "mine" and Path("report-2.html").read_text() == "mine too"
    assert main(["report", str(runs / "tb"), "-o", "report.html"]) == 0
    assert "kept" not in capsys.readouterr().out and Page(Path("report.html").read_text(encoding="utf-8")).data()
    Path("report.html").unlink()
    assert main(["report", str(runs / "tb")]) == 0
    assert "report        report.html (" in capsys.readouterr().out


@pytest.mark.parametrize("form", [[], ["--text"], ["--json"]], ids=lambda form: "".join(form) or "page")
def test_of_a_folder_above_runs_the_newest_is_shown_and_named(tmp_path, capsys, monkeypatch, runs, form):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("version_1", "version_2", "version_0")):  # the newest first
        shutil.copytree(runs / "csv", tmp_path / "logs" / name)
        written = 1e9 - age
        os.utime(tmp_path / "logs" / name / "metrics.csv", (written, written))
    assert main(["report", "logs", *form]) == 0
    told = capsys.readouterr()
    line = "run           logs/version_1, the newest that can be shown below logs\n"
    assert line in (told.err if form == ["--json"] else told.out)
    assert main(["report", "logs/version_0", *form]) == 0
    told = capsys.readouterr()
    assert "the newest" not in told.out + told.err


REFUSALS = {
    "no such folder": (["nowhere"], "nowhere is not a folder"),
    "nothing in it": (["empty"], "empty holds neither event files nor metrics.csv."),
    "no values": (["valueless"], "valueless holds a run without a single value: nothing was logged, or training has"),
    "not a folder": (["file"], "file is not a folder"),
    "no folder for the output": (["run", "-o", "missing/x.{}"], "missing/x.{} cannot be opened: No such file or"),
    "output is a folder": (["run", "-o", "empty.{}"], "empty.{} is a folder: name a file in it."),
    "output below a file": (["run", "-o", "file/x.{}"], "file/x.{} cannot be opened: there is a file where a folder"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_both_commands_refuse_alike(tmp_path, capsys, monkeypatch, runs, case):
    """Status 2, one sentence, nothing printed beside it."""
    monkeypatch.chdir(tmp_path)
    (arguments, sentence), said = REFUSALS[case], []
    for name in ("empty", "empty.html", "empty.npy", "valueless"):
        Path(name).mkdir()
    Path("file").write_text("")
    Path("valueless/metrics.csv").write_text("step,loss\n")
    rows = ["step,gradient/norm,train/loss", *(f"{i},{1 + i % 3},0.5" for i in range(40))]
    Path("run").mkdir()
    Path("run/metrics.csv").write_text("\n".join(rows) + "\n")
    for command, suffix in (("report", "html"), ("schedule", "npy")):
        assert main([command, *(word.format(suffix) for word in arguments)]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"dynamon {command}: {sentence.format(suffix)}")
        assert told.err.count("\n") == 1 and not told.out
        said.append(told.err.removeprefix(f"dynamon {command}: ").replace(f".{suffix}", ""))
    assert said[0] == said[1]
