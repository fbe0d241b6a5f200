"""Find out what a sample of a batch is: how many a batch has, and the first of them, copied."""

from collections import UserDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dynamon.isolation.batches import PLAIN, clone, items_of, leaves, of_class, rebuild

_SPREAD = 0.75  # integers that reach this share of the batch's size, but not the size, may be indices into it


@dataclass(frozen=True)
class Part:
    """Samples of a batch, copied.

    Attributes:
        batch: A batch of the original's class.
        samples: Their number, None if it is not known.
        is_cut: Whether samples were left out.
        reason: Why the whole batch was taken although a part was requested; None otherwise.
    """

    batch: Any
    samples: int | None
    is_cut: bool = False
    reason: str | None = None


def take_samples(batch: Any, fraction: float, most: int | None = None, sizes: Sequence[int] = ()) -> Part:
    """Copy the first samples of a batch; the whole batch if it is not certain what a sample is.

    It is certain if several signs agree: all tensors have the same first dimension, or all lists of samples the same
    length, and that number is in ``sizes``. If ``sizes`` is empty, the first dimensions of several tensors must agree
    and allow no other reading: no second dimension in which all agree, too (time before samples), and no list of
    similar tensors (one per sample). Batches are not cut if they hold packed sequences, objects that can only move
    themselves (graphs), or integers that look like indices into the batch.

    Args:
        batch: Tensors in containers of any class.
        fraction: Share of the samples in (0, 1]; at least two are taken, which BatchNorm and contrastive losses need.
        most: Largest number of samples, if limited.
        sizes: Known batch sizes: the loader's ``batch_size``, and that of its last batch.
    """
    size, reason = _size(batch, sizes)
    if size is None:
        return Part(clone(batch), _known(batch, sizes), reason=reason if fraction < 1 or most is not None else None)
    wanted = round(size * fraction) if most is None else min(most, round(size * fraction))
    count = min(size, max(2, wanted))
    if count == size:
        return Part(clone(batch), size)
    if _has_places(batch, size, count):
        return Part(clone(batch), size, reason="its integers look like indices into the batch")
    cut = _Cut(size, count)
    try:
        cut.visit(batch)
        part = rebuild(batch, cut.replaced)
        _Cut(count, count).visit(part)  # a batch that creates its entries at each access was not cut
    except Exception as error:  # a container of the user may raise anything; the whole batch is kept then
        told = str(error) if isinstance(error, _UnclearError) else ""
        return Part(clone(batch), size, reason=told or f"a {type(batch).__name__} cannot be cut")
    return Part(part, count, is_cut=True)


def count_samples(batch: Any, sizes: Sequence[int] = ()) -> int | None:
    """Return the number of samples of a batch as :func:`take_samples` counts them; None if it is not known."""
    size, _ = _size(batch, sizes)
    return _known(batch, sizes) if size is None else size


def guess_samples(batch: Any, sizes: Sequence[int] = ()) -> int | None:
    """Return the likely number of samples of a batch, to tell it from a smaller one; None if nothing indicates it.

    That is the number that all tensors have as their first or second dimension, and lists of similar tensors as their
    length. If there are several, one in ``sizes`` is taken; without ``sizes``, the first dimension.

    Args:
        batch: Tensors in containers of any class.
        sizes: As for :func:`take_samples`.
    """
    said = {n for leaf in leaves(batch, {}) if (n := _said(leaf)) is not None}
    if len(said) == 1:
        return said.pop()
    signs = list(_signs(batch))
    common = [n for n in signs[0] if all(n in sign for sign in signs)] if signs else []
    told = [n for n in common or dict.fromkeys(n for sign in signs for n in sign) if n in sizes]
    if told or not common:
        return told[0] if told else None
    return common[0] if len(common) == 1 or not sizes else None


