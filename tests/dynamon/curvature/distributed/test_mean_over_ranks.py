"""Two processes: the Hessian on the samples of both, with plain and with sharded parameters."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dynamon.curvature import HessianOperator, MeanOverRanks, top_eigenvalues, unsharded
from tests.models import dense_hessian, mlp, samples
from tests.processes import in_processes

X, Y = samples(12, 4, dtype=torch.float64)
PARTS = [slice(0, 8), slice(8, 12)]  # uneven, so that weights matter


def train_step(model, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model(X[PARTS[rank]]), Y[PARTS[rank]]).backward()
    for p in model.parameters():
        if not hasattr(p, "full_tensor"):  # FSDP has averaged by itself
            dist.all_reduce(p.grad)
            p.grad /= 2
    optimizer.step()


def whole_weights(model) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def work(rank: int, sharded: bool) -> dict:
    models = []
    for measured in (False, True):
        model = mlp(4, 5, 3).double()
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for part in (model[0], model[2]):
                fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
        train_step(model, rank)
        found = measure(model, rank) if measured else {}
        train_step(model, rank)
        models.append(whole_weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))  # measuring left the run alone
    return found


def measure(model, rank: int) -> dict:
    weights = [w.clone() for w in whole_weights(model)]
    with unsharded(model):
        params = list(model.parameters())
        own = HessianOperator(lambda: cross_entropy(model(X[PARTS[rank]]), Y[PARTS[rank]]), params)
        found = top_eigenvalues(MeanOverRanks(own, weight=len(X[PARTS[rank]])), tol=1e-6)
    return {"value": float(found.values[0]), "weights": weights, "converged": found.converged}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_hessian_of_both_processes(sharded) -> None:
    ranks = in_processes(lambda rank: work(rank, sharded), 2, group=True)
    model = mlp(4, 5, 3).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), ranks[0]["weights"], strict=True):
            p.copy_(w)
    truth = float(torch.linalg.eigvalsh(dense_hessian(model, lambda f: cross_entropy(f(X), Y)))[-1])
    assert ranks[0]["converged"] and ranks[0]["value"] == ranks[1]["value"]
    assert ranks[0]["value"] == pytest.approx(truth, rel=1e-8)
