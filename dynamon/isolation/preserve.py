"""Evaluate the training loss once more without leaving a trace."""

import inspect
import operator
import random
from argparse import Namespace
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dynamon.distributed.dtensor import is_sharded, to_local
from dynamon.isolation.batches import clone
from dynamon.isolation.equality import clone_tensors, find_changed
from dynamon.isolation.evaluations import force_eager, fresh_autocast_cache, rewind_state
from dynamon.isolation.random_streams import RandomState, seed_all, stream_of

LossFn = Callable[[Any, Any], Tensor]
_MUTED = ("log", "log_dict")
_Contents = dict[int, tuple[Any, Any]]  # by identity: a tensor or container, and a copy of its contents


class LossError(ValueError):
    """There is no valid loss, on any batch."""


class NoLossError(LossError):
    """There is no loss on this batch: ``training_step`` skips it."""


@contextmanager
def preserve_state(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore the module and all random streams on exit.

    Restored are: the random streams of torch (CPU and all devices of the accelerator), numpy and python; every
    parameter and buffer; submodules that were added, removed or replaced; train and eval modes; every plain attribute
    of every submodule (numbers, strings, tensors, arrays, random generators, and the contents of lists, dicts, sets,
    deques and namespaces, also nested), which covers counters, collected outputs, averaged teachers and states of
    torchmetrics. ``log`` and ``log_dict`` do nothing inside. ``.grad`` is None inside and restored on exit. Compiled
    code runs uncompiled, so that training keeps its graphs. Not covered: files, dataloader iterators and objects of the
    user's own classes. Memory: one copy of parameters and buffers.

    The operators and searches of :mod:`dynamon.curvature` used inside also restore all of this, except the weights
    themselves, between any two evaluations of the loss. So a layer that changes a buffer in every forward pass
    (spectral normalisation, a queue, a codebook) has one loss, and not a new one each time.

    Args:
        module: The module.
        seed: Seeds torch, numpy and python inside, so that dropout draws the same masks each time; None leaves the
            streams.

    Example:
        >>> import torch
        >>> from dynamon.isolation.preserve import preserve_state
        >>> module = torch.nn.BatchNorm1d(2)
        >>> with preserve_state(module, seed=0):
        ...     _ = module(torch.randn(8, 2))
        >>> int(module.num_batches_tracked)
        0
    """
    modules = list(module.modules())
    classes = [type(m) for m in modules]  # parametrizations replace them
    saved = _snapshots(modules)
    gradients = [(p, p.grad) for p in module.parameters()]
    outside = RandomState()
    try:
        if seed is not None:
            seed_all(seed)
        muted = {name: _say_nothing for name in _MUTED if callable(getattr(module, name, None))}
        module.__dict__.update(muted)
        for p, _ in gradients:
            p.grad = None
        inside = [
            (m, {**now, **(muted if m is module else {})}, held) for m, (now, held) in zip(modules, saved, strict=True)
        ]
        with rewind_state(_State(inside)), force_eager(), fresh_autocast_cache():
            yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        outside.restore()
        _put_all_back([(m, *snapshot) for m, snapshot in zip(modules, saved, strict=True)], keeps=False)
        for m, cls in zip(modules, classes, strict=True):
            if type(m) is not cls:
                m.__class__ = cls


class _State:
    """The state that evaluations of a loss change: random numbers, and all of a module but its trained weights."""

    def __init__(self, saved: Sequence[tuple[nn.Module, dict[str, Any], _Contents]]) -> None:
        self._saved, self._random = saved, RandomState()
        # Callers that change weights restore them. A loss that writes to others (an averaged teacher's) does not.
        self._trained = {id(p) for m, *_ in saved for p in m._parameters.values() if p is not None and p.requires_grad}
        self._trained |= {id(m._parameters) for m, *_ in saved}  # full tensors replace sharded ones meanwhile

    def rewind(self) -> Callable[[], None] | None:
        """Restore it, and return what brings back the present state, random numbers excepted."""
        now = _put_all_back(self._saved, self._trained, marks=False)
        self._random.restore()
        now = [(m, attributes, contents) for m, attributes, contents in now if attributes or contents]

        def undo() -> None:
            _put_all_back(now, marks=False, keeps=False)

        return undo if now else None


def training_loss(module: nn.Module, batch: Any, loss_fn: LossFn | None = None, batch_idx: int = 0) -> Tensor:
    """Compute the scalar training loss of a module on a batch.

    Args:
        module: A LightningModule, or any module when ``loss_fn`` is given.
        batch: The batch, already on the module's device. A copy is passed on, so that a ``training_step`` may change
            it.
        loss_fn: ``loss_fn(module, batch)``. Without it the module's own ``training_step`` is called, and ``"loss"`` is
            taken from a dict.
        batch_idx: The batch's index for ``training_step``.

    Raises:
        NoLossError: If this batch has no loss: None, or a constant that depends on nothing.
        LossError: If there is neither a ``loss_fn`` nor a ``training_step``, or the result is not a scalar tensor with
            a graph. Both are ValueErrors.
    """
    batch = clone(batch)
    if loss_fn is not None:
        source, loss = "loss_fn", loss_fn(module, batch)
    else:
        step = getattr(module, "training_step", None)
        if step is None:
            raise LossError(f"{type(module).__name__} has no training_step; pass loss_fn=lambda module, batch: ...")
        source = "training_step"
        loss = step(*_step_arguments(step, batch, batch_idx))
        if isinstance(loss, dict):
            if "loss" not in loss:
                raise LossError(f"training_step returned a dict without 'loss' (it has {sorted(map(str, loss))}).")
            loss = loss["loss"]
    if not isinstance(loss, Tensor):
        kind = NoLossError if loss is None else LossError
        raise kind(f"{source} must return a scalar tensor as loss, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise LossError(f"{source} must return a scalar loss, got shape {tuple(loss.shape)}; reduce it first.")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise LossError(f"the loss that {source} returned does not depend on any parameter.")
    if loss.is_leaf and loss.requires_grad:
        raise NoLossError(f"the loss that {source} returned depends on nothing.")
    return loss.reshape(())


def _step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> list[Any]:
    """Return the arguments of ``training_step``: a batch, or a batch and its index."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(step).parameters.values())
    names = [p.name for p in parameters if p.kind in kinds]
    if "dataloader_iter" in names:
        raise LossError("training_step reads from dataloader_iter; pass loss_fn=lambda module, batch: ...")
    takes_index = len(names) > 1 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return [batch, batch_idx] if takes_index else [batch]


def _say_nothing(*_: Any, **__: Any) -> None:
    """Replace ``log`` while the loss is evaluated."""


_CONTAINERS = (list, dict, set, deque)
_HOLDERS = (UserDict, UserList, Namespace, SimpleNamespace)  # standard classes that hold all in their attributes
_SEARCHED = 1000  # longer containers (such as data sets) are not searched
_STRUCTURE = frozenset(name for name in nn.Module().__dict__ if name != "training")
_REGISTRIES = "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"


def _snapshots(modules: Sequence[nn.Module]) -> list[tuple[dict[str, Any], _Contents]]:
    """Record the attributes of modules by reference, and copy those that are tensors or containers."""
    found = [_snapshot(m) for m in modules]
    every = {place: value for _, held in found for place, (value, _) in held.items() if isinstance(value, Tensor)}
    copies = dict(zip(every, clone_tensors([_here(value) for value in every.values()]), strict=True))
    for _, held in found:
        held.update({place: (every[place], copies[place]) for place in held if place in every})
    return found


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], _Contents]:
    """Record one module, without copying its tensors yet."""
    attributes = dict(module.__dict__)
    contents: _Contents = {}
    for name, value in attributes.items():
        if name not in _STRUCTURE:
            _remember(value, contents)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        _remember(tensor, contents)
    for registry in (getattr(module, name) for name in _REGISTRIES):
        contents[id(registry)] = registry, _entries(registry)
    return attributes, contents