def _signs(value: Any) -> Iterator[tuple[int, ...]]:
    """Yield, for each tensor or list of similar items in a batch, the possible numbers of samples."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield (int(value.size(0)),) if value.is_nested else tuple(value.shape[:2])
        return
    held = items_of(value)
    if held is None:
        yield from ((int(t.size(0)),) for t in _tensors(value) if t.ndim)
        return
    inner = [sign for item in held.values() for sign in _signs(item)]
    if inner and isinstance(value, list | tuple) and (_are_alike(value) or all(map(_is_record, value))):
        yield (
            *(n for n in inner[0] if all(n in sign for sign in inner)),
            len(value),
        )  # the common numbers, or one per sample
    else:
        yield from inner


def _is_record(value: Any) -> bool:
    """Return whether a value holds the parts of one sample by name, such as the boxes and labels of an image."""
    return not isinstance(value, list | tuple) and bool(items_of(value))


class _UnclearError(Exception):
    """A batch cannot be cut; the message has the reason."""


class _Cut:
    """Reads a batch as ``size`` samples, and keeps ``count`` of them.

    Attributes:
        replaced: The parts of tensors, lists and objects, by identity of the whole.
    """

    def __init__(self, size: int, count: int) -> None:
        self._size, self._count = size, count
        self.replaced: dict[int, Any] = {}
        self._alive: list[Any] = []  # so that no identity is reused

    def visit(self, value: Any) -> int:
        """Cut the contents of a value, and count what indicates samples.

        Raises:
            _UnclearError: If it does not have that many samples.
        """
        if isinstance(value, PLAIN):
            return 0
        if isinstance(value, Tensor):
            return self._visit_tensor(value)
        if isinstance(value, np.ndarray):
            if value.ndim and len(value) == self._size:
                self._replace(value, value[: self._count].copy())
            return 0
        held = items_of(value)
        if not isinstance(value, dict | UserDict | list | tuple) and hasattr(value, "to"):
            part = self._own_part(value)
            if part is not None:
                self._replace(value, part)
                return 1
        if held is None:
            if hasattr(value, "to") or any(isinstance(v, Tensor) for v in getattr(value, "__dict__", {}).values()):
                raise _UnclearError(f"it holds a {type(value).__name__}, which cannot be cut")
            return 0
        is_list = isinstance(value, list | tuple) and not hasattr(value, "_fields")
        if is_list and len(value) == self._size:
            return self._visit_list(value)
        return sum(self.visit(item) for item in held.values())

    def _visit_tensor(self, tensor: Tensor) -> int:
        if tensor.ndim == 0:
            return 0
        if tensor.size(0) != self._size:
            raise _UnclearError("")
        self._replace(tensor, of_class(_head(tensor.detach(), self._count), tensor))
        return 1

    def _visit_list(self, value: list[Any] | tuple[Any, ...]) -> int:
        """Cut a list as long as there are samples: one entry per sample, or entries that hold all samples."""
        inner = _Cut(self._size, self._count)
        try:
            told = sum(inner.visit(item) for item in value)
        except _UnclearError:
            told = 0
        if told:
            if _are_alike(value) and self._count < self._size:
                raise _UnclearError(f"a list of {self._size} tensors of {self._size} can be read in two ways")
            self.replaced |= inner.replaced
            self._alive += inner._alive
            return told
        if isinstance(value, tuple) and all(isinstance(item, int | float) for item in value):
            return 0  # a shape, say
        if not _are_one_kind(value) and any(isinstance(leaf, Tensor) for leaf in leaves(value, {})):
            raise _UnclearError("")
        self._replace(value, clone(value[: self._count]))
        return 1

    def _own_part(self, value: Any) -> Any | None:
        """Return the slice of an object that can be indexed itself."""
        try:
            part: Any = value[: self._count] if len(value) == self._size else None
            return clone(part) if type(part) is type(value) and len(part) == self._count else None
        except Exception:  # indexed by names
            return None

    def _replace(self, value: Any, part: Any) -> None:
        self.replaced[id(value)] = part
        self._alive.append(value)


def _head(tensor: Tensor, count: int) -> Tensor:
    """Copy the first entries of a tensor along its first dimension; sparse and nested ones too."""
    if tensor.is_nested:
        return torch.nested.nested_tensor(list(tensor.unbind()[:count]), layout=tensor.layout, device=tensor.device)
    if tensor.layout is not torch.strided:
        return tensor.index_select(0, torch.arange(count, device=tensor.device))
    return tensor[:count].clone()


def _size(batch: Any, sizes: Sequence[int]) -> tuple[int | None, str]:
    """Return the number of samples, or None and why it is not certain."""
    reason = ""
    for size in sizes:
        try:
            if _Cut(size, size).visit(batch):
                if not _is_square(batch, size, sizes):
                    return size, ""
                reason = "time and samples cannot be told apart by size"
        except Exception as error:  # a user's container may raise anything; the next size is tried
            reason = reason or str(error)
    agreed, other = _agreed(batch)
    if agreed is None and not reason and sizes and (firsts := _firsts(batch)):
        other = f"its tensors begin with {firsts} where the loader's batch_size is {sizes[0]}"
    if agreed is None or not sizes:
        return agreed, reason or other
    if agreed < max(sizes):  # a last batch, or one whose collate function dropped broken samples
        return agreed, ""
    return None, f"its tensors begin with {agreed} where the loader's batch_size is {sizes[0]}"


def _firsts(batch: Any) -> str:
    """Describe the first dimensions of the tensors of a batch."""
    found = sorted({int(t.size(0)) for t in _tensors(batch) if t.ndim})
    return " and ".join(map(str, found[:4])) + (" and others" if len(found) > 4 else "")


def _agreed(batch: Any) -> tuple[int | None, str]:
    """Return the number of samples, or None and the reason, without knowing the loader's batch size."""
    firsts = {int(t.size(0)) for t in _tensors(batch) if t.ndim}
    if not firsts:
        return None, f"a {type(batch).__name__} does not show its samples"
    if len(firsts) > 1:
        return None, f"its tensors begin with {_firsts(batch)}"
    first, *others = (t for t in _tensors(batch) if t.ndim)
    if not others and not first.is_nested:
        return None, "a single tensor does not show its samples"
    if _has_alike(batch):
        return None, "a list of similar tensors may hold one per sample"
    if _second(batch) is not None:
        return None, "its tensors agree in their first two dimensions, and either may be the samples"
    try:
        size = firsts.pop()
        return (size, "") if _Cut(size, size).visit(batch) else (None, f"a {type(batch).__name__} cannot be cut")
    except Exception as error:  # a user's container may raise anything: it cannot be cut then
        return None, str(error)


