"""Every norm: each is a norm, its dual is the dual, its oracle attains it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynamon.layers import Layer, describe_layers
from dynamon.norms import (
    NORMS,
    dual_norms,
    get_norm,
    iid_dual_norm,
    norm_for_layer,
    operator_norm,
    optimizer_family,
    sigma_factor,
    update_norm,
)
from tests.models import cnn, gpt

NAMES = tuple(NORMS)
ON_MATRICES = [norm.name for norm in NORMS.values() if norm.on_matrices]
ON_ENTRIES = [name for name in NAMES if name not in ON_MATRICES]
PROPERTY = settings(deadline=None, max_examples=50, derandomize=True)
SEEDS = st.integers(0, 2**32)
EVERY_NORM = pytest.mark.parametrize("name", NAMES)
HALF = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def pairs(draw):
    """Two matrices of one shape, the first of any rank (zero included) and scale."""
    rows, columns, rank, seed = (
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(0, 12)),
        draw(SEEDS),
    )
    low = gaussian(rows, rank, seed=seed) @ gaussian(rank, columns, seed=seed + 1)
    return low * 10.0 ** draw(st.integers(-12, 12)), gaussian(rows, columns, seed=seed + 2)


def inner(a, b):
    return float((a.double() * b.double()).sum())


def assert_oracle_attains_the_dual(norm, g, rel=1e-9):
    step, dual = norm.lmo(g), float(norm.dual(g))
    assert step.shape == g.shape and step.dtype == g.dtype
    if not g.any():
        assert dual == 0 and not step.any() and float(norm.primal(g)) == 0
        return
    assert inner(g, step) == pytest.approx(-dual, rel=rel)
    assert float(norm.primal(step)) == pytest.approx(1, rel=rel)


@EVERY_NORM
@PROPERTY
@given(pairs())
def test_the_oracle_attains_the_dual(name, pair):
    assert_oracle_attains_the_dual(get_norm(name), pair[0], rel=1e-6)
    assert_oracle_attains_the_dual(get_norm(name), pair[1])


@EVERY_NORM
@PROPERTY
@given(pairs())
def test_hoelder(name, pair):
    g, w = pair
    norm = get_norm(name)
    assert abs(inner(g, w)) <= float(norm.primal(w) * norm.dual(g)) * (1 + 1e-6)
    assert abs(inner(g, w)) <= float(norm.primal(g) * norm.dual(w)) * (1 + 1e-6)


@EVERY_NORM
@PROPERTY
@given(pairs(), st.floats(-1e6, 1e6))
def test_primal_and_dual_are_norms(name, pair, factor):
    g, w = pair
    norm = get_norm(name)
    for size in (norm.primal, norm.dual):
        assert float(size(factor * w)) == pytest.approx(abs(factor) * float(size(w)), rel=1e-9)
        assert float(size(g + w)) <= float(size(g) + size(w)) * (1 + 1e-6)
        assert float(size(w)) > 0


@EVERY_NORM
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_dtypes(name, dtype):
    norm, g = get_norm(name), gaussian(6, 9, dtype=dtype)
    assert_oracle_attains_the_dual(norm, g, rel=HALF[dtype])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert norm.primal(g).dtype == norm.dual(g).dtype == wide
    for size in (norm.primal, norm.dual):
        assert float(size(g)) == pytest.approx(float(size(g.double())), rel=1e-5)


@EVERY_NORM
def test_zero(name):
    assert_oracle_attains_the_dual(get_norm(name), torch.zeros(4, 3))


# What each norm says about the map x -> W x, written out with numpy.
RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 7))
SIGMA = np.linalg.svd(W, compute_uv=False)
BY_HAND = {
    "rms_to_rms": (math.sqrt(7 / 5) * SIGMA[0], math.sqrt(5 / 7) * SIGMA.sum()),
    "spectral": (SIGMA[0], SIGMA.sum()),
    "one_to_rms": (
        max(math.sqrt((W[:, j] ** 2).mean()) for j in range(7)),
        sum(5 * math.sqrt((W[:, j] ** 2).mean()) for j in range(7)),
    ),
    "rms_to_inf": (
        max(math.sqrt(7) * np.linalg.norm(W[i]) for i in range(5)),
        sum(np.linalg.norm(W[i]) / math.sqrt(7) for i in range(5)),
    ),
    "one_to_inf": (abs(W).max(), abs(W).sum()),
    "rms": (math.sqrt((W**2).mean()), 35 * math.sqrt((W**2).mean())),
    "frobenius": (math.sqrt((W**2).sum()), math.sqrt((W**2).sum())),
}


@EVERY_NORM
def test_against_closed_forms(name):
    primal, dual = BY_HAND[name]
    norm = get_norm(name)
    assert float(norm.primal(torch.tensor(W))) == pytest.approx(primal, rel=1e-12)
    assert float(norm.dual(torch.tensor(W))) == pytest.approx(dual, rel=1e-7)


def test_operator_norms_are_gains_of_the_map():
    """The largest output size over inputs of size one, in the sizes the name gives."""
    rms = lambda x: np.sqrt((x**2).mean(0))  # noqa: E731
    inputs = RNG.normal(size=(7, 200_000))
    unit_rms, corners = inputs / rms(inputs), np.eye(7)  # an l1 ball is the hull of its corners
    gains = {
        "rms_to_rms": (rms(W @ unit_rms).max(), 0.9),
        "rms_to_inf": (abs(W @ unit_rms).max(), 0.9),
        "one_to_rms": (rms(W @ corners).max(), 1 - 1e-12),
        "one_to_inf": (abs(W @ corners).max(), 1 - 1e-12),
    }
    for name, (gain, tightness) in gains.items():
        size = float(get_norm(name).primal(torch.tensor(W)))
        assert tightness * size <= gain <= size * (1 + 1e-12), name


def stored(role, *shape, **options):
    return Layer("w", role, gaussian(*shape), **options)


TRANSPOSED = nn.ConvTranspose2d(6, 8, (3, 2), groups=2).double()
STORED = {
    "embedding": stored("embedding", 11, 4, rows_are_tokens=True),
    "inputs first": stored("hidden", 7, 5, inputs_first=True),
    "packed": stored("hidden", 12, 4, blocks=3),
    "packed, inputs first": stored("hidden", 4, 12, blocks=3, inputs_first=True),
    "experts": stored("hidden", 3, 5, 4, blocks=3),
    "positions": stored("embedding", 1, 9, 4, rows_are_tokens=True),
    "conv": stored("conv", 6, 4, 3, 3),
    "grouped conv": describe_layers(nn.Conv2d(8, 12, 3, groups=4).double())[0],
    "depthwise conv": describe_layers(nn.Conv1d(5, 5, 3, groups=5).double())[0],
    "transposed conv": describe_layers(TRANSPOSED)[0],
    "3-d conv": describe_layers(nn.Conv3d(2, 4, (3, 1, 2)).double())[0],
    "lstm": describe_layers(nn.LSTM(3, 5).double())[0],
    "vector": stored("vector", 6),
    "scalar": stored("vector"),
    "gain": stored("vector", 1, 1, 6),
}


@EVERY_NORM
@pytest.mark.parametrize("layer", STORED.values(), ids=STORED)
def test_fitted_to_what_a_layer_stores(name, layer):
    if layer.role == "vector" and name in ON_MATRICES:
        with pytest.raises(ValueError, match=f"{name} is a norm of matrices and w is a vector"):
            norm_for_layer(name, layer)
        return
    norm = norm_for_layer(name, layer)
    g, w = gaussian(*layer.parameter.shape), gaussian(*layer.parameter.shape, seed=1)
    assert norm.name == name and norm.primal(w).shape == norm.dual(g).shape == ()
    assert_oracle_attains_the_dual(norm, g)
    assert_oracle_attains_the_dual(norm, torch.zeros_like(g))
    assert abs(inner(g, w)) <= float(norm.primal(w) * norm.dual(g)) * (1 + 1e-9)
    (batched,) = dual_norms([layer], [norm], [g])
    assert float(batched) == pytest.approx(float(norm.dual(g)), rel=1e-9)


def linear_maps(layer):
    """The matrices of a layer, put together entry by entry with numpy."""
    w = layer.parameter.detach().numpy()
    if layer.conv is not None and layer.conv.transposed:
        inputs = w.shape[0] // layer.conv.groups
        return [
            w[first : first + inputs].swapaxes(0, 1).reshape(w.shape[1], -1) for first in range(0, w.shape[0], inputs)
        ]
    if layer.role == "conv":
        return np.split(w.reshape(len(w), -1), layer.blocks)
    w = w.reshape(-1, *w.shape[-2:])
    if layer.rows_are_tokens or layer.inputs_first:
        w = w.swapaxes(-1, -2)
    return list(w) if len(w) > 1 else np.split(w[0], layer.blocks)


@pytest.mark.parametrize("name", ON_MATRICES)
@pytest.mark.parametrize("layer", [la for la in STORED.values() if la.role != "vector"],
                         ids=[k for k, la in STORED.items() if la.role != "vector"])  # fmt: skip
def test_blocks_have_the_largest_norm_and_the_summed_dual(name, layer):
    is_scaled = layer.role == "conv" and get_norm(name).per_window
    window = math.sqrt(math.prod(layer.parameter.shape[2:])) if is_scaled else 1
    members = [torch.tensor(matrix.copy()) for matrix in linear_maps(layer)]
    assert len(members) == layer.blocks
    norm, weight = norm_for_layer(name, layer), layer.parameter.detach()
    primals = [float(get_norm(name).primal(member)) for member in members]
    duals = [float(get_norm(name).dual(member)) for member in members]
    assert float(norm.primal(weight)) == pytest.approx(window * max(primals), rel=1e-9)
    assert float(norm.dual(weight)) == pytest.approx(sum(duals) / window, rel=1e-9)


def test_dual_norms_batch_layers_of_one_shape():
    layers = [*STORED.values(), stored("hidden", 5, 7), stored("hidden", 7, 5), stored("conv", 6, 4, 3, 3)]
    norms = [
        norm_for_layer("vector" == la.role and "rms" or ("rms_to_rms", "spectral")[i % 2], la)
        for i, la in enumerate(layers)
    ]
    tensors = [gaussian(*layer.parameter.shape, seed=i) for i, layer in enumerate(layers)]
    found = dual_norms(layers, norms, tensors)
    for value, norm, tensor in zip(found, norms, tensors, strict=True):
        assert float(value) == pytest.approx(float(norm.dual(tensor)), rel=1e-9)


def test_not_finite_is_nan_and_no_exception():
    for name in NAMES:
        norm, g = get_norm(name), gaussian(4, 3)
        g[1, 1] = math.nan
        assert norm.primal(g).isnan() and norm.dual(g).isnan(), name
        assert norm.lmo(g).isnan().any(), name
        stack = torch.stack([gaussian(4, 3), g])
        assert norm.primal(stack).isnan().tolist() == norm.dual(stack).isnan().tolist() == [False, True]


@EVERY_NORM
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_single_precision_at_extreme_scales(name, scale):
    g = gaussian(6, 4).float() * scale
    step = get_norm(name).lmo(g)
    assert float(get_norm(name).primal(step)) == pytest.approx(1, rel=1e-5)
    assert inner(g, step) == pytest.approx(-float(get_norm(name).dual(g.double())), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("rms", "frobenius")])  # whose balls are round
def test_duals_by_brute_force(name):
    """The largest inner product over many points of the unit ball comes close to the dual, and never above it."""
    g, norm = gaussian(2, 2, seed=3), get_norm(name)
    points = gaussian(400_000, 2, 2, seed=4)
    if name == "one_to_inf":  # corners
        points = points.sign()
    points = points / norm.primal(points)[:, None, None]
    reached = float((points * g).sum((-2, -1)).max())
    assert 0.97 * float(norm.dual(g)) <= reached <= float(norm.dual(g)) * (1 + 1e-9)


@EVERY_NORM
def test_stacks_are_batched(name):
    norm, g = get_norm(name), gaussian(3, 5, 4)
    for function in (norm.primal, norm.dual, norm.lmo):
        assert torch.allclose(function(g), torch.stack([function(member) for member in g]))


@pytest.mark.parametrize("name", ON_ENTRIES)
@pytest.mark.parametrize("shape", [(), (7,)], ids=str)
def test_entrywise_norms_take_vectors_and_scalars(name, shape):
    assert_oracle_attains_the_dual(get_norm(name), gaussian(*shape))


def test_unknown_norm():
    with pytest.raises(ValueError, match=f"unknown norm 'nuclear'; choose one of {', '.join(sorted(NAMES))}"):
        get_norm("nuclear")


def layers_by_role(model):
    return {layer.role: layer for layer in describe_layers(model)}


def test_operator_norm_by_role():
    conv, rest = layers_by_role(cnn().double())["conv"], layers_by_role(gpt().double())
    size = lambda layer: float(operator_norm(layer).primal(layer.parameter.detach()))  # noqa: E731
    kernel = conv.parameter.detach().numpy()
    top = np.linalg.svd(kernel.reshape(len(kernel), -1), compute_uv=False)[0]
    assert size(conv) == pytest.approx(9 * math.sqrt(kernel.shape[1] / kernel.shape[0]) * top)
    w = rest["hidden"].parameter.detach().numpy()
    assert size(rest["hidden"]) == pytest.approx(math.sqrt(w.shape[1] / w.shape[0]) * np.linalg.svd(w)[1][0])
    tokens = rest["embedding"].parameter.detach().numpy()  # [vocab, d]: a token picks a row
    assert size(rest["embedding"]) == pytest.approx(np.sqrt((tokens**2).mean(1)).max())
    head = rest["head"].parameter.detach().numpy()  # [vocab, d]: every row is an output
    assert size(rest["head"]) == pytest.approx(math.sqrt(head.shape[1]) * np.linalg.norm(head, axis=1).max())
    vector = rest["vector"].parameter.detach().numpy()
    assert size(rest["vector"]) == pytest.approx(np.sqrt((vector**2).mean()))


def test_update_norm_by_family_and_role():
    layers = layers_by_role(gpt()) | {"conv": layers_by_role(cnn())["conv"]}
    spectral = {"hidden": "rms_to_rms", "conv": "rms_to_rms", "embedding": "one_to_inf", "head": "one_to_inf"}
    for role, layer in layers.items():
        assert update_norm(layer, "sign").name == "one_to_inf"
        assert update_norm(layer, "euclidean").name == "frobenius"
        assert update_norm(layer, "spectral").name == spectral.get(role, "rms")
    g = gaussian(*layers["conv"].parameter.shape)
    assert_oracle_attains_the_dual(update_norm(layers["conv"], "spectral"), g)
    with pytest.raises(ValueError, match="family must be 'sign', 'euclidean' or 'spectral', got 'adam'"):
        update_norm(layers["hidden"], "adam")


@pytest.mark.parametrize("role", ["hidden", "conv", "embedding", "head", "vector"])
def test_sigma_factor_agrees_with_the_operator_norm(role):
    layer = {**layers_by_role(gpt().double()), "conv": layers_by_role(cnn().double())["conv"]}[role]
    factor = sigma_factor(layer)
    if role not in ("hidden", "conv"):
        assert factor is None
        return
    w = layer.parameter.detach()
    sigma = torch.linalg.svdvals(w.flatten(1))[0]
    assert float(operator_norm(layer).primal(w)) == pytest.approx(factor * float(sigma), rel=1e-12)


def test_optimizer_families():
    expected = {
        "sign": "Adam AdamW NAdam RAdam Adamax SparseAdam RMSprop Rprop Adagrad Adadelta",
        "euclidean": "SGD ASGD LBFGS",
    }
    for family, names in expected.items():
        for name in names.split():
            optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.1)
            assert optimizer_family(optimizer) == family, name
    assert optimizer_family(torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])) == "spectral"


@pytest.mark.parametrize(
    ("name", "base", "family"),
    [
        ("Lion", torch.optim.Optimizer, "sign"),
        ("SignSGD", torch.optim.SGD, "sign"),
        ("Lamb", torch.optim.Optimizer, "sign"),
        ("AdamMini", torch.optim.Optimizer, "sign"),
        ("Mine", torch.optim.AdamW, "sign"),
        ("Scion", torch.optim.Optimizer, "spectral"),
        ("MuonWithAuxAdam", torch.optim.Optimizer, "spectral"),
        ("Lanton", torch.optim.Optimizer, "spectral"),
        ("Mine", torch.optim.SGD, "euclidean"),
        ("Unheard", torch.optim.Optimizer, "euclidean"),
    ],
)
def test_families_of_optimizers_from_elsewhere(name, base, family):
    kind = type(name, (base,), {"__init__": lambda self, p: torch.optim.Optimizer.__init__(self, p, {"lr": 0.1})})
    assert optimizer_family(kind([nn.Parameter(torch.ones(1))])) == family


@EVERY_NORM
@pytest.mark.parametrize("layer", [
    stored("hidden", 40, 40), stored("hidden", 120, 30), stored("hidden", 30, 120),
    stored("embedding", 120, 30, rows_are_tokens=True), stored("hidden", 30, 90, blocks=3, inputs_first=True),
    stored("hidden", 3, 24, 30, blocks=3), stored("conv", 16, 12, 3, 3),
    describe_layers(nn.ConvTranspose2d(48, 32, 3, groups=2).double())[0],
], ids=lambda layer: f"{layer.role} {tuple(layer.parameter.shape)}")  # fmt: skip
def test_iid_dual_norm_against_monte_carlo(name, layer):
    """To leading order: within 30 % for Gaussian entries, whose mean magnitude is 0.80 of their rms."""
    norm = norm_for_layer(name, layer)
    drawn = np.mean([float(norm.dual(gaussian(*layer.parameter.shape, seed=seed))) for seed in range(5)])
    assert 0.75 <= drawn / iid_dual_norm(norm, layer) <= 1.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (9,)], ids=str)
def test_iid_dual_norm_of_vectors(name, shape):
    """The dual of all-ones, which are i.i.d. signs up to symmetry."""
    layer = stored("vector", *shape)
    if name in ("one_to_inf", "rms", "frobenius"):
        assert iid_dual_norm(norm_for_layer(name, layer), layer) == pytest.approx(
            float(norm_for_layer(name, layer).dual(torch.ones(shape)))
        )


def test_a_layer_is_all_that_norms_need():
    layer = Layer("experts", "hidden", torch.ones(2, 3, 4), blocks=2)
    assert update_norm(layer, "spectral").dual(layer.parameter).shape == ()
