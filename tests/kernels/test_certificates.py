"""A thousand random kernels: the exact largest singular value lies between the bounds, and they are close.

Exact is the value of the weight as it is stored: rounding to bfloat16 makes another matrix, no error of a bound.
"""

import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dynamon.kernels import conv_gram_iteration, gram_iteration

CHUNK = 100
DENSE, SMALL, LARGE = 600, 280, 120  # cases; the small and large ones are convolutions
ROUNDING = 1e-13  # of the oracles, which are float64 as the bounds of float64 kernels are; float32 ones get nothing
SCALES = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30, torch.float16: 2}  # largest exponent of ten
DTYPES = list(SCALES)
TIGHT_RANK, TIGHT = 64, 1.04
MEDIAN = 1.1


def chunks(cases):
    return pytest.mark.parametrize("seeds", [range(n, min(n + CHUNK, cases)) for n in range(0, cases, CHUNK)], ids=str)


def gaussian(pick, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(pick.getrandbits(60)), dtype=torch.float64)


def scaled(pick, weight, dtype):
    """The weight with a largest entry of the order of a random power of ten, stored in the dtype."""
    largest = weight.abs().max().clamp_min(1e-300)
    return (weight / largest * 10.0 ** pick.uniform(-SCALES[dtype], SCALES[dtype])).to(dtype)


def assert_encloses(lower, exact, upper, case):
    rounding = ROUNDING if upper.dtype == torch.float64 else 0.0
    lower, upper = float(lower), float(upper)
    assert lower <= exact * (1 + rounding) and exact * (1 - rounding) <= upper, (case, lower, exact, upper)


# ---- dense


def spectrum(pick, rank):
    """Singular values of one of the kinds that bounds find easy or hard."""
    at = torch.arange(1, rank + 1, dtype=torch.float64)
    kinds = {
        "flat": torch.ones(rank, dtype=torch.float64),
        "power law": at ** -pick.uniform(0.1, 2.0),
        "pair": torch.where(at <= 2, 1.0, 0.3),
        "apart": torch.where(at == 1, 1.0, 1e-6),
        "linear": 1 - (at - 1) / (rank + 1),
    }
    return kinds[pick.choice(list(kinds))]


def dense(pick):
    """A matrix and a rank that its large singular values do not exceed."""
    rows, columns = (pick.choice([1, 2, 3, 7, 16, 33, 64, 65, 100, 150]) for _ in range(2))
    rank = pick.randint(1, min(rows, columns))
    kind = pick.choice(["gaussian", "rank deficient", "spectrum", "spectrum", "signs", "sparse", "constant"])
    if kind == "rank deficient":
        return gaussian(pick, rows, rank) @ gaussian(pick, rank, columns), rank
    if kind == "spectrum":
        left, right = (torch.linalg.qr(gaussian(pick, n, rank))[0] for n in (rows, columns))
        return left * spectrum(pick, rank) @ right.mT, rank
    if kind == "constant":
        return torch.ones(rows, columns, dtype=torch.float64), 1
    matrix = gaussian(pick, rows, columns)
    if kind == "signs":
        matrix = matrix.sign()
    elif kind == "sparse":
        matrix = matrix * (matrix > 1.5)
    return matrix, min(rows, columns)


@chunks(DENSE)
def test_dense(seeds):
    tight = 0
    for seed in seeds:
        pick = random.Random(seed)
        dtype = pick.choice(DTYPES)
        matrix, rank = dense(pick)
        weight = scaled(pick, matrix, dtype)
        lower, upper = gram_iteration(weight)
        exact = float(torch.linalg.svdvals(weight.double())[0])
        case = (seed, dtype, tuple(weight.shape), rank)
        assert_encloses(lower, exact, upper, case)
        if rank <= TIGHT_RANK:
            tight += 1
            assert upper <= TIGHT * lower, case
    assert tight > 0.7 * len(seeds)


# ---- convolutions


def exact_norm(kernel, size, padding, mode, stride, dilation, groups):
    """Of the matrix whose rows are the images of the unit inputs, by the smaller of its Gram matrices."""
    channels = kernel.shape[1] * groups
    count = channels * math.prod(size)
    inputs = torch.eye(count, dtype=torch.float64).view(count, channels, *size)
    if mode == "circular":
        for axis, (n, p) in enumerate(zip(size, padding, strict=True), start=2):
            inputs = inputs.index_select(axis, torch.arange(-p, n + p) % n)
        padding = 0
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    matrix = convolution(inputs, kernel.double(), None, stride, padding, dilation, groups).reshape(count, -1)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


def convolution_kernel(pick, groups, taps, channels):
    shape = [groups * pick.randint(1, channels), pick.randint(1, channels), *taps]
    kernel = gaussian(pick, *shape)
    kind = pick.choice(["gaussian", "gaussian", "rank deficient", "signs", "sparse", "constant"])
    if kind == "rank deficient":
        return kernel[:1] * gaussian(pick, shape[0], *[1] * (kernel.ndim - 1))
    if kind == "signs":
        return kernel.sign()
    if kind == "sparse":
        return kernel * (kernel > 0.5)
    return torch.ones_like(kernel) if kind == "constant" else kernel


def convolution(pick, large):
    """Kernel and arguments of a convolution whose padding and kernel fit its input."""
    dimensions = 2 if large else pick.choice([1, 2, 2, 2, 3])
    sizes = {1: [4, 5, 9, 16, 30], 2: [3, 4, 5, 7, 8], 3: [3, 4]}[dimensions]
    size = [pick.choice([16, 17, 18]) if large else pick.choice(sizes) for _ in range(dimensions)]
    dilation = [pick.choice([1, 1, 1, 2]) for _ in size]
    allowed = [[k for k in (1, 2, 3, 3, 4, 5) if d * (k - 1) < n] for n, d in zip(size, dilation, strict=True)]
    taps = [pick.choice(fit) for fit in allowed]
    groups = pick.choice([1, 1, 2])
    kernel = convolution_kernel(pick, groups, taps, 2 if large or groups == 2 else 3)
    mode = pick.choice(["zeros", "zeros", "zeros", "circular"])
    stride = [pick.choice([1, 1, 1, 2, 3]) for _ in size]
    return kernel, size, [pick.choice([0, 1, 2]) for _ in size], mode, stride, dilation, groups


def check_convolution(seed, large):
    pick = random.Random(seed)
    dtype = pick.choice(DTYPES)
    kernel, size, padding, mode, stride, dilation, groups = convolution(pick, large)
    kernel = scaled(pick, kernel, dtype)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    lower, upper = conv_gram_iteration(kernel, size, padding=padding, padding_mode=mode, **options)
    exact = exact_norm(kernel, size, padding, mode, stride, dilation, groups)
    case = (seed, dtype, tuple(kernel.shape), size, padding, mode, options)
    assert_encloses(lower, exact, upper, case)
    if mode == "zeros":  # the supremum over all sizes bounds this one
        assert_encloses(0.0, exact, conv_gram_iteration(kernel, **options)[1], case)
    return float(upper / lower) if exact else 1.0


@chunks(SMALL)
def test_convolutions(seeds):
    for seed in seeds:
        check_convolution(10_000 + seed, large=False)


def test_convolutions_on_16_x_16_and_more_are_close_too():
    ratios = [check_convolution(20_000 + seed, large=True) for seed in range(LARGE)]
    assert np.median(ratios) <= MEDIAN
