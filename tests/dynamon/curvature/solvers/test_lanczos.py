"""The eigen-solver against dense decompositions: values, residuals, bounds, and what it says about itself."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from dynamon.curvature import HessianOperator, LinearOperator, top_eigenvalues
from dynamon.curvature.solvers.eigenpairs import value_error
from tests.models import dense_hessian, mlp, samples

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
SEEDS = st.integers(0, 2**32)


class Counted(LinearOperator):
    """A dense or diagonal matrix that counts its products."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.products = matrix, 0

    def _product(self, vector):
        self.products += 1
        return self.matrix * vector if self.matrix.ndim == 1 else self.matrix @ vector


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, seed=0, dtype=torch.float64):
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(gaussian(len(values), len(values), seed=seed))[0]
    matrix = q * values @ q.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def symmetric(n, seed=0, dtype=torch.float64):
    matrix = gaussian(n, n, seed=seed)
    return (matrix + matrix.mT).to(dtype)


def decaying(n=400, top=()):
    """Eigenvalues of a network's kind: a few that stand out, a bulk that decays."""
    return torch.tensor([*top, *(0.5 / (1 + i) for i in range(n - len(top)))], dtype=torch.float64)


def assert_consistent(found, matrix, k, tol):
    """What the result says of itself is true, converged or not."""
    matrix = matrix.double()
    truth = torch.linalg.eigvalsh(matrix).flip(0)
    scale = float(truth.abs().max()) + 1e-300
    rounding = 1e-12 if found.vectors.dtype == torch.float64 else 3e-6
    vectors = found.vectors.double()
    assert found.values.shape == found.residuals.shape == (k,)
    assert found.values.dtype == found.residuals.dtype == torch.float64
    assert vectors.shape[0] == len(matrix) and vectors.shape[1] >= min(k, len(matrix))
    torch.testing.assert_close(
        vectors.mT @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64), atol=10 * rounding, rtol=0
    )
    for value, x, residual in zip(found.values, vectors.mT, found.residuals, strict=False):
        assert abs(float((matrix @ x - value * x).norm()) - float(residual)) <= 100 * rounding * scale
        assert float((truth - value).abs().min()) <= float(residual) + 100 * rounding * scale
    assert found.lower <= truth[0] * (1 + 1e-14 * torch.sign(truth[0]))
    assert truth[-1] - 100 * rounding * scale <= found.smallest <= truth[0] + 100 * rounding * scale
    if found.upper is not None:
        assert found.lower <= found.upper
    if found.converged:
        assert (found.errors <= tol * scale + 100 * rounding * scale).all()
    assert (found.errors <= found.residuals + 100 * rounding * scale).all()
    return truth


@PROPERTY
@given(st.integers(1, 60), SEEDS, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_random_matrices(n, seed, dtype, data):
    k = data.draw(st.integers(1, min(4, n)))
    matrix = symmetric(n, seed, dtype)
    found = top_eigenvalues(matrix, k, seed=seed % 1000, max_matvecs=80)
    assert_consistent(found, matrix, k, 1e-2)
    assert found.converged


@PROPERTY
@given(st.integers(1, 60), SEEDS, st.integers(-12, 12))
def test_negative_definite_matrices(n, seed, exponent):
    matrix = -(symmetric(n, seed) @ symmetric(n, seed)) * 10.0**exponent
    found = top_eigenvalues(matrix, max_matvecs=200)
    assert_consistent(found, matrix, 1, 1e-2)
    assert found.converged and found.lower <= 0


def test_converged_is_seldom_wrong():
    """A small residual proves an eigenvalue nearby, not that it is the top one; a random start seldom misses that."""
    wrong = 0
    for seed in range(200):
        matrix = symmetric(30 + seed % 100, seed)
        truth = torch.linalg.eigvalsh(matrix)
        found = top_eigenvalues(matrix, seed=seed, max_matvecs=100)
        error = float(abs(found.values[0] - truth[-1]) / truth.abs().max())
        assert found.converged and error <= 0.05
        wrong += error > 0.01
    assert wrong <= 8


@pytest.mark.parametrize("n", range(1, 41))
def test_as_many_products_as_dimensions_are_exact(n):
    matrix = symmetric(n, seed=n)
    found = top_eigenvalues(matrix, tol=1e-9)
    assert found.converged and found.matvecs <= 40
    assert float(found.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), abs=1e-8)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_k(k, dtype):
    values = decaying(300, top=[9, 7, 6, 4, 3, -8])
    found = top_eigenvalues(with_spectrum(values, dtype=dtype), k, tol=1e-4, max_matvecs=200)
    assert found.converged
    np.testing.assert_allclose(found.values.numpy(), [9, 7, 6, 4][:k], atol=1e-3)
    assert found.smallest == pytest.approx(-8, abs=0.01)


