"""What only the tab has, as runs that grow and TensorBoard's theme; names that try to be more than names; speed."""

import json
import os
import shutil

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from tests.browser import big
from tests.browser.board import exact, number, serving

pytestmark = pytest.mark.slow
NASTY = "<img src=x onerror=window.attacked=1>"


def add_row(writer, quantity, step, names, values):
    content = SummaryMetadata.PluginData(plugin_name="dynamon", content=json.dumps({"layers": names}).encode())
    proto = make_tensor_proto(np.asarray(values, dtype=np.float32))
    value = Summary.Value(tag=f"{quantity}/layers", tensor=proto, metadata=SummaryMetadata(plugin_data=content))
    writer._get_file_writer().event_writer.add_event(Event(step=step, summary=Summary(value=[value])))


def add(writer, steps, names=("a.weight", "b.weight")):
    for step in steps:
        writer.add_scalar("train/loss", 2.0 + np.sin(step), step)
        writer.add_scalar("sharpness/stability_ratio", 0.01 * step, step)
        add_row(writer, "gradient/dual", step, list(names), [step + 0.5, 2.0])
    writer.flush()


@pytest.fixture
def add_run(logdir):
    """A run of its own in the folder that TensorBoard shows, gone after the test."""
    made = []

    def written(name):
        made.append(logdir / name)
        return SummaryWriter(str(logdir / name))

    yield written
    for path in made:
        shutil.rmtree(path, ignore_errors=True)


def test_the_board_follows_a_run(open_tab, add_run, logdir):
    with add_run("live") as writer:
        add(writer, range(10))
        board = open_tab("live")
        assert board.readings("Training loss")[0] == 9
        board.show("layers")
        board.frame.click('button.layer[title="a.weight"]')
        assert board.readings("gradient/dual") == (9, {"a.weight": "9.5", "median of all layers": "5.75"})
        add(writer, range(10, 25))
        board.frame.wait_for_function("() => document.querySelector('.runs [role=status]').textContent === 'step 24'")
        board.page.wait_for_timeout(200)
        assert board.frame.locator("#board").get_attribute("data-view") == "layers"
        _, readings = board.point("gradient/dual", 1.0)
        assert readings == {"a.weight": "24.5", "median of all layers": "13.25"}  # still chosen
        assert board.point_at_map(8, 0.999)[:2] == (24.5, 24)
        with SummaryWriter(str(logdir / "live"), filename_suffix=".resumed") as other:  # back to step 20, on to 29
            for step in range(20, 30):
                other.add_scalar("train/loss", 100.0 + step, step)
        board.show("stability")
        board.frame.wait_for_function("() => document.querySelector('.runs [role=status]').textContent === 'step 29'")
        board.page.wait_for_timeout(200)
        loss = {step: board.point("Training loss", step / 29)[1]["train/loss"] for step in (10, 19, 20, 29)}
        expected = {10: 2 + np.sin(10), 19: 2 + np.sin(19), 20: 120.0, 29: 129.0}
        assert {step: number(value) for step, value in loss.items()} == {s: exact(v) for s, v in expected.items()}
    with add_run("newer") as writer:  # runs appear and vanish
        choice = "() => [...document.querySelector('.runs select').options].map((option) => option.value)"
        shutil.rmtree(logdir / "live")
        board.frame.wait_for_function(f"() => !({choice})().includes('live')")
        assert board.frame.evaluate(choice) == ["run/two", "run/one"]  # what holds nothing yet is not offered
        add(writer, range(5))
        board.frame.wait_for_function(f"() => ({choice})()[0] === 'newer'")
        board.choose_runs("newer", None)
        assert board.readings("Training loss")[0] == 4


