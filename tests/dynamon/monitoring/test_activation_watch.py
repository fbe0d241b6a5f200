"""Statistics of outputs and gradients against hooks written by hand in float64, for modules of every kind."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynamon.distributed.ranks import Ranks
from dynamon.monitoring.activation_modules import watched_modules
from dynamon.monitoring.activation_reading import read_activations
from dynamon.monitoring.activation_watch import ActivationWatch
from tests.models import cnn, gpt

CPU = torch.device("cpu")
Loss = Callable[[nn.Module], Tensor]


def readings(model: nn.Module, loss: Loss, samples: int | None = 1, scale: float | None = None, **options: Any) -> dict:
    """Readings of one evaluation, as numbers by name by tag."""
    watch = ActivationWatch(model, **options)
    with watch.watching():
        value = watch.loss(loss(model))
        value.backward(None if scale is None else torch.full_like(value, scale))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tables = read_activations(watch, Ranks(CPU, alone=True), CPU, samples)
    return {tag: dict(zip(names, values.tolist(), strict=True)) for tag, (values, names) in tables.items()}


class ByHand:
    """Outputs of some modules and their gradients, kept whole in float64."""

    def __init__(self, model: nn.Module, loss: Loss, names: list[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        twin = copy.deepcopy(model).double()
        for name in names:
            twin.get_submodule(name).register_forward_hook(self._keep(name))
        loss(twin).backward()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while not isinstance(output, Tensor):
                output = next(iter(output.values())) if isinstance(output, dict) else output[0]
            output.retain_grad()
            self.outputs[name].append((output.detach().clone(), output))

        return hook

    def check(self, found: dict, rtol: float = 2e-5) -> None:
        for name, calls in self.outputs.items():
            entries = np.concatenate([before.numpy().ravel() for before, _ in calls])
            graded = [output.grad.numpy().ravel() for _, output in calls if output.grad is not None]
            expected = {
                "rms": np.sqrt(np.mean(entries**2)),
                "max": np.abs(entries).max(),
                "kurtosis": np.mean(entries**4) / np.mean(entries**2) ** 2,
                "zero": np.mean(entries == 0),
                "gradient": np.sqrt(np.mean(np.concatenate(graded) ** 2)),
            }
            for tag, value in expected.items():
                np.testing.assert_allclose(found[f"activation/{tag}"][name], value, rtol, 1e-9, err_msg=f"{tag} {name}")


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mean_square(inputs: Tensor) -> Loss:
    """Mean squared output for some inputs, in the dtype of the model."""

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        given = inputs.to(dtype) if inputs.is_floating_point() else inputs
        output = model(given)
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, dict) else output[0]
        return output.square().mean()

    return loss


@dataclass
class ModelOutput(OrderedDict):
    """Like that of Hugging Face: a dataclass that is a mapping."""

    last_hidden_state: Tensor = None
    attentions: Any = None

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) is not None:
                self[one.name] = getattr(self, one.name)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states * hidden_states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Attention(nn.Module):
    """Grouped queries, with fused attention or written by hand."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width // 2, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, 4)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        weights = None
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        else:
            weights = F.softmax(query @ key.transpose(2, 3) / 2 + attention_mask, dim=-1, dtype=query.dtype)
            mixed = weights @ value
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.down_proj, self.act_fn = nn.Linear(3 * width, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(width, fused), MLP(width)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        mixed, weights = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class Decoder(nn.Module):
    """A look-alike of a decoder of Hugging Face: keyword arguments, tuples, a mapping as output."""

    def __init__(self, fused: bool = True, width: int = 16, recompute: str = "") -> None:
        super().__init__()
        self.embed_tokens, self.recompute = nn.Embedding(11, width), recompute
        self.layers = nn.ModuleList(DecoderLayer(width, fused) for _ in range(3))
        self.norm = RMSNorm(width)

    def forward(self, input_ids: Tensor) -> ModelOutput:
        states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        mask = torch.full((length, length), torch.finfo(states.dtype).min, dtype=states.dtype).triu(1)
        for layer in self.layers:
            if self.recompute:
                states = checkpoint(layer, states, mask, use_reentrant=self.recompute == "reentrant")[0]
            else:
                states = layer(states, attention_mask=mask)[0]
        return ModelOutput(last_hidden_state=self.norm(states))


class ViTBlock(nn.Module):
    """As in timm: packed projections, attention, MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.cls_token, self.patch_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Conv2d(2, width, 2, 2)
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(2)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1))[:, 0])


class Bottleneck(nn.Module):
    """As in torchvision: one ReLU in place, for several widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Cell(nn.Module):
    """The same cell at every time step, activation functions called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            state = torch.tanh(self.inner(step) + self.outer(state))
        return F.relu(state)


def model_of(kind: str) -> tuple[nn.Module, Loss, list[str]]:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    layers = ["layers.0", "layers.1.mlp.act_fn", "layers.2.self_attn.q_proj", "layers.2.mlp.down_proj", "norm"]
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
        "decoder": (Decoder, tokens(3, 7), ["embed_tokens", "layers.0.input_layernorm", *layers]),
        "decoder by hand": (lambda: Decoder(fused=False), tokens(3, 7), layers),
        "ViT": (ViT, normal(3, 2, 4, 4), ["patch_embed", "blocks.0", "blocks.1.mlp.1", "blocks.1.attn.qkv", "head"]),
        "encoder": (lambda: nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), normal(3, 5, 8),
                    ["layers.0", "layers.1", "layers.0.self_attn", "layers.1.linear1", "layers.1.norm2"]),
        "CNN": (cnn, normal(4, 2, 6, 6), ["0", "1", "2", "3", "4", "6"]),
        "bottlenecks": (lambda: nn.Sequential(nn.Conv2d(2, 8, 1), nn.Sequential(Bottleneck(4), Bottleneck(4))),
                        normal(4, 2, 6, 6), ["0", "1.0", "1.0.conv1", "1.1.bn2", "1.1.relu"]),
        "LSTM": (lambda: nn.Sequential(OrderedDict(lstm=nn.LSTM(4, 6, batch_first=True))), normal(3, 5, 4), ["lstm"]),
        "cell": (Cell, normal(3, 5, 4), ["inner", "outer"]),
    }  # fmt: skip
    make, inputs, names = cases[kind]
    model = make()
    return model, mean_square(inputs), names


KINDS = ["decoder", "decoder by hand", "ViT", "encoder", "CNN", "bottlenecks", "LSTM", "cell"]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_hooks_by_hand(kind) -> None:
    model, loss, names = model_of(kind)
    ByHand(model, loss, names).check(readings(model, loss))


@pytest.mark.parametrize("recompute", ["", "reentrant", "not reentrant"])
def test_what_is_computed_again_counts_once(recompute) -> None:
    model, loss, names = model_of("decoder")
    by_hand = ByHand(model, loss, names)
    model.recompute = recompute
    found = readings(model, loss)
    by_hand.check(found)
    assert set(found["activation/residual"]) == {"layers.0", "layers.1", "layers.2"}
    assert len(found["attention/entropy"]) == 12


def test_gradients_are_those_of_one_sample_and_of_the_unscaled_loss() -> None:
    model, loss, names = model_of("ViT")
    expected = readings(model, loss)["activation/gradient"]
    for options in ({"samples": 3}, {"scale": 4096.0}):
        found = readings(model, loss, **options)["activation/gradient"]
        factor = options.get("samples", 1)
        assert found == pytest.approx({name: factor * value for name, value in expected.items()}, rel=1e-6)


def test_a_second_backward_pass_takes_the_place_of_the_first() -> None:
    model, loss, _ = model_of("ViT")
    expected = readings(model, loss)["activation/gradient"]
    watch = ActivationWatch(model)
    with watch.watching():
        value = watch.loss(loss(model))
        value.backward(torch.full_like(value, 1e30), retain_graph=True)
        value.backward()
    values, names = read_activations(watch, Ranks(CPU, alone=True), CPU, 1)["activation/gradient"]
    assert dict(zip(names, values, strict=True)) == pytest.approx(expected)


def test_the_residual_stream_is_where_blocks_follow_each_other() -> None:
    for kind, blocks in (("decoder", 3), ("ViT", 2), ("encoder", 2), ("bottlenecks", 2), ("CNN", 0), ("cell", 0)):
        model, loss, _ = model_of(kind)
        found = readings(model, loss)
        own = found.get("activation/residual", {})
        assert len(own) == blocks
        assert all(found["activation/rms"][name] == value for name, value in own.items())


class Branches(nn.Module):
    """Experts that all take one tensor, or parts of it."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.experts, self.split = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)), split

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([1, 2, 5]) if self.split else [x] * 3
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


@pytest.mark.parametrize("split", [False, True])
def test_branches_are_no_residual_stream(split) -> None:
    found = readings(Branches(split), mean_square(normal(8, 4)))
    assert "experts.1" in found["activation/rms"] and "activation/residual" not in found


def test_heads_are_those_of_every_kind_of_attention() -> None:
    fused, by_hand = (readings(*model_of(kind)[:2]) for kind in ("decoder", "decoder by hand"))
    assert fused["attention/entropy"] == pytest.approx(by_hand["attention/entropy"], abs=1e-6)
    assert fused["attention/max_logit"] == pytest.approx(by_hand["attention/max_logit"], rel=1e-5)
    assert list(fused["attention/entropy"])[:2] == ["layers.0.self_attn.heads.0", "layers.0.self_attn.heads.1"]
    assert len(readings(*model_of("encoder")[:2])["attention/entropy"]) == 4
    assert list(readings(gpt(), lambda m: m(tokens(2, 6)).square().mean())["attention/entropy"]) == [
        "blocks.0.heads.0",
        "blocks.1.heads.0",
    ]


class ByHandAttention(nn.Module):
    """Attention in the ways in which people write it; ``way`` says how, others than the first four are none."""

    def __init__(self, way: str, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.way, self.num_heads, self.qkv = way, heads, nn.Linear(width, 3 * width)
        self.codebook, self.softmax = nn.Parameter(torch.eye(6, 4)), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        batch = len(x)
        if self.way == "bmm":  # samples and heads in one dimension, masked in four
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            logits = torch.bmm(q, k.transpose(1, 2)) / 2
            logits = (logits.view(batch, -1, *logits.shape[1:]) + torch.zeros(())).view(logits.shape)
            return torch.bmm(F.dropout(F.softmax(logits, dim=-1), 0.0), v).view(batch, self.num_heads, -1, 4)
        if self.way == "einsum":
            logits = torch.einsum("nhid,nhjd->nhij", q, k).mul_(0.5)
            return torch.einsum("nhij,nhjd->nhid", logits.softmax(-1).type_as(q), v)
        if self.way == "baddbmm":
            bias = torch.zeros(batch * self.num_heads, q.shape[2], q.shape[2], dtype=q.dtype)
            logits = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5)
            weights = logits.view(batch, self.num_heads, *logits.shape[1:]).float().softmax(-1).to(v.dtype)
            return weights @ v
        if self.way == "maximum taken off":
            logits = (q @ k.mT) / 2
            return (logits - logits.max(-1, keepdim=True)[0]).softmax(-1) @ v
        if self.way == "maximum taken off, bmm":
            logits = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).mul_(0.5)
            logits -= logits.amax(-1, keepdim=True).detach()
            return logits.softmax(-1) @ v.flatten(0, 1)
        if self.way == "module":
            return self.softmax(torch.matmul(q, k.mT) * 0.5).to(v) @ v
        if self.way == "classes":  # probabilities that multiply a batch, of logits that are no product
            return torch.softmax(q, -1) @ v.mT
        if self.way == "codebook":
            return torch.softmax(q @ k.mT, -1) @ self.codebook
        assert self.way == "loss"
        return torch.softmax(q @ k.mT, -1)


