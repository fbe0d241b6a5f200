"""Describe the weight tensors of a model: names, roles and blocks."""

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from dynamon.layers.layer import ROLES, ConvGeometry, Layer, is_measurable
from dynamon.quantities.names import plain_name

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

STATED = "dynamon_roles"  # the attribute of a model that states roles
_Use = tuple[nn.Module, str]  # a module and the name under which it holds a parameter


def describe_layers(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[Layer]:
    """List every weight tensor of a model once, with its role, in the order of ``named_parameters``.

    The weight of a module below is its ``weight``, also under weight normalisation, spectral normalisation or another
    parametrization. The rules for the role, first match wins:

    1. fewer than two dimensions (biases, scalars), or complex (measured as pairs of real numbers): ``vector``;
    2. a matrix called ``lora_A``, ``lora_B`` or ``lora_embedding_A`` and ``_B`` (a LoRA factor): ``hidden``;
    3. an entrywise parameter that is not the weight of an ``nn.Linear``, ``nn.Bilinear``, embedding, convolution,
       recurrent layer or Hugging Face ``Conv1D``: ``vector``. Entrywise is a parameter that has at most one dimension
       larger than one (gains, class tokens), or belongs to a normalisation (one of ``torch.nn``, or a class whose name
       ends in "Norm") or a PReLU, or whose name ends in gain, gamma, beta, scale, layer_scale, scale_shift_table, bias,
       biases or A_log;
    4. the weight of ``nn.Embedding`` or ``nn.EmbeddingBag``: ``embedding``. A head tied to it is an alias;
    5. the weight of a convolution: ``conv``;
    6. a learned position (``pos``, ``position``, ``positional``, ``pos_emb``, ``pos_embed``, ``posemb`` or ``wpe`` in
       its name) or several learned tokens (``tokens``, ``prompts``, ``queries``, ``query_embed`` or
       ``latents`` at its end) that are not the weight of an ``nn.Linear`` or ``Conv1D``: ``embedding``;
    7. the output layer: ``head``. That is, outside numbered blocks, the last ``nn.Linear`` of each module called head,
       lm_head, classifier, logits, output_projection, score or fc_out, which may be the ``nn.Linear`` itself; else the
       last ``nn.Linear`` with such a name anywhere; else the last ``nn.Linear`` of the model, unless it is part of a
       numbered block or of a ``pooler``. LoRA factors do not count here;
    8. everything else: ``hidden``.

    The rules for the number of blocks, first match wins:

    1. a vector: 1;
    2. a convolution: its groups;
    3. three or more dimensions (stacked experts ``[experts, out, in]``): the product of all but the last two;
    4. ``weight_ih`` and ``weight_hh`` of recurrent layers: the gates, 4 for LSTM, 3 for GRU, 1 for a plain RNN;
    5. queries, keys and values packed in one matrix (``qkv``, ``to_qkv``, ``qkv_proj``, ``Wqkv``, ``c_attn`` or
       ``in_proj`` at the end of its name, with three times as many outputs as inputs): 3;
    6. everything else: 1.

    Empty parameters are left out. The model is not changed.

    Args:
        model: Any module.
        overrides: Roles by glob on names and aliases (``{"backbone.stem.*": "embedding"}``); the last match wins.
            Parameters that cannot have the role are skipped: less than two dimensions is always a vector, the weight
            of a convolution is ``conv`` or ``vector``. A model may state the same as its attribute ``dynamon_roles``,
            which monitors and steering use too; overrides come after it.

    Returns:
        One :class:`Layer` per tensor.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If a role does not exist; if a glob matches nothing, or nothing that can have its role; if a lazy
            module has not seen a batch.

    Example:
        >>> import torch
        >>> from dynamon import describe_layers
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 10))
        >>> describe_layers(model, {"1.bias": "vector"})  # doctest: +NORMALIZE_WHITESPACE
        [Layer('0.weight', embedding, 10 x 4), Layer('1.weight', vector, 4), Layer('1.bias', vector, 4),
         Layer('2.weight', head, 10 x 4), Layer('2.bias', vector, 10)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ValueError(f"{plain_name(name)} has no shape yet: run the model on a batch once, then describe it.")
    return known_layers(model, overrides)


def known_layers(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[Layer]:
    """Describe the tensors that have a shape, as :func:`describe_layers` does; those of lazy modules are left out.

    Args:
        model: Any module.
        overrides: As there; they may also match tensors without a shape.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    without_shape: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            without_shape.append(plain_name(name))
        elif parameter.numel():
            names.setdefault(id(parameter), []).append(plain_name(name))
            parameters.setdefault(id(parameter), parameter)
    names = {key: list(dict.fromkeys(own)) for key, own in names.items()}
    uses = {key: held for key, held in _uses(model).items() if key in parameters}
    heads = _head_weights(model, uses)
    geometries = {key: _conv_geometry(parameter, uses.get(key, [])) for key, parameter in parameters.items()}
    roles = {key: _role(names[key], p, uses.get(key, []), is_head=key in heads) for key, p in parameters.items()}
    stated = {**(getattr(model, STATED, None) or {}), **(overrides or {})}
    for glob, role in stated.items():
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r} for {glob!r}; choose one of {', '.join(ROLES)}.")
        matched = [key for key in roles if any(fnmatchcase(name, glob) for name in names[key])]
        if not matched and not any(fnmatchcase(name, glob) for name in without_shape):
            raise ValueError(f"the override {glob!r} matches no parameter.")
        fitting = [key for key in matched if _can_be(role, parameters[key], geometries[key])]
        if matched and not fitting:
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


