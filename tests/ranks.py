"""Fits in several processes, and what each of them ends with."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from tests.helpers import fit

Tables = dict[str, dict[str, Any]]


class Report(Callback):
    """Writes what a rank ends with, since the processes are gone afterwards."""

    def __init__(self, folder: Path, callbacks: list[Any], more: Callable[[Any], Any] | None) -> None:
        self.folder, self.callbacks, self.more = folder, callbacks, more

    def on_train_end(self, trainer, pl_module) -> None:
        weights = {key: value.cpu() for key, value in pl_module.state_dict().items()}
        found = {"weights": weights, "tables": tables(self.callbacks)}
        found["failures"] = [c.failures for c in self.callbacks if hasattr(c, "failures")]
        found["ratios"] = [c.ratios for c in self.callbacks if hasattr(c, "ratios")]
        found["more"] = None if self.more is None else self.more(pl_module)
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def tables(callbacks: list[Any]) -> Tables:
    """Steps and values of everything in the histories of some callbacks."""
    found: Tables = {}
    for callback in callbacks:
        for tag in callback.history:
            series = callback.history[tag]
            found[tag] = {"steps": list(map(int, series.steps)), "values": torch.as_tensor(series.values).double()}
    return found


def fit_ranks(
    folder: Path, make: Callable[[], Any], callbacks: list[Any], ranks: int = 2, more: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """What each of some forked processes ends with; one process runs without a strategy."""
    folder.mkdir()
    given = {"steps": 16, "max_epochs": -1, "use_distributed_sampler": False, **settings}
    options, others = given.pop("ddp", {}), given.pop("others", [])
    if ranks > 1:
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", **options)
        given |= {"strategy": strategy, "devices": ranks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on forking
        fit(make(), [*callbacks, *others, Report(folder, callbacks, more)], **given)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def regression(count: int = 96, features: int = 8, classes: int = 3) -> Dataset[Any]:
    """Inputs and labels in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(classes, (count,), generator=generator))


class Parts(Sampler[list[int]]):
    """Batches of ``size`` samples in order, of which rank r of R takes every R-th, or what ``bounds`` says."""

    def __init__(self, count: int, size: int, bounds: Sequence[int] = ()) -> None:
        self.count, self.size, self.bounds = count, size, bounds

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for begin in range(0, self.count, self.size):
            whole = list(range(begin, min(begin + self.size, self.count)))
            if self.bounds and ranks > 1:
                edges = [0, *self.bounds, self.size]
                yield whole[edges[rank] : edges[rank + 1]]
            else:
                yield whole[rank::ranks]


def loader(size: int = 16, count: int = 96, bounds: Sequence[int] = ()) -> DataLoader[Any]:
    """The same samples in each step whatever the number of processes."""
    return DataLoader(regression(count), batch_sampler=Parts(count, size, bounds))


def rank() -> int:
    """Which process this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def _fails(message: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(message)

    return fail


class Breaks(Callback):
    """Makes a function fail on one process, between two steps."""

    def __init__(self, owner, name: str, begin: int, end: int, on: int = 1) -> None:
        self.owner, self.name, self.begin, self.end, self.on = owner, name, begin, end, on

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if rank() != self.on:
            return
        if trainer.global_step == self.begin:
            self.kept = getattr(self.owner, self.name)
            setattr(self.owner, self.name, _fails("broken"))
        if trainer.global_step == self.end:
            setattr(self.owner, self.name, self.kept)
