"""Bounds on the largest singular value: they hold, they are tight, and they can be differentiated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import gram_iteration

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
DTYPES = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30, torch.float16: 3}  # largest exponent tried
SIDES = st.integers(1, 40)


def sigma(matrix):
    return torch.linalg.svdvals(matrix.double())[..., 0]


def gaussian(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(values, rows, columns, seed=0):
    """A float32 matrix with the given singular values."""
    u, v = (torch.linalg.qr(gaussian(n, len(values), seed=seed + n, dtype=torch.float64))[0] for n in (rows, columns))
    return (u * torch.tensor(values, dtype=torch.float64) @ v.mT).float()


def assert_encloses(matrix, steps=6):
    lower, upper = gram_iteration(matrix, steps)
    truth = sigma(matrix)
    assert lower.shape == upper.shape == matrix.shape[:-2]
    assert lower.dtype == upper.dtype == (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    assert (lower.double() <= truth).all() and (truth <= upper.double()).all(), (lower, truth, upper)


@st.composite
def matrices(draw):
    """Random matrices of any rank, scale and dtype."""
    rows, columns, rank, seed = draw(SIDES), draw(SIDES), draw(SIDES), draw(st.integers(0, 2**32))
    dtype = draw(st.sampled_from(list(DTYPES)))
    exponent = draw(st.integers(-DTYPES[dtype], DTYPES[dtype]))
    product = gaussian(rows, rank, seed=seed, dtype=torch.float64) @ gaussian(
        rank, columns, seed=seed + 1, dtype=torch.float64
    )
    return (product * 10.0**exponent / product.abs().max()).to(dtype)


@PROPERTY
@given(matrices(), st.integers(1, 10))
def test_bounds_enclose_the_largest_singular_value(matrix, steps):
    assert_encloses(matrix, steps)


@PROPERTY
@given(matrices())
def test_bounds_are_within_four_percent_at_six_steps(matrix):
    lower, upper = gram_iteration(matrix)
    assert (upper <= 1.04 * lower).all()


@pytest.mark.parametrize(
    "matrix",
    [
        gaussian(64, 64),
        gaussian(512, 64),
        gaussian(64, 3000),
        torch.linalg.qr(gaussian(64, 64))[0],
        torch.eye(64, dtype=torch.float64),
        with_spectrum([1.0] * 64, 300, 200),
        with_spectrum([1.0, 0.99] + [0.5] * 62, 300, 200),
        with_spectrum([n**-0.5 for n in range(1, 65)], 300, 200),
    ],
    ids=["square", "tall", "wide", "orthogonal", "identity", "flat", "pair", "power-law"],
)
def test_tight_up_to_rank_64(matrix):
    lower, upper = gram_iteration(matrix, steps=6)
    assert_encloses(matrix)
    assert upper <= 1.04 * lower


@pytest.mark.parametrize("side", [128, 257])
@pytest.mark.parametrize("steps", [1, 6, 12])
def test_large_orthogonal_matrices_are_enclosed(side, steps):
    assert_encloses(torch.linalg.qr(gaussian(side, side, seed=side))[0], steps)


def test_rank_one_is_exact_up_to_the_allowance():
    matrix = torch.outer(gaussian(30, seed=1), gaussian(20, seed=2))
    lower, upper = gram_iteration(matrix, steps=1)
    assert_encloses(matrix, steps=1)
    assert upper / lower - 1 < 1e-5


def test_more_steps_never_loosen_the_upper_bound():
    uppers = [gram_iteration(gaussian(48, 32, dtype=torch.float64), steps)[1] for steps in range(1, 12)]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(uppers, uppers[1:], strict=False))


def test_a_batch_is_the_same_as_its_members():
    batch = gaussian(2, 3, 9, 14, seed=3, dtype=torch.float64)
    assert_encloses(batch)
    singles = [torch.stack(gram_iteration(matrix)) for matrix in batch.flatten(0, 1)]
    assert torch.allclose(torch.stack(gram_iteration(batch)).flatten(1), torch.stack(singles, 1), rtol=1e-12)


def test_the_transpose_has_the_same_bounds():
    matrix = gaussian(11, 29, dtype=torch.float64)
    for one, other in zip(gram_iteration(matrix), gram_iteration(matrix.mT), strict=True):
        assert torch.allclose(one, other, rtol=1e-13)


def test_a_zero_matrix_gives_zero_and_a_finite_gradient():
    matrix = torch.zeros(5, 3, requires_grad=True)
    lower, upper = gram_iteration(matrix)
    assert lower == upper == 0
    (lower + upper).backward()
    assert matrix.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_entries_give_nan_for_their_own_matrix_only(bad):
    batch = gaussian(3, 6, 4)
    batch[1, 2, 2] = bad
    lower, upper = gram_iteration(batch)
    assert lower.isnan().tolist() == upper.isnan().tolist() == [False, True, False]
    assert_encloses(batch[::2])


@pytest.mark.parametrize("which", [0, 1], ids=["lower", "upper"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradcheck(which, shape, steps):
    matrix = gaussian(*shape, seed=7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gram_iteration(w, steps)[which], matrix)


def test_the_gradient_tends_to_that_of_the_largest_singular_value():
    matrix = with_spectrum([3.0, 1.0, 0.5], 6, 4).double().requires_grad_()
    u, _, vh = torch.linalg.svd(matrix.detach())
    for bound in gram_iteration(matrix, steps=10):
        (gradient,) = torch.autograd.grad(bound, matrix, retain_graph=True)
        assert torch.allclose(gradient, torch.outer(u[:, 0], vh[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "steps", "message"),
    [
        (torch.ones(3, 3, dtype=torch.int64), 6, "floating point or complex tensor, got torch.int64"),
        (torch.ones(3), 6, r"matrices \[..., m, n\], got shape \(3,\)"),
        (torch.ones(0, 3), 6, r"got shape \(0, 3\)"),
        (torch.ones(3, 3), 0, "steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(weight, steps, message):
    with pytest.raises(ValueError, match=message):
        gram_iteration(weight, steps)
