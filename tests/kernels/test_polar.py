"""The polar factor against the singular value decomposition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import nuclear_norm, polar_error, polar_factor


def with_ratios(m, n, ratios, seed=0):
    """A matrix, its polar factor, and its bases, for given singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(ratios) @ right.mT, left @ right.mT, left, right


def test_the_stated_errors():
    assert polar_error(5) <= 0.13 and polar_error(6) <= 2e-3 and polar_error(8) <= 1e-6


@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (150, 40)])
@pytest.mark.parametrize("steps", [5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_singular_values_go_to_one(shape, steps, dtype):
    """Each direction separately: u_i . X v_i is the polynomial's value, and nothing mixes."""
    ratios = torch.logspace(0, -2.4, 40, dtype=torch.float64)
    matrix, _, left, right = with_ratios(*shape, ratios)
    for scale in (1.0, 1e-12, 1e12):
        found = polar_factor((matrix * scale).to(dtype), steps).double()
        inside = left.mT @ found @ right
        rounding = 1e-9 if dtype == torch.float64 else 2e-3
        assert (inside.diagonal() - 1).abs().max() <= polar_error(steps) + rounding
        assert (inside - torch.diag(inside.diagonal())).abs().max() <= rounding
    wide = polar_factor(matrix.mT.to(dtype), steps).double()
    torch.testing.assert_close(wide, polar_factor(matrix.to(dtype), steps).double().mT, atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_any_shape_and_rank(m, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, n, generator=generator, dtype=torch.float64
    )
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    ratio = s / (s**4).sum() ** 0.25
    large, found = ratio >= 2e-3, polar_factor(matrix, 8)
    inside = (u.mT @ found @ vh.mT).diagonal()
    assert (inside[large] - 1).abs().max() <= 1e-5
    assert inside[ratio < 1e-13].abs().sum() <= 1e-6 and (inside <= 1 + 1e-5).all()
    assert float(nuclear_norm(matrix, "polar")) == pytest.approx(float(s.sum()), rel=1e-2)


@pytest.mark.parametrize("method", ["polar", "gram", "svd"])
def test_nuclear_norm_methods(method):
    matrix = torch.randn(6, 30, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix.double()).sum(-1)
    torch.testing.assert_close(nuclear_norm(matrix, method).double(), expected, rtol=1e-4, atol=0)


def test_batches_and_special_values():
    batch = torch.randn(3, 2, 8, 5, generator=torch.Generator().manual_seed(0))
    batch[0, 0] = 0
    batch[1, 0, 0, 0] = math.nan
    found = polar_factor(batch)
    assert not found[0, 0].any() and found[1, 0].isnan().any()
    assert torch.allclose(found[2, 1], polar_factor(batch[2, 1]), atol=1e-5)
    assert polar_factor(torch.empty(0, 3)).shape == (0, 3)
    assert polar_factor(torch.randn(4, 4).bfloat16()).dtype == torch.float32


def test_bad_arguments():
    for bad in (torch.ones(3), torch.ones(3, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="floating point matrices"):
            polar_factor(bad)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        polar_factor(torch.ones(2, 2), 0)
