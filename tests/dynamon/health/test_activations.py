"""Rules on activations: synthetic readings with each fault, and with what resembles it."""

import numpy as np
import pytest

from dynamon.health import examine, findings
from dynamon.runs.history import RunData, Series

T = 40
STEPS = 20 * np.arange(T)
MODULES = ("blocks.0.act", "blocks.1.act", "blocks.2.act", "blocks.3.act")
RISING = np.linspace(0, 1, T)


def table(values, size=0.1, seed=0):
    """``[T]`` or ``[4]`` or a number, with noise."""
    values = np.asarray(values, dtype=float)
    values = values[:, None] if values.shape == (T,) else values
    noise = np.exp(size * np.random.default_rng(seed).normal(size=(T, 4)))
    return Series(STEPS, np.broadcast_to(values, (T, 4)) * noise, MODULES)


BLOCKS = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


def stream(values, names=BLOCKS, **options):
    """A residual stream after four blocks."""
    found = table(values, **options)
    return Series(found.steps, found.values, names)


def one(values, others, place=2):
    """One module with a fault among others without."""
    found = np.full((T, 4), float(others))
    found[:, place] = values
    return found


def run(samples=64, **tables):
    scalars = {"dynamon/loss": 2 - RISING, "activation/probe_samples": np.full(T, float(samples))}
    scalars = {tag: Series(STEPS, values) for tag, values in scalars.items()}
    return RunData(scalars, {tag.replace("__", "/"): values for tag, values in tables.items()})


def rules(data):
    return [finding.rule for finding in findings(data)]


