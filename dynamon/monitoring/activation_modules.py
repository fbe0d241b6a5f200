"""Choose the modules whose outputs are measured, and find the blocks of a residual stream."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynamon.quantities.names import is_chosen, plain_name

HEADS = "heads"  # in names of rows, before the number of the head
_ATTENTION = nn.MultiheadAttention  # which is among torch's activation functions
_LISTS = (nn.ModuleList, nn.Sequential)


class Watched(NamedTuple):
    """Hold one module of a model.

    Attributes:
        name: Its name, without the segments of wrappers.
        place: Its place among all modules.
        is_measured: Whether its output is measured.
        is_function: Whether it is an activation function of ``torch.nn``.
        is_inside: Whether functions that it calls may be measured: it has parameters, or is an activation function.
        names: The names that globs choose it by: its own and those of its own parameters.
        stack: The list of blocks that it belongs to, and its place there; None for others.
    """

    name: str
    place: int
    is_measured: bool
    is_function: bool
    is_inside: bool
    names: tuple[str, ...]
    stack: tuple[int, int] | None


def watched_modules(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[int, Watched]:
    """List modules by their ``id``, and say which of them are measured; wrappers of a compiler are left out.

    Measured are modules that compute and hold no others: those with parameters (linear, convolution, embedding,
    normalisation, recurrent), activation functions of ``torch.nn`` and normalisations without parameters; attention of
    ``torch.nn``; and blocks: the members of a ``ModuleList`` or ``Sequential`` of two or more modules of one class that
    hold others. Left out are modules of a parametrization.

    Args:
        module: The model.
        patterns: Globs that choose modules by their names or those of their own parameters; ``!`` excludes.
    """
    stacks: dict[int, tuple[int, int]] = {}
    for place, holder in enumerate(module.modules()):
        members = list(holder.children())
        if isinstance(holder, _LISTS) and len(members) > 1 and len({type(m) for m in members}) == 1:
            if not _is_leaf(members[0]):
                stacks |= {id(member): (place, index) for index, member in enumerate(members)}
    found = {}
    for place, (full, one) in enumerate(module.named_modules()):
        if "_orig_mod" in one._modules or isinstance(one, torch.jit.ScriptModule):
            continue  # a hook on what torch.compile returns would see everything twice
        name = plain_name(full)
        names = name, *(f"{name}.{p}".lstrip(".") for p, _ in one.named_parameters(recurse=False))
        is_function = type(one).__module__ == "torch.nn.modules.activation" and not isinstance(one, _ATTENTION)
        chosen = is_chosen(names, list(patterns or ()))
        measured = chosen and "parametrizations" not in full and (_computes(one) or id(one) in stacks)
        is_inside = is_function or any(True for _ in one.parameters())
        found[id(one)] = Watched(name, place, measured, is_function, is_inside, names, stacks.get(id(one)))
    return found


def row_is_chosen(one: Watched, function: str, patterns: Sequence[str] | None) -> bool:
    """Return whether globs choose what a module calls: its row by that name, or the module."""
    return one.is_inside and is_chosen([*one.names, f"{one.name}.{function}".lstrip(".")], list(patterns or ()))


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "parametrizations" for name, _ in module.named_children())


def _computes(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not _is_leaf(module) or isinstance(module, nn.ParameterList | nn.ParameterDict):
        return False
    has_parameters = any(True for _ in module.parameters())
    return has_parameters or type(module).__module__ == "torch.nn.modules.activation" or "Norm" in type(module).__name__


class Passage(NamedTuple):
    """Hold where a block's input and output lie in memory, and their shapes."""

    source: int
    result: int
    taken: tuple[int, ...]
    given: tuple[int, ...]

    @classmethod
    def of(cls, taken: Tensor, given: Tensor) -> "Passage":
        """Take them down; no values are read."""
        return cls(taken.data_ptr(), given.data_ptr(), tuple(taken.shape), tuple(given.shape))

    def leads_to(self, other: "Passage") -> bool:
        """Return whether another block may take what this one returns; not where both take one tensor side by side."""
        return self.given == other.taken and (self.source != other.source or self.source == self.result)


def residual_blocks(passages: dict[tuple[int, int], Passage]) -> set[tuple[int, int]]:
    """Return the blocks of a residual stream: what they return has the shape of what they take, one after the other.

    Modules of a list that take one tensor side by side (branches, experts) are none.

    Args:
        passages: Of each block, by its list and its place there.
    """
    found = set()
    for (stack, place), own in passages.items():
        before, after = (passages.get((stack, near)) for near in (place - 1, place + 1))
        has_neighbour = before is not None and before.leads_to(own) or after is not None and own.leads_to(after)
        if own.taken == own.given and has_neighbour:
            found.add((stack, place))
    return found
