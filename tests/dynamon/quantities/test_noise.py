"""Independent gradients, signal to noise and the noise scale, on problems where the truth is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import describe_layers
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.noise import NoiseEstimator, SignalToNoise
from tests.models import gpt

MEAN, SIGMA, BATCH = 0.3, 2.0, 8


def model():
    return nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(6, 5, bias=False)})


def accumulate(parameter, samples, generator):
    """Add the gradients of some samples of a batch of BATCH: mean MEAN and standard deviation SIGMA an entry."""
    noise = torch.randn((samples, *parameter.shape), generator=generator)
    g = (MEAN + SIGMA * noise).sum(0) / BATCH
    parameter.grad = g if parameter.grad is None else parameter.grad + g


@pytest.mark.parametrize("family", ["sign", "euclidean", "spectral"])
@pytest.mark.parametrize("first", [4, 2, 7])
def test_parts_of_a_window_have_the_unit_of_two_full_batches(family, first):
    """Whatever the split, the mean square is that of two independent gradients of the full batch, within 10 %."""
    layers, generator = describe_layers(model()), torch.Generator().manual_seed(0)
    reader = GradientReader(layers, family)
    noise = {s: NoiseEstimator([la.name for la in layers], 0.995, s) for s in ("successive", "independent")}
    exact = np.zeros(len(layers))
    for step in range(300):
        for layer in layers:
            layer.parameter.grad = None
            accumulate(layer.parameter, first, generator)
        reader.store_part(first / BATCH)
        for layer in layers:
            accumulate(layer.parameter, BATCH - first, generator)
        reader.begin(step)
        readings = reader.read().wait()
        for estimator in noise.values():
            estimator.update(readings)
        for i, (layer, norm) in enumerate(zip(layers, reader.norms, strict=True)):
            two = torch.randn((2, *layer.parameter.shape), generator=generator, dtype=torch.float64)
            exact[i] += float(norm.dual(SIGMA / math.sqrt(BATCH) * (two[0] - two[1]))) ** 2 / 300
    for estimator in noise.values():  # weights do not move here, so both see noise alone
        np.testing.assert_allclose(estimator.squared, exact, rtol=0.1)


def test_the_gap_between_the_two_is_curvature():
    """A mean gradient that turns round at every step is noise to successive gradients, not to independent ones."""
    layers, generator = describe_layers(model()), torch.Generator().manual_seed(0)
    reader = GradientReader(layers, "euclidean")
    successive, independent = (NoiseEstimator(["a", "b", "c"], 0.98, s) for s in ("successive", "independent"))
    for step in range(100):
        for part in range(2):
            for layer in layers:
                layer.parameter.grad = None if part == 0 else layer.parameter.grad
                accumulate(layer.parameter, 4, generator)
                layer.parameter.grad += (-1) ** step * 5
            if part == 0:
                reader.store_part(0.5)
        reader.begin(step)
        readings = reader.read().wait()
        successive.update(readings)
        independent.update(readings)
    sizes = np.array([layer.parameter.numel() for layer in layers])
    noise = 2 * SIGMA**2 / BATCH * sizes
    np.testing.assert_allclose(independent.squared, noise, rtol=0.4)
    np.testing.assert_allclose(successive.squared - noise, 400 * sizes, rtol=0.05)


def test_signal_to_noise_and_noise_scale():
    layers, generator = describe_layers(model()), torch.Generator().manual_seed(1)
    reader = GradientReader(layers, "sign")
    found = {s: SignalToNoise([la.name for la in layers], 0.995, s) for s in ("successive", "independent")}
    assert math.isnan(found["successive"].noise_scale) and np.isnan(found["successive"].ratios).all()
    for step in range(600):
        for part in range(2):
            for layer in layers:
                layer.parameter.grad = None if part == 0 else layer.parameter.grad
                accumulate(layer.parameter, 4, generator)
            if part == 0:
                reader.store_part(0.5)
        reader.begin(step)
        readings = reader.read().wait()
        for estimator in found.values():
            estimator.update(readings)
    truth = MEAN**2 / (SIGMA**2 / BATCH)  # of every entry, so of every layer
    for estimator in found.values():
        np.testing.assert_allclose(estimator.ratios[[0, 2]], truth, rtol=0.25)
        assert estimator.noise_scale == pytest.approx(1 / truth, rel=0.15)
        again = SignalToNoise(estimator.names, 0.995, estimator.source)
        again.load_state_dict(estimator.state_dict())
        assert again.noise_scale == estimator.noise_scale and np.array_equal(again.ratios, estimator.ratios)


def test_a_part_is_for_the_step_that_follows_it_only():
    layers = describe_layers(gpt())
    reader = GradientReader(layers, "sign")
    generator = torch.Generator().manual_seed(0)
    for layer in layers[1:]:
        accumulate(layer.parameter, 8, generator)
    reader.store_part(0.5)
    reader.begin(0)  # not read
    reader.begin(1)
    assert np.isnan(reader.read().wait().independent_dual).all()
    reader.store_part(0.25)
    accumulate(layers[0].parameter, 8, generator)  # the first layer comes in after the part was taken
    reader.begin(2)
    found = reader.read().wait()
    assert np.isnan(found.independent_l2[0]) and np.isfinite(found.independent_l2[1:]).all()
    estimator = NoiseEstimator([la.name for la in layers], source="independent")
    assert estimator.update(found) and np.isnan(estimator.squared[0]) and (estimator.squared[1:] > 0).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 2, math.nan])
def test_a_share_is_inside(share):
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\)"):
        GradientReader(describe_layers(model()), "sign").store_part(share)


@pytest.mark.parametrize("kind", [NoiseEstimator, SignalToNoise])
def test_sources_are_checked(kind):
    with pytest.raises(ValueError, match="source must be one of successive, independent, got 'paired'"):
        kind(["w"], source="paired")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        kind(["w"], 1.0)


@pytest.mark.parametrize("source", ["successive", "independent"])
def test_no_signal_at_all(source):
    """Noise around zero: the scale is infinite or very large, never negative."""
    layers, generator = describe_layers(nn.Linear(30, 20, bias=False)), torch.Generator().manual_seed(2)
    reader, found = GradientReader(layers, "sign"), SignalToNoise(["weight"], 0.9, source)
    for step in range(30):
        layers[0].parameter.grad = torch.randn(20, 30, generator=generator)
        reader.store_part(0.5)
        layers[0].parameter.grad += torch.randn(20, 30, generator=generator)
        reader.begin(step)
        found.update(reader.read().wait())
    assert 0 <= found.ratios[0] < 0.1 and found.noise_scale > 10
