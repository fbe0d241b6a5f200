"""The one-pass statistics against a plain loop in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import gradient_stats

SHAPES = [(4, 3), (7,), (), (1, 1), (2, 3, 5), (300, 40)]
OWN = ("l1", "sum_squares", "max_abs", "nonfinite")
FIELDS = (*OWN, *(f"difference_{name}" for name in OWN), "inner")


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def nonfinite(values):
    return int((~np.isfinite(values)).sum())


def plain_loop(gradients, previous):
    """The nine statistics of every tensor, entry by entry, in float64."""
    rows = []
    for g, p in zip(gradients, previous, strict=True):
        g, p = g.double().numpy().ravel(), p.double().numpy().ravel()
        own = [math.fsum(abs(g)), math.fsum(g * g), max(abs(g)), nonfinite(g)]
        change = [math.fsum(abs(g - p)), math.fsum((g - p) ** 2), max(abs(g - p)), nonfinite(g - p)]
        rows.append([*own, *change, math.fsum(g * p)])
    return np.array(rows).T


def assert_lines(found, tensors, rel):
    """Sums of squares over the last dimension and over the last but one, in float64 with NumPy."""
    for line, tensor in zip(found, tensors, strict=True):
        for axis, sums in zip((-1, -2), line, strict=True):
            if tensor.ndim < 2:
                assert sums is None
            else:
                with np.errstate(all="ignore"):
                    expected = np.square(tensor.numpy()).sum(axis)
                assert sums.shape == expected.shape
                np.testing.assert_allclose(sums.double().numpy(), expected, rtol=rel, atol=1e-30)


def assert_axes(gradients, previous, rel):
    """With rows and columns: those against NumPy, everything else as without them."""
    stored, kept = [p.clone() for p in previous], [p.clone() for p in previous]
    found, without = gradient_stats(gradients, stored, axes=True), gradient_stats(gradients, kept)
    exact = [g.double() for g in gradients]
    assert_lines(zip(found.row_squares, found.column_squares, strict=True), exact, rel)
    change = [g - p.double() for g, p in zip(exact, previous, strict=True)]
    assert_lines(zip(found.difference_row_squares, found.difference_column_squares, strict=True), change, rel)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(without, name), rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(stored, kept, strict=True))
    alone = gradient_stats(gradients, axes=True)
    assert_lines(zip(alone.row_squares, alone.column_squares, strict=True), exact, rel)
    for stats in (alone, without):
        assert stats.difference_row_squares is stats.difference_column_squares is None
    assert without.row_squares is without.column_squares is None
    expected = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    lines = (*found.row_squares, *found.column_squares, *found.difference_row_squares)
    assert all(sums is None or sums.dtype == expected for sums in lines)


def assert_matches(gradients, previous, rel):
    expected = plain_loop(gradients, previous)
    copies = [g.clone() for g in gradients]
    stored = [p.clone() for p in previous]
    found = gradient_stats(gradients, stored)
    fields = [getattr(found, name) for name in FIELDS]
    assert all(field.shape == (len(gradients),) for field in fields)
    for field, row in zip(fields[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(field.double().numpy(), row, rtol=rel, atol=1e-30)
    # An inner product is as good as the product of the lengths, whatever cancels in it.
    lengths = np.sqrt(expected[1] * [p.double().square().sum().item() for p in previous])
    assert (abs(found.inner.double().numpy() - expected[-1]) <= rel * lengths).all()
    assert all(torch.equal(p, g.to(p.dtype)) for p, g in zip(stored, gradients, strict=True))
    assert all(torch.equal(g, copy) for g, copy in zip(gradients, copies, strict=True))
    alone = gradient_stats(gradients)
    for name in OWN:
        assert torch.equal(getattr(alone, name), getattr(found, name))
    assert all(getattr(alone, name) is None for name in FIELDS[4:])
    assert_axes(gradients, previous, rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_against_a_plain_loop(dtype):
    rel = 1e-12 if dtype == torch.float64 else 2e-5
    assert_matches(tensors(0, dtype), tensors(1, dtype), rel)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.integers(-12, 12),
)
def test_any_shapes_and_scales(shapes, seed, exponent):
    gradients, previous = (tensors(seed + i, torch.float32, shapes) for i in (0, 1))
    assert_matches([g * 10.0**exponent for g in gradients], [p * 10.0**exponent for p in previous], 2e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_stored_gradient_may_have_another_dtype(stored):
    assert_matches(tensors(0), tensors(1, stored), 2e-5)


def test_the_difference_to_a_gradient_stored_in_bfloat16_is_taken_in_float32():
    first, second = tensors(0), [g * (1 + 1e-4) for g in tensors(0)]  # closer than bfloat16 can tell
    stored = [torch.empty_like(g, dtype=torch.bfloat16) for g in first]
    gradient_stats(first, stored)
    kept = [p.clone() for p in stored]
    assert all(torch.equal(p, g.bfloat16()) for p, g in zip(kept, first, strict=True))
    assert_matches(second, kept, 2e-5)
    assert (gradient_stats(second, stored).difference_sum_squares > 0).all()


def test_mixed_dtypes_are_reported_in_float64():
    gradients = [tensors(0)[0], tensors(1, torch.float64)[1], tensors(2, torch.bfloat16)[2]]
    assert gradient_stats(gradients).l1.dtype == torch.float64
    assert_matches(gradients, [torch.zeros_like(g) for g in gradients], 2e-5)


def test_strided_gradients():
    first, second = (tensors(seed, shapes=[(4, 3), (2, 3, 4, 4), (30, 40), (1, 9)]) for seed in (0, 1))
    ways = [
        lambda t: t.mT,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t[::2, 1::3],
        lambda t: t.expand(7, 9),
    ]
    gradients = [way(t) for way, t in zip(ways, first, strict=True)]
    assert_matches(gradients, [way(t).contiguous() for way, t in zip(ways, second, strict=True)], 2e-5)
    storage = [way(t).clone(memory_format=torch.preserve_format) for way, t in zip(ways, second, strict=True)]
    assert_matches([g.contiguous() for g in gradients], storage, 2e-5)
    room = torch.full((60, 80), 7.0)
    gradient_stats([first[2]], [room[::2, ::2]], axes=True)
    assert torch.equal(room[::2, ::2], first[2]) and (room == 7).sum() == 3 * 30 * 40


def test_gradients_that_carry_a_graph_are_detached():
    gradient = torch.randn(3, requires_grad=True) * 2
    assert not gradient_stats([gradient], [torch.zeros(3)]).difference_l1.requires_grad


def test_nonfinite_entries_are_counted_and_carried():
    gradients = tensors(0)
    gradients[1][2], gradients[1][4], gradients[4][0, 0, 0] = math.nan, math.inf, -math.inf
    previous = [torch.zeros_like(g) for g in gradients]
    found = gradient_stats(gradients, previous)
    assert found.nonfinite.tolist() == found.difference_nonfinite.tolist() == [0, 2, 0, 0, 1, 0]
    for name in ("l1", "sum_squares", "max_abs", "difference_l1", "difference_sum_squares", "difference_max_abs"):
        finite = getattr(found, name).isfinite().tolist()
        assert finite == [True, False, True, True, False, True], name
    assert previous[1].isnan().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nonfinite_entries_reach_their_own_row_and_column_only(dtype):
    gradients, previous = tensors(0, dtype), tensors(1, dtype)
    gradients[0][1, 2], gradients[4][0, 0, 0], previous[5][200, 17] = math.nan, -math.inf, math.inf
    assert_axes(gradients, previous, 1e-12 if dtype == torch.float64 else 2e-5)
    found = gradient_stats(gradients, previous, axes=True)
    assert found.row_squares[0].isfinite().tolist() == [True, False, True, True]
    assert found.column_squares[0].isfinite().tolist() == [True, True, False]
    assert found.column_squares[4][0, 0].isinf() and found.row_squares[5].isfinite().all()
    assert found.difference_row_squares[5].isinf().nonzero().tolist() == [[200]]


def test_the_difference_lacks_what_either_gradient_lacks():
    gradient, stored = (torch.zeros(10) for _ in range(2))
    gradient[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    stored[1:5] = torch.tensor([math.inf, math.inf, math.nan, math.inf])  # one infinity twice, one of either sign
    gradient[7], stored[7] = 3e38, -3e38  # too far apart for float32
    found = gradient_stats([gradient, torch.ones(2)], [stored, torch.zeros(2)])
    assert found.nonfinite.tolist() == [3, 0] and found.difference_nonfinite.tolist() == [6, 0]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_off_the_cpu_no_value_is_asked_for(stored):
    """Tensors without values raise where the host would wait for one."""
    gradients = [g.to("meta") for g in tensors(0)]
    found = gradient_stats(gradients, [g.to(stored) for g in gradients], axes=True)
    assert all(getattr(found, name).is_meta for name in FIELDS)


def test_an_empty_list():
    found = gradient_stats([])
    assert found.l1.shape == (0,) and found.inner is found.row_squares is None
    found = gradient_stats([], [])
    assert found.inner.shape == found.difference_nonfinite.shape == (0,) and found.row_squares is None
    found = gradient_stats([], axes=True)
    assert found.row_squares == found.column_squares == () and found.difference_row_squares is None
    assert gradient_stats([], [], axes=True).difference_column_squares == ()


@pytest.mark.parametrize(
    ("gradients", "previous", "message"),
    [
        ([torch.ones(0)], None, "cannot take an empty tensor"),
        ([torch.ones(2)], [torch.ones(3)], "same shapes in the same order"),
        ([torch.ones(2)], [], "same shapes in the same order"),
        ([], [torch.ones(2)], "same shapes in the same order"),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "same shapes in the same order"),
        ([torch.ones(2, dtype=torch.int64)], None, "floating point tensors, got torch.int64"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int32)], "floating point tensors, got torch.int32"),
    ],
)
def test_bad_arguments(gradients, previous, message):
    with pytest.raises(ValueError, match=message):
        gradient_stats(gradients, previous)
