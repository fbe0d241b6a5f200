"""Data frames and charts of a history."""

import sys

import numpy as np
import pytest

from dynamon.runs import History, Series

STEPS = np.arange(0, 50, 10)


def history(layers: int) -> History:
    found = History()
    for step in STEPS:
        found.add("gradient/norm", step, 1.0 + step)
        if step % 20 == 0:
            found.add("train/loss", step, -float(step))
        row = step + np.arange(layers, dtype=float)
        found.add("gradient/l2", step, row, [f"layer{i}" for i in range(layers)])
    return found


def test_data_frames_hold_the_same_numbers():
    pandas = pytest.importorskip("pandas")
    frame = history(3).to_dataframe()
    assert list(frame.columns) == ["gradient/norm", "train/loss"] and list(frame.index) == list(STEPS)
    assert frame.index.name == "step" and frame["gradient/norm"].tolist() == (1.0 + STEPS).tolist()
    assert frame["train/loss"].isna().tolist() == [False, True, False, True, False]
    table = history(3).to_dataframe("gradient/l2")
    assert list(table.columns) == ["layer0", "layer1", "layer2"]
    assert (table.to_numpy() == history(3)["gradient/l2"].values).all()
    one = history(3).to_dataframe("train/loss")
    assert list(one.columns) == ["train/loss"] and one.loc[20, "train/loss"] == -20.0
    assert isinstance(Series(STEPS, STEPS * 1.0).to_dataframe("loss"), pandas.DataFrame)
    assert len(History().to_dataframe()) == 0
    with pytest.raises(KeyError, match="gradient/norm"):
        history(3).to_dataframe("gradient/norms")


def test_a_table_is_drawn_layer_by_layer_or_as_quantiles():
    pytest.importorskip("matplotlib")
    few = history(3).plot("gradient/l2")
    assert [line.get_label() for line in few.lines] == ["layer0", "layer1", "layer2"] and few.get_yscale() == "log"
    assert (few.lines[1].get_ydata() == STEPS + 1).all() and few.get_ylabel() == "gradient/l2"
    many = history(21).plot("gradient/l2")
    (median,) = many.lines
    assert (median.get_ydata() == STEPS + 10).all() and len(many.collections) == 1
    (line,) = history(3).plot("train/loss", axes=few).lines[3:]
    assert (line.get_xdata() == STEPS[::2]).all() and few.get_yscale() == "linear"
    (alone,) = Series(STEPS, STEPS * 1.0).plot("loss").lines
    assert (alone.get_ydata() == STEPS).all()


def test_steps_without_a_value_are_left_out_of_quantiles():
    pytest.importorskip("matplotlib")
    values = np.tile(np.arange(20.0), (5, 1))
    values[1], values[2, 3] = np.nan, np.inf
    axes = Series(STEPS, values, tuple(f"layer{i}" for i in range(20))).plot()
    (median,) = axes.lines
    known = [
        np.median(np.delete(row, 3)) if step == 20 else np.median(row) for step, row in zip(STEPS, values, strict=True)
    ]
    assert median.get_xdata().tolist() == [0, 20, 30, 40]
    assert median.get_ydata().tolist() == [known[0], *known[2:]]


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("pandas", lambda h: h.to_dataframe(), "to_dataframe needs pandas: pip install pandas"),
        ("pandas", lambda h: h["gradient/norm"].to_dataframe(), "needs pandas"),
        ("matplotlib.figure", lambda h: h.plot("gradient/norm"), r'pip install "lightning-dynamon\[demo\]"'),
    ],
)
def test_what_is_not_installed_is_named(module, call, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        call(history(2))
