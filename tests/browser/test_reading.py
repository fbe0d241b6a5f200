"""How a reader goes through a run: zoom and cursor, links, what was checked, several runs."""

import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamon.health import findings
from dynamon.health.checks import RULES
from dynamon.runs import read_run_data
from tests.browser.board import Board, exact, number, rounded, serving
from tests.browser.conftest import SWEEP

pytestmark = pytest.mark.slow
LOSS = "dynamon/loss"


def scalars(folder, tag) -> dict[int, float]:
    """A tag by TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


def nearest(points: dict[int, float], step: int) -> list[float]:
    """The values at the step that is nearest, or at both where two are."""
    least = min(abs(other - step) for other in points)
    return [exact(value) for at, value in points.items() if abs(at - step) == least]


def test_zoom_and_cursor_are_those_of_all_charts(open_board, logdir):
    board = open_board()
    loss = scalars(logdir / "run" / "one", LOSS)
    ratio = scalars(logdir / "run" / "one", "sharpness/stability_ratio")
    assert board.steps() is None
    board.drag("Training loss", 0.25, 0.75)
    assert board.steps() == (15, 44)  # of the 59 steps
    for share, expected in ((0.0, 15), (0.5, 29.5), (1.0, 44)):
        step, readings = board.point("Training loss", share)
        assert abs(step - expected) <= 0.5 and number(readings[LOSS]) in nearest(loss, step)
        other, readings = board.readings("Stability ratio")
        assert other == step and number(readings["stability ratio"]) in nearest(ratio, step)
    lines = board.frame.locator(".plot .u-cursor-x:visible")
    places = {round(line.bounding_box()["x"]) for line in lines.all()}
    assert lines.count() == len(board.titles()) and max(places) - min(places) <= 1  # one below the other

    board.page.keyboard.down("Shift")
    board.drag("Stability ratio", 0.5, 0.25)
    board.page.keyboard.up("Shift")
    first, last = board.steps()
    assert last - first == 29 and abs(first - 22) <= 1  # a quarter of what was shown
    board.shot("zoomed")

    board.show("layers")
    assert board.steps() == (first, last)
    for share in (0.02, 0.98):
        value, step, layer = board.point_at_map(25, share)
        assert abs(step - (first + share * 29)) <= 2
        assert board.readings("gradient/dual")[0] == round(first + share * 29)
    place = board.frame.locator(".maparea canvas").bounding_box()
    for act, share in (("move", 0.2), ("down", 0), ("move", 0.4), ("move", 0.6), ("up", 0)):
        getattr(board.page.mouse, act)(
            *([place["x"] + share * place["width"], place["y"] + 25] if act == "move" else [])
        )
    closer = board.steps()
    assert np.allclose(closer, (first + 0.2 * 29, first + 0.6 * 29), atol=1)
    assert not board.frame.locator('button.layer[aria-pressed="true"]').count()  # a drag is no click
    board.page.mouse.dblclick(place["x"] + 100, place["y"] + 25)
    assert board.steps() is None


def test_zoom_by_keyboard_and_wheel(open_board):
    board = open_board()
    board.chart("Training loss").locator(".plot").focus()
    for _ in range(5):
        board.page.keyboard.press("ArrowLeft")
    step, _ = board.readings("Training loss")
    board.page.keyboard.press("+")
    board.page.keyboard.press("+")
    first, last = board.steps()
    assert first < step < last and abs((last - first) - 59 * 0.36) <= 2
    for _ in range(3):
        board.page.keyboard.press("PageUp")  # the steps shown follow the cursor
    step, _ = board.readings("Training loss")
    assert board.steps()[0] <= step < first and board.steps()[1] - board.steps()[0] == last - first
    board.page.keyboard.press("-")
    assert board.steps()[1] - board.steps()[0] > last - first
    board.page.keyboard.press("0")
    assert board.steps() is None
    board.point("Training loss", 0.5)
    board.page.keyboard.down("Control")
    board.page.mouse.wheel(0, -100)
    board.page.keyboard.up("Control")
    board.frame.wait_for_selector(".zoomed", state="visible")
    first, last = board.steps()
    assert abs((first + last) / 2 - 29.5) <= 1.5 and abs((last - first) - 59 * 0.6) <= 2
    board.frame.get_by_role("button", name="whole run").click()
    assert board.steps() is None


def test_the_address_is_a_link(open_tab, open_report, request):
    """What one reader sees, another one sees who opens the address; and the way back leads through the views."""
    for opened in (open_tab, open_report):
        board = opened("run/one", "run/two")
        board.show("layers")
        board.choose("quantity", "noise/dual")
        board.frame.click('button.layer[title="network.3.weight"]')
        board.drag("noise/dual", 0.2, 0.6)
        step, readings = board.point("noise/dual", 0.5)
        place = board.place()
        assert place["view"] == "layers" and (place["run"], place["run2"]) == ("run/one", "run/two")
        assert place["quantity"] == "noise/dual" and place["layer"] == "network.3.weight"
        assert place["step"] == str(step) and place["steps"] == "-".join(map(str, board.steps()))
        address = board.page.url
        board.show("rates")
        board.show("health")
        for back in ("rates", "layers"):
            board.page.go_back()
            board.wait(f"#board[data-view={back}]")
        assert board.place() == place and board.readings("noise/dual") == (step, readings)
        board.page.go_forward()
        board.wait("#board[data-view=rates]")

        other = opened(None if opened is open_tab else "run/one", "run/two", place=address.partition("#")[2])
        other.wait("#board[data-view=layers]")
        assert other.steps() == tuple(map(int, place["steps"].split("-")))
        assert other.readings("noise/dual") == (step, readings)
        assert other.frame.locator('button.layer[aria-pressed="true"]').get_attribute("title") == "network.3.weight"


def test_a_link_that_leads_nowhere_shows_the_run(open_board):
    board = open_board(None if False else "run/one", place="view=nothing&run=gone&steps=9-3&step=x&layer=%E0%A4%A")
    assert board.view() == "stability" and board.steps() is None
    assert board.readings("Training loss")[0] == 59


def test_a_link_into_tensorboard(open_tab):
    """Its address holds the place, beside what TensorBoard keeps there."""
    place = "&p.dynamon.view=layers&p.dynamon.run=run/two&p.dynamon.quantity=update/ratio&p.dynamon.steps=20-60"
    board = open_tab(None, whole=True, place=place)
    board.wait("#board[data-view=layers]")
    assert board.steps() == (20, 60) and board.frame.get_by_label("run", exact=True).first.input_value() == "run/two"
    assert board.titles() == ["update/ratio"]
    board.show("health")
    assert board.page.url.partition("#")[2].startswith("dynamon&") and board.place()["view"] == "health"
    board.page.go_back()
    board.wait("#board[data-view=layers]")
    board.page.evaluate("location.hash = 'scalars'")
    board.page.wait_for_timeout(1000)
    assert "p.dynamon" not in board.page.url  # the address is that of the other tab
    board.page.go_back()
    board.page.wait_for_timeout(1000)
    assert board.view() == "layers"


def test_health_of_a_good_run_says_what_was_checked(open_board, logdir):
    board = open_board()
    board.show("health")
    assert board.frame.locator(".empty h2").text_content() == "Nothing looks wrong"
    rows = [row.locator("th, td").all_text_contents() for row in board.frame.locator("table.checks tbody tr").all()]
    seen = {what: value for what, verdict, value, _ in rows}
    assert {verdict for _, verdict, _, _ in rows} == {"fine"} and all(limit for *_, limit in rows)
    missing = board.frame.locator(".unchecked li").count()
    assert len(rows) + missing == len(RULES) and len(rows) >= 17  # one for each rule
    loss = scalars(logdir / "run" / "one", LOSS)
    ratio = np.array(list(scalars(logdir / "run" / "one", "sharpness/stability_ratio").values()))
    assert seen["loss is finite"] == f"0 of {len(loss)} readings not finite"
    median, highest = re.findall(r"(?:median|highest) ([\d.e-]+)", seen["steps fit the curvature: stability ratio"])
    np.testing.assert_allclose([float(median), float(highest)], [np.median(ratio), ratio.max()], rtol=5e-3)
    table = read_run_data(logdir / "run" / "one").tables["update/ratio"]
    ends = np.median(table.values[-5:], axis=0)
    slowest = f"least {ends.min():.3g} of its weight at the end, {table.layers[int(ends.argmin())]}"
    assert seen["every layer moves: update over weight"] == slowest
    board.shot("health-good")


@pytest.mark.parametrize("kind", ["tab", "report"])
def test_a_sweep_of_six_runs(open_tab, open_report, sweep_dir, tmp_path, kind):
    folders = {f"sweep/{name}": sweep_dir / "sweep" / name for name in SWEEP}
    if kind == "report":
        check_sweep(open_report(folders=folders.values()), folders, kind)
    else:
        with serving(sweep_dir, tmp_path / "log") as address:
            board = open_tab(None, address=address)
            check_sweep(board, folders, kind)
            board.page.close()  # before the server goes


def check_sweep(board: Board, folders, kind: str) -> None:
    board.show("runs")
    board.frame.wait_for_function("() => document.querySelectorAll('table.runtable .result').length === 6")
    board.wait_until_drawn()
    rows = table_of(board)
    assert set(rows) == set(folders)
    finals, ratios = {}, {}
    for name, folder in folders.items():
        loss = np.array(list(scalars(folder, LOSS).values()))
        ratio = list(scalars(folder, "sharpness/stability_ratio").values())
        level = [np.median(loss[max(0, i - 4) : i + 1]) for i in range(len(loss))]
        level[:2] = [level[2]] * 2
        finals[name], ratios[name] = level[-1], max(ratio)
        found = findings(read_run_data(folder))
        count = {kind: sum(one.severity == kind for one in found) for kind in ("fault", "warning", "note")}
        words = ", ".join(f"{n} {severity}{'s' * (n > 1)}" for severity, n in count.items() if n)
        steps, rate, final, lowest, highest, health = rows[name]
        assert steps == "60" and number(rate) == rounded(SWEEP[folder.name])
        assert health == (words or "nothing looks wrong")
        np.testing.assert_allclose([number(final), number(highest)], [finals[name], ratios[name]], rtol=5e-3)
        assert number(lowest) <= number(final)
    assert any("fault" in row[-1] for row in rows.values()) and any("nothing" in row[-1] for row in rows.values())
    board.shot(f"sweep-{kind}")

    for _ in range(2):
        board.after_drawing(lambda: board.frame.locator(".runtable thead button", has_text="final loss").click())
    assert list(table_of(board)) == sorted(finals, key=finals.get, reverse=True)
    marks = board.frame.locator(".run-mark")
    assert marks.count() == 6
    best = min(finals, key=finals.get)
    point = board.frame.locator(f'.run-mark[aria-label^="{best}:"]')
    assert f"final loss {exact(finals[best])}".rstrip("0") in point.get_attribute("aria-label")
    shown = [name for name in folders if board.frame.get_by_label(f"show {name}", exact=True).is_checked()]
    for name in folders:
        if (name in shown) != (name in (best, "sweep/1e+30", "sweep/10")):
            mark = board.frame.locator(f'.run-mark[aria-label^="{name}:"]')
            board.after_drawing(lambda mark=mark: mark.press("Enter"))
    board.show("stability")
    labels = board.readings("Training loss")[1]
    assert set(labels) == {f"{LOSS} ({name})" for name in (best, "sweep/1e+30", "sweep/10")}
    colors = (
        board.chart("Training loss").locator(".key svg").evaluate_all("all => all.map((one) => one.className.baseVal)")
    )
    assert len(set(colors)) == 3  # one for each run
    board.shot(f"sweep-{kind}-stability")


def table_of(board: Board) -> dict[str, list[str]]:
    found = board.frame.locator("table.runtable tbody tr").all()
    return {row.locator("th").text_content(): row.locator("td").all_text_contents()[1:] for row in found}
