"""Processes that hold shards of FSDP2 parameters: operators and solvers against the dense Hessian."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dynamon.curvature import (
    HessianOperator,
    MeanOverRanks,
    ShardedHessian,
    ShardedParameters,
    blockwise_sharpness,
    critical_sharpness,
    directional_sharpness,
    eigenspace_share,
    spectral_density,
    top_eigenvalues,
    trace,
    unsharded,
)
from dynamon.curvature.distributed.fsdp import is_rounded, unsupported_reason
from dynamon.distributed.dtensor import to_local
from dynamon.distributed.ranks import Ranks
from tests.models import dense_hessian, mlp, samples
from tests.processes import in_processes

X, Y = samples(12, 4, dtype=torch.float64)
PARTS = {2: [slice(0, 8), slice(8, 12)], 4: [slice(0, 5), slice(5, 7), slice(7, 11), slice(11, 12)]}


def loss_of(model) -> torch.Tensor:
    return cross_entropy(model(X), Y)


def dealt_out(mesh) -> torch.nn.Module:
    """4 x 5 and 5 x 3 do not divide evenly, and of a bias of 3 the fourth process has nothing."""
    model = mlp(4, 5, 3).double()
    for part in (model[0], model[2]):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, own: slice) -> list[torch.Tensor]:
    """Two steps, then whole weights; the gradient of the second is left for what is measured between."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(X[own]), Y[own]).backward()
        optimizer.step()
    return [p.full_tensor() for p in model.parameters()]


def part(vector: torch.Tensor, params: ShardedParameters, model) -> torch.Tensor:
    """What of a whole flat vector belongs to this process, by torch's own dealing."""
    from torch.distributed.tensor import distribute_tensor

    pieces = vector.split([p.numel() for p in model.parameters()])
    owners = list(model.parameters())
    dealt = [
        distribute_tensor(v.view(p.shape), p.device_mesh, p.placements) for v, p in zip(pieces, owners, strict=True)
    ]
    return params.flatten([to_local(v) for v in dealt])


def measure(rank: int, processes: int) -> dict:
    own = PARTS[processes][rank]
    plain = train(dealt_out(init_device_mesh("cpu", (processes,))), own)
    model = dealt_out(init_device_mesh("cpu", (processes,)))
    found: dict = {"weights": train(model, own)}
    gradients = [to_local(p.grad).clone() for p in model.parameters()]
    hooked = []
    next(model.parameters()).register_post_accumulate_grad_hook(hooked.append)
    model.set_gradient_divide_factor(3.0)
    ranks = Ranks(torch.device("cpu"))
    params = ShardedParameters(model, dict(model.named_parameters()), ranks)
    share = processes * len(X[own]) / len(X)

    def loss() -> torch.Tensor:
        return share * cross_entropy(model(X[own]), Y[own])

    hessian = ShardedHessian(loss, params)
    whole = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(3)).double()
    vector = part(whole, params, model)
    product = hessian @ vector
    found["product"] = torch.cat([params.space.piece(p, i).reshape(-1) for i, p in enumerate(params.split(product))])
    found["loss"], found["error"] = hessian.loss, hessian.product_error(vector)
    top = top_eigenvalues(hessian, 3, tol=1e-7, max_matvecs=90)
    certified = top_eigenvalues(hessian, certify=True, tol=1e-6)
    found |= {"top": top.values, "converged": top.converged, "upper": certified.upper}
    found["again"] = top_eigenvalues(hessian, 3, tol=1e-7, max_matvecs=90, warm_start=top.vectors).values
    found["power"] = top_eigenvalues(hessian, method="power", tol=1e-5, max_matvecs=80).values
    found["share"] = eigenspace_share(top.vectors[:, :3], hessian.gradient, params.space)
    blocks = blockwise_sharpness(hessian, {"first": "0.*", "second": "2.*"}, tol=1e-7, max_matvecs=60)
    found["blocks"] = [float(pairs.values[0]) for pairs in blocks.values()]
    traced = trace(hessian, num_vectors=24)
    found["trace"] = [traced.value, traced.standard_error]
    found["mean"] = spectral_density(hessian, steps=20, num_vectors=2).mean
    scale = part(whole.abs(), params, model)
    found["scaled"] = top_eigenvalues(hessian.scaled(scale), tol=1e-7, max_matvecs=80).values
    step = -0.3 * hessian.gradient
    found["directional"] = directional_sharpness(hessian, step).sharpness
    found["critical"] = critical_sharpness(lambda: ranks.mean(loss() / processes, 1.0), params, step, rate=0.3).multiple
    with pytest.raises(ValueError, match="the loss must be a scalar tensor"):
        ShardedHessian(lambda: model(X[own]), params)
    found["untouched"] = not hooked and all(
        torch.equal(to_local(p.grad), g) for p, g in zip(model.parameters(), gradients, strict=True)
    )
    model.set_gradient_divide_factor(float(processes))
    found["after"] = [
        torch.equal(a, b) for a, b in zip(train(model, own), train_on(plain, processes, own), strict=True)
    ]
    found["refused"] = [unsupported_reason(model, list(model.parameters()), processes), is_rounded(model)]
    found["other mesh"] = unsupported_reason(model, list(model.parameters()), processes + 1)
    if processes == 4:
        found["replicated"] = replicated(rank, own)
    return found


