"""The running level: its spread is that of the noise, spikes stand out of it, and trends do not."""

import math

import numpy as np
import pytest
import torch

from dynamon.health.limits import SPIKE
from dynamon.monitoring.levels import PATIENCE, WARM_UP, Levels

GENERATOR = np.random.default_rng(0)
LEAST = math.log(2)


def alarms(numbers: np.ndarray) -> np.ndarray:
    """Which of ``[T, R]`` are above their limits, all of them judged together."""
    count = numbers.shape[1]
    levels = Levels(np.full(count, LEAST), np.full(count, float(count)))
    found = []
    for row in numbers:
        limits = levels.limits
        found.append(levels.see(row) >= limits)
    return np.array(found)


def gaussian(t: int, count: int) -> np.ndarray:
    return GENERATOR.normal(size=(t, count))


def slow(t: int, count: int) -> np.ndarray:
    """Noise that goes on for a hundred numbers, beside noise that does not."""
    found, at = np.zeros((t, count)), np.zeros(count)
    for row in found:
        at = 0.99 * at + 0.05 * GENERATOR.normal(size=count)
        row[:] = at + 0.1 * GENERATOR.normal(size=count)
    return found


TIMES = np.arange(4000)[:, None]
USUAL = {
    "gaussian": lambda: 0.3 * gaussian(4000, 40),
    "little noise": lambda: 0.01 * gaussian(4000, 40),
    "heavy tails": lambda: 0.2 * GENERATOR.laplace(size=(4000, 40)),
    "correlated": lambda: slow(4000, 40),
    "falls at first": lambda: 0.1 * gaussian(4000, 40) + 2.3 * np.exp(-TIMES / 20),
    "warm-up": lambda: 0.1 * gaussian(4000, 40) + np.minimum(TIMES / 400, 1.5),
    "restarts": lambda: (
        0.15 * gaussian(4000, 40) + 1.6 * np.minimum(1, TIMES % 1000 / 20) * np.exp(-(TIMES % 1000) / 300)
    ),
    "steps of the rate": lambda: 0.1 * gaussian(4000, 40) + 0.4 * (TIMES // 1000),
    "no noise": lambda: 0.3 * np.sin(TIMES / 3) + np.zeros((4000, 4)),
}


@pytest.mark.parametrize("name", USUAL)
def test_nothing_is_found_in_what_is_usual(name: str) -> None:
    found = alarms(USUAL[name]())
    assert not found.any(), np.argwhere(found)[:5]


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_every_spike_is_found_and_hides_no_other(spread: float) -> None:
    """Every 37th number is e^7 as large: none of them makes the next one usual. For wide noise 36 numbers are few."""
    first = 36 if spread < 0.3 else 73
    numbers = spread * gaussian(400, 10)
    numbers[first::37] += math.log(1000)
    expected = np.zeros(400, bool)
    expected[first::37] = True
    assert (alarms(numbers) == expected[:, None]).all()


def test_the_unit_is_the_standard_deviation_of_gaussian_noise() -> None:
    levels = Levels(np.full(200, 1e-9))
    deviations = np.array([levels.see(0.3 * row + 5.0) for row in gaussian(2000, 200)])[500:]
    assert 0.8 < deviations.std() < 1.05  # the tail may widen it
    assert abs(np.median(deviations)) < 0.05


def test_a_spike_is_at_least_the_floor() -> None:
    """Of a series without any noise."""
    levels = Levels(np.array([LEAST]))
    for _ in range(500):
        levels.see(np.zeros(1))
    limit = levels.limits
    assert levels.see(np.array([0.9 * math.log(2)])) < limit < levels.see(np.array([1.2 * math.log(2)]))


def test_what_is_not_finite_is_a_spike_from_the_first_number_on_and_is_not_learned() -> None:
    one, other = Levels(np.full(2, LEAST)), Levels(np.full(2, LEAST))
    for index, row in enumerate(0.1 * gaussian(100, 2)):
        if index in (0, 7, 50):
            assert np.isinf(one.see(np.full(2, np.inf))).all()
        one.see(row), other.see(row)
    assert all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in ("level", "scale", "tail"))


def test_missing_numbers_leave_a_level_as_it_is() -> None:
    levels, rows = Levels(np.full(2, LEAST)), 0.1 * gaussian(60, 2)
    for row in rows:
        levels.see(np.array([row[0], np.nan]))
    assert levels.see(np.array([5.0, np.nan])).tolist()[1] == 0
    for row in rows[:WARM_UP]:
        assert levels.see(np.array([np.nan, row[1]]))[1] == 0  # its level begins only now
    assert levels.see(np.array([np.nan, 9.0]))[1] > SPIKE


def test_a_level_that_has_moved_for_good_is_taken_anew() -> None:
    numbers = 0.1 * gaussian(1000, 3)
    numbers[300:] += 5.0
    found = alarms(numbers)
    assert found[300 : 300 + PATIENCE].all() and not found[300 + PATIENCE :].any()


def test_what_comes_back_often_becomes_usual() -> None:
    """A hard batch at every eighth step."""
    numbers = 0.1 * gaussian(4000, 10)
    numbers[::8] += 1.5
    assert not alarms(numbers)[1000:].any()


def test_slack_is_what_may_be_above() -> None:
    levels = Levels(np.array([LEAST]))
    for row in 0.1 * gaussian(300, 1):
        levels.see(row)
    before = levels.state_dict()
    assert float(levels.see(np.array([1.6]), slack=1.5)[0]) < 2 and float(levels.see(np.array([1.6]))[0]) > SPIKE
    assert torch.equal(before["level"], levels.state_dict()["level"])


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    """By place: the second series of the saved ones is the first of the new ones."""
    rows = 0.1 * gaussian(200, 2)
    whole, before, after = Levels(np.full(2, LEAST)), Levels(np.full(2, LEAST)), Levels(np.full(1, LEAST))
    expected = [whole.see(row)[1] for row in rows]
    for row in rows[:50]:
        before.see(row)
    after.load_state_dict(before.state_dict(), np.array([1]))
    assert [float(after.see(row[1:])[0]) for row in rows[50:]] == expected[50:]
