"""Names and roles of weight tensors, on the models people bring."""

import pytest
import torch
from torch import nn

from dynamon.layers import ROLES, describe_layers, select
from tests.models import cnn, gpt, mlp


def roles(model):
    return {layer.name: layer.role for layer in describe_layers(model)}


def test_mlp():
    assert roles(mlp(4, 5, 5, 3)) == {
        "0.weight": "hidden",
        "0.bias": "vector",
        "2.weight": "hidden",
        "2.bias": "vector",
        "4.weight": "head",
        "4.bias": "vector",
    }


@pytest.mark.parametrize("tied", [False, True])
def test_gpt(tied):
    model = gpt(tied=tied)
    layers = describe_layers(model)
    found = roles(model)
    matrices = {name: role for name, role in found.items() if role != "vector"}
    blocks = {f"blocks.{i}.{name}.weight": "hidden" for i in (0, 1) for name in ("qkv", "proj", "mlp.0", "mlp.2")}
    head = {} if tied else {"lm_head.weight": "head"}
    assert matrices == {"wte.weight": "embedding", "wpe.weight": "embedding", **blocks, **head}
    assert all(name.endswith("bias") or "ln" in name for name, role in found.items() if role == "vector")
    assert layers[0].aliases == (("lm_head.weight",) if tied else ())
    assert [layer.rows_are_tokens for layer in layers] == [layer.role == "embedding" for layer in layers]
    assert len(layers) == len(list(model.parameters()))
    assert all(layer.parameter is dict(model.named_parameters())[layer.name] for layer in layers)


def test_cnn_with_batchnorm():
    assert roles(cnn()) == {
        "0.weight": "conv",
        "0.bias": "vector",
        "1.weight": "vector",
        "1.bias": "vector",
        "3.weight": "conv",
        "3.bias": "vector",
        "6.weight": "head",
        "6.bias": "vector",
    }


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_convolutions(kind):
    assert roles(kind(2, 4, 3))["weight"] == "conv"


def test_transformer_encoder():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    found = roles(model)
    hidden = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert {name for name, role in found.items() if role == "hidden"} == {
        f"layers.{i}.{n}" for i in (0, 1) for n in hidden
    }
    assert set(found.values()) == {"hidden", "vector"}


def test_lstm_with_a_decoder():
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "rnn": nn.LSTM(4, 5, 2), "decoder": nn.Linear(5, 9)})
    found = roles(model)
    assert found["tokens.weight"] == "embedding" and found["decoder.weight"] == "head"
    assert {role for name, role in found.items() if "weight_" in name} == {"hidden"}
    assert {role for name, role in found.items() if "bias" in name} == {"vector"}


def test_a_named_head_is_found_before_the_end():
    model = nn.ModuleDict({"classifier": nn.Linear(4, 3), "auxiliary": nn.Linear(4, 4)})
    assert roles(model)["classifier.weight"] == "head" and roles(model)["auxiliary.weight"] == "hidden"


@pytest.mark.parametrize("name", ["pos", "pos_emb", "pos_embed", "position", "wpe", "positional"])
def test_learned_positions_are_embeddings(name):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(1, 5, 4)))
    assert roles(model) == {name: "embedding"}


def test_a_name_that_only_contains_pos_is_no_position():
    model = nn.ModuleDict({"compose": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert roles(model)["compose.weight"] == "hidden"


def test_compiled_and_wrapped_submodules_keep_their_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = gpt()
    plain = roles(model)
    model.blocks[0] = torch.compile(model.blocks[0])
    model.blocks[1].mlp = checkpoint_wrapper(model.blocks[1].mlp)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert roles(model) == plain
    assert roles(torch.compile(model)) == plain
    assert roles(torch.compile(mlp(4, 5, 3))) == roles(mlp(4, 5, 3))


def test_odd_parameters():
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.frozen = nn.Parameter(torch.ones(3, 4), requires_grad=False)
    model.column = nn.Parameter(torch.ones(4, 1))
    model.gain = nn.Parameter(torch.ones(1, 1, 4))
    model.stack = nn.Parameter(torch.ones(2, 3, 4))
    assert roles(model) == {
        "scalar": "vector",
        "frozen": "hidden",
        "column": "vector",
        "gain": "vector",
        "stack": "hidden",
    }


def test_a_linear_layer_with_one_output_is_a_matrix():
    assert roles(mlp(4, 5, 1))["2.weight"] == "head"
    assert roles(mlp(1, 5, 2))["0.weight"] == "hidden"


def test_a_model_without_parameters():
    assert describe_layers(nn.ReLU()) == []


def test_the_model_is_not_changed():
    model = gpt(tied=True)
    before = {name: (id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)}
    describe_layers(model)
    assert {name: (id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert {layer.role for layer in describe_layers(model)} <= set(ROLES)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["*"], ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2.*", "0.weight"], ["0.weight", "2.weight", "2.bias"]),
        (["!*.bias"], ["0.weight", "2.weight"]),
        (["0.*", "!*.bias"], ["0.weight"]),
        (["[02].bias"], ["0.bias", "2.bias"]),
        (["weight"], []),
        ([], ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_select(patterns, chosen):
    assert [layer.name for layer in select(describe_layers(mlp(3, 4, 2)), patterns)] == chosen


def test_select_by_alias():
    layers = describe_layers(gpt(tied=True))
    assert [layer.name for layer in select(layers, ["lm_head.*"])] == ["wte.weight"]
    assert "wte.weight" not in [layer.name for layer in select(layers, ["!lm_head.*"])]
