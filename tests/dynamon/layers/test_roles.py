"""Names and roles of weight tensors, on the models people bring."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynamon.layers import ROLES, ConvGeometry, Layer, describe_layers, known_layers, layer_table, select
from tests.models import cnn, gpt, mlp


def roles(model, overrides=None):
    return {layer.name: layer.role for layer in describe_layers(model, overrides)}


def by_name(model, overrides=None):
    return {layer.name: layer for layer in describe_layers(model, overrides)}


def named(names):
    """A module with the given submodules and parameters at dotted names, as Hugging Face and timm name them."""
    root = nn.Module()
    for name, value in names.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, value) if isinstance(value, nn.Parameter) else at.add_module(last, value)
    return root


def matrices_of(model):
    """Names of everything but vectors, by role."""
    found = {}
    for name, role in roles(model).items():
        if role != "vector":
            found.setdefault(role, set()).add(name)
    return found


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils."""

    def __init__(self, outer, inner):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer)), nn.Parameter(torch.zeros(outer))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


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


# Names of Hugging Face and timm


def hf_gpt2(tied=True):
    names = {"transformer.wte": nn.Embedding(11, 8), "transformer.wpe": nn.Embedding(6, 8)}
    for i in range(2):
        names |= {
            f"transformer.h.{i}.ln_1": nn.LayerNorm(8),
            f"transformer.h.{i}.attn.c_attn": Conv1D(24, 8),
            f"transformer.h.{i}.attn.c_proj": Conv1D(8, 8),
            f"transformer.h.{i}.ln_2": nn.LayerNorm(8),
            f"transformer.h.{i}.mlp.c_fc": Conv1D(32, 8),
            f"transformer.h.{i}.mlp.c_proj": Conv1D(8, 32),
        }
    model = named(names | {"transformer.ln_f": nn.LayerNorm(8), "lm_head": nn.Linear(8, 11, bias=False)})
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_gpt2(tied):
    model = hf_gpt2(tied)
    hidden = {f"transformer.h.{i}.{n}.weight" for i in (0, 1)
              for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    expected = {"embedding": {"transformer.wte.weight", "transformer.wpe.weight"}, "hidden": hidden}
    assert matrices_of(model) == expected | ({} if tied else {"head": {"lm_head.weight"}})
    layers = by_name(model)
    assert layers["transformer.wte.weight"].aliases == (("lm_head.weight",) if tied else ())
    assert {name for name, layer in layers.items() if layer.inputs_first} == hidden
    assert {name for name, layer in layers.items() if layer.blocks > 1} == {
        f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)
    }
    assert layers["transformer.h.0.attn.c_attn.weight"].matrices().shape == (3, 8, 8)
    assert layers["transformer.h.0.mlp.c_fc.weight"].matrices().shape == (1, 32, 8)
    assert layers["transformer.wte.weight"].matrices().shape == (1, 8, 11)  # a token is a column


