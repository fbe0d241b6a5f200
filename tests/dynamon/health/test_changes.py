"""What was changed in mid-run: rates, the limit of clipping, weights, sizes of steps; and what was not."""

import numpy as np
import pytest

from dynamon.health import findings
from dynamon.runs.history import RunData, Series

LAYERS = tuple("abcd")
T, EVERY = 60, 10
STEPS = EVERY * np.arange(T)


def run(rate=0.1, seed=0, noise=0.3, loss=None):
    """Norms of weights that walk, under steps of the rate's size."""
    rng = np.random.default_rng(seed)
    rate = np.broadcast_to(np.asarray(rate, dtype=float), (T,))
    updates = rate[:, None] * np.exp(noise * rng.normal(size=(T, 4)))
    weights = 10 + np.cumsum(EVERY**0.5 * updates * rng.normal(size=(T, 4)), axis=0)
    tables = {
        "update/operator": updates,
        "update/ratio": updates / weights,
        "weight/operator": weights,
        "weight/frobenius": 3 * weights,
        "weight/effective_rate": rate[:, None] / (3 * weights) ** 2,
        "gradient/l2": np.exp(noise * rng.normal(size=(T, 4))),
    }
    norms = np.exp(noise * rng.normal(size=T))
    scalars = {"dynamon/loss": 2 * np.exp(-STEPS / 200) + 0.05 * rng.normal(size=T) if loss is None else loss}
    scalars |= {"gradient/norm": norms, "gradient/norm_clipped": norms.copy()}
    return RunData(
        {tag: Series(STEPS, values) for tag, values in scalars.items()},
        {tag: Series(STEPS, values, LAYERS) for tag, values in tables.items()},
    )


def only(data):
    (found,) = findings(data)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "rate",
    [
        0.1,
        0.1 * np.minimum(1, (STEPS + 1) / 200),
        0.1 * 0.5 * (1 + np.cos(np.pi * STEPS / (EVERY * T))),
        0.1 * 0.5 * (1 + np.cos(np.pi * (STEPS % 140) / 140)),  # restarts
        0.1 * 0.1 ** (STEPS // 250),
        0.1 * np.where(STEPS < 180, 0.04 + 0.96 * np.sin(STEPS / 180 * np.pi / 2) ** 2, (590 - STEPS) / 410 + 1e-3),
        1e-4 * 1.1 ** np.arange(T),
    ],
    ids=["constant", "warm-up", "cosine", "restarts", "decay", "one cycle", "search"],
)
def test_ordinary_schedules_raise_nothing(rate, seed):
    assert findings(run(rate, seed)) == []


@pytest.mark.parametrize("begin", [30, 33, 47])
def test_rates_of_readings(begin):
    """Without the sentinel: the step of the reading."""
    found = only(run(np.where(np.arange(T) < begin, 0.1, 0.4) * np.linspace(1, 0.5, T)))
    assert (found.rule, found.severity, found.step) == ("lr/jump", "note", EVERY * begin)
    assert 3.8 < found.numbers["times"] < 4


@pytest.mark.parametrize("tag", ["lr/base", "lr-AdamW"])
def test_rates_that_others_logged(tag):
    values = np.where(np.arange(T) < 40, 0.1, 0.3)
    found = only({tag: Series(STEPS, values), "gradient/norm": Series(STEPS, np.ones(T))})
    assert (found.rule, found.step, found.numbers["times"]) == ("lr/jump", 400, pytest.approx(3))


def test_the_step_that_the_sentinel_recorded():
    """It replaces the reading after it, and is known where no reading is."""
    data = run(np.where(np.arange(T) < 30, 0.1, 0.4))
    data.scalars["lr/rise"] = Series(np.array([297]), np.array([4.0]))
    assert only(data).step == 297
    data = run()
    data.scalars["lr/rise"] = Series(np.array([11, 297, 350, 400, 420]), np.array([2.2, 16.0, 2.5, 3.0, 2.3]))
    assert [(one.rule, one.step) for one in findings(data)] == [("lr/jump", step) for step in (297, 350, 400)]