def measurable_layers(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[Layer]:
    """List the layers of :func:`known_layers` that :func:`is_measurable` accepts."""
    return [layer for layer in known_layers(model, overrides) if is_measurable(layer)]


def role_assumption(model: nn.Module, overrides: Mapping[str, str] | None = None) -> str | None:
    """Return which roles rest on names or on the order of modules, and how to state others; None if none does.

    Args:
        model: Any module.
        overrides: As in :func:`describe_layers`; what they state is not assumed.
    """
    uses, stated = _uses(model), {**(getattr(model, STATED, None) or {}), **(overrides or {})}
    heads = _head_weights(model, uses)
    guessed: dict[str, list[str]] = {}
    for layer in known_layers(model, overrides):
        key, names = id(layer.parameter), (layer.name, *layer.aliases)
        held = uses.get(key, [])
        of_class = any(type(module).__module__.startswith("torch.nn.") for module, _ in held)
        is_known = layer.role == "vector" or of_class and key not in heads
        if not is_known and not any(fnmatchcase(name, glob) for name in names for glob in stated):
            guessed.setdefault(layer.role, []).append(layer.name)
    if not guessed:
        return None
    found = "; ".join(f"{role}: {_some(names)}" for role, names in guessed.items())
    return f"Roles assumed by name or place: {found}. They choose norms; roles={{glob: role}} states others."


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    """Map each parameter to the modules that hold it and its names there; a parametrized one is the module's own."""
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
    """Return the ids of the weights of output layers, by rule 7 of :func:`describe_layers`."""
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
    convolution = _conv_geometry(parameter, uses) is not None
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
    """Return whether a parameter scales or shifts entry by entry, by its shape, module, or name."""
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
    """Return whether it is the weight ``[in, out]`` of Hugging Face's ``Conv1D``, by the name of the class."""
    module, name = use
    return name == "weight" and parameter.ndim == 2 and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _has_rows_of_tokens(uses: Sequence[_Use]) -> bool:
    """Return whether an embedding is stored ``[tokens, d]``; the weight of an ``nn.Linear`` (overridden) is not."""
    return any(_is_weight_of(use, nn.Embedding, nn.EmbeddingBag) for use in uses) or not any(
        _is_weight_of(use, nn.Linear) for use in uses
    )


def _gates(uses: Sequence[_Use]) -> int:
    """Return the number of outputs per gate if a recurrent layer stacks its gates, else 0."""
    for module, name in uses:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) and name.startswith(("weight_ih", "weight_hh")):
            return module.hidden_size
    return 0


def _conv_geometry(parameter: Tensor, uses: Sequence[_Use]) -> ConvGeometry | None:
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
