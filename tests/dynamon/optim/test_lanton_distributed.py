"""Two processes with FSDP2: Lanton on shards is Lanton on the whole."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dynamon.optim import Lanton
from dynamon.rates import NoiseAdaptiveRates
from tests.models import GPT, gpt
from tests.processes import in_processes

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


def work(rank: int, adaptive: bool, lag: int) -> dict:
    model, part = network(sharded=True), slice(4 * rank, 4 * rank + 4)
    optimizer = make(model, adaptive, lag)
    train(model, optimizer, range(3), part)
    state = optimizer.state_dict()
    assert all(hasattr(entry["momentum_buffer"], "placements") for entry in state["state"].values())
    resumed = make(model, adaptive, lag)
    resumed.load_state_dict(state)
    train(model, resumed, range(3, STEPS), part)
    weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    return {"weights": weights, "ratios": resumed.ratios}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("adaptive", "lag"), [(False, 1), (True, 1), (True, 0)])
def test_shards_take_the_steps_of_the_whole(adaptive, lag) -> None:
    first, second = in_processes(lambda rank: work(rank, adaptive, lag), 2, group=True)
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
