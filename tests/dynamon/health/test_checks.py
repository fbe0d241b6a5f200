"""What is said of each rule: what it checked, which value it saw, which readings it lacks."""

import ast
from pathlib import Path

import numpy as np
import pytest

import dynamon.health
from dynamon.health import NAMES, examine, findings
from dynamon.health.checks import RULES
from dynamon.runs.history import RunData, Series

STEPS = np.arange(0, 400, 10)
LAYERS = ("a.weight", "a.bias", "b.weight")
GENERATOR = np.random.default_rng(0)


def noisy(level):
    return level * np.exp(0.1 * GENERATOR.normal(size=len(STEPS)))


def table(*levels):
    return Series(STEPS, np.column_stack([noisy(level) for level in levels]), LAYERS)


@pytest.fixture(scope="module")
def good() -> RunData:
    """A run with every reading that a rule asks for, and nothing wrong."""
    scalars = {
        "dynamon/loss": noisy(2 * np.exp(-STEPS / 200)),
        "sharpness/stability_ratio": noisy(0.8),
        "gradient/nonfinite": np.zeros(len(STEPS)),
        "gradient/norm": noisy(2.0),
        "gradient/norm_clipped": noisy(0.9),
        "gradient/clip_coefficient": noisy(0.45),
        "gradient/cosine": noisy(0.2),
        "lr/bounded": np.ones(len(STEPS)),
        "dynamon/failures": np.zeros(len(STEPS)),
        "dynamon/overhead": np.full(len(STEPS), 0.013),
        "spike/deviation": noisy(3.0),
        "spike/loss": noisy(2.0),
    }
    tables = {
        "gradient/l2": table(1.0, 0.5, 2.0),
        "update/operator": table(0.01, 0.02, 0.03),
        "update/ratio": table(1e-3, 2e-3, 4e-4),
        "weight/operator": table(1.0, 2.0, 3.0),
        "weight/frobenius": table(3.0, 4.0, 5.0),
        "weight/effective_rate": table(0.1, 0.06, 0.04),
        "spectrum/stable_rank": table(5.0, 7.0, 3.5),
        "lr/ratio": table(0.5, 0.7, 0.9),
        "precision/update_lost": table(0.1, 0.2, 0.3),
        "precision/decay_lost": table(0.1, 0.2, 0.3),
        "activation/saturated": table(0.1, 0.2, 0.3),
        "activation/kurtosis": table(3.0, 5.0, 9.0),
        "activation/gradient": table(1e-3, 1e-2, 1e-1),
        "activation/rms": table(1.0, 2.0, 0.5),
        "activation/zero": table(0.1, 0.2, 0.3),
        "activation/residual": Series(STEPS, np.column_stack([noisy(level) for level in range(1, 5)]), tuple("abcd")),
        "attention/max_logit": table(3.0, 5.0, 9.0),
        "attention/entropy": table(0.3, 0.5, 0.7),
    }
    return RunData({tag: Series(STEPS, values) for tag, values in scalars.items()}, tables)


def seen(run: RunData) -> dict[str, str | None]:
    return {check.words: check.value for check in examine(run).checks}


def test_every_rule_says_what_it_saw(good):
    found = examine(good)
    assert found.findings == findings(good) == []
    assert len(found.checks) == len(RULES) == len({check.words for check in found.checks})
    assert all(check.value and check.limit and check.needs and check.severity is None for check in found.checks)


def test_values_are_those_of_the_readings(good):
    values = seen(good)
    ratio, update = good.scalars["sharpness/stability_ratio"].values, good.tables["update/ratio"].values
    assert values["loss is finite"] == "0 of 40 readings not finite"
    assert values["steps fit the curvature: stability ratio"] == (
        f"median {np.median(ratio):.3g}, highest {ratio.max():.3g}, 40 readings"
    )
    ends = np.median(update[-5:], axis=0)
    assert values["every layer moves: update over weight"] == f"least {ends[2]:.3g} of its weight at the end, b.weight"
    middle = np.median(update, axis=1)
    assert values["steps are small against weights"].endswith(f"at most {middle.max():.3g} of its weight")
    logs = np.log(good.tables["gradient/l2"].values)
    rise = max(np.median(column[i : i + 5]) - np.median(column[i - 20 : i]) for column in logs.T for i in range(20, 36))
    assert values["gradients of single layers do not jump"].startswith(f"at most {np.exp(rise):.3g} times, ")
    weight = good.tables["weight/operator"].values
    smooth = np.array([np.median(weight[max(0, i - 2) : i + 1], axis=0) for i in range(40)])
    usual = np.maximum(smooth[2], np.median(weight[:3]))
    times = smooth.max(0) / usual
    name = LAYERS[int(times.argmax())]
    assert values["operator norms do not explode"] == f"at most {times.max():.3g} times its usual size, {name}"
    largest = good.scalars["spike/deviation"].values.max()
    assert values["no step is far above its usual level"] == f"0 spikes; at most {largest:.3g} deviations"
    cosine = np.median(good.scalars["gradient/cosine"].values)
    assert values["batches differ: cosine of successive gradients"] == f"median {cosine:.3g}"
    assert values["steering stays within its bounds"] == "at most 1 of 3 layers at a bound"
    assert values["readings are there and converged"] == (
        "40 of 40 eigenvalue solves converged; monitoring took 1.30% of training time"
    )


def test_what_lacks_readings_is_named(good):
    run = RunData({"train/loss": good.scalars["dynamon/loss"]}, {})
    missing = {check.words for check in examine(run).checks if check.value is None}
    assert {words for words, value in seen(run).items() if value} == {
        "loss is finite",
        "loss does not rise again",
        "loss changes",
    }
    assert len(missing) == len(RULES) - 3
    nothing = examine(RunData({}, {}))
    assert all(check.value is None for check in nothing.checks)


def test_a_check_has_the_severity_of_what_was_found(good):
    broken = np.where(STEPS < 300, 1.0, np.nan)
    found = examine(RunData({**good.scalars, "dynamon/loss": Series(STEPS, broken)}, good.tables))
    verdicts = {check.words: check.severity for check in found.checks}
    assert verdicts["loss is finite"] == "fault" and verdicts["gradients are finite"] is None
    assert {f.rule for f in found.findings} == {"loss/nonfinite"}
    (check,) = [check for check in found.checks if check.words == "loss is finite"]
    assert check.value == "10 of 40 readings not finite"


@pytest.mark.parametrize("values", [np.full(40, np.nan), np.full(40, np.inf), np.zeros(40)], ids=["nan", "inf", "zero"])
def test_no_reading_whatever_stops_the_list(good, values):
    """Scalars and tables that hold nothing finite, or only zeros."""
    rows = np.repeat(values[:, None], 3, 1)
    scalars = {tag: Series(STEPS, values) for tag in good.scalars}
    tables = {tag: Series(STEPS, rows, LAYERS) for tag in good.tables}
    assert len(examine(RunData(scalars, tables)).checks) == len(RULES)


def test_rules_name_all_that_their_findings_are_called():
    """By the source: a name that ``stop_on`` refuses would never stop anything."""
    sources = [ast.parse(path.read_text()) for path in Path(dynamon.health.__file__).parent.glob("*.py")]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    made = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "Finding"]
    assert set(NAMES) == set(made) and len(set(NAMES)) == len(NAMES)
