"""The seven norms: each is a norm, its dual is the dual, its oracle attains it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynamon.layers import Layer, describe_layers
from dynamon.norms import (
    get_norm,
    iid_dual_norm,
    operator_norm,
    optimizer_family,
    sigma_factor,
    update_norm,
)
from tests.models import cnn, gpt

NAMES = ("rms_to_rms", "one_to_rms", "rms_to_inf", "one_to_inf", "rms", "frobenius", "spectral")
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


@EVERY_NORM
def test_transposed(name):
    norm, g = get_norm(name).transposed(), gaussian(5, 7)
    plain = get_norm(name)
    assert torch.equal(norm.primal(g), plain.primal(g.mT))
    assert torch.equal(norm.dual(g), plain.dual(g.mT))
    assert_oracle_attains_the_dual(norm, g)


@EVERY_NORM
@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 6, 3, 3), (4, 2, 3, 1, 2)], ids=str)
def test_flattened(name, shape):
    norm, g, w = get_norm(name).flattened(), gaussian(*shape), gaussian(*shape, seed=1)
    assert_oracle_attains_the_dual(norm, g)
    assert abs(inner(g, w)) <= float(norm.primal(w) * norm.dual(g))
    if name == "rms_to_rms":
        sigma = np.linalg.svd(g.numpy().reshape(shape[0], -1), compute_uv=False)
        window = math.prod(shape[2:])
        assert float(norm.primal(g)) == pytest.approx(window * math.sqrt(shape[1] / shape[0]) * sigma[0])
        assert float(norm.dual(g)) == pytest.approx(math.sqrt(shape[0] / shape[1]) / window * sigma.sum(), rel=1e-7)
    else:
        assert float(norm.primal(g)) == pytest.approx(float(get_norm(name).primal(g.reshape(shape[0], -1))))


@pytest.mark.parametrize("name", ["rms_to_rms", "one_to_rms", "rms_to_inf", "spectral"])
def test_stacks_are_batched(name):
    norm, g = get_norm(name), gaussian(3, 5, 4)
    for function in (norm.primal, norm.dual, norm.lmo):
        assert torch.allclose(function(g), torch.stack([function(member) for member in g]))


@pytest.mark.parametrize("name", ["one_to_inf", "rms", "frobenius"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_entrywise_norms_take_any_shape(name, shape):
    assert_oracle_attains_the_dual(get_norm(name), gaussian(*shape))


def test_unknown_norm():
    with pytest.raises(ValueError, match="unknown norm 'nuclear'; choose one of frobenius, one_to_inf,"):
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
@pytest.mark.parametrize("shape", [(40, 40), (120, 30), (30, 120)], ids=str)
@pytest.mark.parametrize("form", ["plain", "transposed"])
def test_iid_dual_norm_against_monte_carlo(name, shape, form):
    """To leading order: within 30 % for Gaussian entries, whose mean magnitude is 0.80 of their rms."""
    norm = get_norm(name) if form == "plain" else get_norm(name).transposed()
    drawn = np.mean([float(norm.dual(gaussian(*shape, seed=seed))) for seed in range(5)])
    assert 0.75 <= drawn / iid_dual_norm(norm, torch.empty(shape)) <= 1.05


@pytest.mark.parametrize("name", ["rms_to_rms", "one_to_inf", "frobenius", "one_to_rms"])
def test_iid_dual_norm_of_a_convolution(name):
    norm, shape = get_norm(name).flattened(), (16, 12, 3, 3)
    drawn = np.mean([float(norm.dual(gaussian(*shape, seed=seed))) for seed in range(5)])
    assert 0.75 <= drawn / iid_dual_norm(norm, torch.empty(shape)) <= 1.05


@EVERY_NORM
def test_iid_dual_norm_of_a_stack_is_the_sum_over_its_members(name):
    norm, shape = get_norm(name), (3, 24, 30)
    drawn = np.mean([float(norm.dual(gaussian(*shape, seed=seed)).sum()) for seed in range(5)])
    assert 0.75 <= drawn / iid_dual_norm(norm, torch.empty(shape)) <= 1.05


@pytest.mark.parametrize("name", ["one_to_inf", "rms", "frobenius"])
@pytest.mark.parametrize("shape", [(), (9,), (2, 3, 4)], ids=str)
def test_iid_dual_norm_of_any_shape(name, shape):
    """The dual of all-ones, which are i.i.d. signs up to symmetry."""
    assert iid_dual_norm(get_norm(name), torch.empty(shape)) == pytest.approx(
        float(get_norm(name).dual(torch.ones(shape)))
    )


def test_a_layer_is_all_that_norms_need():
    layer = Layer("experts", "hidden", torch.ones(2, 3, 4))
    assert update_norm(layer, "spectral").dual(layer.parameter).shape == (2,)
