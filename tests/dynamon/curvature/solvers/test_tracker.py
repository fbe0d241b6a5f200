"""Following eigenvalues of an operator that changes."""

import copy
import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynamon.curvature import Diagonal, EigenTracker, HessianOperator, LinearOperator, top_eigenvalues
from tests.models import dense_hessian, gpt

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
    again = top_eigenvalues(operator, warm_start=first.vectors, last=float(first.values[0]), seed=8)
    assert torch.equal(second.vectors, again.vectors)


# ---- a top that stands clear


class WithGradient(LinearOperator):
    """A matrix that knows a direction, as a Hessian knows its gradient, and whose products may be wrong."""

    def __init__(self, matrix, direction=None, wrong=None):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.direction, self.wrong = matrix, direction, wrong

    def _product(self, vector):
        return self.matrix @ vector if self.wrong is None else (self.matrix + self.wrong) @ vector

    def initial_direction(self):
        return self.direction


def test_a_clear_top_takes_three_or_four_products():
    tracker, products = EigenTracker(), []
    for step in range(16):
        operator = matrix(3 + 0.1 * step, 1.0) + drifting(0.01, seed=step)
        was_cold = tracker.next_is_cold
        found = tracker.update(operator)
        values = torch.linalg.eigvalsh(operator)
        assert found.converged and found.lower <= float(values[-1])
        assert float(values[-1]) * (1 - 1e-2) <= float(found.values[0])
        residual = operator @ found.vectors[:, 0] - found.values[0] * found.vectors[:, 0]
        assert float(residual.norm()) == pytest.approx(float(found.residuals[0]), rel=1e-6)
        assert float(values[-1] - found.values[0]) <= float(found.errors[0]) + 1e-9
        torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(3).double(), rtol=0, atol=1e-9)
        if not was_cold:
            products.append(found.matvecs)
    assert set(products) <= {3, 4}


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("speed", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvalue_that_rises_past_a_clear_top(speed, seed, has_gradient):
    """Four products say that nothing comes near: what rises has to be seen before it is at the top."""
    tracker, wrong, steps = EigenTracker(seed=100 * seed), 0, int(4 / speed) + 2
    for step in range(steps):
        rising = 0.4 + speed * step
        drawn = torch.randn(N, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)
        share = torch.full((N,), 0.3, dtype=torch.float64)
        share[:3] = torch.tensor([3.0, 1.0, rising])  # in a gradient a direction counts by its curvature
        direction = Q @ (share * drawn) if has_gradient else None
        found = tracker.update(WithGradient(matrix(3.0, 1.0, rising), direction))
        truth = max(3.0, rising)
        wrong += found.converged and abs(float(found.values[0]) / truth - 1) > 0.01
    assert wrong <= 2 and float(found.values[0]) == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exact_eigenvectors_leave_no_residual(sign):
    """Where nothing can be added to the basis it is extended by noise, not by a vector of zeros with a value of 0."""
    values = sign * torch.cat([torch.tensor([3.0]), torch.linspace(0.5, 1, 99)]).double()
    top = values.argsort(descending=True)[:3]
    found = top_eigenvalues(Diagonal(values), warm_start=torch.eye(100).double()[:, top], last=float(values.max()))
    assert found.converged and float(found.values[0]) == pytest.approx(float(values.max()), abs=1e-2 * 3)
    assert found.lower <= float(values.max())


def test_a_second_that_comes_near_takes_more():
    tracker = EigenTracker()
    for _ in range(2):
        tracker.update(matrix(3.0, 1.0))
    few, many = copy.copy(tracker).update(matrix(3.0, 1.5)), copy.copy(tracker).update(matrix(3.0, 2.9))
    assert few.matvecs <= 4 < many.matvecs and few.converged and many.converged


def test_near_another_eigenvalue_a_reading_takes_no_more_than_a_cold_one():
    """A few products were not enough once: they are not tried again before the top stands clear."""
    tracker = EigenTracker()
    near, clear = ([matrix(3.0, second) for _ in range(4)] for second in (2.7, 1.0))
    cold = tracker.update(near[0])
    assert not tracker.is_clear and 2.5 < cold.next_value <= 2.7 + 1e-9
    assert all(tracker.update(operator).matvecs <= cold.matvecs for operator in near[1:])
    again = EigenTracker()
    again.load_state_dict(tracker.state_dict())
    assert not again.is_clear
    first, *later = (again.update(operator).matvecs for operator in clear if not again.next_is_cold)
    assert again.is_clear and all(few < first for few in later)


def test_products_that_are_not_symmetric_are_not_believed():
    """What one-sided differences get wrong shows there, at no further product."""
    tracker = EigenTracker()
    tracker.update(matrix(3.0, 1.0))
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / N**0.5
    top, values = Q[:, :1], {}
    for size in (0.0, 1e-3, 0.3):
        wrong = size * (drawn @ top) @ top.mT
        found = copy.copy(tracker).update(WithGradient(matrix(3.0, 1.0) + drifting(0.01), wrong=wrong))
        values[size] = found
    assert values[0.0].product_error < 1e-12 < values[1e-3].product_error < 1e-3 and values[1e-3].converged
    assert values[1e-3].lower < values[0.0].lower
    assert values[0.3].product_error > 0.01 and not values[0.3].converged and values[0.3].lower == -math.inf


@pytest.mark.parametrize(("vectors", "restarts"), [(3, False), (1, True)])
def test_lanczos_from_a_warm_start_does_not_believe_them_either(vectors, restarts):
    """Near another eigenvalue a reading is Lanczos from its first product on; with and without a restart."""
    near = matrix(3.0, 2.9)
    known = top_eigenvalues(near).vectors[:, :vectors]
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / N**0.5
    arguments = {"warm_start": known, "max_matvecs": 60, "tol": 1e-3}
    right = top_eigenvalues(near + drifting(0.01), **arguments)
    wrong = top_eigenvalues(WithGradient(near + drifting(0.01), wrong=0.3 * drawn), **arguments)
    assert right.converged and (right.matvecs > 8) == restarts and 0 < right.product_error < 1e-12
    assert wrong.product_error > 1e-2 and not wrong.converged and wrong.lower == -math.inf
    cold = top_eigenvalues(near, max_matvecs=60, tol=1e-3)
    assert cold.converged and cold.product_error == 0


# ---- one-sided differences


TOKENS = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(0))


