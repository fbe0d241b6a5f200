"""Detect what a training step changes that cannot be restored: files, iterators, objects of the user's classes."""

import io
import itertools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, deque)
_STRUCTURE = frozenset(nn.Module().__dict__)
_FRAMEWORKS = frozenset({"torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"})
_DEEPEST, _LONGEST, _MOST = 4, 1000, 10_000  # levels, entries of a container, fingerprints: bound the time


def external_state(module: nn.Module, step: Callable[..., Any] | None = None, counts: bool = True) -> dict[str, str]:
    """Fingerprint what a module reaches and :func:`dynamon.isolation.preserve.preserve_state` does not restore.

    Covered: attributes of objects of the user's own classes, positions of open files and iterators, states of random
    generators in such objects, versions of tensors and of modules that are not registered; and the same for the globals
    and closures that ``step`` names. Not covered: files opened anew each time, attributes of classes, and anything
    behind a function that ``step`` calls.

    Args:
        module: The module.
        step: Its training step, or another function or callable object that computes the loss.
        counts: Whether plain values and lengths of containers outside the module matter as well; those of iterators do.

    Returns:
        A fingerprint by name, to be compared with a later one by :func:`changed_names`.
    """
    walk = _Walk(module, counts)
    for path, part in module.named_modules():
        place = ".".join(filter(None, (type(module).__name__, path)))
        for name, value in vars(part).items():
            if name not in _STRUCTURE:
                walk.visit(value, f"{place}.{name}", restored=True)
    for name, value in _names_of(step).items():
        walk.visit(value, name)
    return walk.marks


def changed_names(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """List the names whose fingerprint has changed."""
    return [name for name, mark in after.items() if before.get(name, mark) != mark]


class _Walk:
    """Visits objects, each once."""

    def __init__(self, module: nn.Module, counts: bool) -> None:
        self._counts = counts
        self.marks: dict[str, str] = {}
        self._seen = {id(part) for part in module.modules()}
        self._seen |= {id(t) for t in (*module.parameters(), *module.buffers())}

    def visit(self, value: Any, name: str, depth: int = 0, restored: bool = False) -> None:
        """Fingerprint a value and its contents; ``restored``: plain values and containers here are restored anyway."""
        if isinstance(value, _PLAIN):
            if not restored and self._counts:
                self.marks[name] = repr(value)
            return
        if id(value) in self._seen or depth > _DEEPEST or len(self.marks) > _MOST:
            return
        self._seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            self._visit_entries(value, name, depth, restored and not isinstance(value, tuple))
        elif (mark := _mark(value, restored)) is not None:
            self.marks[name] = mark
        elif _is_own(value):
            counts, self._counts = self._counts, self._counts or hasattr(type(value), "__next__")
            for key, part in list(vars(value).items()):
                self.visit(part, f"{name}.{key}", depth + 1)
            self._counts = counts

    def _visit_entries(self, value: Any, name: str, depth: int, restored: bool) -> None:
        if not restored and self._counts:
            self.marks[name] = str(len(value))
        if len(value) <= _LONGEST:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in list(items):
                self.visit(part, f"{name}[{key!r:.40}]", depth + 1, restored)


def _mark(value: Any, restored: bool) -> str | None:
    """Return the state of a tensor, module, generator, file or iterator; None for other objects."""
    if isinstance(value, nn.Module):
        return str([t._version for t in (*value.parameters(), *value.buffers()) if not t.is_inference()])
    if isinstance(value, Tensor | torch.Generator | random.Random | np.random.Generator):
        return None if restored else _number_mark(value)
    if isinstance(value, io.IOBase):
        try:
            return str(value.tell())
        except (OSError, ValueError):  # closed, a pipe, or being read line by line
            return None
    if isinstance(value, itertools.count):
        return repr(value)
    return str(operator.length_hint(value)) if hasattr(value, "__length_hint__") else None


def _number_mark(value: Any) -> str:
    if isinstance(value, Tensor):
        return "" if value.is_inference() else str(value._version)
    if isinstance(value, torch.Generator):
        return str(hash(value.get_state().numpy().tobytes()))
    return str(hash(str(value.getstate() if isinstance(value, random.Random) else value.bit_generator.state)))


def _is_own(value: Any) -> bool:
    """Return whether an object's class is the user's (or a data loader's iterator): its attributes are visited."""
    if isinstance(value, type | FunctionType | MethodType) or not hasattr(value, "__dict__"):
        return False
    module = type(value).__module__
    root = module.split(".")[0]
    known = root in _FRAMEWORKS or root in sys.stdlib_module_names
    return not known or isinstance(value, SimpleNamespace) or module.startswith("torch.utils.data")


def _names_of(step: Callable[..., Any] | None) -> dict[str, Any]:
    """Return the globals and closure variables that a function names, without functions and classes.

    Of a bound method the object as well, of a callable object the object, of a partial what it binds.
    """
    if isinstance(step, partial):
        bound = {f"argument {key}": value for key, value in [*enumerate(step.args), *step.keywords.items()]}
        return {**bound, **_names_of(step.func)}
    function = getattr(step, "__func__", step)
    owner = getattr(step, "__self__", None if isinstance(function, FunctionType) else step)
    owned = {} if owner is None else {type(owner).__name__: owner}
    if not isinstance(function, FunctionType):
        return owned
    code, cells = function.__code__, function.__closure__ or ()
    found = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return owned | {name: value for name, value in found.items() if not isinstance(value, type | FunctionType)}
