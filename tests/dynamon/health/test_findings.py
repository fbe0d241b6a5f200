"""Each rule on a series with its fault and without, and on noise; real runs are in tests/callbacks."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.health import SEVERITIES, findings, loss_tag
from dynamon.runs.history import RunData, Series

LAYERS = tuple(f"blocks.{i}.weight" for i in range(6))
T = 120
STEPS = 5 * np.arange(T)


def noise(shape=(T,), size=0.3, seed=0):
    return np.exp(size * np.random.default_rng(seed).normal(size=shape))


def healthy(size=0.3, seed=0, correlation=0.0, points=T):
    """A run that learns: noise on everything, sharpness around the edge, decaying loss."""
    rng = np.random.default_rng(seed)
    steps = 5 * np.arange(points)

    def draw(*columns):
        white = rng.normal(size=(points, *columns))
        for i in range(1, points):  # an AR(1) process of unit variance
            white[i] = correlation * white[i - 1] + math.sqrt(1 - correlation**2) * white[i]
        return np.exp(size * white)

    def table(level):
        return Series(steps, level * draw(len(LAYERS)), LAYERS)

    def scalar(values):
        return Series(steps, np.asarray(values, dtype=float))

    return RunData(
        {
            "train/loss": scalar(0.5 + 2 * np.exp(-steps / 200) + size * np.log(draw())),
            "sharpness/stability_ratio": scalar(0.95 * draw()),
            "gradient/norm": scalar(draw()),
            "gradient/nonfinite": scalar(np.zeros(points)),
            "dynamon/overhead": scalar(np.full(points, 0.02)),
            "dynamon/failures": scalar(np.zeros(points)),
            "lr/bounded": scalar(rng.integers(0, 3, points)),
        },
        {
            "gradient/l2": table(0.1),
            "update/ratio": table(1e-3),
            "weight/operator": table(1.0),
            "spectrum/stable_rank": table(8.0),
            "spectrum/effective_rank": table(20.0),
            "lr/ratio": table(0.5),
        },
    )


def rules(run):
    return [finding.rule for finding in findings(run)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0, 0.6), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([1, 7, 30, 120, 400])
)
def test_noise_alone_raises_nothing(seed, size, correlation, points):
    assert rules(healthy(size, seed, correlation, points)) == []


@pytest.mark.parametrize(("kind", "alarms"), [("normal", 0), ("lognormal", 0), ("walk", 0), ("cauchy", 4)])
def test_a_loss_without_a_trend_raises_nothing(kind, alarms):
    """Of 100 runs; with tails so heavy that there is no mean, a few may."""
    found = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        draws = {"normal": rng.normal, "lognormal": rng.lognormal, "cauchy": rng.standard_cauchy}
        if kind == "walk":
            values = 0.02 * np.cumsum(rng.normal(size=300)) + 3 * np.exp(-np.arange(300) / 50)
            values = values + 0.2 * rng.normal(size=300)
        else:
            values = draws[kind](size=300)
        norms = Series(np.arange(2), np.ones(2))
        found += rules({"train/loss": Series(np.arange(300), values), "gradient/norm": norms}) != []
    assert found <= alarms


@pytest.mark.parametrize("seed", range(8))
def test_the_beginning_of_a_healthy_run_raises_nothing(seed):
    """The rules are applied while a run goes on, to what there is."""
    run = healthy(0.3, seed, 0.5 * (seed % 2))
    for points in range(5, T, 10):
        begin = RunData(*({n: first(s, points) for n, s in some.items()} for some in (run.scalars, run.tables)))
        assert [one for one in findings(begin) if one.severity != "note"] == [], points


def first(series, points):
    return Series(series.steps[:points], series.values[:points], series.layers)


def test_batches_that_come_in_one_order_are_noise():
    """Eight batches of random labels, again and again: five apart they happen to be alike."""
    order = [1.065, 1.261, 1.052, 1.246, 1.1, 1.051, 1.249, 1.371]
    losses = Series(np.arange(32), np.array(order * 4) - 0.001 * np.arange(32))
    assert [one for one in findings({"train/loss": losses}) if one.severity != "note"] == []


def test_many_layers_raise_nothing():
    rng = np.random.default_rng(5)
    values = np.exp(rng.normal(size=(2000, 200)))
    table = Series(np.arange(2000), values, tuple(map(str, range(200))))
    assert (
        rules({"gradient/l2": table, "weight/operator": table, "gradient/norm": Series(np.arange(1), np.ones(1))}) == []
    )


def test_the_time_of_a_very_long_run_grows_with_its_length():
    def seconds(points):
        rng = np.random.default_rng(0)
        table = Series(np.arange(points), np.exp(0.3 * rng.normal(size=(points, 20))), tuple(map(str, range(20))))
        table.values[3 * points // 4 :, 7] *= 100
        begin = time.process_time()
        (found,) = findings({"gradient/l2": table, "gradient/norm": Series(np.arange(1), np.ones(1))})
        assert found.layers == ("7",) and abs(found.step - 3 * points // 4) < 100
        return time.process_time() - begin

    # A fourth of the points should take a fourth; were it the square, the long run would take 16 times as much.
    assert min(seconds(40_000) for _ in range(2)) < 10 * max(seconds(10_000) for _ in range(2))


def one(run, rule):
    """The only finding, of this rule."""
    found = findings(run)
    assert [finding.rule for finding in found] == [rule], found
    assert found[0].severity in SEVERITIES and found[0].message and found[0].advice.endswith(".")
    json.dumps(found[0].as_dict(), allow_nan=False)
    return found[0]


def test_gradients_that_are_not_finite():
    run = healthy()
    run.scalars["gradient/nonfinite"].values[40:] = 12
    run.tables["gradient/l2"].values[40:, 2:4] = np.nan
    found = one(run, "gradient/nonfinite")
    assert found.severity == "fault" and found.step == 200 and found.layers == LAYERS[2:4]
    assert found.numbers == {"values": 12, "readings": 80} and "12 values" in found.message
    run = healthy()
    run.scalars["gradient/nonfinite"].values[7] = 3
    assert one(run, "gradient/nonfinite").severity == "note"  # as a scaler's overflow


def test_a_loss_that_is_not_finite():
    run = healthy()
    run.scalars["train/loss"].values[90:] = np.nan
    found = one(run, "loss/nonfinite")
    assert found.severity == "fault" and found.step == 450
    run.scalars["train/loss"].values[100:] = 0.5  # a batch or two, then it went on
    assert rules(run) == []


@pytest.mark.parametrize("rises", [False, True])
def test_a_layer_whose_gradient_grows(rises):
    run = healthy()
    run.tables["gradient/l2"].values[60:, 3] *= 100
    run.scalars["train/loss"].values[62:] += 4.0 * rises
    found = next(f for f in findings(run) if f.rule == "gradient/growth")
    assert abs(found.step - 300) <= 10 and found.layers == (LAYERS[3],)
    assert found.severity == ("warning" if rises else "note") and 40 < found.numbers["times"] < 250
    assert rises or rules(run) == ["gradient/growth"]


def test_a_layer_whose_gradient_fades():
    run = healthy()
    run.tables["gradient/l2"].values[60:, 3] *= 0.01
    found = one(run, "gradient/faded")
    assert abs(found.step - 300) <= 10 and found.layers == (LAYERS[3],) and found.severity == "warning"
    assert 40 < found.numbers["times"] < 250
    run.tables["gradient/l2"].values[100:, 3] *= 100  # it came back
    assert rules(run) == ["gradient/growth"]
    run = healthy()
    run.tables["gradient/l2"].values[60:] *= 0.01  # all of them, as where the loss becomes small
    assert rules(run) == []
    run = healthy()
    run.tables["gradient/l2"].values[:, 3] *= np.exp(-np.linspace(0, 4, T))  # slowly
    assert rules(run) == []


def test_single_large_gradients_are_no_growth():
    run = healthy()
    run.tables["gradient/l2"].values[20::25] *= 1000
    assert rules(run) == []
    run.tables["gradient/l2"].values[:] *= np.exp(np.linspace(0, 3, T))[:, None]  # slowly, twenty times in all
    assert rules(run) == []


def test_one_batch_again_and_again():
    run = healthy()
    cosines = 0.3 * np.random.default_rng(0).normal(size=T)
    run.scalars["gradient/cosine"] = Series(STEPS, cosines)
    cosines[:12] = 0.95  # the first steps all go one way
    assert rules(run) == []
    cosines[60:64] = 0.97
    assert rules(run) == []  # four that happen to be alike
    cosines[80:90] = 0.97
    found = one(run, "gradient/repeated")
    assert found.step == 400 and found.severity == "warning" and found.numbers["readings"] == 10
    assert found.numbers["now"] == 0.97 and found.numbers["before"] < 0.3
    cosines[:] = 0.97  # all samples at each step
    assert rules(run) == []
    cosines[:] = np.linspace(0.3, 0.97, T)  # batches that grow
    assert rules(run) == []


def test_clipping_that_tightens():
    run = healthy()
    left = np.clip(0.7 * noise(size=0.4), 0, 1)
    run.scalars["gradient/clip_coefficient"] = Series(STEPS, left)
    assert rules(run) == []
    left[70:74] *= 0.02
    assert rules(run) == []  # four steps
    left[74:] *= 0.02
    found = one(run, "gradient/clipping")
    assert found.step == 350 and found.severity == "warning" and 0.005 < found.numbers["coefficient"] < 0.05
    assert 0.4 < found.numbers["before"] < 1 and "changed the limit" in found.advice
    run.scalars["gradient/norm"].values[70:] *= 50  # it is the gradient that has changed
    assert rules(run) == []
    left[40:] = 1e-4
    found = one(run, "gradient/clipping")
    assert found.step == 200 and found.severity == "note"


def test_sharpness_is_a_fault_only_with_a_rising_loss():
    run = healthy(size=0.1)
    run.scalars["sharpness/stability_ratio"].values[50:80] = 5.0
    assert rules(run) == []
    run.scalars["train/loss"].values[52:80] += np.linspace(0, 4, 28)
    found = one(run, "sharpness/unstable")
    assert found.severity == "fault" and found.step == 250
    assert found.numbers["stability_ratio"] == 5 and found.numbers["readings"] == 30


def test_at_the_edge_a_rising_loss_is_no_matter_of_sharpness():
    run = healthy(size=0.1)
    run.scalars["sharpness/stability_ratio"].values[50:] = 1.3
    run.scalars["train/loss"].values[60:] += np.linspace(0, 4, T - 60)
    found = one(run, "loss/rising")
    assert found.severity == "fault" and found.numbers["last"] > found.numbers["first"] > found.numbers["lowest"]
    run.scalars["train/loss"].values[60:] -= np.linspace(0, 2.8, T - 60)
    assert one(run, "loss/rising").severity == "warning"  # half of the way back


def test_a_loss_that_jumps_wildly_from_the_start():
    """Its noise is as large as its rise; that of its logarithm is not."""
    run = healthy()
    run.scalars["train/loss"].values[1:] = 50 * noise(T - 1, 0.4)
    assert one(run, "loss/rising").severity == "fault"


def test_a_layer_that_stopped():
    run = healthy()
    run.tables["update/ratio"].values[70:, 1] = 0
    found = one(run, "update/stopped")
    assert found.step == 350 and found.layers == (LAYERS[1],) and "stopped moving" in found.message
    assert found.numbers["before"] == np.median(run.tables["update/ratio"].values[:70, 1])
    run.tables["update/ratio"].values[-1, 1] = 1e-3  # it moves again
    assert rules(run) == []
    run = healthy()
    run.tables["update/ratio"].values[70:] = 0  # a schedule that ended
    assert rules(run) == []
    run.tables["update/ratio"].values[:70, 2] = 0  # a backbone that was thawed later
    assert rules(run) == []


def test_a_dead_gradient():
    run = healthy()
    run.tables["gradient/l2"].values[30:, 4] = 0
    run.tables["update/ratio"].values[32:, 4] = 0  # not told twice
    found = one(run, "gradient/dead")
    assert found.step == 150 and found.layers == (LAYERS[4],)
    run = healthy()
    run.tables["gradient/l2"].values[:, :4] = 0  # more than half of the layers, from the start
    assert one(run, "gradient/dead").layers == LAYERS[:4]
    run = healthy()
    run.tables["gradient/l2"].values[:, 4] *= 1e-9  # what rounding leaves of a bias before a BatchNorm
    run.tables["gradient/l2"].values[-5:, 2] = 0  # not for long
    assert rules(run) == []


def test_an_operator_norm_that_explodes():
    run = healthy(size=0.05)
    run.tables["weight/operator"].values[80:, 5] *= np.exp(np.linspace(0, 6, T - 80))
    found = one(run, "weight/exploding")
    assert found.layers == (LAYERS[5],) and 400 < found.step < 600 and 250 < found.numbers["times"] < 600
    run = healthy(size=0.05)
    run.tables["weight/operator"].values[:, 0] = np.linspace(0, 1, T)  # a bias that begins at zero
    run.tables["weight/operator"].values[:, 1] *= np.linspace(1, 20, T)  # slowly
    assert rules(run) == []


def test_a_rank_that_collapses():
    run = healthy(size=0.05)
    run.tables["spectrum/stable_rank"].values[60:, 0] = 1.02
    assert rules(run) == []  # one strong direction, and the rest is there
    run.tables["spectrum/effective_rank"].values[60:, 0] = 1.3
    found = one(run, "spectrum/collapse")
    assert found.step == 300 and found.layers == (LAYERS[0],) and found.numbers["last"] == 1.02
    del run.tables["spectrum/effective_rank"]
    assert rules(run) == []  # a language model's head comes to 1.07
    run.tables["spectrum/stable_rank"].values[60:, 0] = 1.001
    assert one(run, "spectrum/collapse").step == 300
    run.tables["spectrum/stable_rank"].values[:, 0] = 1.0  # a layer of one output has always had it
    assert rules(run) == []


def test_steering_at_its_bounds():
    run = healthy()
    run.scalars["lr/bounded"].values[50:] = 5
    found = one(run, "lr/bounded")
    assert found.step == 250 and found.numbers["layers"] == 5
    run.scalars["lr/bounded"].values[-1] = 0
    assert rules(run) == []


def test_what_was_not_measured():
    run = healthy()
    run.scalars["dynamon/failures"].values[30:] = 2
    assert one(run, "dynamon/failures").step == 150
    run = healthy()
    del run.scalars["sharpness/stability_ratio"]
    assert one(run, "dynamon/no_sharpness").severity == "note"
    run.scalars["dynamon/failures"].values[30:] = 2  # what failed was no matter of the budget
    assert rules(run) == ["dynamon/failures"]
    run.scalars["dynamon/failures"].values[:] = 0
    del run.tables["weight/operator"]  # a GradientMonitor, which was not to measure it
    assert rules(run) == []
    run = healthy()
    run.scalars["sharpness/stability_ratio_unconverged"] = run.scalars.pop("sharpness/stability_ratio")
    assert one(run, "sharpness/unconverged").numbers == {"unconverged": T, "converged": 0}
    assert one({"train/loss": Series(STEPS, noise())}, "dynamon/nothing").severity == "note"
    assert rules(RunData.of()) == ["dynamon/nothing"]


def test_faults_come_first_and_then_the_earliest():
    run = healthy()
    run.scalars["dynamon/failures"].values[3:] = 2
    run.tables["gradient/l2"].values[30:, 4] = 0
    run.scalars["gradient/nonfinite"].values[100:] = 1
    assert rules(run) == ["gradient/nonfinite", "dynamon/failures", "gradient/dead"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["val/loss", "train/loss", "loss"], "train/loss"),
        (["val_loss", "my/Train_Loss_epoch"], "my/Train_Loss_epoch"),
        (["val/loss", "sharpness/probe_loss"], "sharpness/probe_loss"),
        (["val/loss"], None),
    ],
)
def test_which_loss(tags, expected):
    assert loss_tag(dict.fromkeys(tags)) == expected
    run = {"mine": Series(STEPS, np.where(STEPS > 300, np.nan, 1.0)), "gradient/norm": Series(STEPS, noise())}
    assert rules(run) == [] and [f.rule for f in findings(run, loss="mine")] == ["loss/nonfinite"]
