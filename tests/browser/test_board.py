"""The tab in TensorBoard and the report: every view, with the numbers of the event files."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from dynamon.quantities import REGISTRY
from tests.browser.board import VIEWS, exact, number, rounded

pytestmark = pytest.mark.slow
CHARTS = {
    "stability": {"Stability ratio", "Training loss", "Top eigenvalue of the Hessian", "Sharpness along the step"},
    "layers": {"gradient/dual"},
    "progress": {"Decrease of the loss in a step", "Overshoot of the step"},
    "rates": {"Base learning rate", "Rate ratio across layers", "Gradient noise across layers, dual norm"},
    "health": set(),
}
LOSS = "dynamon/loss"  # what rules rest on, at measured steps
LAYERS = ["network.0.weight", "network.0.bias", "network.3.weight", "network.3.bias"]


@pytest.fixture(scope="module")
def events(logdir):
    """The first run, read by TensorBoard's own reader."""
    found = EventAccumulator(str(logdir / "run" / "one"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


@pytest.fixture(scope="module")
def tables(events):
    """``{quantity: (names, {step: row})}``."""
    return {
        tag.removesuffix("/layers"): (
            json.loads(events.SummaryMetadata(tag).plugin_data.content)["layers"],
            {point.step: make_ndarray(point.tensor_proto) for point in events.Tensors(tag)},
        )
        for tag in events.Tags()["tensors"]
        if tag.endswith("/layers")
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view(open_board, request, scheme):
    board = open_board("run/one", "run/two" if scheme == "dark" else None, whole=True, color_scheme=scheme)
    name = request.node.callspec.params["open_board"]
    for view in VIEWS:
        board.show(view)
        assert CHARTS[view] <= set(board.titles())
        assert view != "health" or board.frame.locator(".finding, .empty, .result").count()
        assert "NaN" not in board.frame.locator("#panel").inner_html()
        assert board.frame.evaluate("document.documentElement.scrollWidth <= innerWidth")
        board.shot(f"{name}-{view}-{scheme}")
    channels = board.frame.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(channels) < 64) if scheme == "dark" else (min(channels) > 224)
    assert (
        board.frame.evaluate("performance.getEntriesByType('mark').map((mark) => mark.name)")[0] == "dynamon stability"
    )


def test_values_under_the_pointer(open_board, events):
    board = open_board()
    scalars = {tag: {p.step: p.value for p in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for title, label, tag in (
        ("Training loss", LOSS, LOSS),
        ("Top eigenvalue of the Hessian", "eigenvalue", "sharpness/hessian_max"),
        ("Stability ratio", "stability ratio", "sharpness/stability_ratio"),
    ):
        for share in (0.0, 0.33, 0.71, 1.0):
            step, readings = board.point(title, share)
            assert abs(step - 59 * share) <= 0.5
            steps = list(scalars[tag])
            near = [s for s in steps if abs(s - step) == min(abs(other - step) for other in steps)]
            assert number(readings[label].split(" (step")[0]) in [exact(scalars[tag][s]) for s in near]
    _, readings = board.point("Stability ratio", 0.4)
    value, step = readings["99 % upper bound"].split(" ", 1)
    assert number(value) == exact(scalars["sharpness/stability_ratio_upper"][int(step.strip("(step )"))])


def test_values_of_the_map(open_board, tables):
    board = open_board()
    board.show("layers")
    for quantity in ("gradient/dual", "noise/dual", "lr/ratio", "sharpness/block", "weight/operator", "update/ratio"):
        names, rows = tables[quantity]
        board.choose("quantity", quantity)
        labels = [node.get_attribute("title") for node in board.frame.locator("button.layer").all()]
        assert labels == names and names == [name for name in LAYERS if name in names]  # in the order of the model
        place = board.frame.locator(".maparea canvas").bounding_box()
        for name in names:
            label = board.frame.locator(f'button.layer[title="{name}"]').bounding_box()
            for share in (0.02, 0.55, 0.995):
                value, step, layer = board.point_at_map(label["y"] + label["height"] / 2 - place["y"], share)
                assert layer == name
                assert abs(step - 59 * share) <= min(abs(other - 59 * share) for other in rows) + 0.1
                np.testing.assert_equal(value, exact(float(rows[step][names.index(name)])))


def test_words_and_colours_are_those_of_the_registry(open_board, tables):
    board = open_board()
    board.show("layers")
    options = board.frame.locator(".controls").get_by_label("quantity").locator("option").all_text_contents()
    assert options == [f"{tag}: {REGISTRY[tag].words}" for tag in sorted(tables)]
    for quantity in ("update/layer_cosine", "gradient/dual", "lr/ratio", "weight/operator"):
        board.choose("quantity", quantity)
        assert board.frame.locator(".controls").get_by_label("colours").input_value() == REGISTRY[quantity].scale


def test_layers_are_chosen_by_pointer_and_keyboard(open_board, tables):
    board = open_board()
    board.show("layers")
    names, rows = tables["gradient/dual"]
    board.frame.locator(".maparea canvas").click(position={"x": 300, "y": 25})
    board.frame.click('button.layer[title="network.3.bias"]')
    step, readings = board.point("gradient/dual", 0.5)
    assert [label for label in readings] == ["network.0.weight", "network.3.bias", "median of all layers"]
    near = min(rows, key=lambda s: abs(s - step))
    for name in ("network.0.weight", "network.3.bias"):
        assert number(readings[name]) == exact(float(rows[near][names.index(name)]))
    assert number(readings["median of all layers"]) == exact(float(np.median(rows[near])))
    pressed = board.frame.locator('button.layer[aria-pressed="true"]').all()
    assert [node.get_attribute("title") for node in pressed] == ["network.0.weight", "network.3.bias"]

    _, before, _ = board.point_at_map(25, 0.8)
    board.frame.locator(".maparea canvas").focus()
    for key in ("ArrowDown", "ArrowLeft", "ArrowLeft"):
        board.page.keyboard.press(key)
    value, step, layer = board.tip()
    assert layer == "network.0.bias" and step == before - 8
    assert value == exact(float(rows[step][1]))
    board.page.keyboard.press("Enter")
    assert "network.0.bias" in board.readings("gradient/dual")[1]

    board.frame.get_by_role("button", name="▾ network.0").click()
    board.wait_for_layers(2)
    value, step, layer = board.point_at_map(8, 0.6)
    assert layer == "network.0, median of 2" and value == exact(float(np.median(rows[step][:2])))
    board.frame.click("text=unfold all")
    board.wait_for_layers(4)


def test_views_and_charts_by_keyboard(open_board, events):
    board = open_board()
    board.frame.locator("#tab-stability").focus()
    runs = ["runs"] if board.frame.locator("#tab-runs").is_visible() else []  # where there are several
    for view in (*VIEWS[1:], *runs, VIEWS[0]):
        board.page.keyboard.press("ArrowRight")
        board.wait(f"#board[data-view={view}]")
        assert board.frame.evaluate("document.activeElement.id") == f"tab-{view}"
    board.show("layers")
    reached = set()
    board.frame.locator("#tab-layers").focus()
    for _ in range(25):
        board.page.keyboard.press("Tab")
        reached.add(board.frame.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"SELECT.", "BUTTON.layer", "BUTTON.group", "CANVAS.", "BUTTON.scale", "DIV.plot", "INPUT."} & reached >= {
        "SELECT.",
        "BUTTON.layer",
        "BUTTON.group",
        "CANVAS.",
        "BUTTON.scale",
        "DIV.plot",
    }
    board.show("stability")
    board.chart("Training loss").locator(".plot").focus()
    steps = [point.step for point in events.Scalars(LOSS)]
    for _ in range(2):
        board.page.keyboard.press("ArrowLeft")
    assert board.readings("Training loss")[0] == steps[-3]
    board.page.keyboard.press("PageUp")
    assert board.readings("Training loss")[0] == steps[-13]


def test_two_runs(open_board, logdir):
    board = open_board("run/one", "run/two")
    step, readings = board.point("Training loss", 0.3)
    assert abs(step - 0.3 * 89) <= 0.5
    for run in ("one", "two"):
        events = EventAccumulator(str(logdir / "run" / run), size_guidance={"scalars": 0}).Reload()
        loss = {point.step: point.value for point in events.Scalars(LOSS)}
        value = number(readings[f"{LOSS} (run/{run})"].split(" (step")[0])
        assert value in [exact(v) for at, v in loss.items() if abs(at - step) == min(abs(s - step) for s in loss)]
    board.show("layers")
    board.choose("run", "1")
    assert "23 readings" in board.frame.locator(".hint").all_text_contents()[-1]
    board.frame.click('button.layer[title="network.0.weight"]')
    assert {f"network.0.weight (run/{run})" for run in ("one", "two")} < set(board.readings("gradient/dual")[1])
    board.shot("two-runs-layers")


def test_smoothing_leaves_the_values(open_board, events):
    board = open_board()
    loss = np.array([point.value for point in {p.step: p for p in events.Scalars(LOSS)}.values()])
    board.after_drawing(lambda: board.frame.locator(".smoothing input").fill("0.9"))
    step, readings = board.point("Training loss", 1.0)
    weights = 0.9 ** np.arange(len(loss))[::-1]
    smooth = (weights * loss).sum() / weights.sum()
    value, inside = readings[LOSS].split(" ")[:2]
    assert (
        step >= max(p.step for p in events.Scalars(LOSS))
        and number(value) == exact(float(loss[-1]))
        and number(inside.strip("()")) == rounded(smooth)
    )
    board.chart("Training loss").get_by_role("button", name="log scale").click()
    board.show("rates")
    board.show("stability")
    button = board.chart("Training loss").get_by_role("button", name="log scale")
    assert button.get_attribute("aria-pressed") == "false"  # it stays as the reader left it
