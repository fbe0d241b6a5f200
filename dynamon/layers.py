"""What the weight tensors of a model are: their names and roles."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

ROLES = ("hidden", "embedding", "head", "conv", "vector")
_HEAD_NAMES = {"head", "lm_head", "classifier", "logits", "output_projection", "score", "fc_out"}
_POSITION_NAMES = re.compile(r"(^|[._])(pos|position|positional|wpe|posemb|pos_emb|pos_embed)([._]|$)")
# Wrappers that put a segment into parameter names; the name without it survives compiling or wrapping.
_WRAPPER_SEGMENTS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


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
    """

    name: str
    role: str
    parameter: Tensor
    aliases: tuple[str, ...] = ()
    rows_are_tokens: bool = False


def describe_layers(model: nn.Module) -> list[Layer]:
    """List every weight tensor of a model once, with its role, in the order of ``named_parameters``.

    The rules, first match wins:

    1. at most one dimension larger than one (biases, gains, scalars) and not the matrix of an ``nn.Linear``:
       ``vector``;
    2. the weight of ``nn.Embedding`` or ``nn.EmbeddingBag``, or a learned position (``pos``, ``position``,
       ``pos_emb``, ``wpe`` as a part of its name): ``embedding``. A head tied to it is an alias;
    3. the weight of a convolution: ``conv``;
    4. the weight of an ``nn.Linear`` called head, lm_head, classifier, logits, output_projection, score or
       fc_out, or the last ``nn.Linear`` of the model where it is not part of a numbered block: ``head``;
    5. everything else: ``hidden``.

    Empty parameters are left out. The model is not changed.

    Args:
        model: Any module.

    Returns:
        One :class:`Layer` a tensor.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            names.setdefault(id(parameter), []).append(_WRAPPER_SEGMENTS.sub("", name))
            parameters.setdefault(id(parameter), parameter)
    owners = _owners(model)
    head = _head_weight(model)
    layers = []
    for key, parameter in parameters.items():
        own_names = list(dict.fromkeys(names[key]))
        role = _role(own_names, parameter, owners.get(key, []), is_head=key == head)
        layers.append(Layer(own_names[0], role, parameter, tuple(own_names[1:]), role == "embedding"))
    return layers


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
    include = [p for p in patterns if not p.startswith("!")] or ["*"]
    exclude = [p[1:] for p in patterns if p.startswith("!")]
    return [layer for layer in layers if _matches(layer, include) and not _matches(layer, exclude)]


def _matches(layer: Layer, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns for name in (layer.name, *layer.aliases))


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Which modules hold each parameter directly."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _head_weight(model: nn.Module) -> int | None:
    """The id of the weight of the output layer, by rule 4 of :func:`describe_layers`."""
    linears = [
        (_WRAPPER_SEGMENTS.sub("", name).split("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for path, module in reversed(linears):
        if path[-1] in _HEAD_NAMES:
            return id(module.weight)
    if not linears:
        return None
    path, module = linears[-1]
    return None if any(part.isdigit() for part in path[:-1]) else id(module.weight)


def _role(names: list[str], parameter: Tensor, owners: list[nn.Module], is_head: bool) -> str:
    if sum(side > 1 for side in parameter.shape) <= 1 and not any(isinstance(o, nn.Linear) for o in owners):
        return "vector"
    if parameter.ndim < 2:
        return "vector"
    if any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
        return "embedding"
    if any(_POSITION_NAMES.search(name) for name in names):
        return "embedding"
    if any(isinstance(owner, _ConvNd) for owner in owners):
        return "conv"
    return "head" if is_head else "hidden"
