"""The rules of other papers, against what they publish."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.layers import describe_layers
from dynamon.optim import LayerwiseRates
from dynamon.quantities.hill import hill_exponent
from dynamon.rates import HeavyTailRates, disparity_rates
from tests.models import gpt


def by_hand(matrix):
    """Hill's estimate over the upper half of the eigenvalues, as the definition has it."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues = sorted(np.linalg.eigvalsh(gram))
    first = int(len(eigenvalues) / 2)
    tail = eigenvalues[first:]
    return 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)


@pytest.mark.parametrize("shape", [(60, 90), (51, 51)])
def test_the_exponent_is_hills_estimate_over_the_upper_half(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    assert float(hill_exponent(torch.tensor(matrix))) == pytest.approx(by_hand(matrix), rel=1e-9)


def model():
    """Matrices large enough to be read, small ones, vectors, an embedding and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(70, 64), nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 10), nn.Linear(10, 70)
    )


def step(rates, network):
    network(torch.arange(8)).square().mean().backward()
    rates.optimizer.step()
    return rates.applied


def test_ratios_are_mapped_linearly_and_embedding_and_head_are_pinned():
    network = model()
    rule = HeavyTailRates(1.0, 3.0, ramp=0)
    rates = LayerwiseRates(torch.optim.SGD(network.parameters(), lr=0.0), rule, network)
    first, second = (by_hand(network[index].weight.detach().double().numpy()) for index in (1, 2))
    applied = step(rates, network)  # the first step already
    assert rule.exponents == pytest.approx({"1.weight": first, "2.weight": second})
    low, high = ("1", "2") if first < second else ("2", "1")
    assert applied[f"{low}.weight"] == applied[f"{low}.bias"] == 1
    assert applied[f"{high}.weight"] == applied[f"{high}.bias"] == 3
    assert applied["0.weight"] == applied["4.weight"] == applied["4.bias"] == 3
    assert applied["3.weight"] == applied["3.bias"] == 1  # ten eigenvalues are too few


def test_ratios_move_along_a_line_after_each_reading():
    network = model()
    rule = HeavyTailRates(1.0, 3.0, refresh=4, ramp=2)
    rates = LayerwiseRates(torch.optim.SGD(network.parameters(), lr=0.0), rule, network)
    assert [step(rates, network)["0.weight"] for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]


def test_the_blocks_of_a_transformer_have_the_published_ratios():
    network = gpt()
    rule = disparity_rates(describe_layers(network))
    rates = LayerwiseRates(torch.optim.AdamW(network.parameters()), rule, network)
    found = {name: round(6 * ratio, 6) for name, ratio in rates.ratios.items()}
    roles = {layer.name: layer.role for layer in rates.layers}
    assert {found[name] for name, role in roles.items() if role in ("embedding", "head")} == {10}
    assert {found[name] for name, role in roles.items() if role == "vector"} == {1}
    assert {ratio for name, ratio in found.items() if "qkv" in name and roles[name] == "hidden"} == {8}


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 8),
        ("model.layers.3.self_attn.v_proj.weight", 4),
        ("model.layers.3.self_attn.o_proj.weight", 4),
        ("model.layers.3.mlp.up_proj.weight", 6),
        ("transformer.h.0.attn.c_attn.weight", 8),
        ("transformer.h.0.attn.c_proj.weight", 4),
        ("transformer.h.0.mlp.c_proj.weight", 6),
        ("encoder.layer.1.attention.self.query.weight", 8),
    ],
)
def test_names_that_models_give_their_layers(name, ratio):
    layer = describe_layers(nn.ModuleDict({"x": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}))[0]
    renamed = type(layer)(name, "hidden", layer.parameter)
    rule = disparity_rates([renamed])
    rule.start([renamed], [])
    assert rule.ratios()[0] == pytest.approx(ratio / 6)