@pytest.mark.parametrize("way", ["bmm", "einsum", "baddbmm", "module", "maximum taken off", "maximum taken off, bmm"])
def test_attention_by_hand_is_that_of_the_fused_function(way) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(attn=ByHandAttention(way)))
    inputs = normal(3, 6, 8)
    found = readings(model, mean_square(inputs))
    q, k, v = model.attn.qkv(inputs).detach().double().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / 2
    weights = logits.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1).mean((0, 2)) / np.log(6)
    names = ["attn.heads.0", "attn.heads.1"]
    assert found["attention/max_logit"] == pytest.approx(
        dict(zip(names, logits.amax((0, 2, 3)).tolist(), strict=True)), rel=1e-5
    )
    assert found["attention/entropy"] == pytest.approx(dict(zip(names, entropy.tolist(), strict=True)), rel=1e-5)


@pytest.mark.parametrize("way", ["classes", "codebook", "loss"])
def test_other_softmaxes_are_no_attention(way) -> None:
    found = readings(nn.Sequential(ByHandAttention(way)), mean_square(normal(3, 6, 8)))
    assert "attention/entropy" not in found and "0.qkv" in found["activation/rms"]


def test_attention_head_by_head_in_a_module_that_states_their_number() -> None:
    class Loop(ByHandAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 3, 0, 1, 4)
            return torch.stack([(q[j] @ k[j].mT / 2).softmax(-1) @ v[j] for j in range(self.num_heads)])

    torch.manual_seed(0)
    model, inputs = Loop("loop"), normal(4, 6, 8)
    found = readings(nn.Sequential(model), mean_square(inputs))["attention/max_logit"]
    q, k, _ = model.qkv(inputs).detach().unflatten(-1, (3, 2, -1)).permute(2, 3, 0, 1, 4)
    largest = (q @ k.mT / 2).amax((1, 2, 3)).tolist()
    assert found == pytest.approx(dict(zip(["0.heads.0", "0.heads_2.0"], largest, strict=True)), rel=1e-5)


