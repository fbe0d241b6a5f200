"""Decrease, curvature cost, overshoot, and how sure their means are."""

import numpy as np
import pytest

from dynamon.quantities.progress import (
    Couplings,
    StepReading,
    is_significant,
    overshoot,
    standard_error,
    standard_error_over_trend,
)


def _reading(before: list[float], after: list[float], decay: float = 0.0) -> StepReading:
    rows = [np.array(row) for row in (before, after, [decay] * len(before), [decay] * len(before))]
    return StepReading(tuple("abcdef"[: len(before)]), *rows, loss_before=2.0, loss_after=1.0)


def test_the_decrease_is_the_first_order_minus_half_of_the_cost() -> None:
    reading = _reading([-3.0, 1.0, -2.0], [1.0, 2.0, -5.0])
    np.testing.assert_array_equal(reading.decrease, reading.first_order - reading.curvature_cost / 2)
    np.testing.assert_array_equal(reading.curvature_cost, [4.0, 1.0, -3.0])


def test_a_layer_that_climbs_has_no_overshoot() -> None:
    np.testing.assert_array_equal(
        overshoot(np.array([-2.0, 0.0, 1.0]), np.array([1.0, 1.0, 3.0])), [1.5, np.nan, np.nan]
    )


def test_totals_leave_out_layers_without_a_step() -> None:
    reading = _reading([-3.0, np.nan], [1.0, np.nan])
    assert reading.total_decrease == 1.0
    assert reading.total_overshoot == pytest.approx(4 / 3)


def test_the_discrepancy_counts_decay() -> None:
    reading = _reading([-3.0, -1.0], [1.0, 0.0], decay=0.25)
    assert reading.total_decay_decrease == -0.5
    assert reading.discrepancy == pytest.approx(1.5 - 0.5 - 1.0)


def test_groups_are_sums_over_their_layers() -> None:
    reading = _reading([-3.0, -1.0, np.nan, np.nan], [1.0, 0.0, np.nan, np.nan]).grouped(["x", "y", "x", "z"])
    assert reading.names == ("x", "y", "z")
    np.testing.assert_array_equal(reading.before, [-3.0, -1.0, np.nan])
    assert reading.total_decrease == 1.5


def test_the_asymmetry_of_couplings() -> None:
    found = Couplings(("a", "b"), np.array([[2.0, 1.0], [3.0, 2.0]]), np.zeros(2), 0.0)
    np.testing.assert_array_equal(found.symmetric, [[2.0, 2.0], [2.0, 2.0]])
    assert found.asymmetry == pytest.approx(np.sqrt(2) / 4)


def _series(correlation: float, count: int, draws: int) -> np.ndarray:
    """Autoregressive series ``[count, draws]`` of mean 0 and variance 1."""
    noise = np.random.default_rng(count).standard_normal((count, draws))
    for t in range(1, count):
        noise[t] = correlation * noise[t - 1] + np.sqrt(1 - correlation**2) * noise[t]
    return noise


@pytest.mark.parametrize("count", [4, 8, 16, 64])
@pytest.mark.parametrize(("correlation", "most"), [(-0.5, 0.05), (0.0, 0.05), (0.3, 0.08)])
def test_pure_noise_is_seldom_significant(count: int, correlation: float, most: float) -> None:
    rate = is_significant(_series(correlation, count, 1000)).mean()
    assert rate <= most + 2 * np.sqrt(most * (1 - most) / 1000)


def test_noise_that_lasts_is_not_taken_for_progress() -> None:
    series = _series(0.8, 64, 1000)
    assert is_significant(series).mean() < 0.13
    naive = np.abs(series.mean(0)) > 2 * series.std(0, ddof=1) / 8
    assert naive.mean() > 0.4  # what independent readings would claim


@pytest.mark.parametrize("count", [4, 8, 16, 64])
@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.05), (0.3, 0.08)])
def test_noise_around_a_trend_is_seldom_significant(count: int, correlation: float, most: float) -> None:
    """The trend adds nothing to the mean; errors of stationary readings would hide everything behind it."""
    series, trend = _series(correlation, count, 1000), 20 * np.linspace(-1, 1, count)[:, None]
    trend = trend if count >= 8 else 0 * trend
    rate = (np.abs((series + trend).mean(0)) > 2 * standard_error_over_trend(series + trend)).mean()
    assert rate <= most + 2 * np.sqrt(most * (1 - most) / 1000)
    if count >= 8:
        assert (standard_error(series + trend) > 5 * standard_error_over_trend(series + trend)).mean() > 0.9


def test_a_level_that_falls_does_not_hide_that_it_is_there() -> None:
    level = np.exp(-np.arange(96) / 8)[:, None]
    series = level * (1 + 0.3 * _series(0.0, 96, 1000)) + 0.02 * _series(0.0, 96, 1000)[::-1]
    assert (series.mean(0) > 2 * standard_error_over_trend(series)).mean() > 0.9
    assert (series.mean(0) > 2 * standard_error(series)).mean() < 0.5


def test_what_stands_out_is_significant() -> None:
    series = _series(0.3, 32, 1000) + 1.0
    assert is_significant(series).mean() > 0.9


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_the_error_is_that_of_the_mean(correlation: float) -> None:
    series = _series(correlation, 256, 2000)
    assert standard_error(series).mean() == pytest.approx(series.mean(0).std(), rel=0.1)


def test_few_or_unknown_readings_have_no_error() -> None:
    assert np.isnan(standard_error(np.zeros((3, 2)))).all()
    assert not is_significant(np.ones((3, 2))).any()
    assert not is_significant(np.zeros((0, 2))).any()
    values = np.ones((8, 2)) + np.arange(8)[:, None] % 2
    values[3, 1] = np.nan
    np.testing.assert_array_equal(is_significant(values), [True, False])


def test_a_constant_series_is_certain() -> None:
    np.testing.assert_array_equal(standard_error(np.ones((8, 1))), [0.0])
    np.testing.assert_array_equal(is_significant(np.stack([np.ones(8), np.zeros(8)], 1)), [True, False])
