"""Singular-value statistics against the singular values in float64."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.spectra import (
    batched_by_shape,
    reduce_blocks,
    spectral_extremes,
    weight_spectra,
    weight_spectrum,
)
from dynamon.spectra.power_law import power_law

MEASURES = {
    "extremes": spectral_extremes,
    "spectrum": weight_spectrum,
    "exact": partial(weight_spectrum, exact=True),
}
SHARED = ("sigma_max", "sigma_lower", "sigma_upper", "stable_rank")
ALL = (*SHARED, "participation_ratio", "effective_rank", "nuclear")
EVERY = pytest.mark.parametrize("kind", MEASURES)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def from_singular_values(sigma, m, n, seed=0):
    left = torch.linalg.qr(gaussian(m, len(sigma), seed=seed, dtype=torch.float64))[0]
    right = torch.linalg.qr(gaussian(n, len(sigma), seed=seed + 1, dtype=torch.float64))[0]
    return left @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64)) @ right.mT


def assert_matches(found, weight, kind):
    """Tolerances: 0.5 % for the certificate's middle, 1e-3 and 1 % without decomposition in float64, 1e-6 with."""
    sigma = torch.linalg.svdvals(weight.double())
    energy = sigma.square().sum(-1)
    assert (found.sigma_lower.double() <= sigma[..., 0] * (1 + 1e-12)).all()
    assert (found.sigma_upper.double() >= sigma[..., 0] * (1 - 1e-12)).all()
    assert (found.sigma_upper <= found.sigma_lower * 1.01).all()
    single, rank = {"extremes": (5e-3, 1.3e-2), "spectrum": (1e-3, 1e-2), "exact": (1e-6, 1e-6)}[kind]
    same = partial(torch.testing.assert_close, atol=0)
    same(found.sigma_max.double(), sigma[..., 0], rtol=single)
    same(found.stable_rank.double(), energy / sigma[..., 0] ** 2, rtol=rank)
    if kind != "extremes":
        same(found.participation_ratio.double(), energy**2 / (sigma**4).sum(-1), rtol=rank)
        shares = sigma / sigma.sum(-1, keepdim=True)
        same(found.nuclear.double(), sigma.sum(-1), rtol=rank)
        same(found.effective_rank.double(), torch.special.entr(shares).sum(-1).exp(), rtol=max(rank, 1e-5))


@EVERY
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(-30, 30), st.integers(0, 2**32))
def test_any_rank_and_scale(kind, rows, columns, rank, exponent, seed):
    left, right = gaussian(rows, rank, seed=seed, dtype=torch.float64), gaussian(rank, columns, seed=seed + 1)
    product = left @ right.double()
    weight = (product * 10.0**exponent / torch.linalg.svdvals(product)[0]).float()
    assert_matches(MEASURES[kind](weight), weight, kind)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(kind, dtype):
    weight = gaussian(20, 14, dtype=dtype)
    found = MEASURES[kind](weight)
    assert_matches(found, weight, kind)
    wide = torch.float64 if kind == "exact" or dtype == torch.float64 else torch.float32
    assert all(getattr(found, name).dtype == wide for name in (SHARED if kind == "extremes" else ALL))


@EVERY
def test_known_spectra(kind):
    identity = MEASURES[kind](3 * torch.eye(7))
    assert float(identity.sigma_max) == pytest.approx(3, rel=0.005)
    assert float(identity.stable_rank) == pytest.approx(7, rel=0.01)
    rank_one = MEASURES[kind](torch.outer(torch.arange(1.0, 5), torch.ones(9)))
    assert float(rank_one.sigma_max) == pytest.approx(3 * math.sqrt(30))
    assert float(rank_one.stable_rank) == pytest.approx(1)
    if kind != "extremes":
        assert float(identity.participation_ratio) == pytest.approx(7)
        assert float(rank_one.participation_ratio) == pytest.approx(1)
        assert float(identity.effective_rank) == pytest.approx(7) and float(identity.condition) == pytest.approx(1)
        assert float(rank_one.effective_rank) == pytest.approx(1, rel=1e-3) and math.isnan(float(rank_one.condition))


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6])
def test_the_condition_number_or_nothing(smallest):
    """What float32 cannot resolve is not made up; float64 reaches further."""
    sigma = torch.logspace(0, math.log10(smallest), 40, dtype=torch.float64)
    weight = from_singular_values(sigma, 60, 40).double()
    assert float(weight_spectrum(weight).condition) == pytest.approx(1 / smallest, rel=1e-3)
    single = float(weight_spectrum(weight.float()).condition)
    assert math.isnan(single) if smallest < 1e-2 else single == pytest.approx(1 / smallest, rel=1e-2)