def _remember(value: Any, contents: _Contents) -> None:
    """Add a tensor, an array, a generator, or a container and its contents."""
    if id(value) in contents:
        return
    content = value if isinstance(value, Tensor) and not is_lazy(value) else _content(value)
    if content is not None:
        contents[id(value)] = value, content
    if isinstance(value, (*_CONTAINERS, tuple)) and len(value) <= _SEARCHED:
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, contents)
    elif isinstance(value, _HOLDERS):
        _remember(vars(value), contents)


def _content(value: Any) -> Any:
    """Copy what an object holds that an evaluation may change in place; None if it holds nothing of the kind."""
    if isinstance(value, Tensor):
        return None if is_lazy(value) else _here(value).detach().clone()  # it holds nothing yet
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Generator | random.Random):
        return stream_of(value).get_state() if isinstance(value, torch.Generator) else value.getstate()
    if isinstance(value, np.random.Generator | np.random.RandomState | np.random.BitGenerator):
        return _of_numpy(value).state
    if isinstance(value, bytearray | array):
        return value[:]
    return _entries(value) if isinstance(value, _CONTAINERS) else None


def _of_numpy(stream: np.random.Generator | np.random.RandomState | np.random.BitGenerator) -> np.random.BitGenerator:
    """Return the bit generator that holds the state of a numpy random stream."""
    if isinstance(stream, np.random.RandomState):
        return stream._bit_generator
    return stream.bit_generator if isinstance(stream, np.random.Generator) else stream


