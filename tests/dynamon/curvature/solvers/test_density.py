"""Stochastic Lanczos quadrature against spectra that are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.curvature import Diagonal, HessianOperator, spectral_density, trace
from dynamon.curvature.solvers.lanczos import random_start
from tests.models import dense_hessian, mlp, samples

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semicircle(n, radius=1.0):
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    mass = (1 - x.square()).sqrt().cumsum(0)
    return radius * x[torch.searchsorted(mass / mass[-1], (torch.arange(n, dtype=torch.float64) + 0.5) / n)]


@PROPERTY
@given(st.integers(1, 50), st.integers(1, 5), st.integers(0, 2**31))
def test_exact_where_there_are_as_many_steps_as_dimensions(n, num_vectors, seed):
    """Every node is an eigenvalue, and the weights of a start are its squared parts along the eigenvectors."""
    matrix = gaussian(n, n, seed=seed)
    matrix = matrix + matrix.mT
    truth = torch.linalg.eigvalsh(matrix).flip(0).numpy()
    found = spectral_density(matrix, steps=80, num_vectors=num_vectors, seed=seed % 1000)
    scale = np.abs(truth).max()
    assert found.nodes.shape == found.weights.shape == (num_vectors, n) and found.matvecs == n * num_vectors
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        np.testing.assert_allclose(nodes, truth, atol=1e-9 * scale)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 80])
def test_moments_of_every_start_are_those_of_its_vector(steps):
    """Gauss quadrature with m nodes is exact to degree 2m - 1: ``sum tau^2 theta^p = q.A^p q``."""
    values = semicircle(300)
    found = spectral_density(Diagonal(values), steps=steps, num_vectors=3, seed=5)
    for run in range(3):
        q = random_start(Diagonal(values), None, 5 + run)
        for power in range(min(2 * steps, 8)):
            moment = float((values**power * q**2).sum())
            assert (found.weights[run] * found.nodes[run] ** power).sum() == pytest.approx(moment, abs=1e-10)


def test_the_mean_is_the_trace_over_n():
    values = torch.cat([torch.tensor([30.0, 20.0]), semicircle(998) + 0.5])
    found = spectral_density(Diagonal(values), steps=40, num_vectors=200)
    spread = float(values.std()) * math.sqrt(2 / (1000 * 200))
    assert found.mean == pytest.approx(float(values.mean()), abs=4 * spread)
    assert abs(found.mean - float(values.mean())) > 0


def test_the_mean_of_a_network():
    inputs, labels = samples(20, 5, dtype=torch.float64)
    model = mlp(5, 7, 3).double()
    loss = lambda model: torch.nn.functional.cross_entropy(model(inputs), labels)  # noqa: E731
    truth = dense_hessian(model, loss)
    operator = HessianOperator(lambda: loss(model), list(model.parameters()))
    found = spectral_density(operator, steps=3, num_vectors=150)
    spread = math.sqrt(2 * float(truth.square().sum()) / 150) / len(truth)
    assert found.mean == pytest.approx(float(truth.trace()) / len(truth), abs=4 * spread)
    assert found.backend == "double_backward" and found.size == len(truth)
    values = trace(operator, num_vectors=150).value / len(truth)
    assert found.mean == pytest.approx(values, abs=6 * spread)


@pytest.mark.parametrize("width", [None, 0.02, 0.2])
def test_the_density_integrates_to_one(width):
    found = spectral_density(Diagonal(torch.cat([torch.tensor([4.0, -2.0]).double(), semicircle(500)])), steps=30)
    points = np.linspace(-8, 10, 20001)
    heights = found.density(points, width)
    assert np.trapezoid(heights, points) == pytest.approx(1, abs=1e-6)
    assert (heights >= 0).all()
    assert np.trapezoid(heights * points, points) == pytest.approx(found.mean, abs=1e-6)


def test_the_density_is_that_of_the_semicircle():
    found = spectral_density(Diagonal(semicircle(3000)), steps=60, num_vectors=8)
    points = np.linspace(-0.8, 0.8, 33)
    expected = 2 / np.pi * np.sqrt(1 - points**2)
    np.testing.assert_allclose(found.density(points, 0.08), expected, atol=0.08)
    for threshold in (-0.5, 0.0, 0.3):
        above = float((semicircle(3000) > threshold).double().mean())
        assert found.share_above(threshold) == pytest.approx(above, abs=0.03)
    assert found.share_above(2.0) == 0 and found.share_above(-2.0) == pytest.approx(1)


SPIKES = {
    "none": [],
    "one": [2.0],
    "far": [100.0],
    "three": [5.0, 3.0, 2.0],
    "ten": torch.linspace(2, 11, 10).tolist(),
    "a pair": [3.0, 2.9],
}


@pytest.mark.parametrize("spikes", SPIKES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spikes_over_a_bulk_are_counted(spikes, seed, dtype):
    above = sorted(SPIKES[spikes], reverse=True)
    values = torch.cat([torch.tensor(above, dtype=torch.float64), semicircle(2000)]).to(dtype)
    found = spectral_density(Diagonal(values), steps=60, seed=10 * seed)
    np.testing.assert_allclose(found.outliers, above, rtol=1e-3)
    assert found.bulk_edge == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("n", [30, 60, 100, 150])
def test_a_small_spectrum_is_not_all_outliers(n):
    """Every eigenvalue is resolved, and an even bulk is a bulk all the same: it does not stand apart from itself."""
    bulk = torch.linspace(0, 1, n, dtype=torch.float64)
    found = spectral_density(Diagonal(torch.cat([torch.tensor([5.0, 3.0]).double(), bulk])), steps=80)
    np.testing.assert_allclose(found.outliers, [5, 3], rtol=1e-6)
    assert len(spectral_density(Diagonal(bulk), steps=80).outliers) == 0


def test_spikes_over_a_bulk_of_one_point():
    """A low-rank matrix: the bulk is zero and the starts end early."""
    values = torch.zeros(400, dtype=torch.float64)
    values[:3] = torch.tensor([7.0, 5.0, 3.0])
    found = spectral_density(Diagonal(values), steps=30)
    np.testing.assert_allclose(found.outliers, [7, 5, 3], rtol=1e-9)
    assert found.bulk_edge == pytest.approx(0, abs=1e-9)
    assert found.weights.sum(1) == pytest.approx(1)
    assert found.share_above(1.0) == pytest.approx(3 / 400, abs=0.01)


def test_a_multiple_of_the_identity():
    found = spectral_density(2.5 * torch.eye(30, dtype=torch.float64), steps=10)
    assert found.mean == pytest.approx(2.5) and found.bulk_edge == pytest.approx(2.5) and len(found.outliers) == 0
    assert np.isfinite(found.density(np.array([2.5]))).all()


def test_it_is_seeded_and_leaves_global_streams():
    state, operator = torch.get_rng_state(), Diagonal(semicircle(200))
    one, two, other = (spectral_density(operator, steps=10, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.nodes, two.nodes) and not np.array_equal(one.nodes, other.nodes)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    for arguments in ({"steps": 0}, {"num_vectors": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be at least 1, got 0"):
            spectral_density(torch.eye(3), **arguments)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        spectral_density(Diagonal(torch.tensor([1.0, math.nan])))
