"""Fits in forked processes, many in one fork: under DDP, or with parameters that FSDP2 deals out."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from dynamon.monitoring import messages
from tests.helpers import Classifier, fit
from tests.ranks import loader, tables

_SIZE = "DYNAMON_TEST_PROCESSES"


class Sharded(Classifier):
    """Deals out each submodule of the network named in ``parts``, and the rest of it, under FSDP2."""

    def __init__(self, network: nn.Module, optimizer: Any = None, parts: tuple[str, ...] = ("0",), **policies) -> None:
        super().__init__(network, optimizer)
        self.parts, self.policies = parts, policies

    def configure_model(self) -> None:
        if self.device_mesh is None or hasattr(self.network, "unshard"):
            return
        mesh = self.device_mesh["data_parallel"]
        for name in self.parts:
            fully_shard(self.network.get_submodule(name), mesh=mesh, **self.policies)
        fully_shard(self.network, mesh=mesh, **self.policies)


def small() -> nn.Module:
    """Two tanh layers in double precision; 15 and 3 do not divide by 2, so shards differ in size."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 3)).double()


def fit_here(module: Any, callbacks: list[Any], **settings: Any) -> dict[str, Any]:
    """What this process ends with, and what it said; each of the processes must call it. One alone has no strategy."""
    size = int(os.environ.get(_SIZE, "1"))
    given = {"steps": 6, "max_epochs": -1, "use_distributed_sampler": False, "devices": size, "data": loader()}
    if size > 1:
        given["strategy"] = ModelParallelStrategy(size, 1)
    options = settings.pop("ddp", None)
    if options is not None and size > 1:
        given["strategy"] = DDPStrategy(process_group_backend="gloo", **options)
    with warnings.catch_warnings(), listening() as said:
        warnings.simplefilter("ignore")
        fit(module, callbacks, **{**given, **settings})
    return {
        "weights": {name: whole(p) for name, p in module.state_dict().items()},
        "tables": tables([c for c in callbacks if hasattr(c, "history")]),
        "failures": sum(c.failures for c in callbacks if hasattr(c, "failures")),
        "said": said,
        "random": torch.get_rng_state(),
    }


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what the engine tells the user, in place of telling it: only the first process says anything."""
    said: list[str] = []

    def keep(sentence: str, *_: Any, **__: Any) -> None:
        said.append(sentence)

    logger, shown = SimpleNamespace(info=keep), SimpleNamespace(warn=keep)
    with patch.object(messages, "_LOGGER", logger), patch.object(messages, "warnings", shown):
        yield said


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs end with bitwise the same weights and buffers."""
    first, second = one["weights"], other["weights"]
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def values(found: dict[str, Any], tag: str) -> torch.Tensor:
    return found["tables"][tag]["values"]


def dist_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) if _SIZE in os.environ else 0


def in_processes(folder: Path, work: Callable[[], Any], processes: int = 2) -> list[Any]:
    """What ``work`` returns on each of some forked processes, in which a Trainer finds the others."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_begin, (work, port, processes, str(folder)), nprocs=processes, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _begin(rank: int, work: Callable[[], Any], port: int, processes: int, folder: str) -> None:
    # LOCAL_RANK tells Lightning that somebody else has made the processes.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ[_SIZE] = str(processes)
    torch.set_num_threads(1)
    try:
        torch.save(work(), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
