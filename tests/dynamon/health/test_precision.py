"""Weights that cannot hold their updates: synthetic readings with the fault, and all that resembles it."""

import numpy as np
import pytest

from dynamon.health import examine, findings
from dynamon.runs.history import RunData, Series

LAYERS = ("embedding.weight", "norm.weight", "head.weight")
T = 40
STEPS = 10 * np.arange(T)


def run(lost, bits=8.0, rate=1e-4, size=0.1, decay=None, gradient=1.0):
    """Readings of three layers; ``lost`` and others per layer, per reading, or one number for all."""

    def table(values):
        values = np.asarray(values, dtype=float)
        if values.shape == (T,):
            values = values[:, None]
        return Series(STEPS, np.broadcast_to(values, (T, len(LAYERS))).copy(), LAYERS)

    rng = np.random.default_rng(0)
    lost = np.clip(table(lost).values + 0.02 * rng.normal(size=(T, 3)), 0, 1)
    tables = {
        "precision/update_lost": Series(STEPS, lost, LAYERS),
        "precision/update_size": table(size),
        "precision/bits": table(bits),
        "weight/frobenius": table(2.0),
        "weight/effective_rate": table(np.asarray(rate, dtype=float) / 4.0),
        "update/ratio": table(1e-4),
        "update/operator": table(1e-4),
        "gradient/l2": table(gradient),
    }
    if decay is not None:
        tables["precision/decay_lost"] = table(decay)
    return RunData({"gradient/norm": Series(STEPS, np.ones(T))}, tables)


def rules(data):
    return [one.rule for one in findings(data)]


def test_all_layers_are_a_fault_and_the_sentence_says_why():
    (found,) = findings(run(0.97))
    assert (found.rule, found.severity, found.step) == ("precision/swallowed", "fault", 0)
    assert set(found.layers) == set(LAYERS) and found.numbers["size"] == 0.1
    assert found.numbers["moved"] == pytest.approx(0.03, abs=0.02)
    assert "bfloat16" in found.message and "0.1 times half the distance" in found.message
    assert "float32" in found.advice and "Kahan" in found.advice


def test_one_layer_is_a_warning_that_names_it():
    (found,) = findings(run([0.1, 1.0, 0.2], bits=11))
    assert (
        found.severity == "warning" and found.layers == ("norm.weight",) and "norm.weight in float16" in found.message
    )


def test_gains_alone_are_a_note_and_many_of_them_no_fault():
    """Gains that begin at 1 stand still in bfloat16 in nearly every run."""
    for lost, severity in (([0.1, 1.0, 0.2], "note"), ([1.0, 1.0, 0.2], "warning"), ([1.0, 1.0, 1.0], "fault")):
        data = run(lost)
        sigma = np.ones((T, 3))
        sigma[:, 1] = np.nan  # a vector has no singular value
        data.tables["spectrum/sigma_max"] = Series(STEPS, sigma, LAYERS)
        (found,) = findings(data)
        assert (found.rule, found.severity) == ("precision/swallowed", severity)
        assert ("gains or biases" in found.advice) == (severity == "note")
        assert (found.layers[-1] == "norm.weight") and len(found.layers) == sum(share == 1 for share in lost)


def test_without_the_size_of_steps_the_cause_is_still_named():
    (found,) = findings(run(0.97, size=np.nan))
    assert "below half the distance to the next bfloat16 number" in found.message


def test_it_is_said_after_three_readings():
    data = run(0.97)
    for readings, expected in ((2, []), (3, ["precision/swallowed"])):
        cut = {tag: Series(s.steps[:readings], s.values[:readings], s.layers) for tag, s in data.tables.items()}
        assert rules(RunData({}, cut)) == expected


def test_what_begins_later_needs_ten_readings_and_half_precision():
    late = np.where(np.arange(T) < T - 12, 0.3, 0.99)
    assert rules(run(late)) == ["precision/swallowed"] and findings(run(late))[0].step > 250
    assert rules(run(np.where(np.arange(T) < T - 8, 0.3, 0.99))) == []
    assert rules(run(late, bits=24)) == []  # float32: it has converged, or a token was long not seen
    assert rules(run(0.99, bits=24)) == ["precision/swallowed"]  # a rate of 1e-9 from the start


def test_healthy_losses_and_single_bad_readings_raise_nothing():
    assert rules(run(0.5)) == rules(run(0.8)) == rules(run(0.0, bits=24)) == []
    alternating = np.where(np.arange(T) % 3, 0.6, 1.0)
    assert rules(run(alternating)) == []


def test_a_warm_up_is_waited_for_and_the_end_of_a_schedule_is_left_out():
    rising = np.linspace(1e-6, 1e-3, T)
    assert rules(run(0.99, rate=rising)) == []
    assert rules(run(0.99, rate=np.minimum(3 * rising, 1e-3))) == ["precision/swallowed"]
    falling = 1e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(T) / T))
    assert rules(run(np.where(falling < 1e-4, 1.0, 0.4), rate=falling)) == []
    assert rules(run(np.where(rising < 2e-4, 1.0, 0.4), rate=rising)) == []
    assert rules(run(1.0, rate=0.0)) == ["lr/zero"] or rules(run(1.0, rate=0.0)) == []


def test_a_single_layer_in_float32_is_left_out():
    """The bias before a BatchNorm has a gradient of rounding alone, and nothing else need tell so."""
    data = run([0.0, 1.0, 0.0], bits=24)
    del data.tables["gradient/l2"]
    assert rules(data) == []


def test_layers_whose_gradient_is_rounding_are_left_out():
    assert rules(run([0.1, 1.0, 0.2], gradient=[1.0, 1e-9, 1.0])) == []


def test_frozen_layers_have_no_reading_and_raise_nothing():
    data = run([0.1, 0.2, 0.3])
    data.tables["precision/update_lost"].values[:, 1] = np.nan
    assert rules(data) == []


def test_no_second_rule_speaks_of_the_same():
    data = run(1.0)
    for tag in ("update/ratio", "update/operator"):
        data.tables[tag].values[:] = 0.0
    assert rules(data) == ["precision/swallowed"]
    one = run([0.1, 1.0, 0.1])
    one.tables["update/ratio"].values[:, 1] = 0.0
    assert rules(one) == ["precision/swallowed"]
    one.tables["precision/update_lost"].values[:, 1] = 0.2  # without that cause the other rule speaks
    assert rules(one) == ["update/never"]


def test_decay_without_effect_is_a_note():
    (found,) = findings(run(0.1, decay=1.0))
    assert (found.rule, found.severity) == ("precision/decay", "note") and "100%" in found.message
    assert rules(run(0.1, decay=0.6)) == rules(run(0.1, decay=1.0, bits=24)) == []
    assert rules(run(0.1, decay=[1.0, 0.0, 0.0])) == []  # most decay


def test_what_was_seen_is_said():
    seen = {check.words: check.value for check in examine(run([0.1, 0.9, 0.2], decay=0.5)).checks}
    assert "norm.weight" in seen["weights hold their updates"] and "50%" in seen["half precision leaves weight decay"]
