"""The summary of progress readings: means, errors, shares and verdicts, for the tab, the report and the terminal."""

import base64
import json

import numpy as np
import pytest

from dynamon.board.page import page
from dynamon.board.payload import payload
from dynamon.board.progress import LOWERS, RAISES, layer_progress, packed_progress, progress_lines, sentence
from dynamon.quantities.progress import standard_error_over_trend
from dynamon.runs.history import RunData, Series

LAYERS = ("embedding.weight", "body.weight", "norm.bias", "head.weight")
MEANS = np.array([0.4, 0.1, -0.1, 0.0])


def run(count: int, noise: float = 0.05, total: bool = True, means: np.ndarray = MEANS) -> RunData:
    """Readings of known means: costs are half of the first-order decrease."""
    draw = np.random.default_rng(0).standard_normal((count, len(LAYERS)))
    decrease, steps = means + noise * draw, np.arange(count) * 10
    first = decrease / 0.75
    tables = {"decrease": decrease, "first_order": first, "curvature_cost": first / 2}
    scalars = {"progress/total_decrease": Series(steps, decrease.sum(1) + 0.1)} if total else {}
    return RunData(scalars, {f"progress/{name}": Series(steps, rows, LAYERS) for name, rows in tables.items()})


def test_means_errors_and_verdicts() -> None:
    data = run(64)
    found = layer_progress(data)
    values = data.tables["progress/decrease"].values
    np.testing.assert_allclose(found.decrease, values.mean(0))
    np.testing.assert_allclose(found.error, standard_error_over_trend(values))
    np.testing.assert_allclose(found.late, values[-21:].mean(0))
    assert [found.verdict(i) for i in range(4)] == [LOWERS, LOWERS, RAISES, "not sure"]
    np.testing.assert_allclose(found.overshoot[:2], 0.5)  # a cost of half of the first order
    assert np.isnan(found.overshoot[2:]).all()  # does not descend for sure


def test_shares_are_of_all_layers_and_only_where_the_total_is_sure() -> None:
    found = layer_progress(run(64))
    assert found.total == pytest.approx(0.5, abs=0.02)  # with 0.1 of layers that are not shown
    np.testing.assert_allclose(found.share, found.decrease / found.total)
    of_shown = layer_progress(run(64, total=False))
    assert of_shown.total == pytest.approx(0.4, abs=0.02)
    noise = layer_progress(run(64, noise=1.0, means=0 * MEANS - 0.02))
    assert np.isnan(noise.share).all() and "cannot be told from noise" in sentence(noise)


def test_windows_over_time() -> None:
    data = run(63)
    found = layer_progress(data)
    assert found.over_time.shape == (7, 4)
    values, steps = data.tables["progress/decrease"].values, data.tables["progress/decrease"].steps
    parts = np.array_split(np.arange(63), 7)
    np.testing.assert_allclose(found.over_time, [values[part].mean(0) for part in parts])
    np.testing.assert_allclose(found.steps, [steps[part].mean() for part in parts])
    np.testing.assert_allclose(found.overshoot_over_time, 0.5)
    assert layer_progress(run(1000)).over_time.shape == (24, 4)


def test_few_readings_have_no_errors() -> None:
    data = run(3)
    found = layer_progress(data)
    np.testing.assert_array_equal(found.over_time, data.tables["progress/decrease"].values)
    assert np.isnan(found.error).all() and np.isnan(found.share).all() and np.isnan(found.over_time_error).all()
    assert "So few do not tell it from noise" in sentence(found)


def test_layers_that_were_not_stepped_count_where_they_were() -> None:
    data = run(64)
    data.tables["progress/decrease"].values[::2, 1] = np.nan
    found = layer_progress(data)
    known = data.tables["progress/decrease"].values[1::2, 1]
    assert found.decrease[1] == pytest.approx(known.mean())
    assert found.error[1] == pytest.approx(float(standard_error_over_trend(known)))


def test_the_sentence_names_who_did_most_and_who_undid() -> None:
    said = sentence(layer_progress(run(64)))
    assert said.startswith("64 readings: a step took 0.5") and "embedding.weight 8" in said
    assert said.endswith("Raised by: norm.bias.")


def test_lines_for_a_terminal() -> None:
    first, head, *rows, last = progress_lines(run(64), most=3)
    assert first.startswith("  progress, 64 readings") and "decrease in a step" in head
    assert rows[0].split()[0] == "embedding.weight"
    assert {row.split()[0] for row in rows[1:]} == {"norm.bias", "body.weight"}
    assert "lowers the loss" in rows[0] and last.strip() == "and 1 more that did less"
    assert list(progress_lines(RunData({}, {}))) == []


def test_what_the_board_gets() -> None:
    data = run(64)
    packed, found = packed_progress(data), layer_progress(data)
    values = np.frombuffer(base64.b64decode(packed["values"]), "<f4").reshape(-1, 4)
    np.testing.assert_allclose(values, found.over_time, rtol=1e-6)
    low, high = (np.frombuffer(base64.b64decode(packed[key]), "<f8") for key in ("low", "high"))
    np.testing.assert_allclose(high - low, 4 * found.total_over_time_error)
    assert [row[0] for row in packed["rows"]] == list(LAYERS)
    json.dumps(packed, allow_nan=False)
    assert payload(data, "run")["progress"] == packed
    assert payload(RunData({}, {}), "run")["progress"] is None
    assert sentence(found).replace("&", "\\u0026") in page([payload(data, "run")]).replace("\\u00b1", "±")
