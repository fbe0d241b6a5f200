"""Compute Lanton's gradient averages, and each layer's direction from the oracle of its norm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamon.distributed.dtensor import gather, shard_like
from dynamon.layers import Layer
from dynamon.norms import NORMS, UPDATE_NORMS, Norm, get_norm

GEOMETRY = "spectral"
SCALINGS: dict[str, Callable[[int, int], float]] = {
    "rms_to_rms": get_norm("rms_to_rms").dual_factor,
    "original": lambda outputs, inputs: math.sqrt(max(1.0, outputs / inputs)),
    "match_rms_adamw": lambda outputs, inputs: 0.2 * math.sqrt(max(outputs, inputs)),
}
_MAX_ENTRIES = 2**26  # in one batched call; beyond, a device is busy anyway and memory counts


@dataclass
class Item:
    """One parameter in one step. Of a sharded parameter, the tensors are this process's part.

    Attributes:
        layer: The layer.
        index: When it joined the optimizer, counted from 0.
        group: The parameter group, as the step sees it.
        weight: The weight.
        gradient: Its gradient.
        average: The running average of its gradients.
    """

    layer: Layer
    index: int
    group: dict[str, Any]
    weight: Tensor
    gradient: Tensor
    average: Tensor


def update_averages(items: Sequence[Item]) -> list[Tensor]:
    """Update the running averages in place, and return what the directions are taken of."""
    found: dict[int, Tensor] = {}
    batches: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        key = item.group["momentum"], item.group["nesterov"], item.weight.dtype, item.weight.device
        batches.setdefault(key, []).append(i)
    for members in batches.values():
        group = items[members[0]].group
        averages, gradients = [items[i].average for i in members], [items[i].gradient for i in members]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        found.update(zip(members, ahead, strict=True))
    return [found[i] for i in range(len(items))]


def directions(
    items: Sequence[Item],
    averages: Sequence[Tensor],
    polar: Callable[[Tensor], Tensor],
    scaling: str | Callable[[int, int], float],
) -> list[tuple[Tensor, float]]:
    """Compute the unit-ball minimisers of the layers' norms.

    Args:
        items: The parameters of the step.
        averages: One for each.
        polar: Polar factors of ``[n, out, in]``.
        scaling: The factor on them: a key of ``SCALINGS``, or a function of outputs and inputs.

    Returns:
        For each item the direction, in new memory, and a factor that is still to be multiplied to it.
    """
    found: dict[int, tuple[Tensor, float]] = {}
    by_norm: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        by_norm.setdefault(UPDATE_NORMS[GEOMETRY][item.layer.role], []).append(i)
    for name, members in by_norm.items():
        norm = get_norm(name)
        if norm.oracle == "sign":
            signs = _signs([averages[i] for i in members])
            for i, sign in zip(members, signs, strict=True):
                found[i] = sign, -1.0 / (_inputs(items[i].layer) if items[i].layer.role == "head" else 1)
            continue
        is_polar = norm.oracle == "polar"
        layers = [items[i].layer for i in members]
        wholes = [gather(averages[i], items[i].layer.parameter) for i in members]
        stacks = [_stack(norm, layer, tensor) for layer, tensor in zip(layers, wholes, strict=True)]
        steps = _batched(polar if is_polar else norm.lmo, stacks)
        for i, layer, stack in zip(members, layers, steps, strict=True):
            factor = -_scale(scaling, layer, stack) if is_polar else 1.0
            found[i] = shard_like(_unstack(norm, layer, stack), layer.parameter), factor
    return [found[i] for i in range(len(items))]


def _scale(scaling: str | Callable[[int, int], float], layer: Layer, stack: Tensor) -> float:
    if not isinstance(scaling, str):
        return scaling(stack.shape[-2], stack.shape[-1])
    window = get_norm(scaling).window(layer) if scaling in NORMS else 1.0
    return SCALINGS[scaling](stack.shape[-2], stack.shape[-1]) / window


def _signs(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Take signs, NaN where an entry is not finite: ``torch.sign`` of NaN is zero, and the layer would stand still."""
    if not tensors:
        return []
    signs = torch._foreach_sign(tensors)
    torch._foreach_add_(signs, torch._foreach_mul(tensors, 0.0))
    return signs


def _stack(norm: Norm, layer: Layer, tensor: Tensor) -> Tensor:
    """Return the matrices ``[n, out, in]`` of a tensor, or ``[1, 1, size]`` for a norm that sees all entries."""
    return layer.matrices(tensor) if norm.on_matrices else tensor.reshape(1, 1, -1)


def _unstack(norm: Norm, layer: Layer, stack: Tensor) -> Tensor:
    return layer.from_matrices(stack) if norm.on_matrices else stack.reshape(layer.parameter.shape)


def _batched(function: Callable[[Tensor], Tensor], stacks: Sequence[Tensor]) -> list[Tensor]:
    """Call a function of matrices once for all stacks whose matrices have one shape."""
    found: dict[int, Tensor] = {}
    batches: dict[tuple[object, ...], list[list[int]]] = {}
    for i, stack in enumerate(stacks):
        calls = batches.setdefault((*stack.shape[1:], stack.dtype, stack.device), [[]])
        if calls[-1] and sum(stacks[j].numel() for j in calls[-1]) + stack.numel() > _MAX_ENTRIES:
            calls.append([])
        calls[-1].append(i)
    for members in (call for calls in batches.values() for call in calls):
        joined = torch.cat([stacks[i] for i in members])  # a copy always: the function may work in place
        parts = function(joined).split([len(stacks[i]) for i in members])
        found.update(zip(members, parts, strict=True))
    return [found[i] for i in range(len(stacks))]


def _inputs(layer: Layer) -> int:
    return layer.parameter.shape[-2 if layer.inputs_first else -1]
