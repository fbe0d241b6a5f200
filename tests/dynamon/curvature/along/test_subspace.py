"""Shares and overlaps of subspaces that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamon.curvature import Diagonal, top_eigenvalues
from dynamon.curvature.along.subspace import eigenspace_overlap, eigenspace_share

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def orthonormal(n, k, seed):
    drawn = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


@PROPERTY
@given(st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_share_of_coordinates(n, seed, data):
    k = data.draw(st.integers(1, n))
    d = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = float(d[:k].square().sum() / d.square().sum())
    vectors = torch.eye(n, dtype=torch.float64)[:, :k]
    assert eigenspace_share(vectors, d) == pytest.approx(expected)
    rotation = orthonormal(n, n, seed + 1)
    assert eigenspace_share(rotation @ vectors, rotation @ d) == pytest.approx(expected)
    assert eigenspace_share(vectors, -1e-6 * d) == pytest.approx(expected)


@PROPERTY
@given(st.integers(2, 30), st.integers(0, 2**31), st.data())
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(n, seed, data):
    k, m = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    one, other = orthonormal(n, k, seed), orthonormal(n, m, seed + 1)
    cosines = torch.linalg.svdvals(one.mT @ other)
    expected = float(cosines.square().mean())
    assert eigenspace_overlap(one, other) == pytest.approx(expected)
    assert eigenspace_overlap(other, one) == pytest.approx(expected)
    turned = one @ orthonormal(k, k, seed + 2)
    assert eigenspace_overlap(turned, other) == pytest.approx(expected)
    assert eigenspace_overlap(one, turned) == pytest.approx(1)


def test_limits():
    eye = torch.eye(5)
    assert eigenspace_share(eye[:, :2], eye[0]) == 1 and eigenspace_share(eye[:, :2], eye[4]) == 0
    assert math.isnan(eigenspace_share(eye[:, :2], torch.zeros(5)))
    assert eigenspace_overlap(eye[:, :2], eye[:, 2:]) == 0
    assert eigenspace_overlap(eye[:, :1], eye[:, :3]) == eigenspace_overlap(eye[:, :3], eye[:, :1]) == 1
    assert eigenspace_share(eye[:, :2], torch.ones(5).double()) == pytest.approx(0.4)
    assert eigenspace_overlap(eye[:, :2], eye.double()[:, 1:3]) == pytest.approx(0.5)


def test_random_subspaces_have_little_in_common():
    shares = [eigenspace_overlap(orthonormal(200, 3, seed), orthonormal(200, 5, seed + 1000)) for seed in range(100)]
    assert sum(shares) / 100 == pytest.approx(5 / 200, rel=0.2)


def test_with_the_vectors_of_the_solver():
    values = torch.tensor([5.0, 4.0, 3.0, *torch.linspace(1, 0, 50).tolist()], dtype=torch.float64)
    found = top_eigenvalues(Diagonal(values), 2, tol=1e-6, max_matvecs=100)
    direction = torch.zeros(53, dtype=torch.float64)
    direction[[0, 1, 2, 10]] = torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    assert eigenspace_share(found.vectors[:, :2], direction) == pytest.approx(5 / 15, abs=1e-4)