def test_hugging_face_bert():
    names = {
        "bert.embeddings.word_embeddings": nn.Embedding(11, 8),
        "bert.embeddings.position_embeddings": nn.Embedding(6, 8),
        "bert.embeddings.token_type_embeddings": nn.Embedding(2, 8),
        "bert.embeddings.LayerNorm": nn.LayerNorm(8),
    }
    block = {"attention.self.query": (8, 8), "attention.self.key": (8, 8), "attention.self.value": (8, 8),
             "attention.output.dense": (8, 8), "intermediate.dense": (8, 32), "output.dense": (32, 8)}  # fmt: skip
    names |= {f"bert.encoder.layer.{i}.{n}": nn.Linear(*sides) for i in (0, 1) for n, sides in block.items()}
    names |= {"bert.pooler.dense": nn.Linear(8, 8)}
    embeddings = {f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")}
    hidden = {f"bert.encoder.layer.{i}.{n}.weight" for i in (0, 1) for n in block} | {"bert.pooler.dense.weight"}
    assert matrices_of(named(names)) == {"embedding": embeddings, "hidden": hidden}
    head = {"classifier.dense": nn.Linear(8, 8), "classifier.out_proj": nn.Linear(8, 3)}  # as RoBERTa
    assert matrices_of(named(names | head)) == {
        "embedding": embeddings,
        "hidden": hidden | {"classifier.dense.weight"},
        "head": {"classifier.out_proj.weight"},
    }


def test_hugging_face_llama():
    block = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 4), "self_attn.v_proj": (8, 4),
             "self_attn.o_proj": (8, 8), "mlp.gate_proj": (8, 24), "mlp.up_proj": (8, 24),
             "mlp.down_proj": (24, 8)}  # fmt: skip
    names = {"model.embed_tokens": nn.Embedding(11, 8)}
    names |= {f"model.layers.{i}.{n}": nn.Linear(*s, bias=False) for i in (0, 1) for n, s in block.items()}
    names |= {f"model.layers.{i}.input_layernorm": nn.RMSNorm(8) for i in (0, 1)}
    hidden = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in block}
    assert matrices_of(named(names)) == {"embedding": {"model.embed_tokens.weight"}, "hidden": hidden}
    model = named(names | {"model.norm": nn.RMSNorm(8), "lm_head": nn.Linear(8, 11, bias=False)})
    assert matrices_of(model) == {
        "embedding": {"model.embed_tokens.weight"},
        "hidden": hidden,
        "head": {"lm_head.weight"},
    }
    assert all(layer.blocks == 1 for layer in describe_layers(model))  # gate_proj: out == 3 in, but no packed name


@pytest.mark.parametrize("head", ["head.fc", "fc", "classifier", "head", "classifier.6", "heads.head"])
def test_timm_cnn(head):
    blocks = {f"stages.{i}.blocks.0.{n}": conv for i in (0, 1) for n, conv in {
        "conv_dw": nn.Conv2d(8, 8, 3, groups=8, bias=False), "conv_pw": nn.Conv2d(8, 8, 1, bias=False),
        "bn1": nn.BatchNorm2d(8)}.items()}  # fmt: skip
    blocks |= {"stages.1.blocks.0.se.fc1": nn.Conv2d(8, 1, 1), "stages.1.blocks.0.mlp.fc2": nn.Linear(8, 8)}
    model = named({"stem.0": nn.Conv2d(3, 8, 4, 4), "stem.1": nn.BatchNorm2d(8), **blocks, head: nn.Linear(8, 5)})
    assert matrices_of(model) == {
        "conv": {"stem.0.weight", "stages.1.blocks.0.se.fc1.weight"}
        | {f"stages.{i}.blocks.0.conv_{n}.weight" for i in (0, 1) for n in ("dw", "pw")},
        "hidden": {"stages.1.blocks.0.mlp.fc2.weight"},
        "head": {f"{head}.weight"},
    }
    assert by_name(model)["stages.0.blocks.0.conv_dw.weight"].blocks == 8


def test_every_named_head_and_none_inside_blocks():
    model = named({"head": nn.Linear(8, 3), "head_dist": nn.Linear(8, 3), "score": nn.Linear(8, 1),
                   "blocks.0.router.classifier": nn.Linear(8, 4)})  # fmt: skip
    assert matrices_of(model)["head"] == {"head.weight", "score.weight"}
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"head": nn.Linear(4, 2)}))
    assert matrices_of(model)["head"] == {"1.head.weight"}


