"""A norm that only this file knows, where norms are used; and records that lack a piece."""

import math
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import l2_along
from dynamon.layers import ROLES, Layer, describe_layers
from dynamon.norms import Norm, dual_norms, get_norm, iid_dual_norm, norm_for_layer, update_norm
from dynamon.norms import table as norms_module
from dynamon.norms.forms import each_dual, each_primal, normalized
from dynamon.optim import Lanton, LayerwiseRates
from dynamon.quantities.gradient_reader import GradientReader
from dynamon.quantities.primal_norms import BY_MAXIMUM, BY_WHOLE, StepNorms, reduce_steps, statistic_of
from dynamon.quantities.updates import primal_norms
from dynamon.quantities.weights import weight_readings
from dynamon.rates import NoiseAdaptiveRates
from tests.processes import in_processes

COLUMNS = Norm(
    name="columns",
    primal=lambda w: l2_along(w, -2).amax(-1),
    dual=lambda g: l2_along(g, -2).sum(-1),
    lmo=lambda g: (-normalized(g, -2)).to(g.dtype),
    on_matrices=True,
    per_window=False,
    primal_factor=lambda m, n: 1.0,
    dual_factor=lambda m, n: 1.0,
    dual_of="matrix",
    reduces="max over columns",
    iid_dual=lambda blocks, m, n: blocks * n * math.sqrt(m),
    oracle="own",
    batched_primal=each_primal,
    batched_dual=each_dual,
)


@pytest.fixture
def columns(monkeypatch):
    """The norm of this file for hidden weights, embeddings and heads, under optimizers that orthogonalise."""
    monkeypatch.setitem(norms_module.NORMS, "columns", COLUMNS)
    for role in ("hidden", "embedding", "head"):
        monkeypatch.setitem(norms_module.UPDATE_NORMS["spectral"], role, "columns")
        monkeypatch.setitem(norms_module.OPERATOR_NORMS, role, "columns")


class Model(nn.Module):
    """An embedding whose rows are columns of its map, a packed weight, a plain one and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(10, 4), nn.Linear(4, 12)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 10, bias=False)


def lengths(layer: Layer, tensor: torch.Tensor) -> np.ndarray:
    """Lengths of the columns of the maps, with numpy."""
    stored = tensor.detach().double().numpy()
    maps = [stored.T] if layer.rows_are_tokens else np.split(stored, layer.blocks)
    return np.stack([np.linalg.norm(each, axis=0) for each in maps])


def expected(layers, tensors, of_columns, of_vectors) -> list[float]:
    return [
        of_vectors(t.double()) if la.role == "vector" else float(of_columns(lengths(la, t)))
        for la, t in zip(layers, tensors, strict=True)
    ]


def duals(layers, tensors) -> list[float]:
    return expected(layers, tensors, np.sum, lambda t: float(t.norm() * t.numel() ** 0.5))


def primals(layers, tensors) -> list[float]:
    return expected(layers, tensors, np.max, lambda t: float(t.norm() / t.numel() ** 0.5))


def drawn(layers, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layer.parameter.shape, generator=generator) for layer in layers]


def set_gradients(layers, tensors) -> None:
    for layer, tensor in zip(layers, tensors, strict=True):
        layer.parameter.grad = tensor.clone()


def test_readings(columns) -> None:
    layers = describe_layers(Model())
    norms, first, second = [update_norm(layer, "spectral") for layer in layers], drawn(layers, 1), drawn(layers, 2)
    assert [norm.name for norm in norms].count("columns") == 4
    np.testing.assert_allclose(primal_norms(layers, norms, first), primals(layers, first), rtol=1e-5)
    np.testing.assert_allclose(torch.stack(dual_norms(layers, norms, first)), duals(layers, first), rtol=1e-5)
    reader = GradientReader(layers, "spectral")
    for step, tensors in enumerate((first, second)):
        set_gradients(layers, tensors)
        reader.begin(step)
        found = reader.read().wait()
        np.testing.assert_allclose(found.dual, duals(layers, tensors), rtol=1e-5)
    change = [b - a for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(found.difference_dual, duals(layers, change), rtol=1e-5)
    weights = [layer.parameter.detach() for layer in layers]
    before = {layer.name: w - step for layer, w, step in zip(layers, weights, first, strict=True)}
    readings = weight_readings(layers, before)
    np.testing.assert_allclose(readings.operator, primals(layers, weights), rtol=1e-5)
    np.testing.assert_allclose(readings.update, primals(layers, first), rtol=1e-4)


def check_parts(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.detach().clone(), mesh, (Shard(0),))

    layers = describe_layers(Model())
    parted = [replace(layer, parameter=nn.Parameter(cut(layer.parameter))) for layer in layers]
    norms, steps, ranks = [update_norm(la, "spectral") for la in layers], drawn(layers, 1), Ranks(torch.device("cpu"))
    own = {la.role: statistic_of(la, norm) for la, norm in zip(parted, norms, strict=True) if la.blocks == 1}
    assert own["embedding"] == BY_MAXIMUM and own["hidden"] == BY_WHOLE  # rows of tokens are columns of the map
    parts = StepNorms(parted, norms, {i: to_local(cut(step)) for i, step in enumerate(steps)}, ranks)
    with ranks.collective_section():
        _, found = reduce_steps([parts], parts.lengths, ranks)
    np.testing.assert_allclose(found, primals(layers, steps), rtol=1e-5)
    reader = GradientReader(parted, "spectral")
    set_gradients(parted, [cut(step) for step in steps])
    reader.begin(0)
    np.testing.assert_allclose(reader.read().wait().dual, duals(layers, steps), rtol=1e-5)
    with ranks.collective_section():
        readings = weight_readings(parted, ranks=ranks)
    np.testing.assert_allclose(readings.operator, primals(layers, [la.parameter for la in layers]), rtol=1e-5)


@pytest.mark.processes
def test_readings_of_parts(columns) -> None:
    in_processes(lambda rank: check_parts(rank, 2), 2, group=True)


def test_steering(columns) -> None:
    """By the shape of the norm's own noise, and with one group for its layers of each role."""
    model = Model()
    layers = describe_layers(model)
    sizes = [iid_dual_norm(update_norm(layer, "spectral"), layer) for layer in layers if layer.role != "vector"]
    np.testing.assert_allclose(sizes, [10 * 2.0, 3 * 4 * 2.0, 4 * 6**0.5, 6 * 10**0.5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.dynamon_geometry = "spectral"
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0, beta2=0.0, alpha=0.0, group_by="all"), model, lag=0)
    given = [drawn(layers, seed) for seed in (1, 2)]
    for tensors in given:
        set_gradients(layers, tensors)
        optimizer.step()
    change = duals(layers, [b - a for a, b in zip(*given, strict=True)])
    scale = [iid_dual_norm(update_norm(layer, "spectral"), layer) for layer in layers]
    noise = np.square(np.array(change) / scale)
    names = [layer.name for layer in layers]
    quiet = dict(zip(names, (noise.min() / noise) ** 0.25, strict=True))
    assert rates.ratios == pytest.approx({name: max(quiet[name], 1e-9) for name in names}, rel=1e-3)


