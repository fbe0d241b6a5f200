"""Every kernel on matrices at the edge: the right value, NaN, or a ValueError that says what is wrong; nothing else."""

import functools
import math

import pytest
import torch

from dynamon.kernels import (
    conv_gram_iteration,
    gradient_stats,
    gram_iteration,
    nuclear_norm,
    polar_error,
    polar_factor,
    top_singular,
)

F16, F64 = torch.float16, torch.float64
ONES = torch.ones(3, 4)
FINITE = {
    "zero": torch.zeros(3, 4),
    "zero, fp16": torch.zeros(2, 3, dtype=F16),
    "1x1": torch.tensor([[-3.0]]),
    "1x1, zero": torch.zeros(1, 1),
    "1xn": torch.tensor([[3.0, 0.0, -4.0]]),
    "nx1": torch.tensor([[3.0], [-4.0]]),
    "fp16": torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0]], dtype=F16),
    "fp16 near its end": torch.full((40, 30), 6e4, dtype=F16),
    "fp16 subnormal": torch.full((4, 3), 6e-8, dtype=F16),
    "bf16": torch.full((3, 5), 1e30, dtype=torch.bfloat16),
    "1e-30": 1e-30 * ONES,
    "1e30": 1e30 * ONES,
    "fp64, 1e300": 1e300 * ONES.double(),
    "fp64, 1e-300": 1e-300 * ONES.double(),
}
NONFINITE = {
    "all NaN": math.nan * ONES,
    "all NaN, fp16": math.nan * ONES.half(),
    "all NaN, fp64": math.nan * ONES.double(),
    "all infinite": math.inf * ONES,
    "one NaN": torch.tensor([[1.0, 2.0], [math.nan, 0.0]]),
    "one infinite": torch.tensor([[1.0, 2.0], [0.0, -math.inf]]),
    "one infinite, fp16": torch.tensor([[1.0, 2.0], [0.0, -math.inf]], dtype=F16),
    "1x1 NaN": torch.tensor([[math.nan]]),
    "1x1 infinite": torch.tensor([[math.inf]]),
}
REFUSED = {
    "int64": torch.ones(3, 4, dtype=torch.int64),
    "int8": torch.ones(3, 4, dtype=torch.int8),
    "bool": torch.ones(3, 4, dtype=torch.bool),
}
EMPTY = {
    "0xn": torch.ones(0, 3),
    "mx0": torch.ones(3, 0),
    "0x0": torch.ones(0, 0),
    "0xn, fp16": torch.ones(0, 3, dtype=F16),
    "0xn in a batch": torch.ones(2, 0, 3),
}


def conv(matrix, size):
    return conv_gram_iteration(matrix[..., None, None], size)


BOUNDS = {
    "gram_iteration": gram_iteration,
    "conv_gram_iteration": functools.partial(conv, size=5),
    "conv_gram_iteration, any size": functools.partial(conv, size=None),
}
NUCLEAR = {
    f"nuclear_norm, {method}": functools.partial(nuclear_norm, method=method)
    for method in ("auto", "gram", "polar", "svd")
}
VALUES = {"top_singular": lambda matrix: top_singular(matrix, steps=20)[0], **NUCLEAR}
MATRICES = {**BOUNDS, **VALUES, "polar_factor": polar_factor}  # what takes a matrix and gives NaN for one that has NaN
ALL = {**MATRICES, "gradient_stats": lambda matrix: gradient_stats([matrix], [matrix.clone()])}


def table(**columns):
    def apply(test):
        for argument, values in columns.items():
            test = pytest.mark.parametrize(argument, list(values.values()), ids=list(values))(test)
        return test

    return apply


def singular(matrix):
    """Singular values in float64; LAPACK is given ordinary numbers."""
    scale = float(matrix.double().abs().max()) or 1.0
    return torch.linalg.svdvals(matrix.double() / scale) * scale


