"""Following eigenvalues of an operator that changes."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynamon.curvature import Diagonal, EigenTracker, top_eigenvalues

N = 300


def rotation(seed=0):
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


Q = rotation()
BULK = torch.linspace(0.5, -0.3, N, dtype=torch.float64)


def matrix(*top):
    """Fixed eigenvectors; the first eigenvalues are given, the rest is a bulk below 0.5."""
    values = BULK.clone()
    values[: len(top)] = torch.tensor(top, dtype=torch.float64)
    found = Q * values @ Q.mT
    return (found + found.mT) / 2


def drifting(size, seed=1):
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return size * (drawn + drawn.mT) / N**0.5


def test_a_slow_drift_is_followed_for_fewer_products():
    tracker, cold, warm, errors = EigenTracker(), [], [], []
    for step in range(30):
        operator = matrix(2 + 0.1 * step, 1.8, 1.5) + drifting(0.002, seed=step)
        was_cold = tracker.next_is_cold
        found = tracker.update(operator)
        (cold if was_cold else warm).append(found.matvecs)
        truth = float(torch.linalg.eigvalsh(operator)[-1])
        errors.append(abs(float(found.values[0]) / truth - 1))
        assert found.converged and found.lower <= truth + 1e-12
    assert len(cold) == 4 and tracker.taken == 30  # the first, and every tenth from the sixth
    assert max(errors) <= 1e-2 and np.median(warm) <= 8 and np.median(warm) < np.median(cold)


def test_when_runs_are_cold_and_certified():
    tracker, seen = EigenTracker(certify=True), []
    for _ in range(27):
        announced = tracker.next_is_cold, tracker.next_is_certified
        found = tracker.update(matrix(3.0, 2.0))
        assert (found.upper is not None) == announced[1]
        seen.append(announced)
    assert [i for i, (cold, _) in enumerate(seen) if cold] == [0, 5, 15, 25]
    assert [i for i, (_, certified) in enumerate(seen) if certified] == [5, 15, 25]
    plain = EigenTracker()
    assert all(plain.update(matrix(3.0, 2.0)).upper is None for _ in range(7))


def test_several_are_followed():
    above = [9.0, 8.0, 7.0, 6.0, 5.0]
    tracker = EigenTracker(6, tol=1e-4, max_matvecs=200)
    for _ in range(7):  # cold, warm, and cold again
        found = tracker.update(matrix(*above, 1.5, 1.2))
        assert found.converged
        np.testing.assert_allclose(found.values.numpy(), [*above, 1.5], rtol=1e-3)


@pytest.mark.parametrize("at", [0, 1, 4, 5, 7, 12])
@pytest.mark.parametrize("k", [1, 2])
def test_stop_and_go_on_is_the_same(at, k):
    """The state goes through torch.save with weights_only, into a tracker made anew."""

    def operators():
        return [matrix(2 + 0.05 * step, 1.9, 1.5) + drifting(0.003, seed=step) for step in range(16)]

    def make():
        return EigenTracker(k, certify=True, seed=5)

    whole, first, second = make(), make(), make()
    expected = [whole.update(operator) for operator in operators()]
    for operator in operators()[:at]:
        first.update(operator)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for operator, truth in zip(operators()[at:], expected[at:], strict=True):
        found = second.update(operator)
        assert torch.equal(found.values, truth.values) and torch.equal(found.vectors, truth.vectors)
        assert (found.matvecs, found.upper, found.lower) == (truth.matvecs, truth.upper, truth.lower)
    assert second.k == whole.k and second.taken == whole.taken == 16


def test_large_vectors_may_be_left_out_of_the_state():
    tracker = EigenTracker()
    tracker.update(matrix(3.0, 2.0))
    assert tracker.state_dict(most=10)["vectors"] is None
    assert torch.equal(tracker.state_dict(most=3 * N)["vectors"], tracker.vectors)
    other = EigenTracker()
    other.load_state_dict(tracker.state_dict(most=10))
    assert other.next_is_cold and other.taken == 1
    assert float(other.update(matrix(3.0, 2.0)).values[0]) == pytest.approx(3, rel=1e-2)


def test_an_operator_of_another_size_is_measured_anew():
    tracker = EigenTracker()
    tracker.update(matrix(3.0, 2.0))
    found = tracker.update(Diagonal(torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64)))
    assert found.converged and float(found.values[0]) == pytest.approx(5) and tracker.vectors.shape[0] == 3


@pytest.mark.parametrize("speed", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_an_eigenvalue_that_rises_past_two_tracked_ones(speed, seed):
    """From inside the bulk to the very top, past others that stand still: at most two readings miss the crossing."""
    tracker, wrong = EigenTracker(seed=100 * seed), []
    for step in range(int(2.2 / speed)):
        rising = 0.4 + speed * step
        found = tracker.update(matrix(1.5, 1.3, 1.1, rising))
        truth = max(1.5, rising)
        if found.converged and abs(float(found.values[0]) / truth - 1) > 0.01:
            wrong.append((step, rising, float(found.values[0])))
    assert float(found.values[0]) == pytest.approx(truth, rel=0.01)
    # A residual certifies an eigenvalue, not the top one: at the crossing itself a reading or two may name the old top.
    assert len(wrong) <= 2 and all(later <= earlier + 1 for (earlier, *_), (later, *_) in pairwise(wrong))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("jump", [0, 1, 3, 4, 6, 9])
def test_a_jump_to_a_direction_never_seen_is_found_within_ten(jump, seed):
    """A new top out of nothing: at the latest the next cold run finds it, and from then on it is followed."""
    tracker = EigenTracker(seed=100 * seed)
    for _ in range(jump):
        tracker.update(matrix(1.5, 1.3, 1.1))
    values = []
    for _ in range(14):
        found = tracker.update(matrix(1.5, 1.3, 1.1, 1.9))
        values.append(float(found.values[0]))
        assert found.converged
    assert values[10:] == pytest.approx([1.9] * 4, rel=1e-2)
    right = [abs(v / 1.9 - 1) <= 0.01 for v in values]
    assert all(right[right.index(True) :])  # once found, not lost


def test_a_complete_change_of_eigenvectors():
    tracker, other = EigenTracker(), rotation(9)
    tracker.update(matrix(3.0, 2.0))
    tracker.update(matrix(3.0, 2.0))
    values = BULK.clone()
    values[:2] = torch.tensor([4.0, 1.0])
    found = tracker.update(other * values @ other.mT)
    assert found.converged and float(found.values[0]) == pytest.approx(4, rel=1e-2)


def test_a_measurement_that_failed_is_not_counted():
    tracker = EigenTracker()
    tracker.update(matrix(3.0, 2.0))
    vectors = tracker.vectors
    with pytest.raises(FloatingPointError):
        tracker.update(matrix(float("nan"), 2.0))
    assert tracker.taken == 1 and tracker.vectors is vectors


def test_each_measurement_has_a_seed_of_its_own():
    operator, tracker = matrix(3.0, 2.0), EigenTracker(seed=7)
    first = tracker.update(operator)
    assert torch.equal(first.vectors, top_eigenvalues(operator, seed=7).vectors)
    second = tracker.update(operator)
    assert torch.equal(second.vectors, top_eigenvalues(operator, warm_start=first.vectors, seed=8).vectors)