def test_the_largest_algebraic_value_is_wanted_not_the_largest_magnitude():
    found = top_eigenvalues(with_spectrum(decaying(100, top=[2, -50])), tol=1e-4, max_matvecs=100)
    assert float(found.values[0]) == pytest.approx(2, abs=5e-3) and found.smallest == pytest.approx(-50, abs=1e-3)


def test_repeated_eigenvalues():
    found = top_eigenvalues(with_spectrum([5.0] * 3 + [1.0] * 20), tol=1e-6)
    assert found.converged and float(found.values[0]) == pytest.approx(5)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("certify", [False, True])
def test_multiples_of_the_identity(n, k, factor, certify):
    """Every vector is an eigenvector: a Krylov space ends at once, and k values are wanted all the same."""
    if k > n:
        return
    matrix = factor * torch.eye(n, dtype=torch.float64)
    found = top_eigenvalues(matrix, k, certify=certify)
    assert_consistent(found, matrix, k, 1e-2)
    assert found.converged and found.values.tolist() == pytest.approx([factor] * k)
    assert found.upper == (pytest.approx(factor) if certify else None)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_low_rank(rank, k):
    values = torch.zeros(50, dtype=torch.float64)
    values[:rank] = torch.arange(rank, 0, -1)
    matrix = with_spectrum(values)
    found = top_eigenvalues(matrix, k, tol=1e-8)
    assert_consistent(found, matrix, k, 1e-8)
    assert found.converged and found.values.tolist() == pytest.approx(values[:k].tolist(), abs=1e-8)


def test_the_result_can_be_scaled():
    found = top_eigenvalues(with_spectrum(decaying(60, top=[3])), certify=True)
    double = found.scaled(2.0)
    for name in ("values", "residuals", "lower", "upper", "smallest"):
        assert float(getattr(double, name)) == 2 * float(getattr(found, name))
    assert double.vectors is found.vectors
    assert (double.matvecs, double.converged) == (found.matvecs, found.converged)
    assert top_eigenvalues(with_spectrum(decaying(60))).scaled(0.5).upper is None


