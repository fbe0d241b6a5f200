"""Copy and compare many tensors in a few calls, with one wait per device."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.kernels.devices import reads_are_free

_AT_ONCE = 2**24  # entries that are subtracted together, which bounds the memory


def find_changed(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Return for each pair whether the tensors differ in any entry, or may differ, as NaN does.

    Args:
        pairs: Tensors of any device, dtype and shape; those of a pair on one device.

    Cost: one wait per device, whatever the number of tensors, except for sparse and nested ones and subclasses. Memory:
    2^24 entries, or the largest tensor.
    """
    found = [one.shape != other.shape or one.dtype != other.dtype for one, other in pairs]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, (one, other) in enumerate(pairs):
        if found[place] or not one.numel():
            continue
        if reads_are_free(one.device) or not (_is_plain(one) and _is_plain(other)):
            found[place] = not _is_same(one, other)
        else:
            groups[one.device, one.dtype].append(place)
    waiting: dict[torch.device, tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
    for (device, _), places in groups.items():
        waiting[device][0].extend(places)
        waiting[device][1].append(_flags([pairs[place] for place in places]))
    for places, flags in waiting.values():
        for place, differs in zip(places, torch.cat(flags).tolist(), strict=True):
            found[place] = differs
    return found


@torch.no_grad()
def clone_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors without their graphs, as ``tensor.detach().clone()`` does.

    Args:
        tensors: Of any device, dtype and shape.

    Cost: a few calls per device and dtype, except for sparse and nested tensors and subclasses.
    """
    found: list[Tensor] = []
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        if reads_are_free(tensor.device) or not _is_plain(tensor):
            found.append(tensor.detach().clone())
        else:
            found.append(torch.empty_like(tensor.detach(), requires_grad=False))
            groups[tensor.device, tensor.dtype].append(place)
    for places in groups.values():
        torch._foreach_copy_([found[place] for place in places], [tensors[place].detach() for place in places])
    return found


def _flags(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return which pairs of plain tensors of one device and dtype differ, on the device."""
    if not pairs[0][0].is_floating_point():
        return torch.stack([(one != other).any() for one, other in pairs])
    largest: list[Tensor] = []
    begin = 0
    while begin < len(pairs):
        end, entries = begin + 1, pairs[begin][0].numel()
        while end < len(pairs) and entries + pairs[end][0].numel() <= _AT_ONCE:
            entries += pairs[end][0].numel()
            end += 1
        ones, others = (list(tensors) for tensors in zip(*pairs[begin:end], strict=True))
        largest += torch._foreach_norm(torch._foreach_sub(ones, others), torch.inf)
        begin = end
    return torch.stack(largest) != 0


def _is_same(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other)
    except NotImplementedError:  # no comparison of sparse tensors on this device
        return False


def _is_plain(tensor: Tensor) -> bool:
    own = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return own and tensor.layout is torch.strided and not tensor.is_nested