def loss_of(call):
    return torch.nn.functional.cross_entropy(call(TOKENS).flatten(0, 1), TOKENS.flatten())


def hessian_of(model, tracker, shift=0.0):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(shift * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    arguments = {"backend": tracker.backend, "error": tracker.difference_error}
    return HessianOperator(lambda: loss_of(model), dict(model.named_parameters()), **arguments)


def test_differences_are_taken_once_they_were_compared():
    """float32 weights, against the dense Hessian in float64."""
    model, tracker, backends = gpt(width=4, depth=1), EigenTracker(), []
    for _ in range(8):
        operator = hessian_of(model, tracker, 0.01)
        found = tracker.update(operator)
        taken = tracker.compare(operator)
        backends.append(found.backend)
        assert taken == (3 if found.backend == "double_backward" else 0)
        truth = float(torch.linalg.eigvalsh(dense_hessian(copy.deepcopy(model).double(), loss_of))[-1])
        assert found.converged and float(found.values[0]) == pytest.approx(truth, rel=1e-2) and found.lower <= truth
        assert found.product_error == 0 or tracker.difference_error <= found.product_error <= 2.5e-3
    one_sided = ["double_backward", *["forward_difference"] * 4]
    assert backends == [*one_sided, *one_sided[:3]]
    state = tracker.state_dict()
    other = EigenTracker()
    other.load_state_dict(state)
    assert other.backend == tracker.backend == "forward_difference"
    assert other.difference_error == tracker.difference_error
    other.load_state_dict({key: value for key, value in state.items() if key != "difference_error"})
    assert other.backend == "auto"  # a checkpoint of an earlier version


@pytest.mark.parametrize("arguments", [{"tol": 1e-5}, {"k": 2}], ids=["a tight tolerance", "several values"])
def test_where_differences_are_not_good_enough(arguments):
    model, tracker = gpt(), EigenTracker(**({"max_matvecs": 200} | arguments))
    for _ in range(3):
        operator = hessian_of(model, tracker)
        assert tracker.update(operator).backend == "double_backward"
        tracker.compare(operator)


def test_differences_that_turn_out_wrong_are_given_up():
    tracker = EigenTracker()
    tracker.update(matrix(3.0, 1.0))
    tracker.difference_error = 1e-4
    assert tracker.backend == "forward_difference"
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / N**0.5
    tracker.update(WithGradient(matrix(3.0, 1.0), wrong=0.3 * drawn))
    assert tracker.backend == "auto"
