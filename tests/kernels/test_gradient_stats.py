"""The one-pass statistics against a plain loop in float64."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.kernels import gradient_stats

SHAPES = [(4, 3), (7,), (), (1, 1), (2, 3, 5), (300, 40)]
OWN = ("l1", "sum_squares", "nonfinite")
FIELDS = (*OWN, "difference_l1", "difference_sum_squares", "inner")


def tensors(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def nonfinite(values):
    return int((~np.isfinite(values)).sum())


def plain_loop(gradients, previous):
    """The statistics of every tensor, entry by entry, in float64."""
    rows = []
    for g, p in zip(gradients, previous, strict=True):
        g, p = g.double().numpy().ravel(), p.double().numpy().ravel()
        own = [math.fsum(abs(g)), math.fsum(g * g), nonfinite(g)]
        change = [math.fsum(abs(g - p)), math.fsum((g - p) ** 2)]
        rows.append([*own, *change, math.fsum(g * p)])
    return np.array(rows).T


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
    assert all(getattr(alone, name) is None for name in FIELDS[3:])


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
    gradient_stats([first[2]], [room[::2, ::2]])
    assert torch.equal(room[::2, ::2], first[2]) and (room == 7).sum() == 3 * 30 * 40


def test_gradients_that_carry_a_graph_are_detached():
    gradient = torch.randn(3, requires_grad=True) * 2
    assert not gradient_stats([gradient], [torch.zeros(3)]).difference_l1.requires_grad


def test_nonfinite_entries_are_counted_and_carried():
    gradients = tensors(0)
    gradients[1][2], gradients[1][4], gradients[4][0, 0, 0] = math.nan, math.inf, -math.inf
    previous = [torch.zeros_like(g) for g in gradients]
    found = gradient_stats(gradients, previous)
    assert found.nonfinite.tolist() == [0, 2, 0, 0, 1, 0]
    for name in ("l1", "sum_squares", "difference_l1", "difference_sum_squares"):
        finite = getattr(found, name).isfinite().tolist()
        assert finite == [True, False, True, True, False, True], name
    assert previous[1].isnan().tolist() == [False, False, True, False, False, False, False]


def test_the_difference_lacks_what_either_gradient_lacks():
    gradients, stored = torch.zeros(6, 3), torch.zeros(6, 3)
    gradients[:3, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    stored[1:4, 0] = torch.tensor([math.inf, math.inf, math.nan])  # one infinity twice, one of either sign
    gradients[4, 1], stored[4, 1] = 3e38, -3e38  # too far apart for float32
    found = gradient_stats(list(gradients), list(stored))
    assert found.nonfinite.tolist() == [1, 1, 1, 0, 0, 0]
    assert found.difference_l1.isfinite().tolist() == [False] * 5 + [True]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is done where the host must not ask for a number."""
    for module in (importlib.import_module(f"dynamon.kernels.{name}") for name in ("gradient_stats", "lengths")):
        monkeypatch.setattr(module, "reads_are_free", lambda device: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_in_few_calls_as_on_a_gpu(dtype, as_on_a_gpu):
    rel = 1e-12 if dtype == torch.float64 else 2e-5
    assert_matches(tensors(0, dtype), tensors(1, dtype), rel)
    for stored in (torch.bfloat16, torch.float64):
        assert_matches(tensors(0, dtype), tensors(1, stored), rel)
    test_nonfinite_entries_are_counted_and_carried()
    test_the_difference_lacks_what_either_gradient_lacks()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-22, 1e-12, 1.0, 1e15, 1e22, 1e37])
def test_the_whole_range_of_float32_as_on_a_gpu(scale, as_on_a_gpu):
    gradients, previous = ([t * scale for t in tensors(seed)] for seed in (0, 1))
    expected = gradient_stats([g.double() for g in gradients], [p.double() for p in previous])
    found = gradient_stats(gradients, previous, torch.float64)
    for name in FIELDS[:-1]:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)
    lengths = (expected.sum_squares * gradient_stats([t.double() for t in tensors(1)]).sum_squares).sqrt() * scale
    assert ((found.inner - expected.inner).abs() <= 1e-6 * lengths).all()


def test_large_lists_are_taken_in_groups(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(importlib.import_module("dynamon.kernels.gradient_stats"), "_BYTES", 100)
    assert_matches(tensors(0), tensors(1), 2e-5)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [2.0**-16, 0.375])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_is_that_of_the_gradients(scale, make, stored, gpu, request):
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    gradients, previous = tensors(0), [p.to(stored) * scale for p in tensors(1)]
    copies, kept = [g.clone() for g in gradients], [p.clone() for p in previous]
    expected = gradient_stats([g * scale for g in gradients], previous, torch.float64)
    found = gradient_stats(gradients, kept, torch.float64, scale=make(scale))
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip((*gradients, *kept), (*copies, *previous), strict=True))
    alone = gradient_stats(gradients, None, torch.float64, scale=make(scale))
    for name in OWN:
        torch.testing.assert_close(getattr(alone, name), getattr(expected, name), rtol=2e-6, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_off_the_cpu_no_value_is_asked_for(stored):
    """Tensors without values raise where the host would wait for one."""
    gradients = [g.to("meta") for g in tensors(0)]
    scale = torch.ones(1, device="meta")
    found = gradient_stats(gradients, [g.to(stored) for g in gradients], scale=scale)
    assert all(getattr(found, name).is_meta for name in FIELDS)


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
        ([torch.ones(2, dtype=torch.int64)], None, "floating point tensors, got torch.int64"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int32)], "floating point tensors, got torch.int32"),
    ],
)
def test_bad_arguments(gradients, previous, message):
    with pytest.raises(ValueError, match=message):
        gradient_stats(gradients, previous)