@EVERY
def test_zero_and_nonfinite_matrices(kind):
    batch = gaussian(4, 6, 5)
    batch[1], batch[2, 3, 3], batch[3, 0, 0] = 0, math.nan, math.inf
    found = MEASURES[kind](batch)
    for name in SHARED if kind == "extremes" else ALL:
        first, zero, nan, infinite = getattr(found, name).tolist()
        assert math.isnan(zero) if name.endswith(("rank", "ratio")) else zero == 0, name
        assert math.isnan(nan) and math.isnan(infinite) and math.isfinite(first), name


@EVERY
def test_stacks(kind):
    stack = gaussian(2, 3, 8, 13)
    assert_matches(MEASURES[kind](stack), stack, kind)


@pytest.mark.parametrize("at_once", [2**27, 60])
@pytest.mark.parametrize("kind", ["extremes", "spectrum"])
def test_many_shapes_and_dtypes_keep_their_order(kind, at_once, monkeypatch):
    monkeypatch.setattr("dynamon.spectra.singular_values._AT_ONCE", at_once)
    shapes = [(4, 6), (9, 2), (4, 6), (1, 5), (9, 2), (6, 4), (4, 6)]
    weights = [gaussian(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    weights += [gaussian(4, 6, dtype=torch.float64), gaussian(4, 6, seed=9, dtype=torch.bfloat16)]
    found = batched_by_shape(weights, MEASURES[kind])
    for i, weight in enumerate(weights):
        alone = MEASURES[kind](weight)
        for name in SHARED:
            assert float(getattr(found, name)[i]) == pytest.approx(float(getattr(alone, name)), rel=1e-4)
    if kind == "spectrum":
        assert weight_spectra(weights, exact=True).nuclear.dtype == torch.float64


def test_stacks_and_their_members():
    """Members of one shape are one batch wherever they come from, and a stack is read as the block-diagonal matrix."""
    stacks = [gaussian(3, 8, 5), gaussian(6, 4, seed=1), gaussian(2, 8, 5, seed=2), gaussian(1, 6, 4, seed=3)]
    members = [m for stack in stacks for m in stack.reshape(-1, *stack.shape[-2:])]
    found, alone = batched_by_shape(stacks, weight_spectrum), batched_by_shape(members, weight_spectrum)
    for name in (*ALL, "condition"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    together = reduce_blocks(found, [3, 1, 2, 1])
    blocks = [torch.block_diag(*stack.reshape(-1, *stack.shape[-2:])).double() for stack in stacks]
    sigmas = [torch.linalg.svdvals(block) for block in blocks]
    torch.testing.assert_close(together.sigma_max.double(), torch.stack([s[0] for s in sigmas]), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.nuclear.double(), torch.stack([s.sum() for s in sigmas]), rtol=1e-4, atol=0)
    for name, reduce in (("stable_rank", torch.mean), ("effective_rank", torch.mean), ("condition", torch.amax)):
        expected = torch.stack([reduce(part) for part in getattr(alone, name).split([3, 1, 2, 1])])
        torch.testing.assert_close(getattr(together, name), expected)
    assert reduce_blocks(alone, [1] * 7) is alone
    with pytest.raises(ValueError, match="at least one matrix"):
        batched_by_shape([], weight_spectrum)


@EVERY
@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 0), torch.ones(3, 3, dtype=torch.int32)])
def test_bad_arguments(kind, weight):
    with pytest.raises(ValueError, match="a spectrum needs"):
        MEASURES[kind](weight)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
def test_power_laws_are_found(exponent):
    """Eigenvalues drawn from a power law: the fit is taken in nearly all cases, its exponent is right."""
    draws = 1 - torch.rand(60, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = power_law(draws ** (-1 / (exponent - 1)))
    assert (~found.exponent.isnan()).double().mean() >= 0.9
    assert float(found.exponent.nanmedian()) == pytest.approx(exponent, rel=0.05)
    assert (found.ks_distance < 0.1).all()


def test_spectra_without_a_power_law_have_no_exponent():
    """Gaussian matrices (Marchenko-Pastur), a flat spectrum, one of two values; an exponential one most of the time."""
    for aspect in (1, 2, 4):
        matrices = gaussian(20, 200, 200 * aspect, dtype=torch.float64)
        assert weight_spectrum(matrices).tail_exponent.isnan().all()
    assert power_law(torch.linspace(1, 2, 100)).exponent.isnan()
    assert power_law(torch.tensor([1.0] * 50 + [2.0] * 50)).exponent.isnan()
    exponential = -torch.rand(100, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    assert power_law(exponential).exponent.isnan().double().mean() >= 0.6


def test_a_heavy_tailed_weight():
    draws = 1 - torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = (draws ** (-1 / 1.5)).sqrt().sort(descending=True).values
    found = weight_spectrum(from_singular_values(sigma, 400, 300), exact=True)
    assert float(found.tail_exponent) == pytest.approx(2.5, rel=0.1) and float(found.tail_distance) < 0.06


def test_degenerate_tails():
    assert power_law(torch.ones(5)).exponent.isnan()  # too few
    assert power_law(torch.zeros(50)).exponent.isnan()
    assert power_law(torch.full((50,), math.nan)).exponent.isnan()