def test_what_a_restart_makes_void_leaves_the_tab(open_tab, add_run, logdir):
    """A curve that is void as a whole, points at the end of others, rows of a table."""
    with add_run("restarted") as writer:
        add(writer, range(30))
        for step in range(20, 30):
            writer.add_scalar("sharpness/hessian_max", 5.0, step)
        writer.flush()
        board = open_tab("restarted")
        assert board.readings("Top eigenvalue of the Hessian")[0] == 29
        board.show("layers")
        assert board.readings("gradient/dual")[0] == 29
        with SummaryWriter(str(logdir / "restarted"), purge_step=15, filename_suffix=".resumed") as other:
            add(other, range(15, 18))
            status = "() => document.querySelector('.runs [role=status]').textContent === 'step 17'"
            board.frame.wait_for_function(status)
            board.page.wait_for_timeout(200)
            assert board.readings("gradient/dual")[0] == 17
            board.show("stability")
            assert board.readings("Training loss")[0] == 17
            assert not board.frame.get_by_text("Top eigenvalue of the Hessian").count()
    path = next((logdir / "restarted").glob("*.resumed"))
    path.write_bytes(path.read_bytes() + b"\xff" * 40)
    board.frame.wait_for_function(
        "() => document.querySelector('.runs [role=alert]').textContent.startsWith('1 part of')"
    )


def test_inside_of_tensorboard(open_tab):
    board = open_tab(whole=True, color_scheme="light")
    color = "getComputedStyle(document.body).backgroundColor"
    light = board.frame.evaluate(color)
    assert not board.frame.get_by_role("button", name="dark theme").count()
    board.page.get_by_label("Menu for changing light or dark theme").click()
    board.page.get_by_text("Dark", exact=True).click()
    board.frame.wait_for_function(f"(light) => {color} !== light", arg=light)
    assert board.frame.evaluate("document.documentElement.dataset.theme") == "dark"
    asked = []
    board.page.on("request", lambda request: asked.append(request.url) if "/plugin/dynamon/" in request.url else None)
    board.page.evaluate("location.hash = 'scalars'")
    board.page.wait_for_timeout(3000)
    assert len(asked) <= 2  # what was on its way: behind another tab it rests
    board.page.evaluate("location.hash = 'dynamon'")
    with board.page.expect_request("**/plugin/dynamon/run?*"):
        pass


def test_names_are_shown_as_text(open_tab, open_report, add_run, logdir):
    name = f"{NASTY}run"
    with add_run(name) as writer:
        for step in range(30):
            writer.add_scalar(f"train/loss{NASTY}", 1.0, step)
            writer.add_scalar("gradient/norm", 1.0, step)
            add_row(writer, "gradient/l2", step, [NASTY, "b"], [1.0 if step < 5 else 0.0, 1.0])
            add_row(writer, f"x/{NASTY}", step, [NASTY, "b"], [step, 1.0])
    for board in (open_tab(name), open_report(name)):
        assert f"train/loss{NASTY}" in board.frame.locator(".legend").all_text_contents()[0]
        board.show("layers")
        board.choose("quantity", f"x/{NASTY}")
        board.frame.locator("button.layer").first.click()
        assert NASTY in board.readings(f"x/{NASTY}")[1]
        assert board.point_at_map(8, 0.9)[2] == NASTY
        board.show("health")
        assert NASTY in board.frame.locator(".finding").first.text_content()
        assert board.frame.locator("#panel button").first.is_visible()
        board.after_drawing(lambda: board.frame.get_by_role("button", name="show gradient/l2").click())  # noqa: B023
        assert board.readings("gradient/l2")[1][NASTY] == "0"
        assert not board.frame.locator("img").count()
        assert board.frame.evaluate("window.attacked") is None
        board.shot("nasty-names")


