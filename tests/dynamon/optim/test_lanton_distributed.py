"""Two processes with FSDP2: Lanton on shards is Lanton on the whole."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy

from dynamon.optim import Lanton
from dynamon.rates import NoiseAdaptiveRates
from tests.models import GPT, gpt

STEPS = 6


def network(sharded: bool) -> GPT:
    """Rows of uneven number (11 tokens) and packed queries, keys and values, in float64."""
    model = gpt(depth=1).double()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.blocks[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def make(model: GPT, adaptive: bool, lag: int) -> Lanton:
    rule = NoiseAdaptiveRates(warmup=0, group_by="all", beta2=0.8) if adaptive else None
    settings = {"nesterov": True, "weight_decay": 0.1, "noise_adaptive": adaptive, "lag": lag}
    return Lanton(model, 0.02, rule=rule, **settings)


def train(model: GPT, optimizer: Lanton, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(step))[part]
        optimizer.zero_grad()
        cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def work(rank: int, port: int, adaptive: bool, lag: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model, part = network(sharded=True), slice(4 * rank, 4 * rank + 4)
        optimizer = make(model, adaptive, lag)
        train(model, optimizer, range(3), part)
        state = optimizer.state_dict()
        assert all(hasattr(entry["momentum_buffer"], "placements") for entry in state["state"].values())
        resumed = make(model, adaptive, lag)
        resumed.load_state_dict(state)
        train(model, resumed, range(3, STEPS), part)
        weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        torch.save({"weights": weights, "ratios": resumed.ratios}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("adaptive", "lag"), [(False, 1), (True, 1), (True, 0)])
def test_shards_take_the_steps_of_the_whole(tmp_path, adaptive, lag) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(work, (port, adaptive, lag, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = network(sharded=False)
    optimizer = make(model, adaptive, lag)
    train(model, optimizer, range(STEPS))
    assert first["ratios"] == second["ratios"]
    assert first["ratios"] == pytest.approx(optimizer.ratios, rel=1e-6)
    assert (min(optimizer.ratios.values()) < 1) == adaptive
    start = network(sharded=False).state_dict()
    for name, p in model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert (first["weights"][name] - p).norm() <= 1e-6 * p.norm(), name
        assert (p - start[name]).norm() > 0