def test_gradients_need_the_number_of_samples() -> None:
    model, loss, _ = model_of("ViT")
    found = readings(model, loss, samples=None)
    assert "activation/gradient" not in found and "activation/rms" in found


def test_a_prelu_has_one_row() -> None:
    found = readings(nn.Sequential(nn.Linear(4, 5), nn.PReLU()), mean_square(normal(3, 4)))
    assert list(found["activation/rms"]) == ["0", "1"] and found["activation/saturated"] == {"1": 0.0}


def test_globs_choose_heads_by_their_row_or_their_module() -> None:
    for patterns in (["*.heads"], ["layers.1.self_attn"], ["layers.1.self_attn.*"]):
        for fused in (True, False):
            found = readings(Decoder(fused), mean_square(tokens(3, 7)), patterns=patterns)
            count = 12 if patterns == ["*.heads"] else 4
            assert len(found["attention/entropy"]) == count, patterns
    encoder = model_of("encoder")
    assert len(readings(*encoder[:2], patterns=["*.heads"])["attention/entropy"]) == 4
    without = readings(Decoder(), mean_square(tokens(3, 7)), patterns=["!*.heads"])
    assert "attention/entropy" not in without and "layers.1.self_attn.q_proj" in without["activation/rms"]


def test_layers_of_a_recurrent_module_have_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(lstm=nn.LSTM(4, 6, num_layers=2, batch_first=True)))
    inputs = normal(3, 5, 4)
    found = readings(model, mean_square(inputs))["activation/rms"]
    states = model.lstm(inputs)[1][0].detach().double()
    assert list(found) == ["lstm", "lstm.layer.0", "lstm.layer.1"]
    for layer, state in enumerate(states):
        assert found[f"lstm.layer.{layer}"] == pytest.approx(float(state.square().mean().sqrt()), rel=1e-6)


