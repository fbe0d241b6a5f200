"""Hutchinson's estimator against traces that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.curvature import Diagonal, GGNOperator, HessianOperator, trace
from tests.models import dense_hessian, mlp, samples

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)


def symmetric(n, seed=0):
    drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + drawn.mT


def off_diagonal(matrix):
    """Twice the squared entries off the diagonal: the variance of one sample."""
    return 2 * float((matrix - matrix.diagonal().diag()).square().sum())


@PROPERTY
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**31))
def test_exact_on_diagonals(n, count, seed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = trace(Diagonal(values), num_vectors=count, seed=seed % 1000)
    assert found.value == pytest.approx(float(values.sum()), abs=1e-10) and found.matvecs == count
    assert math.isnan(found.standard_error) if count == 1 else found.standard_error < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_unbiased(seed):
    matrix = symmetric(40, seed)
    found = trace(matrix, num_vectors=4000, seed=seed)
    spread = math.sqrt(off_diagonal(matrix) / 4000)
    assert found.value == pytest.approx(float(matrix.trace()), abs=4 * spread)
    assert found.standard_error == pytest.approx(spread, rel=0.1)


def test_the_error_shrinks_like_the_root_of_the_samples():
    matrix = symmetric(60)
    few, many = (
        [trace(matrix, num_vectors=count, seed=seed).value - float(matrix.trace()) for seed in range(200)]
        for count in (4, 64)
    )
    size = [math.sqrt(sum(e * e for e in errors) / len(errors)) for errors in (few, many)]
    assert size[0] / size[1] == pytest.approx(4, rel=0.25)
    assert size[0] == pytest.approx(math.sqrt(off_diagonal(matrix) / 4), rel=0.15)


def test_the_standard_error_covers_the_truth():
    """Within two standard errors in about 95 runs of 100."""
    matrix = symmetric(50)
    runs = [trace(matrix, num_vectors=40, seed=seed) for seed in range(300)]
    inside = sum(abs(run.value - float(matrix.trace())) <= 2 * run.standard_error for run in runs)
    assert 270 <= inside <= 299


def test_samples_of_a_run_are_not_those_of_the_next():
    matrix = symmetric(50)
    values = [trace(matrix, num_vectors=1, seed=seed).value for seed in range(50)]
    assert len({round(v, 9) for v in values}) == 50


@pytest.mark.parametrize("backend", ["double_backward", "finite_difference"])
def test_of_a_network(backend):
    inputs, labels = samples(20, 5, dtype=torch.float64)
    model = mlp(5, 7, 3).double()
    loss = lambda model: torch.nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    truth = dense_hessian(model, loss)
    found = trace(HessianOperator(lambda: loss(model), list(model.parameters()), backend=backend), num_vectors=300)
    assert found.value == pytest.approx(float(truth.trace()), abs=4 * math.sqrt(off_diagonal(truth) / 300))
    ggn = GGNOperator(
        lambda: model(inputs), lambda z: torch.nn.functional.cross_entropy(z, labels), list(model.parameters())
    )
    assert trace(ggn, num_vectors=20).value > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_operators_are_summed_in_float64(dtype):
    values = torch.ones(5000, dtype=dtype)
    assert trace(Diagonal(values), num_vectors=3).value == 5000


def test_it_is_seeded_and_leaves_global_streams():
    state, matrix = torch.get_rng_state(), symmetric(30)
    one, two, other = (trace(matrix, seed=seed) for seed in (1, 1, 2))
    assert one == two and one.value != other.value
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    with pytest.raises(ValueError, match="num_vectors must be at least 1, got 0"):
        trace(torch.eye(3), num_vectors=0)
