"""The one-pass statistics against a plain loop in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import gradient_stats

SHAPES = [(4, 3), (7,), (), (1, 1), (2, 3, 5), (300, 40)]


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain_loop(gradients, previous):
    """The eight statistics of every tensor, entry by entry, in float64."""
    rows = []
    for g, p in zip(gradients, previous, strict=True):
        g, p = g.double().numpy().ravel(), p.double().numpy().ravel()
        own = [math.fsum(abs(g)), math.fsum(g * g), max(abs(g)), 0]
        rows.append([*own, math.fsum(abs(g - p)), math.fsum((g - p) ** 2), max(abs(g - p)), math.fsum(g * p)])
    return np.array(rows).T


def assert_matches(gradients, previous, rel):
    expected = plain_loop(gradients, previous)
    copies = [g.clone() for g in gradients]
    stored = [p.clone() for p in previous]
    found = gradient_stats(gradients, stored)
    fields = [getattr(found, name) for name in found.__dataclass_fields__]
    assert all(field.shape == (len(gradients),) for field in fields)
    for field, row in zip(fields[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(field.double().numpy(), row, rtol=rel, atol=1e-30)
    # An inner product is as good as the product of the lengths, whatever cancels in it.
    lengths = np.sqrt(expected[1] * [p.double().square().sum().item() for p in previous])
    assert (abs(found.inner.double().numpy() - expected[-1]) <= rel * lengths).all()
    assert all(torch.equal(p, g.to(p.dtype)) for p, g in zip(stored, gradients, strict=True))
    assert all(torch.equal(g, copy) for g, copy in zip(gradients, copies, strict=True))
    alone = gradient_stats(gradients)
    for name in ("l1", "sum_squares", "max_abs", "nonfinite"):
        assert torch.equal(getattr(alone, name), getattr(found, name))
    assert alone.difference_l1 is alone.difference_sum_squares is alone.difference_max_abs is alone.inner is None


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


def test_the_stored_gradient_may_have_another_dtype():
    assert_matches(tensors(0), tensors(1, torch.bfloat16), 2e-5)


def test_mixed_dtypes_are_reported_in_float64():
    gradients = [tensors(0)[0], tensors(1, torch.float64)[1], tensors(2, torch.bfloat16)[2]]
    assert gradient_stats(gradients).l1.dtype == torch.float64
    assert_matches(gradients, [torch.zeros_like(g) for g in gradients], 2e-5)


def test_strided_gradients():
    gradients = [tensors(0)[0].mT, torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    assert_matches(gradients, [torch.randn(3, 4), torch.randn(2, 3, 4, 4)], 2e-5)


def test_gradients_that_carry_a_graph_are_detached():
    gradient = torch.randn(3, requires_grad=True) * 2
    assert not gradient_stats([gradient], [torch.zeros(3)]).difference_l1.requires_grad


def test_nonfinite_entries_are_counted_and_carried():
    gradients = tensors(0)
    gradients[1][2], gradients[1][4], gradients[4][0, 0, 0] = math.nan, math.inf, -math.inf
    previous = [torch.zeros_like(g) for g in gradients]
    found = gradient_stats(gradients, previous)
    assert found.nonfinite.tolist() == [0, 2, 0, 0, 1, 0]
    for name in ("l1", "sum_squares", "max_abs", "difference_l1", "difference_sum_squares", "difference_max_abs"):
        finite = getattr(found, name).isfinite().tolist()
        assert finite == [True, False, True, True, False, True], name
    assert previous[1].isnan().tolist() == [False, False, True, False, False, False, False]


def test_an_empty_list():
    found = gradient_stats([])
    assert found.l1.shape == (0,) and found.inner is None
    assert gradient_stats([], []).inner.shape == (0,)


@pytest.mark.parametrize(
    ("gradients", "previous", "message"),
    [
        ([torch.ones(0)], None, "cannot take an empty tensor"),
        ([torch.ones(2)], [torch.ones(3)], "same shapes in the same order"),
        ([torch.ones(2)], [], "same shapes in the same order"),
        ([], [torch.ones(2)], "same shapes in the same order"),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "same shapes in the same order"),
    ],
)
def test_bad_arguments(gradients, previous, message):
    with pytest.raises(ValueError, match=message):
        gradient_stats(gradients, previous)
