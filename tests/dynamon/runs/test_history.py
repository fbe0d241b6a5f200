"""What was measured comes back as arrays, and memory stays bounded."""

import numpy as np
import pytest

from dynamon.runs.history import History, Series


def test_scalars_and_layer_tables():
    history = History()
    for step in (0, 5, 9):
        history.add("loss", step, 1.0 / (1 + step))
        history.add("noise", step, np.array([step, 2.0 * step]), ("a", "b"))
    loss, noise = history["loss"], history["noise"]
    assert list(history) == ["loss", "noise"] and len(history) == 2 and "gone" not in history
    assert loss.steps.tolist() == noise.steps.tolist() == [0, 5, 9] and loss.steps.dtype == np.int64
    assert loss.values.tolist() == [1, 1 / 6, 0.1] and loss.layers is None and len(loss) == 3
    assert noise.values.tolist() == [[0, 0], [5, 10], [9, 18]] and noise.layers == ("a", "b")
    assert noise.values.dtype == np.float64
    with pytest.raises(KeyError):
        history["gone"]


def test_arrays_are_snapshots():
    history = History()
    history.add("loss", 0, 1.0)
    before = history["loss"]
    history.add("loss", 1, 2.0)
    assert len(before) == 1 and len(history["loss"]) == 2


def test_a_table_whose_layers_change_keeps_its_earlier_rows():
    history = History()
    history.add("noise", 0, np.array([1.0, 2.0]), ("a", "b"))
    history.add("noise", 1, np.array([3.0]), ("a",))
    history.add("noise", 2, np.array([4.0, 5.0]), ("c", "b"))
    nan = np.nan
    assert history["noise"].layers == ("a", "b", "c") and history["noise"].steps.tolist() == [0, 1, 2]
    np.testing.assert_equal(history["noise"].values, [[1, 2, nan], [3, nan, nan], [nan, 5, 4]])


def test_a_wide_table_is_bounded_in_bytes():
    history = History()
    names = tuple(f"layer{i}" for i in range(2000))
    for step in range(2000):
        history.add("noise", step, np.full(2000, step, dtype=np.float64), names)
    steps = history["noise"].steps
    assert 64 <= len(steps) <= 2**22 / 8 / 2000
    assert len(set(np.diff(steps))) == 1 and steps[-1] > 2000 - 1 - np.diff(steps)[0]
    assert history["noise"].values.nbytes <= 2**22


def test_going_back_forgets_what_came_after():
    history = History()
    for step in range(5000):  # thinned by now
        history.add("loss", step, float(step))
    history.add("late", 4000, 1.0)
    history.forget_from(1000)
    assert "late" not in history and history["loss"].steps[-1] == 998
    for step in range(1000, 1010):
        history.add("loss", step, float(step))
    assert history["loss"].steps.tolist() == list(range(0, 1010, 2))


def test_a_key_that_is_not_there_names_those_near():
    history = History()
    with pytest.raises(KeyError, match="nothing has been measured yet"):
        history["noise"]
    history.add("noise/dual", 0, np.array([1.0]), ("a",))
    history.add("noise/scale", 0, 2.0)
    history.add("gradient/norm", 3, 2.0)
    with pytest.raises(KeyError, match=r"no 'noise'; there is noise/dual, noise/scale"):
        history["noise"]
    with pytest.raises(KeyError, match="gradient/norm"):
        history["gradient/nrom"]
    with pytest.raises(KeyError, match="no 'xyz' among 3 quantities"):
        history["xyz"]
    assert history.get("noise") is None and "noise" not in history


def test_what_is_printed_says_what_there_is():
    history = History()
    history.add("noise/dual", 0, np.array([1.0, 2.0]), ("a", "b"))
    history.add("loss", 0, 2.0)
    history.add("loss", 5, 0.25)
    assert (
        repr(history)
        == "History of 2 quantities\n  noise/dual: 1 point, step 0, 2 layers\n  loss: 2 points, steps 0 to 5"
    )
    assert repr(history["loss"]) == "Series(2 points, steps 0 to 5, last 0.25)"
    assert repr(history["noise/dual"]) == "Series(1 point, step 0, 2 layers)"
    assert repr(Series(np.zeros(0, dtype=np.int64), np.zeros(0))) == "Series(empty)"


@pytest.mark.parametrize("count", [10, 4095, 4096, 5000, 8192, 20_000, 50_000])
def test_long_runs_are_thinned_evenly(count):
    history = History()
    for step in range(count):
        history.add("loss", step, float(step))
    steps = history["loss"].steps
    assert min(count, 2048) <= len(steps) <= 4096
    assert steps[0] == 0 and len(set(np.diff(steps))) == 1
    assert steps[-1] > count - 1 - np.diff(steps)[0]
    assert (history["loss"].values == steps).all()


def test_quantities_are_thinned_apart():
    history = History()
    for step in range(5000):
        history.add("often", step, 0.0)
        if step % 100 == 0:
            history.add("seldom", step, 0.0)
    assert len(history["seldom"]) == 50 and len(history["often"]) < 4096
