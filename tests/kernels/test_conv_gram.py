"""Bounds on convolutions against the singular values of the explicit operator matrix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dynamon.kernels import conv_gram_iteration
from tests.peak import Peak

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def explicit(kernel, size, padding, mode, stride, dilation, groups) -> float:
    """The largest singular value of the matrix whose columns are the images of the unit inputs, in float64."""
    kernel = kernel.double()
    channels = kernel.shape[1] * groups
    count = channels * math.prod(size)
    inputs = torch.eye(count, dtype=torch.float64).view(count, channels, *size)
    if mode == "circular":
        inputs = F.pad(inputs, [p for p in reversed(padding) for _ in range(2)], mode="circular")
        padding = 0
    outputs = CONV[kernel.ndim - 2](inputs, kernel, None, stride, padding, dilation, groups)
    return float(torch.linalg.svdvals(outputs.reshape(count, -1))[0])


@st.composite
def convolutions(draw):
    dimensions = draw(st.sampled_from([1, 2, 2, 3]))
    each = lambda *values: [draw(st.sampled_from(values)) for _ in range(dimensions)]  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 2]))
    taps = each(1, 2, 3, 4) if dimensions < 3 else each(1, 2, 3)
    shape = [groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)), *taps]
    size = each(4, 5, 7, 11) if dimensions == 1 else each(3, 5, 6, 8) if dimensions == 2 else each(3, 4)
    kernel = torch.randn(
        shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))), dtype=torch.float64
    )
    kind = draw(st.sampled_from(["gaussian", "gaussian", "signs", "rank one", "sparse"]))
    if kind == "signs":
        kernel = kernel.sign()
    elif kind == "rank one":
        kernel = kernel[:1] * torch.linspace(1, 2, shape[0], dtype=torch.float64).view(-1, *[1] * (dimensions + 1))
    elif kind == "sparse":
        kernel = kernel * (kernel > 0.5)
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    return kernel, size, each(0, 1, 2, 3), mode, each(1, 1, 2, 3), each(1, 1, 2), groups


@settings(deadline=None, max_examples=300, derandomize=True)
@given(convolutions(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(-30, 30))
def test_bounds_hold(case, dtype, exponent):
    """Padding, stride, dilation, groups, rank-deficient and sparse kernels, scales from 1e-30 to 1e30, all dtypes."""
    kernel, size, padding, mode, stride, dilation, groups = case
    kernel = (kernel * 10.0**exponent).to(dtype)
    settings = {"stride": stride, "dilation": dilation, "groups": groups}
    try:
        lower, upper = conv_gram_iteration(kernel, size, padding=padding, padding_mode=mode, **settings)
    except ValueError as error:
        assert "smaller than the kernel" in str(error) or "larger than the input" in str(error)
        return
    truth = explicit(kernel, size, padding, mode, stride, dilation, groups)
    assert lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= upper
    assert lower.dtype == upper.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if mode == "zeros":
        assert truth * (1 - 1e-12) <= conv_gram_iteration(kernel, **settings)[1]  # the supremum over sizes


@pytest.mark.parametrize("channels", [(8, 8), (4, 12), (16, 3)])
def test_they_are_tight_on_inputs_of_16_and_more(channels):
    ratios, errors = [], []
    for seed in range(12):
        kernel = torch.randn(*channels, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        lower, upper = conv_gram_iteration(kernel, 16, padding=1)
        ratios.append(float(upper / lower))
    truth = explicit(kernel, [16, 16], [1, 1], "zeros", 1, 1, 1) if math.prod(channels) < 65 else None
    if truth is not None:
        errors = [float(lower) / truth, float(upper) / truth]
        assert 0.95 <= errors[0] <= 1 <= errors[1] <= 1.06
    assert np.median(ratios) <= 1.1


def test_the_circular_norm_of_the_same_size_is_not_a_bound():
    """The second difference on three positions; the circle of four is a bound, that of three is not."""
    row = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    kernel = (row[:, None] * row)[None, None]
    truth = explicit(kernel, [3, 3], [1, 1], "zeros", 1, 1, 1)
    assert truth == pytest.approx(11.657, abs=1e-3)
    assert conv_gram_iteration(kernel, 3, padding=1, padding_mode="circular")[1] == pytest.approx(9, rel=1e-3)
    assert conv_gram_iteration(kernel, 3, padding=1)[1] == pytest.approx(16, rel=1e-3)
    lower, upper = conv_gram_iteration(kernel)
    assert 15.9 <= lower <= 16 <= upper <= 16.4


def test_the_supremum_is_approached_by_large_inputs():
    kernel = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper = conv_gram_iteration(kernel)
    large = explicit(kernel, [300], [1], "zeros", 1, 1, 1)
    assert large <= upper <= 1.01 * large / 0.995 and large == pytest.approx(float(lower), rel=2e-3)


@pytest.mark.parametrize("arguments", [{"input_size": 5, "padding": 1}, {}, {"input_size": 6, "stride": 2}])
def test_differentiable(arguments):
    kernel = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: conv_gram_iteration(k, **arguments)[1], (kernel,))


def test_special_kernels():
    for value, expected in ((0.0, 0.0), (math.nan, math.nan), (math.inf, math.nan)):
        for bound in conv_gram_iteration(torch.full((2, 2, 3, 3), value), 6, padding=1):
            assert bound.item() == expected or math.isnan(expected) and math.isnan(bound)
    lower, upper = conv_gram_iteration(torch.full((1, 1, 1), 3.0), 5)
    assert lower <= 3 <= upper <= 3.001


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 2), {}, "needs a floating point kernel"),
        ((2, 2, 0), {}, "needs a floating point kernel"),
        ((2, 2, 3), {"input_size": 2}, "smaller than the kernel"),
        ((2, 2, 3), {"padding_mode": "reflect"}, "'zeros' or 'circular', got 'reflect'"),
        ((3, 2, 3), {"groups": 2}, "groups must divide the 3 outputs"),
        ((2, 2, 3), {"stride": 0}, "stride must be a whole number of 1 or more"),
        ((2, 2, 3, 3), {"input_size": (4, 4, 4)}, "or 2 of them"),
        ((2, 2, 3), {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_arguments(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        conv_gram_iteration(torch.ones(shape), **arguments)
    with pytest.raises(ValueError, match="floating point"):
        conv_gram_iteration(torch.ones(2, 2, 3, dtype=torch.long))


@pytest.mark.parametrize(("size", "stride", "groups"), [(None, 1, 1), (None, 2, 1), (9, 2, 2), ((7, 12), 1, 1)])
def test_frequencies_taken_some_at_a_time_are_the_same(monkeypatch, size, stride, groups):
    kernel = torch.randn(4, 3, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = {"padding": 1, "stride": stride, "groups": groups}
    at_once = conv_gram_iteration(kernel, size, **arguments)
    monkeypatch.setattr("dynamon.kernels.conv_gram._CHUNK", 60)
    torch.testing.assert_close(conv_gram_iteration(kernel, size, **arguments), at_once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_kernel_is_not_transformed_as_a_whole(monkeypatch, stride):
    """On a grid of 32 x 32 all frequencies at once would be 480 kernels, with the products of Gram iteration 1,500."""
    monkeypatch.setattr("dynamon.kernels.conv_gram._CHUNK", 2**12)
    kernel = torch.randn(64, 64, 3, 3)
    with Peak([kernel]) as peak:
        conv_gram_iteration(kernel, stride=stride, steps=2)
    assert peak.most <= 10 * kernel.nbytes
