"""The samples of a batch that are kept for a probe, and what the loaders say of batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamon.isolation.saved_batches import pack_batch, unpack_batch
from dynamon.monitoring.loop import Loop


@dataclass(frozen=True)
class Kept:
    """Samples of one batch.

    Attributes:
        batch: The samples.
        index: The batch's index in its epoch.
        samples: How many, None where that is not known.
        weight: What they count among others.
        is_cut: Whether samples of the batch were left out.
        is_tried: Whether the loss has been evaluated on them.
        numbers: How many a checkpoint would hold, None where it cannot hold them.
    """

    batch: Any
    index: int
    samples: int | None
    weight: float
    is_cut: bool = False
    is_tried: bool = False
    numbers: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        names = ("index", "samples", "weight", "is_cut", "is_tried", "numbers")
        return {"batch": pack_batch(self.batch), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device, like: Any) -> "Kept":
        """The same again; ``like`` is a batch of the run."""
        return cls(**{**state, "batch": unpack_batch(state["batch"], device, like)})


def numbers_of(batch: Any) -> int | None:
    """Return how many numbers a checkpoint would hold of a batch, None where it cannot hold it."""
    state = pack_batch(batch)
    return None if state is None else int(state["numbers"])


def batch_sizes(loaders: Iterable[Any]) -> tuple[int, ...]:
    """Return how many samples a batch may have by what the loaders say: full batches first, then last ones."""
    full, last = [], []
    for loader in loaders:
        sampler = next((s for n in ("batch_sampler", "sampler") if (s := getattr(loader, n, None)) is not None), None)
        size = next((s for o in (loader, sampler) if (s := getattr(o, "batch_size", None)) is not None), None)
        if type(size) is not int or size < 1:
            continue
        full.append(size)
        drawn = _length(getattr(sampler, "sampler", None))
        if drawn is not None and drawn % size:
            last.append(drawn % size)
    return tuple(dict.fromkeys([*full, *last]))


def is_whole_training_set(loop: Loop, kept: Sequence[Kept]) -> bool:
    """Return whether these are all batches that training sees, so that there are none that they could differ from."""
    loaders = list(loop.loaders)
    if any(one.is_cut for one in kept) or len(kept) < loop.batches_per_epoch or len(loaders) != 1:
        return False
    return loop.repeats_batches or (_length(loaders[0]) or 0) <= loop.batches_per_epoch


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def dealt(parts: Sequence[Sequence[Any]], rank: int, size: int) -> list[Any]:
    """One process's share of what each of perhaps another number of processes had; nothing where it is too few."""
    if len(parts) == size:
        return list(parts[rank])
    found = [entry for part in parts for entry in part]
    return found[rank::size] if len(found) >= size else []
