"""Custom autograd functions, whose part of a second derivative may be missing without a word."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.operators.graphs import nodes_behind

_KNOWN = ("torch.distributed.fsdp.", "dynamon.")  # the former pass gradients through
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class CustomFunctions:
    """The ``torch.autograd.Function`` of Python that took part in some tensors, FSDP2's and ours left out.

    Their backward passes may compute with numbers that were kept without a graph, or in kernels of which autograd
    knows nothing. A backward pass that keeps nothing (identities, sign changes, straight-through estimators) and
    hands on the graph of what it gets is above suspicion.

    Args:
        tensors: What they took part in.
        beyond: Leaves out those that took part in these already.

    Attributes:
        suspects: Names of those that are not above suspicion, which is known after :meth:`watched`.
        silent: Those of them that handed on a gradient without a graph: as if they were linear.
    """

    def __init__(self, tensors: Sequence[Tensor], beyond: Sequence[Tensor] = ()) -> None:
        """Find them."""
        nodes = nodes_behind(tensors, beyond)
        own = (node for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction))
        self._nodes: list[Any] = [node for node in own if not _class_of(node).__module__.startswith(_KNOWN)]
        self.silent: list[str] = []
        self.suspects = list(dict.fromkeys(_name(node) for node in self._nodes if _keeps_numbers(node)))

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._nodes)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the backward pass whose graph is wanted: see which of them hand on none."""
        handles = [node.register_hook(self._watch(_name(node))) for node in self._nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str) -> Any:
        def look(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
            depends = any(g is not None and g.requires_grad for g in outputs)
            if depends and any(g is not None and not g.requires_grad for g in inputs) and name not in self.suspects:
                self.suspects.append(name)
            constant = any(g is not None and not g.requires_grad for g in inputs)
            if constant and name in self.suspects and name not in self.silent:
                self.silent.append(name)

        return look


def _class_of(node: Any) -> type:
    return getattr(node, "_forward_cls", type(node))


def _name(node: Any) -> str:
    return _class_of(node).__name__


def _keeps_numbers(node: Any) -> bool:
    """Whether floating point numbers were kept for the backward pass, in the usual place or beside it."""
    try:
        saved = [t for t in node.saved_tensors if t is not None]
    except RuntimeError:  # freed already, or changed since
        return True
    return any(t.is_floating_point() or t.is_complex() for t in saved) or any(map(_may_hold, vars(node).values()))


def _may_hold(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_may_hold, value))
    if isinstance(value, dict):
        return any(map(_may_hold, value.values()))
    return not isinstance(value, _PLAIN) and not callable(value)
