"""What the weight tensors of a model are: their names and roles."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from dynamon.distributed.dtensor import is_sharded
from dynamon.layers.complex_pairs import COMPLEX, real_numel
from dynamon.quantities.names import is_chosen, plain_name

ROLES = ("hidden", "embedding", "head", "conv", "vector")
_HEAD_NAMES = {"head", "lm_head", "classifier", "logits", "output_projection", "score", "fc_out"}
_POSITION_NAMES = re.compile(r"(^|[._])(pos|position|positional|wpe|posemb|pos_emb|pos_embed)([._]|$)")
_TOKEN_NAMES = re.compile(r"(^|[._])(tokens?|prompts?|queries|query_embed|latents)([._]\d+)?$")
_GAIN_NAMES = re.compile(
    r"(^|[._])(gain|gamma|beta|scale|layer_?scale|scale_shift_table|bias|biases|A_log)([._]?\d+)?$"
)
_NORM_CLASSES = re.compile(r"Norm(\d?d|\d*|Gated)$", re.IGNORECASE)
_ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU, _NormBase)
_LORA_NAMES = re.compile(r"((?:^|[._])lora_(?:embedding_)?)([AaBb])(?=\.|$)")
_PACKED_QKV = re.compile(
    r"(^|[._])(qkv|to_qkv|qkv_proj|Wqkv|c_attn|in_proj)"
    r"([._](base_layer|parametrizations|weight|weight_v|weight_orig|original|original1))*$"
)

_Use = tuple[nn.Module, str]  # a module and the name under which it holds a parameter


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution applies its kernel, as the module's arguments of the same names say."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str


@dataclass(frozen=True)
class Layer:
    """One weight tensor of a model.

    Attributes:
        name: Parameter name, the first one where the weight is tied, without the segments that
            ``torch.compile`` and checkpoint wrappers insert.
        role: ``"hidden"``, ``"embedding"``, ``"head"``, ``"conv"`` or ``"vector"``.
        parameter: The tensor itself.
        aliases: Further names of the same tensor (tied weights).
        rows_are_tokens: True for embeddings stored ``[tokens, d]``, whose linear map is the transpose.
        blocks: How many matrices the tensor holds: packed along the outputs (queries, keys and values in one, the
            gates of an LSTM), stacked along the first dimension (experts), or the groups of a convolution.
        conv: The geometry where the tensor is the weight of a convolution.
        inputs_first: True for matrices stored ``[in, out]``, as ``Conv1D`` of Hugging Face does.
    """

    name: str
    role: str
    parameter: Tensor
    aliases: tuple[str, ...] = ()
    rows_are_tokens: bool = False
    blocks: int = 1
    conv: ConvGeometry | None = None
    inputs_first: bool = False

    def __repr__(self) -> str:
        """Name, role and shape; not the weights."""
        shape = " x ".join(map(str, self.parameter.shape)) or "scalar"
        further = f", {self.blocks} blocks" if self.blocks > 1 else ""
        further += f", also {', '.join(self.aliases)}" if self.aliases else ""
        return f"Layer({self.name!r}, {self.role}, {shape}{further})"

    def matrices(self, tensor: Tensor | None = None) -> Tensor:
        """A tensor stored as the weight is, as the matrices of the linear maps it stands for.

        Args:
            tensor: A gradient, a step, anything of the parameter's shape; the weight itself by default.

        Returns:
            ``[blocks, out, in]``, a view where that is possible. A convolution gives ``[groups, out / groups,
            in / groups * prod(k)]``, what it does with one patch of its input; a transposed one the same, with the
            kernel not flipped. An embedding gives ``[1, d, tokens]``, whose columns are the tokens.

        Raises:
            ValueError: For a vector.
        """
        weight = self.parameter if tensor is None else tensor
        if self.role == "vector" or weight.ndim < 2:
            raise ValueError(f"{self.name} is a vector and has no matrices.")
        if self.conv is not None:
            grouped = weight.unflatten(0, (self.conv.groups, -1))
            return (grouped.transpose(1, 2) if self.conv.transposed else grouped).flatten(2)
        if self.role == "conv":
            return weight.flatten(1).unflatten(0, (self.blocks, -1))
        if weight.ndim > 2:
            stacked = weight.flatten(0, -3)
            return stacked.mT if self._is_transposed else stacked
        return (weight.mT if self._is_transposed else weight).unflatten(0, (self.blocks, -1))

    @property
    def size(self) -> int:
        """Real numbers in the weight, of which a complex entry holds two."""
        return real_numel(self.parameter)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(blocks, out, in)`` of :meth:`matrices`; told without the weight, of which this process may hold a part."""
        blocks, outputs, inputs = self.matrices(torch.empty(self.parameter.shape, device="meta")).shape
        return blocks, outputs, inputs

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`: ``[blocks, out, in]`` in the shape in which the weight is stored."""
        shape = self.parameter.shape
        if self.conv is not None and self.conv.transposed:
            groups, outputs = matrices.shape[:2]
            return matrices.reshape(groups, outputs, -1, *shape[2:]).transpose(1, 2).reshape(shape)
        if self.role == "conv":
            return matrices.reshape(shape)
        if len(shape) > 2:
            return (matrices.mT if self._is_transposed else matrices).reshape(shape)
        joined = matrices.flatten(0, 1)
        return joined.mT if self._is_transposed else joined

    @property
    def _is_transposed(self) -> bool:
        return self.rows_are_tokens or self.inputs_first


def describe_layers(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[Layer]:
    """List every weight tensor of a model once, with its role, in the order of ``named_parameters``.

    The weight of a module below is its ``weight``, also under weight normalisation, spectral normalisation or another
    parametrization. The rules for the role, first match wins:

    1. fewer than two dimensions (biases, scalars), or complex (measured as pairs of real numbers): ``vector``;
    2. a matrix called ``lora_A``, ``lora_B`` or ``lora_embedding_A`` and ``_B`` (a LoRA factor): ``hidden``;
    3. what acts entry by entry and is not the weight of an ``nn.Linear``, ``nn.Bilinear``, embedding, convolution,
       recurrent layer or Hugging Face ``Conv1D``: ``vector``. That is what has at most one dimension larger than one
       (gains, class tokens), or belongs to a normalisation (one of ``torch.nn``, or a class whose name ends in "Norm")
       or a PReLU, or has gain, gamma, beta, scale, layer_scale, scale_shift_table, bias, biases or A_log at the end of
       its name;
    4. the weight of ``nn.Embedding`` or ``nn.EmbeddingBag``: ``embedding``. A head tied to it is an alias;
    5. the weight of a convolution: ``conv``;
    6. a learned position (``pos``, ``position``, ``positional``, ``pos_emb``, ``pos_embed``, ``posemb`` or ``wpe`` as
       a part of its name) or several learned tokens (``tokens``, ``prompts``, ``queries``, ``query_embed`` or
       ``latents`` at its end) that are not the weight of an ``nn.Linear`` or ``Conv1D``: ``embedding``;
    7. the output layer: ``head``. That is, outside numbered blocks, the last ``nn.Linear`` of each module called head,
       lm_head, classifier, logits, output_projection, score or fc_out, which may be the ``nn.Linear`` itself; if there
       is none, the last ``nn.Linear`` with such a name anywhere; if there is none, the last ``nn.Linear`` of the
       model where it is part neither of a numbered block nor of a ``pooler``. LoRA factors do not count here;
    8. everything else: ``hidden``.

    The rules for the number of blocks, first match wins:

    1. a vector: 1;
    2. a convolution: its groups;
    3. three or more dimensions (stacked experts ``[experts, out, in]``): the product of all but the last two;
    4. ``weight_ih`` and ``weight_hh`` of recurrent layers: the gates, 4 for LSTM, 3 for GRU, 1 for a plain RNN;
    5. queries, keys and values in one, side by side (``qkv``, ``to_qkv``, ``qkv_proj``, ``Wqkv``, ``c_attn`` or
       ``in_proj`` at the end of its name, with three times as many outputs as inputs): 3;
    6. everything else: 1.

    Empty parameters are left out. The model is not changed.

    Args:
        model: Any module.
        overrides: Roles by glob on names and aliases (``{"backbone.stem.*": "embedding"}``); the later wins. What
            cannot have the role is passed over: less than two dimensions is always a vector, the weight of a
            convolution ``conv`` or ``vector``.

    Returns:
        One :class:`Layer` a tensor.

    Raises:
        ValueError: On a role that does not exist; on a glob that matches nothing, or nothing that can have its role;
            on a lazy module that has not seen a batch.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ValueError(f"{plain_name(name)} has no shape yet: run the model on a batch once, then describe it.")
    return known_layers(model, overrides)


def known_layers(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[Layer]:
    """What :func:`describe_layers` says of the tensors that have a shape: those of lazy modules may have none yet.

    Args:
        model: Any module.
        overrides: As there.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_lazy(parameter) and parameter.numel():
            names.setdefault(id(parameter), []).append(plain_name(name))
            parameters.setdefault(id(parameter), parameter)
    names = {key: list(dict.fromkeys(own)) for key, own in names.items()}
    uses = {key: held for key, held in _uses(model).items() if key in parameters}
    heads = _head_weights(model, uses)
    geometries = {key: _geometry(parameter, uses.get(key, [])) for key, parameter in parameters.items()}
    roles = {key: _role(names[key], p, uses.get(key, []), is_head=key in heads) for key, p in parameters.items()}
    for glob, role in (overrides or {}).items():
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r} for {glob!r}; choose one of {', '.join(ROLES)}.")
        matched = [key for key in roles if any(fnmatchcase(name, glob) for name in names[key])]
        if not matched:
            raise ValueError(f"the override {glob!r} matches no parameter.")
        fitting = [key for key in matched if _can_be(role, parameters[key], geometries[key])]
        if not fitting:
            raise ValueError(
                f"the override {glob!r} matches nothing that can be {role!r}, only {names[matched[0]][0]}."
            )
        roles.update(dict.fromkeys(fitting, role))
    layers = []
    for key, parameter in parameters.items():
        own, role, held, geometry = names[key], roles[key], uses.get(key, []), geometries[key]
        inputs_first = any(_is_inputs_first(use, parameter) for use in held)
        layers.append(
            Layer(
                own[0],
                role,
                parameter,
                tuple(own[1:]),
                rows_are_tokens=role == "embedding" and _has_rows_of_tokens(held),
                blocks=_blocks(own, parameter, held, role, geometry, inputs_first),
                conv=geometry,
                inputs_first=inputs_first,
            )
        )
    return layers


def layer_table(layers: Iterable[Layer]) -> str:
    """What :func:`describe_layers` found, to be printed.

    Args:
        layers: The layers, one line each.

    Returns:
        Aligned columns: name, role, shape, blocks where there are several, aliases.
    """
    rows = [("name", "role", "shape", "blocks", "aliases")]
    for layer in layers:
        shape = " x ".join(map(str, layer.parameter.shape)) or "scalar"
        blocks = str(layer.blocks) if layer.blocks > 1 else ""
        rows.append((layer.name, layer.role, shape, blocks, ", ".join(layer.aliases)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def is_measurable(layer: Layer) -> bool:
    """Whether a layer holds numbers to calculate with, real or complex: no integers, no eight-bit floats."""
    weight = layer.parameter
    if weight.is_complex():
        return weight.dtype in COMPLEX and not is_sharded(weight)
    return weight.is_floating_point() and weight.element_size() > 1


def is_steerable(layer: Layer) -> bool:
    """Whether rules for learning rates know what to do with a layer: not where it is complex."""
    return is_measurable(layer) and not layer.parameter.is_complex()


def measurable_layers(model: nn.Module) -> list[Layer]:
    """The layers that can be measured as things are: those of :func:`known_layers` that :func:`is_measurable` takes."""
    return [layer for layer in known_layers(model) if is_measurable(layer)]


def select(layers: Iterable[Layer], patterns: Sequence[str] | None) -> list[Layer]:
    """Keep the layers that the globs ask for.

    Args:
        layers: What to choose from.
        patterns: Globs on names and aliases (``"blocks.*.attn.*"``); one that begins with ``!`` excludes.
            With only excluding globs everything else stays. None keeps all.

    Returns:
        The chosen layers in their order.
    """
    layers = list(layers)
    if patterns is None:
        return layers
    return [layer for layer in layers if is_chosen((layer.name, *layer.aliases), patterns)]


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    """Which modules hold each parameter, and under which name; a parametrized one counts as the module's own."""
    parents: dict[int, _Use] = {}
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleDict):
                lists = ((name, value) for name, value in child.items() if isinstance(value, ParametrizationList))
                parents.update({id(value): (module, name) for name, value in lists})
    uses: dict[int, list[_Use]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            use = module, name.removesuffix("_v").removesuffix("_orig")
            if id(module) in parents and name in ("original", "original1"):  # original0 is the gain of weight_norm
                use = parents[id(module)]
            uses.setdefault(id(parameter), []).append(use)
    return uses


def _head_weights(model: nn.Module, uses: Mapping[int, Sequence[_Use]]) -> set[int]:
    """The ids of the weights of output layers, by rule 7 of :func:`describe_layers`."""
    weights = {id(module): key for key, held in uses.items() for module, name in held if name == "weight"}
    linears: list[tuple[list[str], int]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in weights and not _LORA_NAMES.search(plain_name(name)):
            linears.append((plain_name(name).split("."), weights[id(module)]))
    named: dict[tuple[str, ...], int] = {}
    for path, key in linears:
        at = next((i for i, part in enumerate(path) if part in _HEAD_NAMES), None)
        if at is not None and not any(part.isdigit() for part in path[:at]):
            named[tuple(path[: at + 1])] = key  # the last one stays
    if named:
        return set(named.values())
    for path, key in reversed(linears):
        if path[-1] in _HEAD_NAMES:
            return {key}
    if not linears:
        return set()
    path, key = linears[-1]
    return set() if any(part.isdigit() for part in path[:-1]) or "pooler" in path else {key}


def _role(names: Sequence[str], parameter: Tensor, uses: Sequence[_Use], is_head: bool) -> str:
    if parameter.ndim < 2 or parameter.is_complex():
        return "vector"
    if parameter.ndim == 2 and any(_LORA_NAMES.search(name) for name in names):
        return "hidden"
    linear = any(_is_weight_of(use, nn.Linear) or _is_inputs_first(use, parameter) for use in uses)
    embedding = any(_is_weight_of(use, nn.Embedding, nn.EmbeddingBag) for use in uses)
    convolution = _geometry(parameter, uses) is not None
    linear = linear or any(_is_weight_of(use, nn.Bilinear) for use in uses)
    if not (linear or embedding or convolution or _gates(uses)) and _is_elementwise(names, parameter, uses):
        return "vector"
    if embedding:
        return "embedding"
    if convolution:
        return "conv"
    if not linear and any(_POSITION_NAMES.search(name) or _TOKEN_NAMES.search(name) for name in names):
        return "embedding"
    return "head" if is_head else "hidden"


def _is_elementwise(names: Sequence[str], parameter: Tensor, uses: Sequence[_Use]) -> bool:
    """Whether a parameter scales or shifts entry by entry, by its shape, its module, or its name."""
    if sum(side > 1 for side in parameter.shape) <= 1 or any(_GAIN_NAMES.search(name) for name in names):
        return True
    return any(isinstance(module, _ELEMENTWISE) or _NORM_CLASSES.search(type(module).__name__) for module, _ in uses)


def _can_be(role: str, parameter: Tensor, geometry: ConvGeometry | None) -> bool:
    matrix = parameter.ndim >= 2 and not parameter.is_complex()
    return role == "vector" or matrix and (geometry is None or role == "conv")


def _blocks(
    names: Sequence[str],
    parameter: Tensor,
    uses: Sequence[_Use],
    role: str,
    geometry: ConvGeometry | None,
    inputs_first: bool,
) -> int:
    if role == "vector":
        return 1
    if role == "conv":
        return 1 if geometry is None else geometry.groups
    if parameter.ndim > 2:
        return math.prod(parameter.shape[:-2])
    if hidden := _gates(uses):
        return parameter.shape[0] // hidden
    inner, outer = parameter.shape if inputs_first else reversed(parameter.shape)
    return 3 if outer == 3 * inner and any(_PACKED_QKV.search(name) for name in names) else 1


def _is_weight_of(use: _Use, *classes: type[nn.Module]) -> bool:
    return use[1] == "weight" and isinstance(use[0], classes)


def _is_inputs_first(use: _Use, parameter: Tensor) -> bool:
    """Whether it is the weight ``[in, out]`` of Hugging Face's ``Conv1D``, told by the name of the class."""
    module, name = use
    return name == "weight" and parameter.ndim == 2 and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _has_rows_of_tokens(uses: Sequence[_Use]) -> bool:
    """How an embedding is stored: the weight of an ``nn.Linear`` alone (an override) is ``[d, tokens]``."""
    return any(_is_weight_of(use, nn.Embedding, nn.EmbeddingBag) for use in uses) or not any(
        _is_weight_of(use, nn.Linear) for use in uses
    )


def _gates(uses: Sequence[_Use]) -> int:
    """The number of outputs of one gate where a recurrent layer stacks its gates, else 0."""
    for module, name in uses:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and name.startswith(("weight_ih", "weight_hh")):
            return module.hidden_size
    return 0


def _geometry(parameter: Tensor, uses: Sequence[_Use]) -> ConvGeometry | None:
    for module, name in uses:
        if isinstance(module, _ConvNd) and name == "weight" and parameter.ndim == 2 + len(module.kernel_size):
            padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
            return ConvGeometry(
                tuple(module.stride),
                padding,
                tuple(module.dilation),
                module.groups,
                module.transposed,
                module.padding_mode,
            )
    return None
