"""Warm-started power steps against the singular value decomposition."""

import math

import pytest
import torch

from dynamon.kernels import top_singular


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (5, 8, 8), (2, 3, 1, 7), (4, 6, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_converges_from_nothing(shape, scale):
    matrix = gaussian(*shape) * scale
    value, vector = top_singular(matrix, steps=500)
    torch.testing.assert_close(value, torch.linalg.svdvals(matrix)[..., 0], rtol=1e-6, atol=0)
    assert vector.shape == (*shape[:-2], shape[-1])
    torch.testing.assert_close(vector.norm(dim=-1), torch.ones(shape[:-2], dtype=torch.float64))


def test_two_steps_follow_a_matrix_that_changes_slowly():
    matrix, vector = gaussian(60, 40), None
    _, vector = top_singular(matrix, steps=300)
    for step in range(20):
        matrix = matrix + 0.02 * gaussian(60, 40, seed=step + 1)
        value, vector = top_singular(matrix, vector)
        assert float(value) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-3)


def test_the_value_is_a_lower_bound():
    matrix = gaussian(7, 30, 20).float()
    exact = torch.linalg.svdvals(matrix.double())[..., 0]
    for steps in range(4):
        assert (top_singular(matrix, steps=steps)[0].double() <= exact * (1 + 1e-6)).all()


def test_special_values():
    batch = gaussian(4, 3, 3)
    batch[0], batch[1, 0, 0], batch[2, 0, 0] = 0, math.nan, math.inf
    value, _ = top_singular(batch.float())
    assert value[0] == 0 and not torch.isfinite(value[1:3]).any() and value[3] > 0
    assert top_singular(torch.ones(2, 2).bfloat16())[0].dtype == torch.float32


def test_bad_arguments():
    for bad in (torch.ones(3), torch.ones(2, 2, dtype=torch.long), torch.ones(0, 2)):
        with pytest.raises(ValueError, match="floating point matrices"):
            top_singular(bad)
    with pytest.raises(ValueError, match=r"start must have shape \[2\]"):
        top_singular(torch.ones(3, 2), torch.ones(3))
