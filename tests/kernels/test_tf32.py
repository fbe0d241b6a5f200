"""Bounds hold where products of float32 are taken in TensorFloat-32, and others say by how much they are off."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dynamon.kernels import conv_gram_iteration, gram_iteration, nuclear_norm, polar_factor, precision, top_singular
from dynamon.spectra import weight_spectrum
from tests.rounding import TensorFloat32

CASES, CONVOLUTIONS = 200, 60
KINDS = ("gaussian", "apart", "flat", "constant", "signs", "near", "sparse")
BOTH = pytest.mark.parametrize("truncates", [False, True], ids=["to nearest", "cut off"])


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(precision, "_of_setting", lambda device, kind: 2.0**-10)


def case(seed):
    """A float32 matrix of a kind whose largest singular value products in few bits move far, or by chance."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def gaussian(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, columns = (pick.choice([1, 2, 7, 33, 64, 100, 150]) for _ in range(2))
    matrix, kind = gaussian(rows, columns), pick.choice(KINDS)
    if kind == "apart":
        matrix = 0.1 * matrix + 10 * torch.outer(gaussian(rows), gaussian(columns))
    elif kind == "flat":
        tall = torch.linalg.qr(gaussian(max(rows, columns), min(rows, columns)))[0]
        matrix = tall if rows >= columns else tall.mT
    elif kind in ("constant", "near"):  # all entries lose the same share: the worst there is
        matrix = torch.full_like(matrix, 1 + 2.0**-10 - 2.0**-20) + (1e-3 * matrix if kind == "near" else 0)
    elif kind == "signs":
        matrix = matrix.sign() * 1.99951
    elif kind == "sparse":
        matrix = matrix * (matrix > 1.5)
    return (matrix * 10.0 ** pick.uniform(-20, 20)).float()


def largest(matrix):
    return float(torch.linalg.svdvals(matrix.double())[..., 0])


@BOTH
def test_bounds_of_matrices_hold(tensor_cores, truncates):
    for seed in range(CASES):
        matrix = case(seed)
        with TensorFloat32(truncates):
            lower, upper = map(float, gram_iteration(matrix))
            below = float(top_singular(matrix, steps=20)[0])
            spectrum = weight_spectrum(matrix)
        exact = largest(matrix)
        assert lower <= exact <= upper, (seed, lower / exact - 1, upper / exact - 1)
        assert below <= exact, (seed, below / exact - 1)
        assert float(spectrum.sigma_lower) <= exact <= float(spectrum.sigma_upper), seed
        assert upper <= lower * 1.05 * min(matrix.shape) ** (1 / 128), seed


@BOTH
def test_bounds_of_convolutions_hold(tensor_cores, truncates):
    for seed in range(CONVOLUTIONS):
        pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        shape = pick.randint(1, 6), pick.randint(1, 6), 3, 3
        kernel = torch.randn(shape, generator=generator)
        if seed % 3 == 0:
            kernel = torch.full(shape, 1 + 2.0**-10 - 2.0**-20)
        size, padding = pick.choice([5, 8]), pick.choice([0, 1])
        with TensorFloat32(truncates):
            lower, upper = map(float, conv_gram_iteration(kernel, size, padding=padding))
            of_any = float(conv_gram_iteration(kernel, padding=padding)[1])
        inputs = torch.eye(shape[1] * size**2, dtype=torch.float64).view(-1, shape[1], size, size)
        exact = largest(F.conv2d(inputs, kernel.double(), padding=padding).flatten(1))
        assert lower <= exact <= min(upper, of_any), (seed, lower / exact - 1, upper / exact - 1)


def test_without_an_allowance_they_do_not_hold():
    """What is simulated here is what goes wrong."""
    wrong = 0
    for seed in range(CASES):
        matrix = case(seed)
        with TensorFloat32(True):
            lower, upper = map(float, gram_iteration(matrix))
        wrong += not lower <= largest(matrix) <= upper
    assert wrong > 20


@BOTH
@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 2**32))
def test_polar_factors_and_nuclear_norms_are_within_one_percent(truncates, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(90, random.Random(seed).choice([30, 60, 90]), generator=generator)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_of_setting", lambda device, kind: 2.0**-10)
        with TensorFloat32(truncates):
            found, nuclear = polar_factor(matrix, 8), nuclear_norm(matrix, "polar")
    large = s > 0.05 * (s**4).sum() ** 0.25
    assert ((u.mT @ found.double() @ vh.mT).diagonal()[large] - 1).abs().max() <= 0.01
    assert float(nuclear) == pytest.approx(float(s.sum()), rel=0.01)


def test_the_settings_that_count():
    matrix, kept = torch.ones(2, 2), torch.backends.mkldnn.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", 2.0**-10), ("bf16", 2.0**-8), ("ieee", 0.0)):
            torch.backends.mkldnn.matmul.fp32_precision = setting
            assert precision.product_rounding(matrix) == expected
            assert precision.product_rounding(matrix.double()) == 0
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = kept


def test_autocast_is_off_inside():
    """A bound on the weight of a layer may be asked for where the layer is used."""
    for seed in range(20):
        matrix = case(seed)
        with torch.autocast("cpu", torch.bfloat16):
            lower, upper = map(float, gram_iteration(matrix))
            below, factor = float(top_singular(matrix)[0]), polar_factor(matrix)
        assert lower <= largest(matrix) <= upper and below <= largest(matrix) * (1 + 1e-6), seed
        assert torch.equal(factor, polar_factor(matrix))
