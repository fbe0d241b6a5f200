"""The samples of a batch that are kept for a probe, and what the loaders say of batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader

from dynamon.isolation.saved_batches import pack_batch, unpack_batch


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
        """What a checkpoint holds."""
        names = ("index", "samples", "weight", "is_cut", "is_tried", "numbers")
        return {"batch": pack_batch(self.batch), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device, like: Any) -> "Kept":
        """The same again; ``like`` is a batch of the run."""
        return cls(**{**state, "batch": unpack_batch(state["batch"], device, like)})


def numbers_of(batch: Any) -> int | None:
    """How many numbers a checkpoint would hold of a batch, None where it cannot hold it."""
    state = pack_batch(batch)
    return None if state is None else int(state["numbers"])


def batch_sizes(trainer: pl.Trainer) -> tuple[int, ...]:
    """How many samples a batch may have by what the loaders of training say: full ones first, then last ones."""
    full, last = [], []
    for loader in _loaders(trainer.train_dataloader):
        sampler = next((s for n in ("batch_sampler", "sampler") if (s := getattr(loader, n, None)) is not None), None)
        size = next((s for o in (loader, sampler) if (s := getattr(o, "batch_size", None)) is not None), None)
        if type(size) is not int or size < 1:
            continue
        full.append(size)
        drawn = sized_len(getattr(sampler, "sampler", None))
        if drawn is not None and drawn % size:
            last.append(drawn % size)
    return tuple(dict.fromkeys([*full, *last]))


def is_whole_training_set(trainer: pl.Trainer, kept: Sequence[Kept]) -> bool:
    """Whether these are all batches that training sees, so that nothing is left that they could differ from."""
    loaders = list(_loaders(trainer.train_dataloader))
    if any(one.is_cut for one in kept) or len(kept) < trainer.num_training_batches or len(loaders) != 1:
        return False
    is_limited = (sized_len(loaders[0]) or 0) > trainer.num_training_batches
    return not is_limited or getattr(trainer, "overfit_batches", 0) > 0


def _loaders(value: Any) -> Iterator[Any]:
    """The loaders in whatever collection the Trainer was given."""
    inner = value.iterables if isinstance(value, CombinedLoader) else value
    if isinstance(inner, Mapping | list | tuple):
        for item in inner.values() if isinstance(inner, Mapping) else inner:
            yield from _loaders(item)
    else:
        yield inner


def dealt(parts: Sequence[Sequence[Any]], rank: int, size: int) -> list[Any]:
    """One process's share of what each of perhaps another number of processes had; nothing where it is too few."""
    if len(parts) == size:
        return list(parts[rank])
    found = [entry for part in parts for entry in part]
    return found[rank::size] if len(found) >= size else []
