"""The sequential test on the loss: shifts are found at their step, and nothing that is usual."""

import math

import numpy as np
import pytest

from dynamon.monitoring.loss_shift import PATIENCE, LossShift, Shift

TIMES = np.arange(4000)


def shifts(numbers: np.ndarray, test: LossShift | None = None) -> list[tuple[int, int, Shift]]:
    """Where each begins, and when it is found."""
    test = test or LossShift()
    found = []
    for step, number in enumerate(numbers):
        shift = test.see(step, float(number))
        if shift is not None:
            found.append((shift.step, step, shift))
        test.close()
    return found


def noise(seed: int, count: int = 4000, scale: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=count)


def correlated(seed: int, of: float) -> np.ndarray:
    found = noise(seed)
    for step in range(1, len(found)):
        found[step] = of * found[step - 1] + math.sqrt(1 - of * of) * found[step]
    return found


FALL = 4.5 * np.exp(-TIMES / 40) - 0.3 * TIMES / 4000
USUAL = {
    "normal": lambda seed: noise(seed),
    "little noise": lambda seed: noise(seed, scale=0.003),
    "no noise": lambda seed: np.zeros(4000),
    "heavy tails": lambda seed: 0.1 * np.random.default_rng(seed).laplace(size=4000),
    "skewed": lambda seed: np.log(np.random.default_rng(seed).gamma(4.0, size=4000)),
    "correlated": lambda seed: correlated(seed, 0.7),
    "learning": lambda seed: FALL + noise(seed),
    "learning without noise": lambda seed: FALL,
    "learning ever more noisily": lambda seed: FALL + noise(seed) * (0.2 + TIMES / 1000),
    "steps down": lambda seed: noise(seed) - 0.3 * (TIMES // 500),
    "epochs": lambda seed: noise(seed) - 0.1 * (TIMES // 200) - 0.0002 * (TIMES % 200),
    "a slow rise": lambda seed: noise(seed) + 0.0005 * TIMES,
    "a hard batch among ten": lambda seed: noise(seed) + 0.6 * (np.random.default_rng(seed + 99).random(4000) < 0.1),
    "single spikes": lambda seed: noise(seed) + 5.0 * (TIMES % 37 == 36),
}


@pytest.mark.parametrize("name", USUAL)
def test_nothing_is_found_in_what_is_usual(name: str) -> None:
    """In 16,000 numbers; noise that goes on for several steps raises an alarm now and then."""
    found = [shifts(USUAL[name](seed)) for seed in range(4)]
    assert sum(map(len, found)) <= (4 if name == "correlated" else 0), found


@pytest.mark.parametrize(("rise", "within"), [(3.0, 9), (4.0, 7), (100.0, 5)])
@pytest.mark.parametrize("trend", [0.0, -0.002])
def test_a_shift_is_found_at_its_step(rise: float, within: int, trend: float) -> None:
    """Four of five, their step known to two, also where the loss falls by 0.2 % a step."""
    right = 0
    for seed in range(20):
        numbers = noise(seed, 400) + trend * np.arange(400)
        numbers[250:] += 0.1 * rise
        found = [one for one in shifts(numbers) if one[1] >= 250]
        right += bool(found) and abs(found[0][0] - 250) <= 2 and found[0][1] <= 250 + within
    assert right >= 16


def test_size_and_deviations_of_a_shift() -> None:
    numbers = noise(3, 300)
    numbers[200:] += 0.3
    ((begin, at, shift),) = shifts(numbers)
    assert begin == 200 and abs(shift.rise - np.mean(numbers[200 : at + 1])) < 0.05
    assert 1.5 < shift.deviations < 4


@pytest.mark.parametrize(("lasts", "is_over"), [(16, True), (60, True), (1000, False)])
def test_whether_it_is_over(lasts: int, is_over: bool) -> None:
    numbers, test, ended = noise(3, 600), LossShift(), []
    numbers[200 : 200 + lasts] += 0.4
    for step, number in enumerate(numbers):
        test.see(step, float(number))
        verdict = test.close()
        if verdict is not None:
            ended.append((step, verdict))
    ((step, verdict),) = ended
    assert verdict is is_over
    assert 200 + lasts <= step < 200 + lasts + 16 if is_over else abs(step - 200 - PATIENCE) < 10


def test_it_rests_where_a_rise_is_explained() -> None:
    numbers, test, found = noise(3, 600), LossShift(), []
    numbers[200:] += 0.4
    for step, number in enumerate(numbers):
        if step == 200:
            test.rest()
        if test.see(step, float(number)) is not None:
            found.append(step)
    assert found == []


def test_what_is_not_finite_is_left_out() -> None:
    numbers = noise(5, 300)
    numbers[200:] += 0.3
    with_gaps = np.insert(numbers, [50, 100, 210], [np.nan, np.inf, -np.inf])
    assert [one[1] - one[0] for one in shifts(with_gaps)][0] <= [one[1] - one[0] for one in shifts(numbers)][0] + 1


@pytest.mark.parametrize("stop", [5, 120, 203, 230])
def test_a_state_goes_on(stop: int) -> None:
    numbers = noise(3, 400)
    numbers[200:] += 0.3
    whole, first, second = LossShift(), LossShift(), LossShift()
    expected = [(whole.see(step, float(y)), whole.close()) for step, y in enumerate(numbers)]
    for step, number in enumerate(numbers[:stop]):
        first.see(step, float(number)), first.close()
    second.load_state_dict(first.state_dict())
    found = [(second.see(stop + step, float(y)), second.close()) for step, y in enumerate(numbers[stop:])]
    assert [one and one.step for one, _ in found] == [one and one.step for one, _ in expected[stop:]]
    assert second.state_dict() == whole.state_dict()