def healthy(seed=0, size=0.3):
    level = lambda value: table(value, size, seed)  # noqa: E731
    share = Series(STEPS, np.clip(level(0.15).values, 0, 1), MODULES)
    return run(
        activation__rms=level(1.0), activation__max=level(6.0), activation__kurtosis=level([3, 8, 15, 30]),
        activation__saturated=share, activation__gradient=level([1e-5, 1e-4, 1e-3, 1e-2]),
        activation__residual=stream([1, 2, 4, 12], size=size, seed=seed), attention__max_logit=level([2, 5, 20, 40]),
        attention__entropy=level([0.01, 0.3, 0.6, 0.8]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_noise_around_usual_values_raises_nothing(seed):
    assert rules(healthy(seed)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_named_and_one_that_is_not_called_is_not(value):
    zero = Series(STEPS, one(np.nan, 0.0, place=1), MODULES)
    sizes = one(np.where(np.arange(T) < 30, 1.0, value), 1.0)
    sizes[:, 1] = np.nan
    (found,) = findings(run(activation__rms=Series(STEPS, sizes, MODULES), activation__zero=zero))
    assert (found.rule, found.severity, found.layers) == ("activation/nonfinite", "fault", ("blocks.2.act",))
    assert found.step == STEPS[30]
    sizes[-1, 2] = 1.0  # it has passed
    assert not findings(run(activation__rms=Series(STEPS, sizes, MODULES), activation__zero=zero))


@pytest.mark.parametrize(("zero", "is_told"), [(0.0, False), (1.0, True)])
def test_the_last_output_may_be_sure_of_all_samples_but_not_dead(zero, is_told):
    saturated, sizes = one(1.0, 0.1, place=3), np.ones((T, 4))
    found = rules(
        run(
            activation__saturated=Series(STEPS, saturated, MODULES),
            activation__rms=Series(STEPS, sizes, MODULES),
            activation__zero=Series(STEPS, one(zero, 0.0, place=3), MODULES),
        )
    )
    assert found == ["activation/dead"] * is_told


def test_one_sample_says_nothing_of_vanished_gradients():
    gradients = Series(STEPS, one(1e-12, 1.0), MODULES)
    assert rules(run(activation__gradient=gradients)) == ["activation/vanished"]
    assert rules(run(samples=1, activation__gradient=gradients)) == []


def test_dead_units_are_named_with_their_share():
    (found,) = findings(run(activation__saturated=Series(STEPS, one(0.7, 0.1), MODULES)))
    assert (found.rule, found.severity, found.layers) == ("activation/dead", "warning", ("blocks.2.act",))
    assert "70% of the units of blocks.2.act" in found.message and found.step == 0
    dying = np.clip((np.arange(T) - 14) / 16, 0.1, 1.0)
    (found,) = findings(run(activation__saturated=Series(STEPS, one(dying, 0.1), MODULES)))
    assert (
        (found.rule, found.severity) == ("activation/dead", "fault")
        and found.step >= STEPS[25]
        and "10% at the first readings" in found.message
    )


def test_units_that_are_dead_by_chance_or_for_a_moment_are_not_counted():
    saturated = Series(STEPS, one(0.7, 0.1), MODULES)
    assert rules(run(64, activation__saturated=saturated)) == ["activation/dead"]
    assert rules(run(2, activation__saturated=saturated)) == []  # a quarter by chance
    assert rules(run(1, activation__saturated=saturated)) == []  # of one sample nothing is known
    moment = np.where((np.arange(T) > 10) & (np.arange(T) < 20), 0.9, 0.1)
    assert rules(run(activation__saturated=Series(STEPS, one(moment, 0.1), MODULES))) == []


def outliers(kurtosis, peak):
    return run(activation__kurtosis=table(kurtosis), activation__max=table(peak), activation__rms=table(1.0, 0.02))


def test_outlier_features_grow_or_are_extreme():
    found = findings(outliers(one(3 * 100**RISING, 4.0), one(5 * 20**RISING, 5.0)))
    assert [f.rule for f in found] == ["activation/outliers"] and found[0].layers == ("blocks.2.act",)
    assert "100 times its root mean square" in found[0].message or found[0].numbers["peak"] == pytest.approx(
        100, rel=0.3
    )
    assert rules(outliers(one(2000.0, 4.0), one(80.0, 5.0))) == ["activation/outliers"]


def test_sparse_outputs_and_growth_below_the_limit_are_no_outliers():
    assert rules(outliers(300.0, 20.0)) == []  # sparse from the start
    assert rules(outliers(3 * 10**RISING, 5 * 2**RISING)) == []
    assert rules(outliers(2000.0, 10.0)) == []  # no single entry stands out
    assert rules(outliers(3 * 100**RISING, 5.0)) == []  # units that fall silent: the largest stays


def test_outliers_that_were_there_at_the_start_are_a_note_and_frozen_ones_nothing():
    (found,) = findings(outliers(one(2000.0, 4.0), one(80.0, 5.0)))
    assert found.severity == "note" and "at the start" in found.advice
    (found,) = findings(outliers(one(3 * 1000**RISING, 4.0), one(5 * 20**RISING, 5.0)))
    assert found.severity == "warning" and "learning rate" in found.advice
    frozen = outliers(one(2000.0, 4.0), one(80.0, 5.0))
    frozen.tables["activation/kurtosis"].values[:, 2] = 2000.0
    assert rules(frozen) == []


def test_zeros_make_no_outliers():
    """Rows of a table of unit vectors: 1500 entries, one of them 1."""
    data = outliers(one(1500.0, 4.0), one(1500**0.5, 5.0))
    assert rules(data) == ["activation/outliers"]
    data.tables["activation/zero"] = Series(STEPS, one(1499 / 1500, 0.0), MODULES)
    assert rules(data) == []


@pytest.mark.parametrize("tag", ["activation__zero", "activation__saturated"])
def test_what_dies_at_once_and_stays_dead_is_named_at_its_step(tag):
    dying = np.where(np.arange(T) < 25, 0.3, 0.9)
    (found,) = findings(run(**{tag: Series(STEPS, one(dying, 0.3), MODULES)}))
    assert (found.rule, found.severity, found.step) == ("activation/died", "warning", STEPS[25])
    assert found.layers == ("blocks.2.act",)
    assert "90% of the" in found.message and "30% just before" in found.message
    for last, expected in ((27, []), (28, ["activation/died"])):  # three readings
        cut = Series(STEPS[:last], one(dying, 0.3)[:last], MODULES)
        assert rules(run(**{tag: cut})) == expected
    (found,) = findings(run(**{tag: Series(STEPS, one(np.where(np.arange(T) < 25, 0.3, 1.0), 0.3), MODULES)}))
    assert found.severity == "fault"


def test_what_dies_slowly_or_for_a_moment_does_not_die_at_once():
    moment = np.where((np.arange(T) > 10) & (np.arange(T) < 20), 0.9, 0.1)
    sparser = 1 - 0.9 * 0.02**RISING
    start = np.where(np.arange(T) < 3, 0.1, 0.99)  # the first steps of a run with many
    for values in (moment, sparser, start):
        assert rules(run(activation__zero=Series(STEPS, one(values, 0.3), MODULES))) == []


def test_an_output_that_fades_at_once_is_named():
    shut = np.where(np.arange(T) < 25, 0.5, 4e-4)
    (found,) = findings(run(activation__rms=table(one(shut, 1.0))))
    assert (found.rule, found.layers, found.step) == ("activation/faded", ("blocks.2.act",), STEPS[25])
    assert found.numbers["share"] == pytest.approx(8e-4, rel=0.2)
    silent = Series(STEPS, one(np.where(np.arange(T) < 25, 0.3, 0.99), 0.3), MODULES)
    assert rules(run(activation__rms=table(one(shut, 1.0)), activation__zero=silent)) == ["activation/died"]
    moment = np.where((np.arange(T) > 10) & (np.arange(T) < 20), 4e-4, 0.5)
    for values in (moment, 0.5 * 1e-3**RISING, np.where(np.arange(T) < 25, 0.5, 0.1)):
        assert rules(run(activation__rms=table(one(values, 1.0)))) == []


def test_logits_that_grow_are_told_with_their_head_and_entropy():
    data = run(attention__max_logit=table(one(2 * 200**RISING, 8.0)), attention__entropy=table(one(0.01, 0.6)))
    (found,) = findings(data)
    assert (found.rule, found.layers) == ("attention/logits", ("blocks.2.act",))
    assert "of the entropy of equal weights" in found.message and found.numbers["entropy"] < 0.02
    assert rules(run(attention__max_logit=table(60.0))) == []
    assert rules(run(attention__max_logit=table(one(400 * 0.005**RISING, 8.0)))) == []  # they shrink
    assert rules(run(attention__max_logit=table(300.0))) == ["attention/logits"]


def test_attention_collapses_in_half_of_the_heads_only():
    fallen = 0.5 * 0.01**RISING
    assert rules(run(attention__entropy=table(fallen))) == ["attention/entropy"]
    assert rules(run(attention__entropy=table(one(fallen, 0.5)))) == []  # a head for the token before
    assert rules(run(attention__entropy=table(0.01))) == []  # always so: what it attends to is given


def test_the_residual_stream_explodes_or_vanishes_with_depth():
    (found,) = findings(run(activation__residual=stream([1, 8, 64, 512])))
    assert found.rule == "activation/residual" and "explodes with depth" in found.message
    assert "blocks.0" in found.message and found.layers == ("blocks.3",)
    (found,) = findings(run(activation__residual=stream([1, 1e-1, 1e-2, 1e-3])))
    assert "vanishes with depth" in found.message
    assert rules(run(activation__residual=stream([1, 4, 16, 40]))) == []
    assert rules(run(activation__residual=stream([1, 0.6, 0.36, 0.2]))) == []
    towers = ("text.0", "text.1", "image.0", "image.1")  # each a stream of its own
    assert rules(run(activation__residual=stream([0.02, 0.03, 60, 70], towers))) == []


def test_dead_units_of_an_unknown_number_of_samples_are_judged_like_those_of_one():
    for share, expected in ((0.7, []), (0.9, ["activation/dead"])):
        data = run(activation__saturated=Series(STEPS, one(share, 0.1), MODULES))
        del data.scalars["activation/probe_samples"]
        assert rules(data) == expected


def test_vanished_gradients_name_the_modules():
    (found,) = findings(run(activation__gradient=table([1e-12, 1e-9, 1e-3, 1.0])))
    assert found.rule == "activation/vanished" and found.layers == ("blocks.0.act", "blocks.1.act")
    assert rules(run(activation__gradient=table([1e-5, 1e-4, 1e-2, 1.0]))) == []
    assert rules(run(activation__gradient=table(0.0))) == []  # no gradient anywhere: another rule's
    late = np.where(np.arange(T) < T - 3, 1.0, 0.0)
    assert rules(run(activation__gradient=table(one(late, 1.0)))) == []


def test_what_was_seen_is_said():
    seen = {check.words: check.value for check in examine(healthy()).checks}
    assert seen["attention does not collapse"] == "1 of 4 heads on single keys"
    assert "blocks.3.act" in seen["outputs have no outlier features"]
    assert seen["the signal keeps its size with depth"].endswith("after blocks.3")