def test_a_rate_with_a_loss_that_rises():
    loss = 2 * np.exp(-STEPS / 200) + 0.02 * np.random.default_rng(0).normal(size=T)
    loss[30:] += 3.0
    data = run(np.where(np.arange(T) < 30, 0.1, 0.4), loss=loss)
    found = {one.rule: one.severity for one in findings(data)}
    assert found["lr/jump"] == "warning"


@pytest.mark.parametrize("times", [0.5, 2.0, 4.0, 20.0])
def test_steps_beside_their_rate(times):
    data = run(noise=0.15)
    for tag in ("update/operator", "update/ratio"):
        data.tables[tag].values[35:] *= times
    found = [one for one in findings(data) if one.rule == "update/jump"]
    assert [one.step for one in found] == ([350] if times > 3 else [])
    if found:
        assert found[0].numbers["times"] == pytest.approx(times, rel=0.3) and found[0].severity == "note"


def test_steps_that_follow_rate_or_gradient_are_none():
    data = run(np.where(np.arange(T) < 35, 0.1, 0.4))
    assert {one.rule for one in findings(data)} == {"lr/jump"}
    data = run()
    data.tables["update/ratio"].values[35:] *= 4
    data.scalars["gradient/norm"].values[35:] *= 4
    assert findings(data) == []
    data = run()
    data.tables["update/ratio"].values[35:, 0] *= 10  # one layer
    assert findings(data) == []


@pytest.mark.parametrize("times", [0.0, 0.3, 3.0])
def test_weights_that_were_written_to(times):
    data = run(rate=0.001)
    data.tables["weight/operator"].values[35:, 2] *= times
    found = only(data)
    assert (found.rule, found.severity, found.step, found.layers) == ("weight/changed", "note", 350, ("c",))
    assert found.numbers["before"] == pytest.approx(10, rel=0.1)
    assert found.numbers["after"] == pytest.approx(10 * times, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_weights_that_steps_move_straight(seed):
    """Every step outwards, with sizes that vary: no norm moves faster."""
    data = run(rate=0.01, noise=0.6, seed=seed)
    data.tables["weight/operator"].values[:] = 1 + EVERY * np.cumsum(data.tables["update/operator"].values, axis=0)
    assert findings(data) == []


def test_weights_that_no_optimizer_steps():
    """A teacher that follows its student."""
    data = run(rate=0.001)
    data.tables["weight/operator"].values[35:, 2] *= 3
    data.tables["update/operator"].values[:, 2] = np.nan
    data.tables["update/ratio"].values[:, 2] = np.nan
    assert findings(data) == []
    data.tables["update/operator"].values[:, 2] = 0.0
    assert "weight/changed" not in {one.rule for one in findings(data)}


def clip(data, limit, part=slice(None)):
    norms, left = data.scalars["gradient/norm"].values, data.scalars["gradient/norm_clipped"].values
    left[part] = np.minimum(norms[part], limit)
    data.scalars["gradient/clip_coefficient"] = Series(STEPS, left / norms)
    return data


def test_a_limit_that_comes_in_mid_run():
    data = clip(run(), 0.8, slice(30, None))
    found = only(data)
    norms = data.scalars["gradient/norm"].values
    first = 30 + int(np.argmax(norms[30:] > 0.8))
    assert (found.rule, found.severity, found.step) == ("gradient/limit", "note", EVERY * first)
    assert found.numbers["limit"] == pytest.approx(0.8) and "left as they were" in found.message


def test_a_limit_that_becomes_lower():
    data = clip(clip(run(), 1.5), 0.5, slice(30, None))
    found = only(data)
    assert found.rule == "gradient/limit" and 300 <= found.step <= 320 and found.numbers["limit"] == pytest.approx(0.5)


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0, 100.0])
def test_a_limit_that_stays(limit):
    assert findings(clip(run(), limit)) == []


def test_clipping_that_follows_gradients_has_no_limit():
    data = run()
    data.scalars["gradient/norm_clipped"].values[30:] *= np.random.default_rng(1).uniform(0.3, 0.9, T - 30)
    assert findings(data) == []


def test_gradients_that_grow_beyond_a_limit():
    """They were below it before: the limit may always have been there."""
    data = run()
    data.scalars["gradient/norm"].values[30:] *= 5
    assert [one for one in findings(clip(data, 4.0)) if one.rule == "gradient/limit"] == []