def _second(batch: Any) -> int | None:
    """Return the second dimension, if all tensors have the same."""
    tensors = [t for t in _tensors(batch) if t.ndim]
    if not tensors or any(t.is_nested or t.ndim < 2 for t in tensors):
        return None
    seconds = {t.shape[1] for t in tensors}
    return seconds.pop() if len(seconds) == 1 and seconds != {1} else None


def _is_square(batch: Any, size: int, sizes: Sequence[int]) -> bool:
    """Return whether the second dimension of all tensors could be the samples as well as the first."""
    return _second(batch) in sizes and all(t.size(0) == size for t in _tensors(batch) if t.ndim)


def _tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for leaf in leaves(batch, {}) if isinstance(leaf, Tensor))


def _are_one_kind(values: Sequence[Any]) -> bool:
    """Return whether each of the values may be a sample."""
    if any(isinstance(v, Tensor) for v in values):
        return len({(type(v), v.dtype, v.ndim) if isinstance(v, Tensor) else type(v) for v in values}) == 1
    return len({type(v) for v in values if v is not None}) <= 1


def _are_alike(values: Sequence[Any]) -> bool:
    """Return whether the values are several tensors of one kind."""
    if len(values) < 2 or not all(isinstance(v, Tensor) and v.ndim for v in values):
        return False
    return _are_one_kind(values)


def _has_alike(value: Any) -> bool:
    held = items_of(value)
    if held is None:
        return False
    is_list = isinstance(value, list | tuple) and not hasattr(value, "_fields")
    return is_list and _are_alike(value) or any(_has_alike(item) for item in held.values())


def _has_places(batch: Any, size: int, count: int) -> bool:
    """Return whether integers seem to index samples that would be left out: on a GPU that would end the run."""
    return any(_points(t, size, count) for t in _tensors(batch) if _is_integer(t))


def _is_integer(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    return whole and tensor.ndim > 0 and tensor.numel() > 0 and tensor.layout is torch.strided and not tensor.is_nested


def _points(tensor: Tensor, size: int, count: int) -> bool:
    """Return whether integers reach, but do not exceed, the batch's size and spread over it, unlike labels or words."""
    most = int(tensor.max())
    if not max(count, _SPREAD * size) <= most < size:
        return False
    distinct = tensor.unique()
    kept = tensor[:count] if tensor.shape[0] == size else tensor
    return bool(kept.max() >= count) and int((distinct >= 0).sum()) > size / 2


def _known(batch: Any, sizes: Sequence[int]) -> int | None:
    """Return the number of samples that objects or the loader state, where they cannot be cut."""
    said = {n for leaf in leaves(batch, {}) if (n := _said(leaf)) is not None}
    if len(said) == 1:
        return said.pop()
    if said or not sizes or sizes[0] < 2:
        return None
    tensors = list(_tensors(batch))
    if len({int(t.size(0)) for t in tensors if t.ndim} & set(sizes)) > 1:  # several loaders
        return None
    seen = {int(t.size(d)) for t in tensors for d in range(1 if t.is_nested else t.ndim)} | _lengths(batch)
    return sizes[0] if not tensors or sizes[0] in seen else None


def _said(value: Any) -> int | None:
    """Return the number of samples that an object states."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, Tensor) or not hasattr(value, "to"):
        return None
    numbers = (getattr(value, name, None) for name in ("num_graphs", "batch_size"))
    return next((n for n in numbers if type(n) is int and n > 0), None)


def _lengths(value: Any) -> set[int]:
    held = items_of(value)
    if held is None:
        return set()
    own = {len(held)} if isinstance(value, list | tuple) else set()
    return own.union(*(_lengths(item) for item in held.values()))