def test_a_projection_of_positions_is_no_embedding():
    model = named({"pos_proj": nn.Linear(4, 4), "pos_conv": nn.Conv1d(4, 4, 3), "pos.table": nn.Embedding(5, 4),
                   "head": nn.Linear(4, 2)})  # fmt: skip
    assert matrices_of(model) == {
        "hidden": {"pos_proj.weight"},
        "conv": {"pos_conv.weight"},
        "embedding": {"pos.table.weight"},
        "head": {"head.weight"},
    }


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1), nn.Embedding(5, 1), nn.LSTM(1, 3), Conv1D(1, 4), nn.RNNCell(1, 2)],
    ids=lambda module: type(module).__name__,
)
def test_a_side_of_one_does_not_make_a_vector(module):
    for name, role in roles(module).items():
        assert (role == "vector") == ("bias" in name)


@pytest.mark.parametrize("normalise", ["weight_norm", "old_weight_norm", "spectral_norm", "old_spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_parametrized_weights(normalise):
    wrap = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old_weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "old_spectral_norm": nn.utils.spectral_norm,
    }[normalise]
    model = named({"conv": wrap(nn.Conv2d(4, 6, 3, groups=2)), "qkv": wrap(nn.Linear(6, 18)),
                   "head": wrap(nn.Linear(6, 2))})  # fmt: skip
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = describe_layers(model)
    assert [(layer.name.split(".")[0], layer.role, layer.blocks) for layer in layers if layer.role != "vector"] == [
        ("conv", "conv", 2),
        ("qkv", "hidden", 3),
        ("head", "head", 1),
    ]
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())  # no power step taken


def test_compiled_head_and_blocks():
    model = mlp(4, 5, 3)
    plain = roles(model)
    model[2] = torch.compile(model[2])
    assert roles(model) == plain
    model = hf_gpt2(tied=False)
    plain = [(layer.name, layer.role, layer.blocks, layer.inputs_first) for layer in describe_layers(model)]
    model.lm_head = torch.compile(model.lm_head)
    model.transformer.h._modules["1"] = torch.compile(model.transformer.h._modules["1"])
    assert [(layer.name, layer.role, layer.blocks, layer.inputs_first) for layer in describe_layers(model)] == plain


