"""Look at what a batch holds: how large its entries are, and whether its samples differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamon.health.limits import INPUT_SIZE, INPUT_SPREAD
from dynamon.isolation.batches import leaves

MOST_TENSORS = 3  # of a batch
LEAST = (INPUT_SIZE, 1 / INPUT_SPREAD, 1 / INPUT_SPREAD)  # times the usual that a spike is at least
_ENTRIES, _FEATURES = 1024, 64  # of a tensor that are looked at, and of each of its samples
_WALKED = 16  # tensors whose lengths are compared
_LEAST_SPREAD = 1e-4  # of the size, below which a spread is none
_FEW = 4  # different values, of masks and flags
_PROVED = 64  # batches in which a tensor has to vary, before its spread is followed


@dataclass(frozen=True)
class BatchSample:
    """Hold entries of the first tensors of a batch.

    Attributes:
        keys: Of each tensor: its place, its kind and its dimensions.
        shapes: Of each tensor, samples and entries of each.
        entries: Of each tensor, ``[n]`` in float32, on its device.
        is_batch: Whether all tensors have as many samples, so that the first dimension counts these.
        samples: Length of the first tensor of the batch that has one, 0 where none has.
        bytes: Of all tensors of the batch.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    entries: tuple[Tensor, ...]
    is_batch: bool
    samples: int
    bytes: int


def sample_batch(batch: Any, device: torch.device) -> BatchSample:
    """Copy some entries of the first tensors of a batch: floating ones, and integers of two dimensions and more.

    Args:
        batch: As ``training_step`` gets it.
        device: Tensors elsewhere are left out.

    Cost: on each of three tensors one device call, which reads 1024 entries at most.
    """
    tensors, lengths = _tensors(batch)
    keys, shapes, entries = list[str](), list[tuple[int, int]](), list[Tensor]()
    for place, tensor in enumerate(tensors[:_WALKED]):
        if len(keys) == MOST_TENSORS:
            break
        if not _is_followed(tensor, device):
            continue
        slices, shape = _slices(tuple(tensor.shape))
        keys.append(f"{place} {'float' if tensor.is_floating_point() else tensor.dtype} {tensor.ndim}")
        shapes.append(shape)
        entries.append(tensor.detach()[slices].to(torch.float32, copy=True).reshape(-1))
    return BatchSample(tuple(keys), tuple(shapes), tuple(entries), len(set(lengths)) == 1, *_measure(tensors, lengths))


def measure_batch(batch: Any) -> BatchSample:
    """Return how many samples and bytes a batch has, and no entries of it."""
    return BatchSample((), (), (), False, *_measure(*_tensors(batch)))