def test_dead_units_of_modules_and_functions() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(2, 8, 3), nn.ReLU(inplace=True), nn.Linear(8 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.gelu(self.fc(self.relu(self.conv(x)).flatten(1))))

    model = Net()
    with torch.no_grad():
        model.conv.bias[:3] = -100.0
        model.fc.bias[:4] = -50.0
    found = readings(model, mean_square(normal(16, 2, 8, 8)))
    assert found["activation/saturated"] == {"relu": 3 / 8, "gelu": 4 / 10, "tanh": 0.0}
    assert list(found["activation/rms"]) == ["conv", "relu", "fc", "gelu", "tanh"]
    assert found["activation/zero"]["relu"] > 3 / 8


def test_units_of_sequences_are_features_and_those_of_1d_convolutions_channels() -> None:
    for first, shape in ((nn.Conv1d(4, 6, 1), (5, 4, 7)), (nn.Linear(4, 6), (5, 7, 4))):
        with torch.no_grad():
            first.bias[:2] = -100.0
        found = readings(nn.Sequential(first, nn.ReLU()), mean_square(normal(*shape)))
        assert found["activation/saturated"] == {"1": pytest.approx(1 / 3)}


def test_functions_have_a_row_for_each_call_in_a_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.two(F.relu(self.one(x))))

    found = readings(Net(), mean_square(normal(8, 4)))
    assert list(found["activation/rms"]) == ["one", "relu", "two", "relu_2"]
    cell, loss, _ = model_of("cell")
    steps = [f"tanh_{i}" if i > 1 else "tanh" for i in range(1, 6)]
    assert set(readings(cell, loss)["activation/rms"]) == {"inner", "outer", *steps, "relu"}


