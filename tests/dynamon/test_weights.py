"""Weight readings against explicit formulas in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import Layer, describe_layers
from dynamon.weights import weight_readings
from tests.models import cnn, gpt, mlp

SPECTRAL = ("sigma_max", "sigma_lower", "sigma_upper", "stable_rank")


def by_hand(layer, w):
    """The norm by role, with numpy."""
    w = w.detach().double().numpy()
    if layer.role == "vector":
        return math.sqrt((w**2).mean())
    if layer.role == "embedding":  # [tokens, d]
        return math.sqrt((w**2).mean(-1).max())
    if layer.role == "head":
        return math.sqrt(w.shape[1]) * np.linalg.norm(w, axis=1).max()
    if layer.role == "conv":
        sigma = np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)[0]
        return math.prod(w.shape[2:]) * math.sqrt(w.shape[1] / w.shape[0]) * sigma
    blocks = np.split(w, layer.blocks) if w.ndim == 2 else list(w)
    return max(math.sqrt(b.shape[1] / b.shape[0]) * np.linalg.svd(b, compute_uv=False)[0] for b in blocks)


def assert_readings(layers, before):
    found = weight_readings(layers, before)
    for i, layer in enumerate(layers):
        w = layer.parameter.detach().double()
        assert float(found.operator[i]) == pytest.approx(by_hand(layer, w), rel=0.005), layer.name
        assert float(found.frobenius[i]) == pytest.approx(float(w.square().sum().sqrt()), rel=1e-5)
        assert float(found.rms[i]) == pytest.approx(float(w.square().mean().sqrt()), rel=1e-5)
        step = by_hand(layer, w - before[layer.name].double())
        assert float(found.update[i]) == pytest.approx(step, rel=0.006), layer.name
        assert float(found.ratio[i]) == pytest.approx(step / by_hand(layer, w), rel=0.01), layer.name
        if layer.role == "vector":
            assert all(math.isnan(getattr(found, name)[i]) for name in SPECTRAL)
            continue
        w = w.flatten(1).unflatten(0, (layer.blocks, -1)) if w.ndim == 2 or layer.role == "conv" else w
        sigma = torch.linalg.svdvals(w)
        assert float(found.sigma_lower[i]) <= float(sigma[..., 0].max()) <= float(found.sigma_upper[i])
        assert float(found.sigma_max[i]) == pytest.approx(float(sigma[..., 0].max()), rel=0.005)
        rank = (sigma.square().sum(-1) / sigma[..., 0] ** 2).mean()
        assert float(found.stable_rank[i]) == pytest.approx(float(rank), rel=0.012)


def moved(layers, size=0.03):
    torch.manual_seed(5)
    return {layer.name: layer.parameter.detach() - size * torch.randn_like(layer.parameter) for layer in layers}


@pytest.mark.parametrize("make", [lambda: gpt(), lambda: gpt(tied=True), cnn, lambda: mlp(5, 9, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_models(make, dtype):
    model = make().to(dtype)
    with torch.no_grad():  # gains of one and biases of zero say little
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    layers = describe_layers(model)
    assert_readings(layers, moved(layers))


def test_stacks_report_their_largest_norm_and_mean_rank():
    torch.manual_seed(0)
    model = nn.ParameterDict({"experts": torch.randn(4, 6, 5), "plain": torch.randn(6, 5)})
    model["experts"].data[2] *= 3
    layers = describe_layers(model)
    assert_readings(layers, moved(layers))


def test_without_earlier_weights_there_is_no_step():
    layers = describe_layers(mlp(4, 5, 3))
    found = weight_readings(layers)
    assert found.update.isnan().all() and found.ratio.isnan().all()
    partial = weight_readings(layers, {"2.weight": layers[2].parameter.detach() + 1})
    assert partial.update.isnan().tolist() == [True, True, False, True]


def test_unmoved_weights_took_a_step_of_zero():
    layers = describe_layers(mlp(4, 5, 3))
    found = weight_readings(layers, {layer.name: layer.parameter.detach().clone() for layer in layers})
    assert not found.update.any() and not found.ratio.any()


def test_zero_weights():
    layers = describe_layers(nn.Linear(3, 4))
    nn.init.zeros_(layers[0].parameter)
    found = weight_readings(layers, {"weight": torch.ones(4, 3)})
    assert found.operator[0] == found.frobenius[0] == found.sigma_max[0] == 0
    assert found.stable_rank[0].isnan() and found.deviation[0].isnan()
    assert found.update[0] > 0 and found.ratio[0].isnan()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    layer = Layer("w", "hidden", weight * scale)
    found = weight_readings([layer], {"w": layer.parameter * 0.5})
    assert float(found.operator[0]) == pytest.approx(by_hand(layer, layer.parameter), rel=0.005)
    assert float(found.sigma_max[0]) == pytest.approx(float(torch.linalg.svdvals(weight)[0]) * scale, rel=0.005)
    assert float(found.ratio[0]) == pytest.approx(0.5, rel=1e-5)
    assert found.stable_rank[0].isfinite()


def test_nonfinite_weights_read_nan_for_themselves_only():
    layers = describe_layers(mlp(4, 5, 3))
    with torch.no_grad():
        layers[0].parameter[1, 1] = math.nan
    found = weight_readings(layers)
    for name in ("operator", "sigma_max", "stable_rank", "frobenius"):
        values = getattr(found, name)
        assert values[0].isnan() and values[2].isfinite(), name


def test_only_vectors():
    found = weight_readings(describe_layers(nn.LayerNorm(4)))
    assert found.operator.tolist() == [1, 0] and found.sigma_max.isnan().all()


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        found = weight_readings(describe_layers(nn.Linear(3, 2)), {"weight": torch.zeros(2, 3)})
        assert found.sigma_max.isfinite().tolist() == [True, False] and found.deviation.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
