"""The nuclear norm against the singular values in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import nuclear_norm

METHODS = ("auto", "gram", "svd")
SIDES = st.integers(1, 24)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(SIDES, SIDES, SIDES, st.integers(-30, 30), st.integers(0, 2**32))
def test_sum_of_singular_values_at_any_rank_and_scale(method, rows, columns, rank, exponent, seed):
    product = gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1)
    matrix = product * 10.0**exponent / product.abs().max()
    singular = torch.linalg.svdvals(matrix)
    # A vanishing eigenvalue of the Gram matrix is known to rounding, its root to the root of rounding.
    allowed = 1e-7 * min(rows, columns) * singular[0]
    assert abs(nuclear_norm(matrix, method) - singular.sum()) <= allowed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(method, dtype):
    matrix = gaussian(12, 7, dtype=dtype)
    found = nuclear_norm(matrix, method)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.double() == pytest.approx(torch.linalg.svdvals(matrix.double()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_zero(method):
    batch = gaussian(2, 3, 8, 5)
    batch[1, 1] = 0
    found = nuclear_norm(batch, method)
    assert found.shape == (2, 3) and found[1, 1] == 0
    assert torch.allclose(found, torch.linalg.svdvals(batch).sum(-1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_entries_give_nan_for_their_own_matrix_only(method, bad):
    batch = gaussian(3, 5, 5)
    batch[0, 1, 1] = bad
    assert nuclear_norm(batch, method).isnan().tolist() == [True, False, False]


def test_bad_arguments():
    with pytest.raises(ValueError, match="method must be one of .*'polar', 'svd'.*, got 'fast'"):
        nuclear_norm(torch.ones(2, 2), "fast")
    with pytest.raises(ValueError, match=r"matrices \[..., m, n\], got shape \(2,\)"):
        nuclear_norm(torch.ones(2))
