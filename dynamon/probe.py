"""Evaluating the training loss once more without leaving a trace."""

import inspect
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamon.batches import clone
from dynamon.shards import is_sharded, local

LossFn = Callable[[Any, Any], Tensor]
_MUTED = ("log", "log_dict")


class LossError(ValueError):
    """What should be a loss is none, on any batch."""


class NoLossError(LossError):
    """There is no loss on this batch: ``training_step`` skips it."""


@contextmanager
def undisturbed(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Leave no trace of what happens inside on the module or on any random stream.

    Put back at exit: the random streams of torch (CPU and all CUDA devices), numpy and python; every parameter and
    buffer; train and eval modes; every plain attribute of every submodule (numbers, strings, tensors, arrays, random
    generators, and the contents of lists, dicts, sets and deques, nested ones too), which covers counters, collected
    outputs, averaged teachers and the states of torchmetrics. ``log`` and ``log_dict`` do nothing inside. ``.grad`` is
    None inside and what it was at exit. Not covered: files, dataloader iterators and objects of the user's own
    classes. Memory: one copy of parameters and buffers.

    Args:
        module: The module.
        seed: Seeds torch inside, so that dropout draws the same masks each time; None leaves the streams.
    """
    modules = list(module.modules())
    saved = [_snapshot(m) for m in modules]
    gradients = [(p, p.grad) for p in module.parameters()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            for name in _MUTED:
                if callable(getattr(module, name, None)):
                    module.__dict__[name] = _say_nothing
            for p, _ in gradients:
                p.grad = None
            yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for m, snapshot in zip(modules, saved, strict=True):
            _put_back(m, *snapshot)


def training_loss(module: nn.Module, batch: Any, loss_fn: LossFn | None = None, batch_idx: int = 0) -> Tensor:
    """The scalar training loss of a module on a batch.

    Args:
        module: A LightningModule, or any module when ``loss_fn`` is given.
        batch: The batch, already on the module's device. A copy is passed on, so that a ``training_step``
            which changes its batch does no harm.
        loss_fn: ``loss_fn(module, batch)``; without it the module's own ``training_step`` is called, and
            ``"loss"`` is taken out of a dict.
        batch_idx: What ``training_step`` gets as the batch's index.

    Raises:
        NoLossError: Where there is no loss for this batch: None, or a number of its own that depends on nothing.
        LossError: If there is neither a ``loss_fn`` nor a ``training_step``, or the result is not a scalar tensor
            with a graph. Both are ValueErrors.
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
    """``training_step`` may take a batch, or a batch and its index."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(step).parameters.values())
    names = [p.name for p in parameters if p.kind in kinds]
    if "dataloader_iter" in names:
        raise LossError("training_step reads from dataloader_iter; pass loss_fn=lambda module, batch: ...")
    takes_index = len(names) > 1 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return [batch, batch_idx] if takes_index else [batch]


def _say_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``log`` while the loss is evaluated for a probe."""


_Contents = dict[int, tuple[Any, Any]]  # by identity: a tensor or container, and a copy of what it held
_CONTAINERS = (list, dict, set, deque)
_SEARCHED = 1000  # what is inside longer containers (a data set, say) is not looked for


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], _Contents]:
    """Attributes by reference, and the contents of those that are tensors or containers."""
    attributes = dict(module.__dict__)
    contents: _Contents = {}
    for name, value in attributes.items():
        if name not in _STRUCTURE:
            _remember(value, contents)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        _remember(tensor, contents)
    for registry in (module._buffers, module._non_persistent_buffers_set):
        contents[id(registry)] = registry, _entries(registry)
    return attributes, contents


def _remember(value: Any, contents: _Contents) -> None:
    """Add a tensor, an array, a generator, or a container and what is in it."""
    if isinstance(value, Tensor):
        here = local(value) if is_sharded(value) else value  # comparing shards would be a message
        contents[id(value)] = here, here.detach().clone()
    elif isinstance(value, np.ndarray):
        contents[id(value)] = value, value.copy()
    elif isinstance(value, torch.Generator | random.Random):
        contents[id(value)] = value, value.get_state() if isinstance(value, torch.Generator) else value.getstate()
    elif isinstance(value, np.random.Generator):
        contents[id(value)] = value, value.bit_generator.state
    elif isinstance(value, _CONTAINERS) and id(value) not in contents:
        contents[id(value)] = value, _entries(value)
        if len(value) <= _SEARCHED:
            for item in value.values() if isinstance(value, dict) else value:
                _remember(item, contents)


_STRUCTURE = frozenset(name for name in nn.Module().__dict__ if name != "training")


def _put_back(module: nn.Module, attributes: dict[str, Any], contents: _Contents) -> None:
    with torch.no_grad():
        for value, content in contents.values():
            if isinstance(value, Tensor):
                _refill(value, content)
            elif isinstance(value, np.ndarray):
                value[...] = content
            elif isinstance(value, torch.Generator):
                value.set_state(content)
            elif isinstance(value, random.Random):
                value.setstate(content)
            elif isinstance(value, np.random.Generator):
                value.bit_generator.state = content
            elif not _same(_entries(value), content):
                value.clear()
                if isinstance(value, dict):
                    content = zip(content[::2], content[1::2], strict=True)
                (value.extend if isinstance(value, list | deque) else value.update)(content)
    for name in [name for name in module.__dict__ if name not in attributes]:
        del module.__dict__[name]
    module.__dict__.update(attributes)


def _entries(container: Any) -> list[Any]:
    """What a container holds, a dictionary as key, value, key, value."""
    return [x for item in container.items() for x in item] if isinstance(container, dict) else list(container)


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _refill(tensor: Tensor, content: Tensor) -> None:
    """Undo changes in place; an untouched tensor is not written to."""
    if tensor.shape != content.shape:
        tensor.data = content
    elif not torch.equal(tensor, content):
        tensor.copy_(content)
