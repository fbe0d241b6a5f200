"""Processes that measure together: what fails on one ends on all, whatever each of them was doing."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dynamon.distributed.ranks import OthersFailedError, Ranks, ran_out_of_memory
from dynamon.optim import LayerwiseRates
from dynamon.quantities.local_gradients import LocalGradients
from dynamon.rates import NoiseAdaptiveRates
from tests.models import mlp, samples
from tests.processes import in_processes

X, Y = samples(24, 4, dtype=torch.float64)


def measure(ranks: Ranks, fails: int, where: str, error: Exception) -> str:
    """Two sums, one of them inside of a measurement in the measurement; ``fails`` fails at ``where``."""

    def perhaps(place: str) -> None:
        if where == place and ranks.rank == fails:
            raise error

    try:
        with ranks.collective_section():
            perhaps("before")
            ranks.sum(torch.ones(3))
            try:
                with ranks.collective_section():
                    perhaps("inside")
                    ranks.sum(torch.ones(7))
                    perhaps("after")
            except Exception as caught:
                if ran_out_of_memory(caught):
                    raise
            ranks.maximum(torch.ones(2))
            perhaps("end")
    except Exception as caught:
        assert ranks.is_collective_failure(caught)
        return f"{type(caught).__name__}: {caught}"
    return "fine"


def failures(rank: int) -> dict:
    ranks = Ranks(torch.device("cpu"))
    found: dict = {"rank": [ranks.rank, ranks.size]}
    for where in ("nowhere", "before", "inside", "after", "end"):
        for fails in (0, 2):
            found[f"{where} {fails}"] = measure(ranks, fails, where, ValueError("broken"))
    found["memory"] = measure(ranks, 1, "inside", torch.OutOfMemoryError("full"))
    found["mean"] = float(ranks.mean(torch.tensor(float(rank)), weight=rank + 1.0))
    found["first"] = ranks.broadcast_from_rank0([float(rank), 5.0])
    found["shared"] = ranks.all_gather_object({"rank": rank})
    return found


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_a_failure_anywhere_ends_it_everywhere() -> None:
    found = in_processes(failures, 3, group=True)
    for rank, own in enumerate(found):
        assert own["rank"] == [rank, 3]
        assert own["mean"] == pytest.approx((0 + 2 + 6) / 6)
        assert own["first"] == [0.0, 5.0] and own["shared"] == [{"rank": r} for r in range(3)]
        for fails in (0, 2):
            for where in ("nowhere", "inside", "after"):  # the outer measurement goes on
                assert own[f"{where} {fails}"] == "fine"
            for where in ("before", "end"):
                known = f"OthersFailedError: on 1 of 3 processes, first on rank {fails}: broken"
                assert own[f"{where} {fails}"] == ("ValueError: broken" if rank == fails else known)
        assert own["memory"].startswith("OutOfMemoryError" if rank == 1 else "OthersFailedError")


def test_one_process_alone_needs_no_group() -> None:
    ranks = Ranks(torch.device("cpu"), alone=True)
    assert not ranks.is_distributed and ranks.broadcast_from_rank0([1.0]) == [1.0] and ranks.all_gather_object(2) == [2]
    assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
    with pytest.raises(ValueError, match="mine") as caught, ranks.collective_section():
        raise ValueError("mine")
    assert ranks.is_collective_failure(caught.value) and not isinstance(caught.value, OthersFailedError)


def steer(rank: int) -> dict:
    """A loop of one's own: DDP, and two batches a step of which the first one is not reduced."""
    model = mlp(4, 6, 3).double()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = NoiseAdaptiveRates(group_by="all", warmup=0, source="independent")
    rates = LayerwiseRates(optimizer, rule, model)
    values = []
    for step in range(5):
        optimizer.zero_grad()
        rates.watch_ranks()
        half, other = torch.arange(24)[rank::3].split(4)
        with ddp.no_sync():
            (cross_entropy(ddp(X[half]), Y[half]) / 2).backward()
        (cross_entropy(ddp(X[other]), Y[other]) / 2).backward()
        local = [torch.autograd.grad(whole(model, half, other), list(model.parameters()))] if step == 0 else []
        if step == 0:
            values = [mean_square(g, p.grad) for g, p in zip(local[0], model.parameters(), strict=True)]
        optimizer.step()
        if step == 0:
            rates.settle()
            noise = rule.noise.squared.tolist()
    assert not any(p._backward_hooks for p in model.parameters())
    return {"ratios": rates.ratios, "truth": values, "noise": noise}


def whole(model, half, other):
    return (cross_entropy(model(X[half]), Y[half]) + cross_entropy(model(X[other]), Y[other])) / 2


def mean_square(own: torch.Tensor, mean: torch.Tensor) -> float:
    square = 2 / 2 * (own - mean).abs().sum() ** 2  # three processes, the dual norm of Adam
    dist.all_reduce(square)
    return float(square) / 3


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_noise_between_processes_in_a_loop_of_ones_own() -> None:
    found = in_processes(steer, 3, group=True)
    assert found[0]["ratios"] == found[1]["ratios"] == found[2]["ratios"] and min(found[0]["ratios"].values()) < 1
    for own in found:
        assert own["noise"] == pytest.approx(own["truth"], rel=1e-6)


def give_up(rank: int) -> dict:
    from dynamon.layers import describe_layers

    model = mlp(4, 6, 3)
    local = LocalGradients(describe_layers(model), Ranks(torch.device("cpu")))
    local.give_up()  # closed: nobody waits
    local.open()
    model(X[rank : rank + 2].float()).sum().backward()
    if rank == 1:
        local.give_up()
        return {"found": None}
    return {"found": local.compare([p.grad for p in model.parameters()], lambda d: torch.ones(2, len(d)))[0]}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_one_that_gives_up_leaves_no_reading() -> None:
    found = in_processes(give_up, 2, group=True)
    assert found[0]["found"].shape == (2, 4) and found[0]["found"].isnan().all()


def test_what_tells_of_a_failure_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: sent.append(tensor))
    ranks = Ranks(torch.device("cpu"))
    own = {held.data_ptr() for held in vars(ranks).values() if isinstance(held, torch.Tensor)}
    for text in ("a device has run out of memory", "again"):
        ranks.attach_values(lambda: [1.0, 2.0])
        with pytest.raises(torch.OutOfMemoryError), ranks.collective_section():
            raise torch.OutOfMemoryError(text)
        assert ranks.attached_sums() == [1.0, 2.0]
        assert bytes(sent[-1][1].tolist()).rstrip(b"\0").decode() == text
    assert {tensor.data_ptr() for tensor in sent} == own and len(own) == 2
