"""The refined schedule against closed forms, and against the formula written out with loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import medfilt

from dynamon.schedule import linear_decay, refined_schedule, schedule_factor, smoothed_norms, warmup_end

LENGTHS = [10, 11, 37, 100, 1000]
positive = st.floats(1e-3, 1e3)


def by_loops(norms, power, smoothing):
    """Median with mirrored ends, weights, sums of all later weights, maximum 1."""
    total = len(norms)
    half = int(smoothing * total / 2)
    mirrored = np.pad(norms, half, mode="symmetric")
    smooth = [float(np.median(mirrored[t : t + 2 * half + 1])) for t in range(total)]
    weights = [x**-power for x in smooth]
    rates = [weights[t] * math.fsum(weights[t + 1 :]) for t in range(total)]
    return np.array(rates) / max(rates)


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("value", [1.0, 0.3, 7e5, 1e-200])
def test_constant_norms_give_linear_decay_exactly(total, norm, value):
    expected = [(total - 1 - t) / (total - 1) for t in range(total)]
    found = refined_schedule(np.full(total, value), norm=norm)
    assert found.tolist() == linear_decay(total).tolist() == expected


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_weights_that_grow_linearly(total, norm, power):
    t = np.arange(1, total + 1)
    expected = t * (total * (total + 1) - t * (t + 1))  # w = t; twice the sum of the later ones
    found = refined_schedule(t ** (-1 / power), norm=norm, smoothing=0)
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-12)


@pytest.mark.parametrize("q", [0.9, 1.05])
def test_weights_that_grow_geometrically(q):
    t = np.arange(1, 101)
    expected = q**t * (q ** (t + 1) - q**101) / (1 - q)
    found = refined_schedule(q ** (-t / 2), smoothing=0)
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("power", [0.0, 0.1, 0.25, 0.5])
def test_norms_that_go_like_a_power_of_the_remaining_time(power):
    r"""w = (1 - s)^{2a} gives (1 - s)^{4a + 1}, for many steps; smoothing moves it by no more than the window."""
    remaining = 1 - np.arange(20_000) / 20_000
    found = refined_schedule(remaining**-power, smoothing=0)
    expected = remaining ** (4 * power + 1)
    np.testing.assert_allclose(found, expected / expected.max(), atol=2e-3)
    np.testing.assert_allclose(refined_schedule(remaining**-power), found, atol=0.05)


@given(st.lists(positive, min_size=10, max_size=60), st.sampled_from(["l1", "l2"]), st.floats(0, 1))
def test_the_formula_with_loops(norms, norm, smoothing):
    expected = by_loops(np.array(norms), {"l1": 1, "l2": 2}[norm], smoothing)
    np.testing.assert_allclose(refined_schedule(norms, norm=norm, smoothing=smoothing), expected, rtol=1e-9)


def test_the_median_is_that_of_scipy_signal_away_from_the_ends():
    norms = np.random.default_rng(0).lognormal(size=300)
    found = smoothed_norms(norms, np.arange(300), 300, smoothing=0.1)
    np.testing.assert_array_equal(found[15:-15], medfilt(norms, 31)[15:-15])


@given(st.lists(st.floats(1e-300, 1e300), min_size=10, max_size=60), st.floats(0, 0.5))
def test_any_norms_give_factors_between_0_and_1(norms, smoothing):
    found = refined_schedule(norms, smoothing=smoothing)
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() == 1 and found[-1] == 0
    assert (found[:-1] > 0).all()


@given(st.lists(positive, min_size=10, max_size=60), st.floats(1e-6, 1e6))
def test_the_unit_of_the_norms_does_not_matter(norms, unit):
    np.testing.assert_allclose(refined_schedule(np.array(norms) * unit), refined_schedule(norms), rtol=1e-9)


@given(st.lists(st.integers(1, 50), min_size=10, max_size=40), st.integers(0, 60))
def test_constant_norms_at_irregular_steps_give_linear_decay_exactly(gaps, rest):
    steps = np.cumsum(gaps)
    total = int(steps[-1]) + 1 + rest
    found = refined_schedule(np.full(len(steps), 2.5), steps=steps, total=total)
    np.testing.assert_array_equal(found, linear_decay(total))


@pytest.mark.parametrize("readings", ["every fourth", "stretched"])
def test_sparse_readings_of_a_smooth_course_give_the_same_schedule(readings):
    total = 2000
    course = 1 + 4 * np.exp(-np.arange(total) / 100) + np.arange(total) / total
    dense = refined_schedule(course)
    steps = np.arange(0, total, 4) if readings == "every fourth" else np.unique(np.geomspace(1, total, 120).astype(int))
    steps = steps[steps < total]
    found = refined_schedule(course[steps], steps=steps, total=total)
    assert len(found) == total
    np.testing.assert_allclose(found, dense, atol=0.02)


def test_readings_that_say_nothing_are_as_if_they_were_not_there():
    rng = np.random.default_rng(0)
    norms = rng.lognormal(size=200)
    bad = {3: math.nan, 50: math.inf, 51: 0.0, 199: math.nan, 0: 0.0}
    broken, kept = norms.copy(), [t for t in range(200) if t not in bad]
    for t, value in bad.items():
        broken[t] = value
    expected = refined_schedule(norms[kept], steps=kept, total=200)
    np.testing.assert_array_equal(refined_schedule(broken), expected)


def test_a_few_outliers_change_nothing():
    norms = np.ones(200)
    norms[[17, 90, 91, 160]] = [1e4, 1e-4, 50, 1e9]
    np.testing.assert_array_equal(refined_schedule(norms), linear_decay(200))


def test_large_norms_at_the_start_become_a_warm_up():
    total, early = 1000, 200
    norms = np.where(np.arange(total) < early, 10.0, 1.0)
    found = refined_schedule(norms)
    assert warmup_end(found) == early and warmup_end(linear_decay(total)) == 0
    t = np.arange(total)
    np.testing.assert_allclose(found[early:], (total - 1 - t[early:]) / (total - 1 - early), rtol=1e-12)
    assert found[:early].max() < 0.0126  # a hundredth of the weight, 1000 / 800 of the sum


@pytest.mark.parametrize(
    ("norms", "usable"), [([1.0] * 9, 9), ([1.0] * 9 + [math.nan] * 20, 9), ([0.0] * 30, 0), ([2.0], 1)]
)
def test_too_few_readings_fall_back_with_a_warning(norms, usable):
    with pytest.warns(UserWarning, match=f"linear decay: {usable} of {len(norms)} gradient norms .* needs 10"):
        found = refined_schedule(norms, total=40)
    np.testing.assert_array_equal(found, linear_decay(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_norms": []}, "gradient_norms must be a sequence of at least one number"),
        ({"gradient_norms": [[1.0]]}, "gradient_norms must be a sequence"),
        ({"gradient_norms": [1.0, -2.0]}, "gradient_norms must not be negative, got -2"),
        ({"norm": "linf"}, "norm must be one of l2, l1, got 'linf'"),
        ({"steps": [0, 1]}, r"steps must have one entry per gradient norm, \(12,\), got \(2,\)"),
        ({"steps": [0, *range(11)]}, "steps must increase"),
        ({"steps": range(-1, 11)}, "steps must increase and not be negative"),
        ({"total": 11}, "total must be more than the last step 11, got 11"),
        ({"smoothing": 1.5}, r"smoothing must be a share of the run in \[0, 1\], got 1.5"),
        ({"smoothing": math.nan}, "smoothing must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        refined_schedule(**{"gradient_norms": [1.0] * 12, **arguments})


def test_linear_decay_by_hand():
    assert linear_decay(5).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert linear_decay(2).tolist() == [1, 0] and linear_decay(1).tolist() == [1]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        linear_decay(0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_a_factor_at_its_own_length_is_the_schedule(schedule):
    factor = schedule_factor(schedule)
    assert [factor(t) for t in range(len(schedule))] == schedule
    assert factor(len(schedule)) == factor(10**6) == schedule[-1]


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 12345])
def test_a_factor_at_another_length(steps):
    factor = schedule_factor(linear_decay(100), steps)
    found = [factor(t) for t in range(steps)]
    np.testing.assert_allclose(found, linear_decay(steps), atol=1e-12)
    assert found[0] == 1 and factor(max(steps - 1, 1)) == factor(steps + 3) == 0


def test_in_torchs_scheduler():
    schedule = refined_schedule(np.random.default_rng(0).lognormal(size=30))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(schedule))
    seen = []
    for _ in range(32):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(seen, 0.3 * np.append(schedule, [0, 0]), rtol=1e-12)
    scheduler.load_state_dict(scheduler.state_dict())


@pytest.mark.parametrize("schedule", [[], [[1.0]], [1.0, math.nan], [1.0, -0.1]])
def test_a_factor_refuses_what_is_no_schedule(schedule):
    with pytest.raises(ValueError, match="schedule must be a sequence of finite, non-negative factors"):
        schedule_factor(schedule)


def test_a_factor_refuses_no_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        schedule_factor([1.0], steps=0)
