"""Fits of sharded models (FSDP2) in several processes, and what each of them ends with."""

import os
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from tests.helpers import Classifier, fit
from tests.ranks import Report


class ShardedClassifier(Classifier):
    """A classifier whose network ``shard`` cuts up: its parts by themselves, then the rest, unless told otherwise."""

    def __init__(self, network: nn.Module, *arguments: Any, shard: Callable[..., Any] | None = None) -> None:
        super().__init__(network, *arguments)
        self.shard = shard or by_parts

    def configure_model(self) -> None:
        if getattr(self, "_device_mesh", None) is not None:
            self.shard(self.network, self.device_mesh)


def by_parts(network: nn.Module, mesh: Any, **options: Any) -> None:
    """Every second layer is a part of its own."""
    for part in list(network.children())[::2]:
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"], **options)
    fully_shard(network, mesh=mesh["data_parallel"], **options)


class WholeReport(Report):
    """A report with whole weights."""

    def on_train_end(self, trainer, pl_module) -> None:
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in pl_module.state_dict().items()}
        pl_module.state_dict, kept = lambda: full, pl_module.state_dict
        try:
            super().on_train_end(trainer, pl_module)
        finally:
            pl_module.state_dict = kept


def fit_shards(
    folder: Path,
    make: Callable[[], Any],
    callbacks: list[Any],
    ranks: int = 2,
    more: Any = None,
    sizes: Sequence[int] = (),
    **settings: Any,
) -> list[dict[str, Any]]:
    """What each of some forked processes ends with; see :func:`tests.ranks.fit_ranks`.

    ``sizes`` are those of the mesh, data parallel first; ``options`` are those of the strategy.
    """
    folder.mkdir()
    data, tensor = sizes or (ranks, 1)
    options = settings.pop("options", {})

    def train(rank: int) -> None:
        strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo", **options)
        given = {"steps": 16, "max_epochs": -1, "use_distributed_sampler": False, **settings}
        others = given.pop("others", [])
        given |= {"strategy": strategy, "devices": ranks}
        fit(make(), [*callbacks, *others, WholeReport(folder, callbacks, more)], **given)

    in_processes(train, ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def in_processes(work: Callable[[int], None], ranks: int) -> None:
    """Call a function in forked processes that can reach each other; what one raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on forking
        start_processes(_work, (work, ranks, port), nprocs=ranks, start_method="fork")


def _work(rank: int, work: Callable[[int], None], ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ.update(WORLD_SIZE=str(ranks), RANK=str(rank))
    torch.set_num_threads(1)
    try:
        work(rank)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_group(work: Callable[[int], None], ranks: int) -> None:
    """The same with ``torch.distributed`` at hand."""

    def begin(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        work(rank)

    in_processes(begin, ranks)