SPECTRA = {
    "flat": torch.linspace(0, 1, 1000, dtype=torch.float64),
    "decaying": decaying(1000),
    "outliers": decaying(1000, top=[4, 3.9, 2]),
    "indefinite": torch.linspace(-1, 1, 1000, dtype=torch.float64) ** 3,
    "negative": -torch.linspace(0.5, 9, 1000, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounds_over_many_starts(spectrum, dtype):
    """The upper bound may fail in one start of a hundred, the lower bound in none."""
    operator = Counted(SPECTRA[spectrum].to(dtype))
    truth = float(operator.matrix.max())
    runs = [top_eigenvalues(operator, certify=True, tol=1e-3, seed=seed) for seed in range(100)]
    assert all(run.matvecs >= 20 and run.lower <= truth for run in runs)
    assert sum(run.upper < truth for run in runs) <= 1
    gaps = [(run.upper - truth) / float(operator.matrix.abs().max()) for run in runs]
    assert np.median(gaps) <= 0.15


def test_more_products_tighten_the_upper_bound():
    operator = Counted(SPECTRA["flat"])
    short, long = (top_eigenvalues(operator, certify=True, tol=tol, max_matvecs=60) for tol in (0.5, 1e-6))
    assert short.matvecs == 20 and long.matvecs > 30
    assert long.upper - long.lower < short.upper - short.lower


def test_certified_runs_ignore_the_warm_start():
    matrix = with_spectrum(decaying(200, top=[3, 2]))
    cold = top_eigenvalues(matrix, certify=True)
    warm = top_eigenvalues(matrix, certify=True, warm_start=cold.vectors)
    assert torch.equal(warm.values, cold.values) and warm.upper == cold.upper and warm.matvecs == cold.matvecs


def test_a_warm_start_takes_fewer_products():
    drift = 0.02 * symmetric(400, seed=9) / math.sqrt(400)
    before = with_spectrum(decaying(400, top=[3, 2.5, 2, 1.5, 1.2]))
    last = top_eigenvalues(before, 2, max_matvecs=200)
    cold = top_eigenvalues(before + drift, max_matvecs=200)
    warm = top_eigenvalues(before + drift, warm_start=last.vectors, max_matvecs=200)
    assert warm.converged and cold.converged
    assert warm.matvecs <= 8 and warm.matvecs < cold.matvecs
    assert float(warm.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(before + drift)[-1]), rel=1e-2)


@pytest.mark.parametrize("bulk", ["flat", "decaying"])
@pytest.mark.parametrize("gap", [1.02, 1.05, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("tracked", ["one vector", "one column", "two"])
def test_an_eigenvalue_that_overtook_the_tracked_one_is_found(bulk, gap, tracked):
    """The old top is now second. What must never happen is to report it and call the run converged."""
    rest = torch.linspace(0.1, 0.8, 298) if bulk == "flat" else decaying(298)
    operator = Counted(torch.cat([torch.tensor([gap, 1.0]), rest.float()]))
    old = torch.eye(300)
    start = {"one vector": old[1], "one column": old[:, 1:2], "two": old[:, [1, 0]]}[tracked]
    for seed in range(20):
        found = top_eigenvalues(operator, warm_start=start, seed=seed)
        assert found.converged and float(found.values[0]) == pytest.approx(gap, rel=1e-2)
        assert found.matvecs <= (14 if tracked == "two" else 20)


def test_a_seed_decides_everything_and_global_streams_stay():
    matrix = with_spectrum(decaying(100))
    torch.manual_seed(1)
    states = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    one, two, other = (top_eigenvalues(matrix, 2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.vectors, two.vectors) and torch.equal(one.values, two.values)
    assert not torch.equal(one.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert pickle.dumps(np.random.get_state()) == states[1]


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("warm", [False, True])
def test_the_limit_on_products_is_kept_and_said(limit, warm):
    operator = Counted(SPECTRA["flat"])
    start = gaussian(1000, 2) if warm else None
    found = top_eigenvalues(operator, tol=1e-9, max_matvecs=limit, warm_start=start)
    assert operator.products == found.matvecs == limit
    assert not found.converged
    assert found.lower <= 1 and found.vectors.shape == (1000, min(3, limit))


def test_a_value_that_still_moves_is_not_called_converged():
    """Its residual may be tiny: the last product found the eigenvector all at once."""
    values = torch.linspace(0, 1e-3, 300, dtype=torch.float64)
    values[:2] = torch.tensor([1.0, 0.9])
    three, four, free = (top_eigenvalues(Counted(values), seed=1, max_matvecs=limit) for limit in (3, 4, 40))
    assert float(three.values[0]) < 0.99 < 0.9999 < float(four.values[0])
    assert float(four.residuals[0]) < 1e-4 and not four.converged
    assert free.converged and free.matvecs > 4


def test_restarts_converge_to_tight_tolerances():
    matrix = with_spectrum(decaying(200, top=[1.2, 1.1, 1.0]))
    found = top_eigenvalues(matrix, 3, tol=1e-8, max_matvecs=400)
    assert found.converged and found.matvecs > 8
    assert_consistent(found, matrix, 3, 1e-8)
    assert found.values.tolist() == pytest.approx([1.2, 1.1, 1.0], abs=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_products_raise(bad):
    matrix = symmetric(20)
    matrix[3, 4] = matrix[4, 3] = bad
    with pytest.raises(FloatingPointError, match="the operator returned NaN or infinity"):
        top_eigenvalues(matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"method": "gram"}, "method 'gram' is for k=1 of a GGNOperator"),
        ({"method": "power", "certify": True}, "method 'power' has no upper bound"),
        ({"method": "magic"}, "method must be one of lanczos, power, gram, got 'magic'"),
        ({"tol": 0.0}, "tol must lie between 0 and 1, got 0.0"),
        ({"tol": 1.0}, "tol must lie between 0 and 1"),
        ({"max_matvecs": 1}, "max_matvecs must be at least 2, got 1"),
        ({"k": 4, "max_matvecs": 3}, "max_matvecs must be at least 4, got 3"),
        ({"warm_start": torch.ones(5)}, "warm_start must have 6 rows, got 5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(torch.eye(6), **arguments)


def test_an_operator_without_dimensions():
    with pytest.raises(ValueError, match="the operator has no eigenvalues"):
        top_eigenvalues(torch.empty(0, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_operators_are_solved_in_float32(dtype):
    operator = Counted(decaying(300, top=[4, 3, 2]).to(dtype))
    found = top_eigenvalues(operator, 2)
    assert found.converged and found.vectors.dtype == torch.float32
    assert found.values.tolist() == pytest.approx([4, 3], rel=2e-2)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_sharpness_of_a_small_network(certify, seed):
    """It must show 3: a loss scaled so that its sharpness is 3."""
    inputs, labels = samples(20, 6, dtype=torch.float64, seed=seed)
    model = mlp(6, 8, 3, seed=seed).double()
    raw = lambda model: cross_entropy(model(inputs), labels)  # noqa: E731
    factor = 3 / float(torch.linalg.eigvalsh(dense_hessian(model, raw))[-1])
    operator = HessianOperator(lambda: factor * raw(model), list(model.parameters()))
    found = top_eigenvalues(operator, tol=1e-3, certify=certify)
    assert found.converged and float(found.values[0]) == pytest.approx(3, abs=3e-3)
    assert found.lower <= 3
    single = model.float()
    narrow = HessianOperator(lambda: factor * cross_entropy(single(inputs.float()), labels), list(single.parameters()))
    assert float(top_eigenvalues(narrow, tol=1e-3, certify=certify).values[0]) == pytest.approx(3, abs=3e-3)


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_all_copies_of_repeated_eigenvalues_are_found(copies, seed):
    """As in the Hessian of a linear layer with several outputs; a Krylov space alone sees one of each."""
    matrix = torch.block_diag(*[symmetric(12, seed)] * copies)
    truth = torch.linalg.eigvalsh(matrix).flip(0)
    k = copies + 1
    found = top_eigenvalues(matrix, k, seed=seed, max_matvecs=300)
    assert found.converged
    torch.testing.assert_close(found.values, truth[:k], rtol=0, atol=0.01 * float(truth.abs().max()))
    true = (matrix @ found.vectors[:, :k] - found.vectors[:, :k] * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, true, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "matrix", [torch.diag(torch.arange(5)), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(3, dtype=torch.complex64)]
)
def test_matrices_that_are_not_meant(matrix):
    with pytest.raises(ValueError, match="real, floating point and symmetric"):
        top_eigenvalues(matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 1.5}, "k must be an int, got 1.5"),
        ({"max_matvecs": 10.5}, "max_matvecs must be an int"),
        ({"warm_start": [1.0]}, r"warm_start must be a tensor \[n\] or \[n, m\], got list"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        top_eigenvalues(symmetric(9, 0), **arguments)


@pytest.mark.parametrize("limit", range(4, 60, 5))
def test_several_values_keep_to_the_limit_on_products_too(limit):
    """Wherever the run is cut off, what it returns is an orthonormal basis with its own Rayleigh quotients."""
    matrix = torch.block_diag(*[symmetric(20, 3)] * 3)
    counted = []

    class Operator:
        shape, dtype = matrix.shape, matrix.dtype

        def __matmul__(self, v):
            counted.append(1)
            return matrix @ v

    found = top_eigenvalues(Operator(), 4, max_matvecs=limit)
    assert len(counted) == found.matvecs <= limit
    vectors = found.vectors[:, : len(found.values)]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(found.values), dtype=vectors.dtype))
    quotients = (vectors * (matrix @ vectors)).sum(0)
    torch.testing.assert_close(quotients, found.values, atol=0.05 * float(matrix.abs().max()), rtol=0)


def test_the_error_is_the_square_of_the_residual_over_the_gap():
    """By hand: a vector at the angle t from the top of diag(10, 1) and a Ritz value known exactly."""
    for angle in (0.01, 0.1, 0.3):
        value = 10 * math.cos(angle) ** 2 + math.sin(angle) ** 2
        residual = 9 * math.sin(angle) * math.cos(angle)
        bound = value_error(np.array([value, 1.0]), np.array([residual, 0.0]))
        assert 10 - value == pytest.approx(bound) == min(residual, residual**2 / (value - 1))


def test_values_within_their_residuals_are_one_cluster():
    """The gap is then that below the cluster, and the residual that of the whole of it."""
    values, residuals = np.array([5.0, 4.9, 1.0]), np.array([0.1, 0.2, 0.05])
    assert value_error(values, residuals) == pytest.approx((0.1**2 + 0.2**2) / (5 - 1 - 0.05))
    assert value_error(values, np.array([0.1, 0.2, 4.5])) == 0.1  # no gap: the residual alone
    assert value_error(np.array([2.0]), np.array([0.3])) == 0.3


def test_the_error_seldom_lies_above_its_bound():
    """Over runs of 4 to 23 products, converged or not, against dense eigenvalues: the distance to the nearest one."""
    above = 0
    for seed in range(120):
        matrix = symmetric(30 + seed % 100, seed)
        truth = torch.linalg.eigvalsh(matrix)
        found = top_eigenvalues(matrix, seed=seed, max_matvecs=4 + seed % 20)
        above += float((truth - found.values).abs().min()) > float(found.errors) + 1e-12
    assert above <= 6


def test_a_run_stops_by_the_error_while_the_residual_is_above_the_tolerance():
    values = torch.cat([torch.tensor([10.0, 8.5]), torch.linspace(8.4, -3, 398)]).double()
    stopped_by_the_gap = 0
    for tol in (1e-2, 3e-3, 1e-3, 1e-4):
        found = top_eigenvalues(with_spectrum(values, seed=3), tol=tol, max_matvecs=100)
        assert found.converged
        assert 10 - float(found.values) <= float(found.errors) <= 10 * tol
        stopped_by_the_gap += float(found.residuals) > 10 * tol
    assert stopped_by_the_gap == 4


def test_the_error_is_never_below_that_of_the_products():
    class Doubtful(Counted):
        def product_error(self, vector):
            return 3e-3

    found = top_eigenvalues(Doubtful(decaying(300, top=[4.0, 2.0])))
    assert found.converged and float(found.errors) >= 3e-3 * 4 * 0.99
    single = top_eigenvalues(Counted(decaying(300, top=[4.0, 2.0]).float()), tol=1e-3)
    assert float(single.errors) >= torch.finfo(torch.float32).eps * 3.9


def test_readings_hold_the_residual_relative_to_the_value():
    found = top_eigenvalues(with_spectrum(-decaying(60, top=[3])), max_matvecs=5)
    expected = float(found.residuals[0]) / abs(float(found.values[0]))
    for pairs in (found, found.scaled(7.0)):
        assert pairs.readings("x")["x_residual"] == pytest.approx(expected, rel=1e-12)
    assert top_eigenvalues(torch.zeros(5, 5)).readings("x") == {"x": 0.0, "x_residual": 0.0}