def _tensors(batch: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors of a batch, and the lengths of the first ones."""
    tensors = [leaf for leaf in leaves(batch, {}) if isinstance(leaf, Tensor)]
    return tensors, [len(t) for t in tensors[:_WALKED] if not t.is_nested and t.ndim]


def _measure(tensors: Sequence[Tensor], lengths: Sequence[int]) -> tuple[int, int]:
    return lengths[0] if lengths else 0, sum([t.numel() * t.element_size() for t in tensors])


def _is_followed(tensor: Tensor, device: torch.device) -> bool:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.device != device:
        return False
    if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel():
        return False
    return tensor.ndim >= (1 if tensor.is_floating_point() else 2)


@lru_cache(maxsize=256)
def _slices(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int, int]]:
    """Choose entries that are spread evenly over a tensor, and return how many samples and entries of each these are.

    Steps are odd along the last dimensions, so that they do not always meet the same column of an image.
    """
    counts = list(shape[1:])
    while math.prod(counts) > _FEATURES:
        largest = int(np.argmax(counts))
        counts[largest] = (counts[largest] + 1) // 2
    features = math.prod(counts)
    counts.insert(0, min(shape[0], max(_ENTRIES // features, 1)))
    chosen = []
    for size, count in zip(shape, counts, strict=True):
        step = max(size // count, 1)
        begin = (size - (count - 1) * step - 1) // 2
        chosen.append(slice(begin, begin + (count - 1) * step + 1, step))
    return tuple(chosen), (counts[0], features)


def describe(entries: NDArray[Any]) -> tuple[float, float, float]:
    r"""Return size, spread across samples and spread within samples of entries ``[n, m]``.

    The size is the root mean square of the entries that are not zero, so that padding and masks do not count. With the
    mean square q of all entries, the spread across samples is
    :math:`\sqrt{1 - \frac{1}{m} \sum_j \bar x_{\cdot j}^2 / q}` and that within samples
    :math:`\sqrt{1 - \frac{1}{n} \sum_i \bar x_{i \cdot}^2 / q}`: 0 where all samples, or all entries of each sample,
    are alike, and at most 1. NaN where entries are not finite, and 0 for all of a batch of zeros.
    """
    n, m = entries.shape
    flat = entries.ravel()
    squares = float(flat @ flat)
    if not math.isfinite(squares):
        return math.nan, math.nan, math.nan
    if squares == 0:
        return 0.0, 0.0, 0.0
    samples, features = entries @ np.ones(m), np.ones(n) @ entries  # sums
    across = 1 - float(features @ features) / (n * squares)
    within = 1 - float(samples @ samples) / (m * squares)
    return math.sqrt(squares / np.count_nonzero(flat)), math.sqrt(max(across, 0.0)), math.sqrt(max(within, 0.0))


class InputSeries:
    """Turns entries of batches into numbers for :class:`dynamon.monitoring.levels.Levels`: high where they are unusual.

    For each of three tensors there are three: the logarithm of the size, and those of both spreads with the opposite
    sign. A tensor keeps its three as long as it comes at the same place of a batch with as many dimensions. The spread
    of a tensor is followed once it has varied in 64 batches: masks, flags and one-hot vectors may be the same in a
    whole batch. Sizes are those of floating tensors and of images in bytes.

    Attributes:
        count: The number of series.
    """

    count = 3 * MOST_TENSORS

    def __init__(self) -> None:
        """No tensor is known."""
        self._slots: dict[str, int] = {}
        self._seen = [0] * MOST_TENSORS  # batches in which it has varied; -1 once it has not

    def numbers(self, batches: Sequence[BatchSample], entries: NDArray[Any]) -> NDArray[Any]:
        """Return ``[B, 9]`` numbers of B batches, NaN where there is none.

        Args:
            batches: What was taken of the batches of a step.
            entries: Their entries, one after the other.
        """
        found = np.full((len(batches), self.count), np.nan)
        begin = 0
        for row, batch in zip(found, batches, strict=True):
            for key, (n, m) in zip(batch.keys, batch.shapes, strict=True):
                own, begin = entries[begin : begin + n * m].reshape(n, m), begin + n * m
                slot = self._slots.get(key)
                if slot is None:
                    if len(self._slots) == MOST_TENSORS:
                        continue
                    slot = self._slots[key] = len(self._slots)
                row[3 * slot : 3 * slot + 3] = self._of_tensor(slot, key, own, batch.is_batch)
        return found

    def _of_tensor(self, slot: int, key: str, entries: NDArray[Any], is_batch: bool) -> list[float]:
        size, across, within = describe(entries)
        has_size = size > 0 and ("float" in key or "uint8" in key)
        numbers = [math.log(size) if has_size else math.nan, math.nan, math.nan]
        if self._seen[slot] < 0 or math.isnan(size):
            return numbers
        n, m = entries.shape
        spreads = [across if n > 1 and is_batch else math.nan, within if m > 1 else math.nan]
        if self._seen[slot] < _PROVED:
            varies = all(math.isnan(one) or one > _LEAST_SPREAD for one in spreads)
            if not varies or entries.size > _FEW and len(np.unique(entries)) <= _FEW:
                self._seen[slot] = -1
                return numbers
            self._seen[slot] += 1
        return [numbers[0], *(-math.log(max(one, _LEAST_SPREAD)) if one == one else one for one in spreads)]

    def describe(self, series: int, rises: NDArray[Any]) -> dict[str, float]:
        """Describe what is unusual about a batch: which of its tensors, and by what its size and spread have changed.

        Args:
            series: The series that is farthest above its level.
            rises: ``[9]``, how far all are above theirs.
        """
        slot = series // 3
        place = next(int(key.split()[0]) for key, at in self._slots.items() if at == slot)
        size, spreads = rises[3 * slot], rises[3 * slot + 1 : 3 * slot + 3]
        found = {"spike/input": float(place), "spike/input_size": float(np.exp(size))}
        if not np.isnan(spreads).all():
            found["spike/input_spread"] = float(np.exp(-np.nanmax(spreads)))
        return {tag: value for tag, value in found.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return which tensors are followed."""
        return {"slots": dict(self._slots), "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up."""
        self._slots, self._seen = dict(state["slots"]), list(state["seen"])
