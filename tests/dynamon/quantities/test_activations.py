"""Statistics of outputs against float64, and the flat parts of activation functions against their derivatives."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dynamon.quantities.activations import (
    FLAT,
    entry_statistics,
    flat_part,
    flat_units,
    join_statistics,
    layer_states,
    measurable,
    unscaled_sums,
)

SMOOTH = sorted(set(FLAT) - {"leaky_relu", "prelu"})


def oracle(values: torch.Tensor) -> list[float]:
    entries = values.double().numpy().ravel()
    top = np.abs(entries).max()
    parts = entries / (top or 1.0)
    return [top, np.sum(parts**2), np.sum(parts**4), np.count_nonzero(entries)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_statistics_are_sums_over_the_entries(dtype, scale) -> None:
    values = (scale * torch.randn(64, 1031, generator=torch.Generator().manual_seed(0))).relu().to(dtype)
    found = entry_statistics(values)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.numpy(), oracle(values), rtol=1e-5)


def test_statistics_of_many_entries_and_of_views() -> None:
    values = torch.randn(4_000_000, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(entry_statistics(values).numpy(), oracle(values), rtol=1e-6)
    view = values[:120_000].view(200, 600).t()[::2]
    np.testing.assert_allclose(entry_statistics(view).numpy(), oracle(view), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e30, 1e37])
def test_kurtosis_of_any_scale(scale) -> None:
    """Squares of entries of 1e-30 are zero in float32, and those of 1e30 infinite."""
    values = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * scale
    halves = join_statistics([entry_statistics(half) for half in (values[:20], values[20:] / 3)]).double()[None]
    entries = torch.cat([values[:20], values[20:] / 3]).double()
    expected = [entries.square().sum(), entries.pow(4).sum()]
    tolerance = 0.05 if scale < 1e-40 else 1e-5  # such numbers have a few bits only
    np.testing.assert_allclose(unscaled_sums(halves)[0].numpy(), np.array(expected), rtol=tolerance)
    assert float(halves[0, 0]) == float(entries.abs().max()) and float(halves[0, 3]) == torch.count_nonzero(entries)


def test_zeros_alone_have_no_size() -> None:
    assert entry_statistics(torch.zeros(5)).tolist() == [0.0] * 4
    assert unscaled_sums(entry_statistics(torch.zeros(5))[None]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad) -> None:
    assert not torch.isfinite(entry_statistics(torch.tensor([1.0, bad]))[:3]).any()


def test_statistics_leave_their_input_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(5, dtype=dtype, requires_grad=True)
        before = values.detach().clone()
        assert not entry_statistics(values).requires_grad
        assert torch.equal(values.detach(), before)


@pytest.mark.parametrize("name", SMOOTH)
def test_flat_is_where_the_slope_is_a_hundredth_of_the_steepest(name) -> None:
    inputs = torch.linspace(-15, 15, 300_001, dtype=torch.float64, requires_grad=True)
    function = getattr(F, name, None) or getattr(torch, name)
    (slopes,) = torch.autograd.grad(function(inputs).sum(), inputs)
    steep = slopes.abs() > 0.01 * slopes.abs().max()
    low, high = flat_part(name)
    first, last = inputs.detach()[steep][[0, -1]].tolist()
    assert low == pytest.approx(first, abs=2e-3) if np.isfinite(low) else first == -15
    assert high == pytest.approx(last, abs=2e-3) if np.isfinite(high) else last == 15


def test_flat_parts_follow_arguments() -> None:
    assert flat_part("hardtanh", (), {"min_val": -2.0, "max_val": 3.0, "inplace": False}) == (-2.0, 3.0)
    assert flat_part("celu", (2.0,))[0] == pytest.approx(-9.21, abs=0.01)
    assert flat_part("leaky_relu") == (-np.inf, np.inf)


@pytest.mark.parametrize(("shape", "dim"), [((5, 7), -1), ((3, 7, 4, 4), 1), ((3, 4, 7), -1), ((7,), -1)])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (-1.0, 1.0)])
def test_a_unit_is_flat_where_all_of_its_entries_are(shape, dim, bounds) -> None:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    by_unit = inputs.movedim(dim, 0).reshape(7, -1)
    by_unit[2], by_unit[4] = -3.0, 3.0
    inputs = by_unit.reshape(7, *[n for i, n in enumerate(shape) if i != dim % len(shape)]).movedim(0, dim)
    expected = [all(x <= bounds[0] or x >= bounds[1] for x in row) for row in by_unit.tolist()]
    assert flat_units(inputs, bounds, dim).tolist() == expected
    assert expected[2] and expected[4] == (bounds[1] == 1.0)


def test_the_first_real_tensor_of_an_output_counts() -> None:
    states = torch.randn(2, 3)
    assert measurable((None, torch.arange(3), [states, torch.ones(1)])) is states
    assert measurable({"mask": torch.ones(2, dtype=torch.bool), "last": states}) is states
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for left in (
        torch.ones(()),
        torch.ones(0, 3),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        nested,
    ):
        assert measurable(left) is None
    assert measurable("text") is None and measurable(None) is None


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_states_of_recurrent_layers(kind) -> None:
    module = kind(3, 5, num_layers=2, batch_first=True)
    inputs = torch.randn(4, 7, 3)
    first, second = layer_states(module, module(inputs))
    assert torch.equal(second[0], module(inputs)[0][:, -1])
    below = kind(3, 5, batch_first=True)
    with torch.no_grad():
        for name, p in below.named_parameters():
            p.copy_(module.get_parameter(name))
    torch.testing.assert_close(first[0], below(inputs)[0][:, -1])
    assert layer_states(below, below(inputs)) == () == layer_states(torch.nn.Linear(3, 3), inputs)