def train_on(weights: list[torch.Tensor], processes: int, own: slice) -> list[torch.Tensor]:
    """The same two steps from the same weights, without a measurement before."""
    model = mlp(4, 5, 3).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (processes,)))
    return train(fully_shard(model, mesh=init_device_mesh("cpu", (processes,))), own)


def replicated(rank: int, own: slice) -> list:
    """Two replicas of two shards each."""
    model = dealt_out(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    weights = train(model, own)
    assert unsupported_reason(model, list(model.parameters()), 4) is None
    with unsharded(model):
        mean = HessianOperator(lambda: cross_entropy(model(X[own]), Y[own]), list(model.parameters()))
        value = top_eigenvalues(MeanOverRanks(mean, len(X[own])), tol=1e-7).values
    return [weights, value]


def hessian_at(weights: list[torch.Tensor]) -> tuple[torch.nn.Module, torch.Tensor]:
    model = mlp(4, 5, 3).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    return model, dense_hessian(model, loss_of)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_give_what_the_dense_hessian_gives(processes: int) -> None:
    ranks = in_processes(lambda rank: measure(rank, processes), processes, group=True)
    own = ranks[0]
    model, dense = hessian_at(own["weights"])
    top = torch.linalg.eigvalsh(dense).flip(0)
    whole = torch.randn(len(dense), generator=torch.Generator().manual_seed(3)).double()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model), list(model.parameters()))])
    torch.testing.assert_close(own["product"], dense @ whole, rtol=1e-7, atol=1e-8)
    assert own["error"] < 1e-6 and float(own["loss"]) == pytest.approx(float(loss_of(model)), rel=1e-12)
    torch.testing.assert_close(own["top"], top[:3], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(own["again"], top[:3], rtol=1e-7, atol=1e-8)
    assert own["converged"] and own["upper"] >= float(top[0]) * (1 - 1e-7)
    assert float(own["power"][0]) == pytest.approx(float(top[0]), rel=1e-4)
    vectors = torch.linalg.eigh(dense).eigenvectors[:, -3:]
    expected = float((vectors.mT @ gradient).square().sum() / gradient.square().sum())
    assert own["share"] == pytest.approx(expected, rel=1e-5)
    first = sum(p.numel() for p in model[0].parameters())
    blocks = [dense[:first, :first], dense[first:, first:]]
    assert own["blocks"] == pytest.approx([float(torch.linalg.eigvalsh(block)[-1]) for block in blocks], rel=1e-6)
    value, error = own["trace"]
    assert abs(value - float(dense.trace())) < 4 * error
    assert own["mean"] * len(dense) == pytest.approx(float(dense.trace()), abs=5 * error)
    scaled = whole.abs()[:, None] * dense * whole.abs()
    assert float(own["scaled"][0]) == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-6)
    curvature = float(gradient @ dense @ gradient / gradient.square().sum())
    assert own["directional"] == pytest.approx(curvature, rel=1e-6)
    alone = critical_sharpness(lambda: loss_of(model), list(model.parameters()), -0.3 * gradient, rate=0.3)
    assert own["critical"] == pytest.approx(alone.multiple, rel=1e-6)
    assert own["refused"] == [None, False] and "FSDP2 over all processes" in own["other mesh"]
    for rank in ranks:
        assert rank["untouched"] and all(rank["after"])
        assert torch.equal(rank["top"], own["top"]) and rank["blocks"] == own["blocks"]
    if processes == 4:
        weights, found = own["replicated"]
        assert float(found[0]) == pytest.approx(float(torch.linalg.eigvalsh(hessian_at(weights)[1])[-1]), rel=1e-8)
