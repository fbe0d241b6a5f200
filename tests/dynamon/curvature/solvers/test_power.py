"""Power iteration: the largest algebraic eigenvalue, whatever stands at the other end of the spectrum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.curvature import Diagonal, top_eigenvalues

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    drawn = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(drawn)[0]
    matrix = q * values @ q.mT
    return (matrix + matrix.mT) / 2


def power(operator, k=1, **arguments):
    return top_eigenvalues(operator, k, method="power", **{"tol": 1e-4, "max_matvecs": 4000, **arguments})


SPECTRA = {
    "positive": [3.0, 2.0, *[0.5] * 30],
    "small negative": [3.0, 2.0, *[0.1] * 30, -0.5],
    "negative nearly as large": [3.0, 2.0, *[0.1] * 30, -2.7],
    "both ends alike": [3.0, 2.0, *[0.1] * 30, -3.0],
    "negative larger": [3.0, 2.0, *[0.1] * 30, -9.0],
    "negative far larger": [3.0, 2.0, *[0.1] * 30, -90.0],
    "negative only": [-1.0, -2.0, *torch.linspace(-3, -9, 30).tolist()],
    "zero on top": [0.0, *torch.linspace(-1, -9, 30).tolist()],
    "rank one": [4.0, *[0.0] * 30],
    "identity": [1.0] * 20,
    "one": [2.5],
    "minus one": [-2.5],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", range(5))
def test_the_largest_algebraic_value(spectrum, seed):
    values = SPECTRA[spectrum]
    matrix, top, scale = symmetric(values, seed), max(values), max(map(abs, values))
    found = power(matrix, seed=seed)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(top, abs=1e-3 * scale)
    assert found.lower <= top + 1e-12 * scale and found.upper is None
    x = found.vectors[:, 0]
    assert float(x.norm()) == pytest.approx(1)
    assert float((matrix @ x - found.values[0] * x).norm()) == pytest.approx(
        float(found.residuals[0]), abs=1e-9 * scale
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", [1])
def test_the_smallest_value_is_an_upper_bound_on_the_smallest_eigenvalue(spectrum, seed):
    values = SPECTRA[spectrum]
    scale = max(map(abs, values))
    found = power(symmetric(values, seed), seed=seed)
    assert min(values) - 1e-9 * scale <= found.smallest <= float(found.values[-1]) + 1e-12 * scale


@PROPERTY
@given(st.integers(2, 40), st.integers(0, 2**31), st.integers(-10, 10))
def test_random_matrices(n, seed, exponent):
    drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = 10.0**exponent * (drawn + drawn.mT)
    spectrum = torch.linalg.eigvalsh(matrix)
    found = power(matrix, seed=seed % 1000)
    scale = float(spectrum.abs().max())
    assert found.lower <= float(spectrum[-1]) + 1e-12 * scale
    assert float((spectrum - found.values[0]).abs().min()) <= float(found.residuals[0]) + 1e-12 * scale
    if found.converged:
        assert float(found.residuals[0]) <= 2e-4 * scale


@pytest.mark.parametrize("k", [1, 2, 3])
def test_several_values(k):
    matrix = symmetric([9, 7, 5, *torch.linspace(1, 0, 30).tolist(), -8])
    found = power(matrix, k)
    assert found.converged and found.values.tolist() == pytest.approx([9, 7, 5][:k], abs=1e-3)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(k, dtype=torch.float64))
    assert (found.residuals <= 1e-3 * 9).all() and len(found.residuals) == k


def test_repeated_values():
    found = power(symmetric([5, 5, 5, *[1.0] * 20]), 2)
    assert found.converged and found.values.tolist() == pytest.approx([5, 5], abs=1e-3)


def test_a_warm_start_is_used():
    matrix = symmetric([3.0, 2.9, *torch.linspace(1, 0, 60).tolist()])
    cold = power(matrix)
    warm = power(matrix, warm_start=cold.vectors)
    assert warm.converged and warm.matvecs < cold.matvecs / 2
    two = power(matrix, 2)
    again = power(matrix, 2, warm_start=two.vectors)
    assert again.converged and again.matvecs < two.matvecs


@pytest.mark.parametrize("limit", [2, 5, 9, 30])
def test_the_limit_on_products_is_kept_and_said(limit):
    calls = []

    class Counted(Diagonal):
        def _product(self, vector):
            calls.append(1)
            return super()._product(vector)

    found = power(Counted(torch.linspace(0, 1, 200)), tol=1e-9, max_matvecs=limit)
    assert len(calls) == found.matvecs == limit and not found.converged
    assert found.lower <= 1


def test_a_seed_decides_everything():
    matrix, state = symmetric([3, 2, *[0.5] * 30]), torch.get_rng_state()
    one, two, other = (power(matrix, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.vectors, two.vectors) and not torch.equal(one.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_products_raise(bad):
    with pytest.raises(FloatingPointError, match="the operator returned NaN or infinity"):
        power(Diagonal(torch.tensor([1.0, bad, 2.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_precisions(dtype):
    found = power(Diagonal(torch.tensor([4.0, 2.0, *[0.5] * 30, -1.0], dtype=dtype)), tol=1e-2)
    assert found.converged and float(found.values[0]) == pytest.approx(4, rel=1e-2)
    assert found.vectors.dtype == torch.float32