def _here(tensor: Tensor) -> Tensor:
    return to_local(tensor) if is_sharded(tensor) else tensor  # comparing DTensors would communicate


def _put_all_back(
    saved: Sequence[tuple[nn.Module, dict[str, Any], _Contents]],
    left_out: Collection[int] = (),
    marks: bool = True,
    keeps: bool = True,
) -> list[tuple[nn.Module, dict[str, Any], _Contents]]:
    """Undo changes; ``marks=False`` hides that from graphs that hold these tensors.

    Returns:
        A snapshot of changed contents, for those that changed; of tensors only if ``keeps``.
    """
    held = {place: entry for *_, contents in saved for place, entry in contents.items() if place not in left_out}
    tensors = [(place, value, content) for place, (value, content) in held.items() if isinstance(value, Tensor)]
    with torch.no_grad():
        differs = find_changed([(_here(value), content) for _, value, content in tensors])
        changed = [entry for entry, is_other in zip(tensors, differs, strict=True) if is_other]
        # All are copied before the first is written, since they may share memory.
        changed_tensors = {place: (value, _content(value) if keeps else None) for place, value, _ in changed}
        return [(m, *_put_back(m, attributes, held, left_out, changed_tensors, marks)) for m, attributes, held in saved]


def _put_back(
    module: nn.Module,
    attributes: dict[str, Any],
    contents: _Contents,
    left_out: Collection[int],
    changed_tensors: _Contents,
    marks: bool,
) -> tuple[dict[str, Any], _Contents]:
    """Undo changes of one module; its changed tensors, and what they held, are in ``changed_tensors``."""
    current, changed = module.__dict__, {}
    for place, (value, content) in contents.items():
        if isinstance(value, Tensor):
            if place in changed_tensors:
                changed[place] = changed_tensors[place]
                _refill(value, content, marks)
        elif place not in left_out and not _holds(value, content):
            changed[place] = value, _content(value)
            _refill(value, content, marks)
    if current.keys() == attributes.keys() and all(map(operator.is_, current.values(), attributes.values())):
        return dict(current) if changed else {}, changed
    now = dict(current)
    for name in now.keys() - attributes.keys():
        del current[name]
    current.update(attributes)
    return now, changed


def _holds(value: Any, content: Any) -> bool:
    """Return whether an object other than a tensor still holds the same."""
    if isinstance(value, _CONTAINERS):
        return not value and not content or _same(_entries(value), content)
    return False  # rewriting these costs less than comparing them


def _refill(value: Any, content: Any, marks: bool) -> None:
    """Write the recorded contents back, in place."""
    if isinstance(value, Tensor):
        here = _here(value)
        if here.shape != content.shape:
            here.data = content.clone()
        else:
            (here if marks else here.data).copy_(content)
    elif isinstance(value, np.ndarray):
        value[...] = content
    elif isinstance(value, torch.Generator):
        stream_of(value).set_state(content)
    elif isinstance(value, random.Random):
        value.setstate(content)
    elif isinstance(value, np.random.Generator | np.random.RandomState | np.random.BitGenerator):
        _of_numpy(value).state = content
    elif isinstance(value, bytearray | array):
        value[:] = content
    else:
        value.clear()
        if isinstance(value, dict):  # one by one, since Counter.update adds
            for key, item in zip(content[::2], content[1::2], strict=True):
                value[key] = item
        else:
            (value.extend if isinstance(value, list | deque) else value.update)(content)


def _entries(container: Any) -> list[Any]:
    """List what a container holds; of a dictionary key, value, key, value."""
    return [x for item in container.items() for x in item] if isinstance(container, dict) else list(container)


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