@table(bounds=BOUNDS, matrix=FINITE)
def test_bounds_of_what_is_finite(bounds, matrix):
    lower, upper = (float(bound) for bound in bounds(matrix))
    exact = float(singular(matrix)[0])
    assert lower <= exact * (1 + 1e-13) and exact * (1 - 1e-13) <= upper <= 1.01 * exact
    assert lower >= 0.99 * exact


@table(norm=VALUES, matrix=FINITE)
def test_values_of_what_is_finite(norm, matrix):
    found, exact = norm(matrix), singular(matrix)
    assert found.dtype == (F64 if matrix.dtype == F64 else torch.float32) and found.shape == ()
    expected = exact.sum() if norm in NUCLEAR.values() else exact[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=0)


@table(matrix=FINITE)
def test_the_polar_factor_of_what_is_finite(matrix):
    u, s, vh = torch.linalg.svd(matrix.double() / (float(matrix.double().abs().max()) or 1.0), full_matrices=False)
    kept = s > 1e-6
    found = polar_factor(matrix)
    assert found.shape == matrix.shape and found.dtype == (F64 if matrix.dtype == F64 else torch.float32)
    exact = u[:, kept] @ vh[kept]
    assert torch.linalg.matrix_norm(found.double() - exact, 2) <= polar_error(5) + 1e-5


@table(matrix={**FINITE, **NONFINITE, "0-d": torch.tensor(-2.0), "0-d NaN": torch.tensor(math.nan)})
def test_the_gradient_statistics_of_all(matrix):
    previous = torch.zeros_like(matrix)
    found, exact = gradient_stats([matrix], [previous]), matrix.double()
    wanted = torch.finfo(found.l1.dtype)

    def agrees(value, expected):
        expected = torch.where(expected.abs() > wanted.max, math.inf * expected.sign(), expected)
        assert value.dtype == (F64 if matrix.dtype == F64 else torch.float32)
        # A square below the smallest number of the dtype is lost.
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=10 * wanted.tiny, equal_nan=True)

    for name in ("", "difference_"):
        agrees(getattr(found, f"{name}l1")[0], exact.abs().sum())
        agrees(getattr(found, f"{name}sum_squares")[0], exact.square().sum())
    assert found.nonfinite.tolist() == [int((~exact.isfinite()).sum())]
    assert torch.equal(previous.nan_to_num(), matrix.nan_to_num())


@table(kernel=MATRICES, matrix=NONFINITE)
def test_what_is_not_finite_gives_nan(kernel, matrix):
    found = kernel(matrix)
    for part in found if isinstance(found, tuple) else (found,):
        assert part.isnan().all()


@table(kernel=ALL, matrix=REFUSED)
def test_other_dtypes_are_refused_by_name(kernel, matrix):
    with pytest.raises(ValueError, match=f"floating point.*{matrix.dtype}"):
        kernel(matrix)


@table(kernel=ALL, matrix={"int32, empty": torch.ones(0, 3, dtype=torch.int32)})
def test_an_empty_matrix_of_another_dtype_is_refused(kernel, matrix):
    with pytest.raises(ValueError):
        kernel(matrix)


@table(kernel={**BOUNDS, "top_singular": top_singular, "gradient_stats": ALL["gradient_stats"]}, matrix=EMPTY)
def test_nothing_has_no_largest_singular_value(kernel, matrix):
    with pytest.raises(ValueError, match=r"empty|got shape \(.*0.*\)"):
        kernel(matrix)


@table(norm=NUCLEAR, matrix=EMPTY)
def test_nothing_has_a_nuclear_norm_of_zero(norm, matrix):
    found = norm(matrix)
    assert found.shape == matrix.shape[:-2] and not found.any() and found.dtype == torch.float32


@table(matrix=EMPTY)
def test_nothing_has_a_polar_factor_of_its_shape(matrix):
    assert polar_factor(matrix).shape == matrix.shape


@table(
    kernel={**VALUES, "gram_iteration": gram_iteration, "polar_factor": polar_factor},
    matrix={"0-d": torch.tensor(1.0), "1-d": torch.ones(3)},
)
def test_no_matrix_at_all(kernel, matrix):
    with pytest.raises(ValueError, match="needs .*matrices"):
        kernel(matrix)
