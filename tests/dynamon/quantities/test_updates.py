"""Sizes of steps and angles between them, against float64 and a full decomposition."""

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import Layer, describe_layers
from dynamon.norms import update_norm
from dynamon.quantities.updates import cosines, joint_cosine, local_smoothness, primal_norms, wide_lengths
from dynamon.quantities.weights import weight_readings
from tests.launches import Launches, gpt2
from tests.models import cnn, gpt


class Experts(nn.Module):
    """A stack of matrices, and a matrix of the shape of its members."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 6, 4))
        self.single, self.head = nn.Linear(4, 6), nn.Linear(6, 2)


@pytest.mark.parametrize("family", ["sign", "euclidean", "spectral"])
@pytest.mark.parametrize("make", [cnn, gpt, Experts])
def test_primal_norms_are_the_exact_ones(make, family: str) -> None:
    layers = describe_layers(make())
    norms = [update_norm(layer, family) for layer in layers]
    tensors = [torch.randn(layer.parameter.shape, generator=torch.Generator().manual_seed(2)) for layer in layers]
    found = primal_norms(layers, norms, tensors)
    exact = [float(norm.primal(tensor.double()).amax()) for norm, tensor in zip(norms, tensors, strict=True)]
    np.testing.assert_allclose(found, exact, rtol=5e-3)
    assert primal_norms(layers, norms, [torch.zeros_like(t) for t in tensors]).eq(0).all()
    assert primal_norms([], [], []).shape == (0,)


def compare_updates(now, before, earlier) -> np.ndarray:
    """Cosine and lengths of the last two steps of some tensors, as readings of weights have them."""
    layers = [Layer(str(i), "vector", tensor) for i, tensor in enumerate(now)]
    names = [layer.name for layer in layers]
    found = weight_readings(layers, dict(zip(names, before, strict=True)), dict(zip(names, earlier, strict=True)))
    return torch.stack([found.cosine, found.last, found.previous]).numpy()


def compare_steps(last, previous) -> np.ndarray:
    """The same from the steps themselves."""
    apart = [a - b for a, b in zip(last, previous, strict=True)]
    lengths = [wide_lengths(tensors) for tensors in (last, previous, apart)]
    return torch.stack([cosines(*lengths), *lengths[:2]]).numpy()


def test_updates_are_compared_layer_by_layer_and_as_a_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    earlier, first, second = ([torch.randn(n, 3, generator=generator) for n in (4, 9)] for _ in range(3))
    second[1] *= 1e-3
    before = [w + u for w, u in zip(earlier, first, strict=True)]
    now = [w + u for w, u in zip(before, second, strict=True)]
    rows = compare_updates(now, before, earlier)
    for column, (u, v) in enumerate(zip(first, second, strict=True)):
        cosine = float((u.double() * v.double()).sum() / u.double().norm() / v.double().norm())
        np.testing.assert_allclose(rows[:, column], [cosine, float(v.norm()), float(u.norm())], rtol=1e-3)
    u, v = (torch.cat([t.flatten().double() for t in update]) for update in (first, second))
    assert joint_cosine(rows) == pytest.approx(float(u @ v / u.norm() / v.norm()), rel=1e-4)
    unknown = np.concatenate([rows, np.full((3, 1), np.nan)], 1)
    assert joint_cosine(unknown) == joint_cosine(rows)


def test_zero_and_unknown_updates() -> None:
    w, u = torch.ones(3), torch.tensor([1.0, 0.0, 0.0])
    rows = compare_updates([w + u, w + u], [w, w + u], [w - u, w])
    assert rows[0, 0] == 1 and np.isnan(rows[0, 1])  # the second stood still in its last step
    assert joint_cosine(rows) == pytest.approx(2**-0.5)  # (u, 0) against (u, u)
    assert np.isnan(joint_cosine(rows[:, :0])) and np.isnan(joint_cosine(rows[:, 1:]))


@pytest.mark.parametrize("quotient", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.3, 0.999, 1.0])
def test_cosines_of_steps_of_unlike_sizes(quotient: float, cosine: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(500, 2, generator=generator, dtype=torch.float64))[0].T
    w, size = cosine * u + (1 - cosine**2) ** 0.5 * v, 1e-3 * quotient
    last, previous = (size * w).float(), (1e-3 * u).float()
    exact = float((last.double() * previous.double()).sum() / last.double().norm() / previous.double().norm())
    found = compare_steps([last], [previous])
    spread = max(quotient, 1 / quotient)
    assert float(found[0, 0]) == pytest.approx(exact, abs=6e-8 * spread + 2e-7)


def test_what_is_lost_beside_a_step_a_million_times_as_long_is_not_made_up() -> None:
    u, v = torch.tensor([1.0, 0.0]), torch.tensor([1e-6, 1e-6])
    rows = compare_steps([u, u], [v, u])
    assert np.isnan(rows[0]).tolist() == [True, False] and (rows[1:] > 0).all()
    assert joint_cosine(rows) == 1.0 and np.isnan(joint_cosine(rows[:, :1]))


def test_few_calls_for_many_layers() -> None:
    layers = describe_layers(gpt2("meta"))
    for family in ("sign", "euclidean", "spectral"):
        norms = [update_norm(layer, family) for layer in layers]
        tensors = [layer.parameter.detach() for layer in layers]
        primal_norms(layers, norms, tensors)
        with Launches("meta") as launches:
            primal_norms(layers, norms, tensors)
        assert launches.total <= (150 if family == "spectral" else 10), launches


def test_half_precision_is_compared_in_single() -> None:
    before = torch.full((1000,), 100.0, dtype=torch.bfloat16)
    rows = compare_updates([before * 2], [before], [before * 0.5])
    np.testing.assert_allclose(rows[:, 0], [1, 100 * 1000**0.5, 50 * 1000**0.5], rtol=1e-2)


def test_local_smoothness_of_a_quadratic_is_its_curvature() -> None:
    curvature = np.array([2.0, 5.0])
    step = np.array([0.1, 0.3])
    np.testing.assert_allclose(local_smoothness(curvature * step, step), curvature)
    found = local_smoothness(np.array([1.0, 0.0, np.nan, 1.0]), np.array([0.0, 0.0, 1.0, np.nan]))
    assert np.isnan(found).all()
