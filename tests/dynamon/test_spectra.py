"""Singular-value statistics against the singular values in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.spectra import weight_spectra, weight_spectrum

FIELDS = ("sigma_max", "sigma_lower", "sigma_upper", "stable_rank", "participation_ratio")
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["gram", "exact"])


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_matches(found, weight, exact=False):
    sigma = torch.linalg.svdvals(weight.double())
    energy = sigma.square().sum(-1)
    rounding = 1e-6 if found.sigma_max.dtype == torch.float32 else 1e-12
    assert (found.sigma_lower.double() <= sigma[..., 0] * (1 + rounding * exact)).all()
    assert (found.sigma_upper.double() >= sigma[..., 0] * (1 - rounding * exact)).all()
    assert (found.sigma_upper <= found.sigma_lower * (1 + (rounding if exact else 0.01))).all()
    within = 1e-5 if exact else 0.005  # the middle of an interval of one percent
    torch.testing.assert_close(found.sigma_max.double(), sigma[..., 0], rtol=within, atol=0)
    torch.testing.assert_close(found.stable_rank.double(), energy / sigma[..., 0] ** 2, rtol=2.5 * within, atol=0)
    participation = energy**2 / (sigma**4).sum(-1)
    torch.testing.assert_close(found.participation_ratio.double(), participation, rtol=1e-5, atol=0)


@EXACT
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(-30, 30), st.integers(0, 2**32))
def test_any_rank_and_scale(exact, rows, columns, rank, exponent, seed):
    product = gaussian(rows, rank, seed=seed, dtype=torch.float64) @ gaussian(
        rank, columns, seed=seed + 1, dtype=torch.float64
    )
    sigma = torch.linalg.svdvals(product)
    weight = (product * 10.0**exponent / sigma[0]).float()
    assert_matches(weight_spectrum(weight, exact), weight, exact)


@EXACT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(exact, dtype):
    weight = gaussian(20, 14, dtype=dtype)
    found = weight_spectrum(weight, exact)
    assert_matches(found, weight, exact)
    wide = torch.float64 if exact or dtype == torch.float64 else torch.float32
    assert all(getattr(found, name).dtype == wide for name in FIELDS)


@EXACT
def test_known_spectra(exact):
    identity = weight_spectrum(3 * torch.eye(7), exact)
    assert float(identity.sigma_max) == pytest.approx(3, rel=0.005)
    assert float(identity.stable_rank) == pytest.approx(7, rel=0.01)
    assert float(identity.participation_ratio) == pytest.approx(7)
    rank_one = weight_spectrum(torch.outer(torch.arange(1.0, 5), torch.ones(9)), exact)
    assert float(rank_one.sigma_max) == pytest.approx(3 * math.sqrt(30))
    assert float(rank_one.stable_rank) == pytest.approx(1) == float(rank_one.participation_ratio)


@EXACT
def test_zero_and_nonfinite_matrices(exact):
    batch = gaussian(4, 6, 5)
    batch[1], batch[2, 3, 3], batch[3, 0, 0] = 0, math.nan, math.inf
    found = weight_spectrum(batch, exact)
    for name in FIELDS:
        first, zero, nan, infinite = getattr(found, name).tolist()
        assert zero == 0 and math.isnan(nan) and math.isnan(infinite) and math.isfinite(first)


@EXACT
def test_stacks(exact):
    stack = gaussian(2, 3, 8, 13)
    assert_matches(weight_spectrum(stack, exact), stack, exact)


def test_many_shapes_keep_their_order():
    shapes = [(4, 6), (9, 2), (4, 6), (1, 5), (9, 2), (6, 4), (4, 6)]
    weights = [gaussian(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    found = weight_spectra(weights)
    for i, weight in enumerate(weights):
        alone = weight_spectrum(weight)
        for name in FIELDS:
            assert float(getattr(found, name)[i]) == pytest.approx(float(getattr(alone, name)), rel=1e-5)


def test_many_dtypes_keep_their_order():
    weights = [
        gaussian(5, 4, dtype=torch.float64),
        gaussian(5, 4, seed=1),
        gaussian(5, 4, seed=2, dtype=torch.bfloat16),
    ]
    found = weight_spectra(weights)
    for i, weight in enumerate(weights):
        assert float(found.sigma_max[i]) == pytest.approx(float(torch.linalg.svdvals(weight.double())[0]), rel=0.005)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 0), torch.ones(3, 3, dtype=torch.int32)])
def test_bad_arguments(weight):
    with pytest.raises(ValueError):
        weight_spectrum(weight)
