"""Fits in forked processes whose parameters FSDP2 deals out; several fits in one fork."""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from tests.helpers import Classifier, fit
from tests.ranks import tables

Found = list[dict[str, Any]]


class Sharded(Classifier):
    """Deals out each submodule named in ``parts``, and the rest of the network, where there are several processes."""

    parts: tuple[str, ...] = ("0",)
    options: dict[str, Any] = {}

    def configure_model(self) -> None:
        if self.device_mesh is None or hasattr(self.network, "unshard"):
            return
        mesh = self.device_mesh["data_parallel"]
        for name in self.parts:
            fully_shard(self.network.get_submodule(name), mesh=mesh, **self.options)
        fully_shard(self.network, mesh=mesh, **self.options)


def fit_sharded(module: Any, callbacks: list[Any], **settings: Any) -> dict[str, Any]:
    """What one of several processes ends with: whole weights, tables, failures, gradients; to be called on each."""
    given = {"steps": 6, "max_epochs": -1, "use_distributed_sampler": False, "devices": dist_size(), **settings}
    if dist_size() > 1:
        given["strategy"] = ModelParallelStrategy(dist_size(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, callbacks, **given)
    return {
        "weights": {name: whole(p) for name, p in module.state_dict().items()},
        "tables": tables([c for c in callbacks if hasattr(c, "history")]),
        "failures": [c.failures for c in callbacks if hasattr(c, "failures")],
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def dist_size() -> int:
    return int(os.environ.get("DYNAMON_TEST_PROCESSES", "1"))


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
    os.environ.update(DYNAMON_TEST_PROCESSES=str(processes))
    torch.set_num_threads(1)
    try:
        torch.save(work(), f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def network() -> nn.Module:
    """Two tanh layers in double precision; 3 does not divide by 2, so shards differ in size."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 3)).double()
