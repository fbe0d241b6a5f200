"""Weight readings against explicit formulas in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dynamon.distributed.dtensor import to_local
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer, describe_layers
from dynamon.monitoring.weight_copies import copied
from dynamon.quantities.entrywise import entrywise_readings
from dynamon.quantities.weights import ENTRYWISE, weight_readings
from tests.launches import Launches, gpt2
from tests.models import cnn, gpt, mlp
from tests.processes import in_processes

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


def assert_readings(layers, before, read):
    found = read(layers, before)
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


@pytest.fixture
def read():
    """Of whole weights. :func:`test_the_same_of_shards` runs the tests that ask for it on shards."""
    return weight_readings


def of_shards(mesh):
    """Readings of the same weights cut along their first dimension."""

    def cut(tensor):
        return distribute_tensor(tensor.detach().clone(), mesh, (Shard(0),))

    def read(layers, before=None, earlier=None):
        sharded = [replace(layer, parameter=nn.Parameter(cut(layer.parameter))) for layer in layers]
        copies = [{n: to_local(cut(t)) for n, t in (tensors or {}).items()} for tensors in (before, earlier)]
        return weight_readings(sharded, *copies)

    return read


def check_shards(size):
    read = of_shards(init_device_mesh("cpu", (size,)))
    for make in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            test_models(make, dtype, read)
    for scale in (1e-30, 1e30):
        test_extreme_scales(scale, read)
    test_stacks_report_their_largest_norm_and_mean_rank(read)
    test_without_earlier_weights_there_is_no_step(read)
    test_unmoved_weights_took_a_step_of_zero(read)
    test_zero_weights(read)
    test_nonfinite_weights_read_nan_for_themselves_only(read)
    test_only_vectors(read)
    test_two_steps_of_some_layers_are_compared(read)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_the_same_of_shards():
    in_processes(lambda rank: check_shards(2), 2, group=True)


MODELS = [lambda: gpt(), lambda: gpt(tied=True), cnn, lambda: mlp(5, 9, 3)]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_models(make, dtype, read):
    model = make().to(dtype)
    with torch.no_grad():  # gains of one and biases of zero say little
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    layers = describe_layers(model)
    assert_readings(layers, moved(layers), read)


def test_stacks_report_their_largest_norm_and_mean_rank(read):
    torch.manual_seed(0)
    model = nn.ParameterDict({"experts": torch.randn(4, 6, 5), "plain": torch.randn(6, 5)})
    model["experts"].data[2] *= 3
    layers = describe_layers(model)
    assert_readings(layers, moved(layers), read)


def test_without_earlier_weights_there_is_no_step(read):
    layers = describe_layers(mlp(4, 5, 3))
    found = read(layers)
    assert found.update.isnan().all() and found.ratio.isnan().all()
    partial = read(layers, {"2.weight": layers[2].parameter.detach() + 1})
    assert partial.update.isnan().tolist() == [True, True, False, True]


def test_unmoved_weights_took_a_step_of_zero(read):
    layers = describe_layers(mlp(4, 5, 3))
    found = read(layers, {layer.name: layer.parameter.detach().clone() for layer in layers})
    assert not found.update.any() and not found.ratio.any()


def test_zero_weights(read):
    layers = describe_layers(nn.Linear(3, 4))
    nn.init.zeros_(layers[0].parameter)
    found = read(layers, {"weight": torch.ones(4, 3)})
    assert found.operator[0] == found.frobenius[0] == found.sigma_max[0] == 0
    assert found.stable_rank[0].isnan() and found.log2_spectral_condition[0].isnan()
    assert found.update[0] > 0 and found.ratio[0].isnan()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale, read):
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    layer = Layer("w", "hidden", weight * scale)
    found = read([layer], {"w": layer.parameter * 0.5})
    assert float(found.operator[0]) == pytest.approx(by_hand(layer, layer.parameter), rel=0.005)
    assert float(found.sigma_max[0]) == pytest.approx(float(torch.linalg.svdvals(weight)[0]) * scale, rel=0.005)
    assert float(found.ratio[0]) == pytest.approx(0.5, rel=1e-5)
    assert found.stable_rank[0].isfinite()


def test_nonfinite_weights_read_nan_for_themselves_only(read):
    layers = describe_layers(mlp(4, 5, 3))
    with torch.no_grad():
        layers[0].parameter[1, 1] = math.nan
    found = read(layers)
    for name in ("operator", "sigma_max", "stable_rank", "frobenius"):
        values = getattr(found, name)
        assert values[0].isnan() and values[2].isfinite(), name


def test_only_vectors(read):
    found = read(describe_layers(nn.LayerNorm(4)))
    assert found.operator.tolist() == [1, 0] and found.sigma_max.isnan().all()


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        found = weight_readings(describe_layers(nn.Linear(3, 2)), {"weight": torch.zeros(2, 3)})
        assert (
            found.sigma_max.isfinite().tolist() == [True, False]
            and found.log2_spectral_condition.dtype == torch.float32
        )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reading_of_gpt2_takes_few_device_calls(dtype):
    """Copies before both steps, norms, steps, angles, bounds: 7,100 calls when each tensor was taken by itself."""
    layers = describe_layers(gpt2("meta", dtype=dtype))
    assert len(layers) == 148
    weights = {layer.name: layer.parameter.detach() for layer in layers}
    weight_readings(layers, copied(weights), copied(weights))  # puts constants on the device
    entrywise_readings(layers, ENTRYWISE)
    with Launches("meta") as launches:
        weight_readings(layers, copied(weights), copied(weights))
        entrywise_readings(layers, ENTRYWISE)
    assert launches.total <= 400 and launches.waits == 0, launches


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("along", [0.0, 0.999999, 1.0])
def test_small_angles_and_steps_along_the_weight(size, along):
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(400, generator=generator)
    across = torch.randn(400, generator=generator)
    step = size * (along * before + (1 - along) * across)
    now = before + step
    found = weight_readings([Layer("w", "vector", now)], {"w": before})
    a, b = before.double(), now.double()
    exact = 2 * math.asin(min(float((a / a.norm() - b / b.norm()).norm()) / 2, 1.0))
    quotient = float((b - a).norm() / a.norm())
    assert float(found.rotation[0]) == pytest.approx(exact, rel=1e-5, abs=2e-8 * quotient**0.5 + 4e-4 * quotient**2)


def test_two_steps_of_some_layers_are_compared(read):
    layers = describe_layers(mlp(4, 5, 3))
    before, earlier = moved(layers), moved(layers, 0.2)
    del before["0.bias"], earlier["2.weight"]
    found = read(layers, before, earlier)
    known = [i for i, la in enumerate(layers) if la.name in before and la.name in earlier]
    expected = []
    for layer in (layers[i] for i in known):
        last = layer.parameter.detach().double() - before[layer.name].double()
        previous = before[layer.name].double() - earlier[layer.name].double()
        expected.append([float((last * previous).sum() / last.norm() / previous.norm()), last.norm(), previous.norm()])
    compared = torch.stack([found.cosine, found.last, found.previous])
    torch.testing.assert_close(compared[:, known].double(), torch.tensor(expected).T, rtol=1e-5, atol=1e-6)
    assert compared.isnan().all(0).tolist() == [i not in known for i in range(len(layers))]


def test_another_default_device():
    """As after torch.set_default_device("cuda"): what is made for the CPU must say so."""
    layers = describe_layers(mlp(4, 5, 3))
    before = moved(layers)
    expected = weight_readings(layers, before, before)
    torch.set_default_device("meta")
    try:
        found = weight_readings(layers, before, before)
    finally:
        torch.set_default_device(None)
    for name, value in vars(found).items():
        assert torch.equal(value.nan_to_num(-1.0), getattr(expected, name).nan_to_num(-1.0)), name


def test_constants_are_put_on_a_device_once():
    device = torch.device("cpu")
    first = on_device([1.0, 2.0, math.nan], device, torch.float32)
    assert on_device((1.0, 2.0, math.nan), device, torch.float32) is first
    assert on_device([1.0, 2.0], device, torch.float32) is not first
    with torch.inference_mode():
        assert not on_device([3.0, 5.0], device, torch.float32).is_inference()