# Blocks and matrices


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_matrices_of_convolutions(kind, groups):
    kernel = (3, 2, 2)[: {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]]
    conv = kind(4, 8, kernel, groups=groups, bias=False)
    layer = by_name(conv)["weight"]
    matrices = layer.matrices()
    assert layer.blocks == groups and matrices.shape[0] == groups
    patch = torch.randn(4, *kernel)
    expected = torch.cat([m @ part.flatten() for m, part in zip(matrices, patch.chunk(groups), strict=True)])
    torch.testing.assert_close(conv(patch[None]).flatten(), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_matrices_of_transposed_convolutions(kind, groups):
    kernel = (3, 2)[: 1 if kind is nn.ConvTranspose1d else 2]
    conv = kind(4, 6, kernel, groups=groups, bias=False)
    layer = by_name(conv)["weight"]
    matrices = layer.matrices()
    assert layer.role == "conv" and matrices.shape == (groups, 6 // groups, 4 // groups * torch.Size(kernel).numel())
    for channel in range(4):  # a unit vector at one pixel spreads the kernel of that channel
        pixel = torch.zeros(1, 4, *[1] * len(kernel))
        pixel[0, channel] = 1
        group, within = divmod(channel, 4 // groups)
        spread = torch.zeros(groups, 6 // groups, *kernel)
        spread[group] = matrices[group].unflatten(1, (4 // groups, *kernel))[:, within]
        torch.testing.assert_close(conv(pixel)[0], spread.flatten(0, 1))


def test_geometry():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=2, groups=2, padding_mode="circular")
    assert by_name(conv)["weight"].conv == ConvGeometry((2, 2), (1, 0), (2, 2), 2, False, "circular")
    assert by_name(nn.Conv1d(2, 2, 3, padding="same"))["weight"].conv.padding == "same"
    assert by_name(nn.ConvTranspose1d(2, 4, 3))["weight"].conv.transposed
    assert by_name(conv)["bias"].conv is None and by_name(mlp(3, 4))["0.weight"].conv is None


def test_matrices_of_hugging_face_conv1d():
    module = named({"attn.c_attn": Conv1D(12, 4)})
    layer = by_name(module)["attn.c_attn.weight"]
    computed = module.attn.c_attn(torch.eye(4)).detach().T  # unit vectors to columns [out, in]
    torch.testing.assert_close(layer.matrices().flatten(0, 1), computed)
    torch.testing.assert_close(layer.matrices()[1], computed[4:8])


def test_matrices_of_attention():
    attention = nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
    query, key, value = by_name(attention)["in_proj_weight"].matrices()
    x = torch.randn(1, 5, 4)
    mixed = F.scaled_dot_product_attention(x @ query.mT, x @ key.mT, x @ value.mT)
    torch.testing.assert_close(attention(x, x, x)[0], attention.out_proj(mixed))
    separate = nn.MultiheadAttention(6, 1, kdim=2, vdim=4)
    assert all(layer.blocks == 1 for layer in describe_layers(separate))


def test_blocks_of_a_transformer_encoder():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    packed = {layer.name: layer.matrices().shape for layer in describe_layers(model) if layer.blocks > 1}
    assert packed == {f"layers.{i}.self_attn.in_proj_weight": (3, 8, 8) for i in (0, 1)}


@pytest.mark.parametrize(
    "name", ["qkv", "attn.qkv", "to_qkv", "qkv_proj", "Wqkv", "c_attn", "in_proj", "qkv.base_layer"]
)
def test_packed_names(name):
    assert by_name(named({name: nn.Linear(4, 12)}))[f"{name}.weight"].blocks == 3
    assert by_name(named({name: nn.Linear(4, 8)}))[f"{name}.weight"].blocks == 1  # grouped queries: not three alike
    assert by_name(named({f"my{name}2": nn.Linear(4, 12)}))[f"my{name}2.weight"].blocks == 1


def test_matrices_of_recurrent_layers():
    x, h, c = torch.randn(3), torch.randn(5), torch.randn(5)
    lstm = nn.LSTM(3, 5, bias=False)
    layers = by_name(lstm)
    gates = layers["weight_ih_l0"].matrices() @ x + layers["weight_hh_l0"].matrices() @ h
    i, f, g, o = gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
    torch.testing.assert_close(lstm(x[None], (h[None], c[None]))[0][0], o * (f * c + i * g).tanh())
    gru = nn.GRUCell(3, 5, bias=False)
    layers = by_name(gru)
    inner, outer = layers["weight_ih"].matrices() @ x, layers["weight_hh"].matrices() @ h
    r, z = (inner[:2] + outer[:2]).sigmoid()
    torch.testing.assert_close(gru(x[None], h[None])[0], (1 - z) * (inner[2] + r * outer[2]).tanh() + z * h)
    for module, blocks in (
        (nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), 4),
        (nn.GRU(2, 3), 3),
        (nn.RNN(2, 3), 1),
    ):
        for layer in describe_layers(module):
            weights = "weight_ih" in layer.name or "weight_hh" in layer.name
            assert layer.blocks == (blocks if weights else 1)


def test_stacked_experts():
    model = named({"mlp.experts.up_proj": nn.Parameter(torch.randn(3, 6, 4)), "mlp.gate": nn.Linear(4, 3),
                   "lm_head": nn.Linear(4, 5)})  # fmt: skip
    layer = by_name(model)["mlp.experts.up_proj"]
    assert (layer.role, layer.blocks, layer.parameter.ndim) == ("hidden", 3, 3)
    assert torch.equal(layer.matrices(), layer.parameter)
    deep = nn.Module()
    deep.stack = nn.Parameter(torch.randn(2, 3, 5, 4))
    assert by_name(deep)["stack"].blocks == 6 and by_name(deep)["stack"].matrices().shape == (6, 5, 4)


def test_matrices_are_views_with_gradients():
    model = nn.ModuleList([nn.Conv2d(4, 6, 3, groups=2), nn.Linear(4, 12), nn.Embedding(5, 4), Conv1D(4, 3)])
    for layer in describe_layers(model):
        if layer.role != "vector":
            assert layer.matrices().data_ptr() == layer.parameter.data_ptr()
            assert layer.matrices().requires_grad and layer.matrices().shape[0] == layer.blocks
    channels_last = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    assert torch.equal(by_name(channels_last)["weight"].matrices()[0], channels_last.weight.flatten(1))


def test_vectors_have_no_matrices():
    for name, layer in by_name(gpt()).items():
        if layer.role == "vector":
            with pytest.raises(ValueError, match=name):
                layer.matrices()


def test_layers_made_by_hand():
    assert Layer("w", "hidden", torch.ones(3, 4)).matrices().shape == (1, 3, 4)
    assert Layer("w", "hidden", torch.ones(6, 4), blocks=3).matrices().shape == (3, 2, 4)
    assert Layer("w", "hidden", torch.ones(2, 3, 4)).matrices().shape == (2, 3, 4)
    assert Layer("w", "conv", torch.ones(6, 4, 3, 3)).matrices().shape == (1, 6, 36)


# LoRA


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight", ".my_adapter.weight"])
@pytest.mark.parametrize("stem", ["lora_A", "lora_a"])
def test_lora_pairs(stem, suffix):
    other = stem.replace("A", "B").replace("a", "b").replace("lorb", "lora")
    base = "model.layers.0.q_proj"

    def factor(*shape):
        if suffix:
            linear = nn.Linear(shape[1], shape[0], bias=False)
            return {suffix.removesuffix(".weight"): linear}
        return {"": nn.Parameter(torch.ones(shape))}

    names = {f"{base}.base_layer": nn.Linear(4, 6)}
    names |= {f"{base}.{stem}{end}": value for end, value in factor(1, 4).items()}
    names |= {f"{base}.{other}{end}": value for end, value in factor(6, 1).items()}
    layers = by_name(named(names))
    a, b = f"{base}.{stem}{suffix}", f"{base}.{other}{suffix}"
    assert layers[a].role == layers[b].role == "hidden"
    assert layers[a].matrices().shape == (1, 1, 4) and layers[b].matrices().shape == (1, 6, 1)


def test_lora_on_head_embedding_and_convolution():
    model = named({
        "embed.base_layer": nn.Embedding(9, 4),
        "embed.lora_embedding_A.default": nn.Parameter(torch.ones(2, 9)),
        "embed.lora_embedding_B.default": nn.Parameter(torch.ones(4, 2)),
        "conv.lora_A.default": nn.Conv2d(4, 2, 3), "conv.lora_B.default": nn.Conv2d(2, 4, 1),
        "qkv.base_layer": nn.Linear(4, 12), "qkv.lora_A.default": nn.Linear(4, 4),
        "qkv.lora_B.default": nn.Linear(4, 12),
        "lm_head.base_layer": nn.Linear(4, 9), "lm_head.lora_A.default": nn.Linear(4, 2),
        "lm_head.lora_B.default": nn.Linear(2, 9),
    })  # fmt: skip
    layers = by_name(model)
    assert matrices_of(model)["head"] == {"lm_head.base_layer.weight"}
    assert matrices_of(model)["embedding"] == {"embed.base_layer.weight"}
    assert matrices_of(model)["conv"] == {"conv.lora_A.default.weight", "conv.lora_B.default.weight"}
    assert (layers["qkv.base_layer.weight"].blocks, layers["qkv.lora_B.default.weight"].blocks) == (3, 1)


# Overrides


def test_overrides():
    model = gpt()
    changed = roles(model, {"blocks.0.*": "embedding", "blocks.0.mlp.*": "head", "lm_head.weight": "hidden"})
    expected = roles(model)
    for name in expected:
        if name.startswith("blocks.0.") and expected[name] == "hidden":
            expected[name] = "head" if ".mlp." in name else "embedding"
    assert changed == expected | {"lm_head.weight": "hidden"}  # biases and gains stay vectors


def test_the_later_override_wins():
    model = mlp(3, 4, 2)
    assert roles(model, {"*": "head", "0.weight": "hidden"})["0.weight"] == "hidden"
    assert roles(model, {"0.weight": "hidden", "*": "head"})["0.weight"] == "head"


def test_overrides_by_alias():
    layer = by_name(gpt(tied=True), {"lm_head.weight": "head"})["wte.weight"]
    assert layer.role == "head" and not layer.rows_are_tokens


def test_overrides_keep_the_rest_in_step():
    model = named({"qkv": nn.Linear(4, 12), "stem": nn.Linear(9, 4), "table": nn.Parameter(torch.ones(9, 4)),
                   "kernel": nn.Parameter(torch.ones(4, 2, 3, 3)), "head": nn.Linear(4, 2)})  # fmt: skip
    layers = by_name(
        model, {"qkv.weight": "vector", "stem.weight": "embedding", "table": "embedding", "kernel": "conv"}
    )
    assert layers["qkv.weight"].blocks == 1
    assert not layers["stem.weight"].rows_are_tokens  # one-hot inputs: [d, tokens]
    assert layers["table"].rows_are_tokens
    assert layers["kernel"].blocks == 1 and layers["kernel"].matrices().shape == (1, 4, 18)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"0.weight": "hiden"}, "unknown role 'hiden' for '0.weight'"),
        ({"nothing.*": "hiden"}, "hiden"),
        ({"6.weight": "hidden", "nothing.*": "hidden"}, r"'nothing\.\*' matches no parameter"),
        ({"*.bias": "hidden"}, r"'\*\.bias' matches nothing that can be 'hidden', only 0\.bias"),
        ({"0.*": "hidden"}, "0.weight"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(ValueError, match=message):
        describe_layers(cnn(), overrides)


# The table


def test_table():
    model = gpt(tied=True)
    lines = layer_table(describe_layers(model)).splitlines()
    assert lines[0].split() == ["name", "role", "shape", "blocks", "aliases"]
    assert len(lines) == 1 + len(describe_layers(model))
    assert lines[1].split("  ")[0] == "wte.weight" and lines[1].endswith("  lm_head.weight")
    packed = next(line for line in lines if line.startswith("blocks.0.qkv.weight"))
    columns = [lines[0].index(title) for title in ("role", "shape", "blocks")]
    assert [packed[at:].split("  ")[0] for at in columns] == ["hidden", "24 x 8", "3"]
    assert all(line == line.rstrip() for line in lines)


def test_table_of_a_scalar_and_of_nothing():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    assert layer_table(describe_layers(model)).splitlines()[1].split() == ["scale", "vector", "scalar"]
    assert layer_table([]) == "name  role  shape  blocks  aliases"


def test_a_model_may_state_its_roles():
    model = mlp(6, 8, 4)
    model.dynamon_roles = {"0.weight": "embedding", "2.*": "hidden"}
    assert roles(model) == {"0.weight": "embedding", "0.bias": "vector", "2.weight": "hidden", "2.bias": "vector"}
    assert roles(model, {"2.weight": "head"})["2.weight"] == "head"
    model.dynamon_roles = {"nope": "hidden"}
    with pytest.raises(ValueError, match="the override 'nope' matches no parameter"):
        describe_layers(model)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        describe_layers([model])


def test_roles_of_lazy_modules_wait_for_their_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    model.dynamon_roles = {"0.weight": "embedding"}
    assert [layer.role for layer in known_layers(model)] == ["head", "vector"]
    model(torch.ones(1, 3))
    assert roles(model)["0.weight"] == "embedding"
