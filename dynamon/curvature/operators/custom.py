"""Custom autograd functions, whose part of a second derivative may be missing without an error."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.operators.graphs import nodes_behind

_KNOWN = ("torch.distributed.fsdp.", "dynamon.")  # the former pass gradients through
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class CustomFunctions:
    """The Python ``torch.autograd.Function`` nodes behind some tensors, without FSDP2's and dynamon's own.

    Their backward passes may use values that were saved without a graph, or kernels unknown to autograd; their part of
    a second derivative is then missing. A backward pass that saves nothing (identity, sign change, straight-through
    estimator) and keeps the graph of its input is safe.

    Args:
        tensors: Tensors whose graph is searched.
        beyond: Tensors whose graph is left out of the search.

    Attributes:
        suspects: Names of functions that may not be safe, complete after :meth:`watched`.
        silent: Those of them that returned a gradient without a graph, as if they were linear.
    """

    def __init__(self, tensors: Sequence[Tensor], beyond: Sequence[Tensor] = ()) -> None:
        """Walk the graph and collect them."""
        nodes = nodes_behind(tensors, beyond)
        own = (node for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction))
        self._nodes: list[Any] = [node for node in own if not _class_of(node).__module__.startswith(_KNOWN)]
        self.silent: list[str] = []
        self.suspects = list(dict.fromkeys(_name(node) for node in self._nodes if _keeps_numbers(node)))

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return bool(self._nodes)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record, during the backward pass inside, which functions return gradients without a graph."""
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
    """Return whether floating point numbers were saved for the backward pass, by any means."""
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