@pytest.mark.parametrize("kind", ["empty", "damaged", "remote"])
def test_what_the_tab_says_without_runs(open_tab, tmp_path, kind):
    folder = tmp_path / "logs"
    folder.mkdir()
    if kind == "damaged":
        (folder / "events.out.tfevents.1.x").write_bytes(b"\xff" * 100)
    with serving("gs://bucket/logs" if kind == "remote" else folder, tmp_path / "log") as address:
        board = open_tab(None, address=address)
        said = board.frame.locator(".empty").text_content()
        board.shot(f"tab-{kind}")
        board.page.close()  # before the server goes
    assert {
        "empty": "Add DynamicsMonitor()",
        "damaged": "The event files hold no readings: the run has only just begun, or they are damaged",
        "remote": "gs://bucket/logs is remote",
    }[kind] in said


def test_300_layers_and_100_000_steps(open_tab, open_report, logdir, add_run, capsys):
    shutil.rmtree(logdir / "big", ignore_errors=True)
    expected = big.write(logdir / "big")
    try:
        times = {}
        for name, opened in (("tab", open_tab), ("report", open_report)):
            board = opened(None) if name == "tab" else opened("big")
            board.wait("figure")
            times[name] = marks(board)["dynamon stability"]
            if name == "tab":
                status = "() => document.querySelector('.runs [role=status]').textContent === 'step 99999'"
                board.frame.wait_for_function(status)
            board.wait_until_drawn()
            times[f"{name}, zoom"] = timed(board, lambda board=board: board.drag("Training loss", 0.25, 0.75))
            first, last = board.steps()
            assert abs(first - 25_000) < 200 and abs(last - 75_000) < 200
            step, readings = board.point("Training loss", 0.5)
            near = expected[big.LOSS][step - 5 : step + 6]  # two of ten are drawn
            assert number(readings[big.LOSS]) in [exact(value) for value in near]
            times[f"{name}, cursor"] = timed(board, lambda board=board: board.point("Training loss", 0.6))
            board.frame.get_by_role("button", name="whole run").click()
            begin = board.frame.evaluate("performance.now()")
            board.show("layers")
            board.frame.wait_for_function("() => performance.getEntriesByName('dynamon layers').length")
            times[f"{name}, map"] = marks(board)["dynamon layers"] - begin
            value, step, layer = board.point_at_map(100, 0.5)
            column = big.names(300).index(layer)
            assert value == exact(float(expected["gradient/dual"][step // 50, column])) and 49_500 < step < 50_500
            begin = board.frame.evaluate("performance.now()")
            board.frame.get_by_role("button", name="fold all", exact=True).click()
            board.frame.wait_for_function("() => performance.getEntriesByName('dynamon layers').length > 1")
            times[f"{name}, folded"] = marks(board)["dynamon layers"] - begin
            board.frame.click("text=unfold all")
            board.frame.locator("button.layer, button.group").first.wait_for()
            board.shot(f"{name}-big")
    finally:
        shutil.rmtree(logdir / "big")
    with capsys.disabled():
        print(
            "\n300 layers x 2,000 readings, 100,000 losses, ms: ", {key: round(value) for key, value in times.items()}
        )
    # The aim is 2,000 on a quiet machine; others are half as fast and have other work, sometimes a queue of it.
    queue = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 1.0
    assert max(times["tab"], times["report"]) < 10_000 * queue
    assert all(times[f"{name}, {what}"] < 500 * queue for name in ("tab", "report") for what in ("zoom", "cursor"))


def timed(board, act) -> float:
    """Milliseconds of the longest task of the page while something is done, by the browser's own clock."""
    board.frame.evaluate(
        "() => { window.tasks = [0]; new PerformanceObserver((list) => list.getEntries().forEach((one) => "
        "window.tasks.push(one.duration))).observe({ entryTypes: ['longtask'] }); }"
    )
    act()
    board.page.wait_for_timeout(500)
    return board.frame.evaluate("Math.max(...window.tasks)")


def marks(board) -> dict[str, float]:
    """Milliseconds since the frame or file was asked for, by the browser's own clock; the last of each name."""
    return dict(board.frame.evaluate("performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime])"))