def test_lanton_steps_in_it(columns) -> None:
    model = Model()
    layers, before = describe_layers(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    given = drawn(layers, 1)
    set_gradients(layers, given)
    Lanton(model, lr=0.5, radii=dict.fromkeys(ROLES, 1.0)).step()
    for layer, gradient in zip(layers, given, strict=True):
        step = layer.parameter.detach() - before[layer.name]
        expected_step = 0.5 * update_norm(layer, "spectral").lmo(gradient)
        torch.testing.assert_close(step, expected_step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("piece", [field.name for field in fields(Norm)])
def test_a_record_that_lacks_a_piece_is_refused(piece: str) -> None:
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(Norm))
    with pytest.raises(TypeError, match=piece):
        Norm(**{name: value for name, value in vars(COLUMNS).items() if name != piece})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iid_dual": None}, "the norm 'columns' is incomplete: iid_dual must be a function"),
        ({"batched_dual": None}, "is incomplete: batched_dual"),
        ({"reduces": "mean"}, "reduces of the norm 'columns' must be one of sum, max over entries, .* got 'mean'"),
        ({"dual_of": "nuclear"}, "dual_of of the norm 'columns' must be one of l1, l2, matrix"),
        ({"oracle": "svd"}, "oracle of the norm 'columns' must be one of polar, sign, own"),
        ({"reduces": "sum"}, "if, and only if, it is a multiple of l2"),
        ({"dual_of": "l1"}, "is one of matrices: dual_of must be 'matrix'"),
        ({"on_matrices": False}, "sees all entries: it must reduce by"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(COLUMNS, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dual_of": "l1"}, "so its dual must be l2 over that multiple"),
        ({"dual_factor": lambda m, n: 2.0}, "so its dual must be l2 over that multiple"),
        ({"per_window": True}, "sees all entries: per_window must be False"),
    ],
)
def test_a_multiple_of_l2_that_contradicts_itself_is_refused(changed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(get_norm("frobenius"), **changed)


def test_rms_to_rms_of_an_embedding_has_its_factor_for_many_layers_too() -> None:
    layer = describe_layers(Model())[0]
    norm, tensor = norm_for_layer("rms_to_rms", layer), drawn([layer], 1)[0]
    assert float(primal_norms([layer], [norm], [tensor])[0]) == pytest.approx(float(norm.primal(tensor)), rel=1e-2)