class Odd(nn.Module):
    """Gives a parameter out as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3))

    def forward(self, x: Any) -> Any:
        return self.table


def test_outputs_of_any_kind() -> None:
    class Pass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Any) -> Any:
            return x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds, self.odd = nn.ModuleList(Pass() for _ in range(6)), Odd()

        def forward(self, x: Tensor) -> Tensor:
            values = [x.long(), x.to(torch.complex64), x[:0], x.sum(), None, {"states": (None, x.bfloat16())}]
            for one, value in zip(self.kinds, values, strict=True):
                one(value)
            return x.sum() + self.odd(x).sum()

    model = Net()
    found = readings(model, lambda m: m(normal(3, 4)))
    assert list(found["activation/rms"]) == ["kinds.5", "odd"]
    assert model.odd.table._backward_hooks in (None, {})


def test_globs_choose_modules_by_their_names_or_those_of_parameters() -> None:
    def chosen(*patterns: str) -> list[str]:
        return [one.name for one in watched_modules(model_of("ViT")[0], patterns).values() if one.is_measured]

    assert chosen("blocks.?") == ["blocks.0", "blocks.1"]
    assert chosen("head.weight", "blocks.0.mlp.*", "!*.3.*") == ["blocks.0.mlp.0", "blocks.0.mlp.1", "head"]
    assert chosen("nothing") == []
    found = readings(gpt(), lambda m: m(tokens(2, 6)).square().mean(), patterns=["blocks.1", "blocks.1.*"])
    assert list(found["attention/entropy"]) == ["blocks.1.heads.0"]
    assert all(name.startswith("blocks.1") for name in found["activation/rms"])


def test_an_exception_leaves_no_hook() -> None:
    model, loss, _ = model_of("ViT")
    with pytest.raises(RuntimeError, match="channels"), ActivationWatch(model).watching():
        model(normal(3, 7, 4, 4)).backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
