"""Handle batches of any class: their contents, copies, devices and weights."""

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_TEXT = (str, bytes, bytearray, range)
_WHOLE = (Tensor, PackedSequence, np.ndarray, type, *_TEXT)
PLAIN = (bool, int, float, complex, type(None), *_TEXT)


class NoWeightError(ValueError):
    """The weight of a batch is not positive."""


def items_of(value: Any) -> dict[Any, Any] | None:
    """Return what a container holds, by key, field or index; None for tensors, text, numbers and other objects.

    Containers are mappings, dataclasses and sequences of any class. A packed sequence is not one: its tensors belong
    together.
    """
    if isinstance(value, _WHOLE):
        return None
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value):
        known = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        return {**known, **getattr(value, "__dict__", {})}
    return dict(enumerate(value)) if isinstance(value, Sequence) else None


def clone(batch: Any) -> Any:
    """Copy a batch, sharing no tensor and no graph with it.

    Classes are kept, and no constructor is called. What cannot be copied (locks, generators) is shared.
    """
    return rebuild(batch, {})


def get_entry(batch: Any, name: str) -> Any:
    """Return the entry of a mapping, or the attribute, of that name; None if there is none."""
    if isinstance(batch, Mapping) and name in batch:
        return batch[name]
    return getattr(batch, name, None)


def batch_weight(batch: Any, name: str) -> float:
    """Return a batch's weight: the sum of its entry of that name, such as a mask of tokens.

    Raises:
        ValueError: If the batch has no such entry or attribute.
        NoWeightError: If the sum is not positive.
    """
    found = get_entry(batch, name)
    if found is None or callable(found):
        known = items_of(batch)
        told = sorted(map(str, known)) if known is not None else type(batch).__name__
        raise ValueError(f"the batch has no {name!r} to weight it by; it is {told}.")
    weight = float(found.sum() if isinstance(found, Tensor) else np.sum(found))
    if not weight > 0:
        raise NoWeightError(f"the batch's {name!r} sums to {weight}; a weight must be positive.")
    return weight


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device. Objects with a method ``to`` are moved by it, as Lightning does."""
    if hasattr(batch, "to") and not isinstance(batch, type):
        result = batch.to(device)
        return batch if result is None else result
    held = items_of(batch)
    if held is None:
        return batch
    return rebuild(batch, {id(v): to_device(v, device) for v in held.values() if not isinstance(v, PLAIN)})


def rebuild(batch: Any, replaced: Mapping[int, Any]) -> Any:
    """Deep-copy a batch with some of its contents replaced, by identity; works for any class, without constructors."""
    found = list(leaves(batch, replaced))  # kept alive, so that no identity is used twice
    memo = {**replaced, **{id(value): _copied(value) for value in found}}
    try:
        return copy.deepcopy(batch, {**memo})
    except Exception:  # something beside the entries cannot be copied
        return _made_anew(batch, memo)


def _made_anew(value: Any, known: Mapping[int, Any]) -> Any:
    """Rebuild containers by their constructors, around known contents."""
    held = None if id(value) in known else items_of(value)
    if held is None:
        return known.get(id(value), value)
    items = {key: _made_anew(item, known) for key, item in held.items()}
    if hasattr(value, "_fields"):
        return type(value)(*items.values())
    if dataclasses.is_dataclass(value):
        made = copy.copy(value)
        for key, item in items.items():
            object.__setattr__(made, key, item)
        return made
    if isinstance(value, dict):
        return _made_dict(value, items)
    plain = items if isinstance(value, Mapping) else list(items.values())
    try:
        return type(value)(plain)
    except TypeError:
        return plain


def _made_dict(value: dict[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    """Rebuild a dict of any class without its constructor, which may expect other arguments."""
    made: Any = type(value).__new__(type(value))
    if hasattr(value, "__dict__"):
        made.__dict__.update(value.__dict__)
    if isinstance(value, defaultdict):
        made.default_factory = value.default_factory
    put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
    for key, item in items.items():
        put(made, key, item)
    return made


def leaves(value: Any, known: Mapping[int, Any]) -> Iterator[Any]:
    """Yield everything in a batch that is not a container and not replaced."""
    if id(value) in known:
        return
    held = items_of(value)
    if held is not None:
        for item in held.values():
            yield from leaves(item, known)
    elif not isinstance(value, PLAIN):
        yield value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return of_class(value.detach().clone(), value)
    if isinstance(value, PackedSequence):
        parts: list[Any] = [None if t is None else t.detach().clone() for t in value]
        return type(value)(*parts)
    try:
        return copy.deepcopy(value)
    except Exception:  # locks, generators
        return value


def of_class(tensor: Tensor, like: Tensor) -> Tensor:
    """Convert a tensor to the class of another, with its attributes."""
    if type(tensor) is not type(like):
        tensor = tensor.as_subclass(type(like))
        tensor.__dict__.update(like.__dict__)
    return tensor.requires_grad_() if like.is_leaf and like.requires_grad else tensor
