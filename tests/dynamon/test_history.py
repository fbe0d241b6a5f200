"""What was measured comes back as arrays, and memory stays bounded."""

import numpy as np
import pytest

from dynamon.history import History


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


def test_a_table_whose_layers_changed_starts_anew():
    history = History()
    history.add("noise", 0, np.array([1.0, 2.0]), ("a", "b"))
    history.add("noise", 1, np.array([3.0]), ("a",))
    assert history["noise"].values.tolist() == [[3.0]] and history["noise"].layers == ("a",)


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
