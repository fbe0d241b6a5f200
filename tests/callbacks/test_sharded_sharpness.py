"""Sharpness of parameters that FSDP2 deals out over two processes, against one process on all of their samples."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dynamon.callbacks import SharpnessMonitor
from dynamon.monitoring.memory_plan import _why_no_differences
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from tests.models import dense_hessian
from tests.processes import Sharded, by_parts, fit_here, in_processes, rank, regression, same, small, values

pytestmark = pytest.mark.processes

NUMBERS = sum(p.numel() for p in small().parameters())
IN_SHARDS = ("hessian", "stability_ratio", "preconditioned", "directional", "critical", "batch", "subspace", "progress")
BOUNDS = ("hessian", "stability_ratio", "bracket")  # in the sixth measurement
NOT_A_VALUE = re.compile(".*_residual|sharpness/matvecs|sharpness/outliers|dynamon/overhead")  # how a solve went
BY_CHANCE = re.compile(".*_(upper|min)")  # these depend on the start vector, and shards draw their own
TRACKED = re.compile("sharpness/(stability_ratio|hessian|preconditioned).*")
EIGENVECTORS = re.compile(".*(share|overlap|block.*)")
# Along a vector on other samples: of first order in the vector's error, which is the root of the value's.
FIRST_ORDER = re.compile(".*_bracket")
NOT_OF_SHARDS = re.compile("sharpness/stability_ratio_next.*")


def copies(count: float) -> dict[str, float]:
    """A limit of memory in vectors as long as the parameters."""
    return {"memory_limit": count * 8 * NUMBERS / 2**30}


GATHERED, DEALT_OUT = copies(200), copies(16.5)


def monitor(every: int, quantities=QUANTITIES, **arguments: Any) -> SharpnessMonitor:
    given = {"probe_fraction": 1.0, "tol": 1e-6, "max_matvecs": 200, "strict": True, **arguments}
    return SharpnessMonitor(every, quantities=quantities, **given)


class Breaks(nn.Tanh):
    """Fails where it is told to, in the middle of a pass."""

    on: tuple[int, ...] = ()

    def forward(self, x):
        if rank() in self.on:
            raise ValueError("broken in the middle")
        return super().forward(x)


def breaks_on(*ranks: int):
    def loss_fn(module, batch):
        module.network[1].on = ranks
        return cross_entropy(module.network(batch[0]), batch[1])

    return loss_fn


def breakable() -> nn.Module:
    network = small()
    network[1] = Breaks()
    return network


class Mixed(nn.Module):
    """Tied and frozen weights, BatchNorm, dropout, activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inward, self.outward = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.outward.weight = self.inward.weight
        self.block = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3))
        self.frozen, self.head = nn.Linear(12, 12).requires_grad_(False), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        hidden = checkpoint(self.block, self.frozen(self.inward(x)), use_reentrant=False)
        return self.head(hidden @ self.outward.weight)


def momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=0.01)


def plain_descent(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def rounded() -> Sharded:
    network = small().float()
    return Sharded(
        network, plain_descent, shard=partial(by_parts, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    )


def resumed(folder: Path, limit: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of ten steps, and one that goes on from its sixth, where an epoch ends."""

    def callback() -> SharpnessMonitor:
        return monitor(2, ["hessian", "stability_ratio", "directional", "batch"], tol=1e-2, **limit)

    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = fit_here(Sharded(small()), [callback(), save], steps=10, enable_checkpointing=True)
    path = str(folder / "step=6.ckpt")
    return whole, fit_here(Sharded(small()), [callback()], steps=10, ckpt_path=path)


def fits() -> dict[str, Any]:
    """Every fit of this file but the resumed ones, in one fork."""
    found = {f"plain {steps}": fit_here(Sharded(small()), [], steps=steps) for steps in (4, 6)}
    for name, limit, quantities in (("gathered", GATHERED, QUANTITIES), ("shards", DEALT_OUT, IN_SHARDS)):
        found[name] = fit_here(Sharded(small()), [monitor(3, quantities, **limit)], steps=4)
        found[f"{name} bounds"] = fit_here(Sharded(small()), [monitor(1, BOUNDS, **limit)], steps=6)
    mixed = {"accumulate_grad_batches": 2, "steps": 4}
    found["plain mixed"] = fit_here(Sharded(Mixed(), momentum, shard=partial(by_parts, names=("block",))), [], **mixed)
    for name, limit, quantities in (("gathered", GATHERED, QUANTITIES), ("shards", DEALT_OUT, ("ggn", *IN_SHARDS))):
        callback = monitor(2, quantities, tol=1e-2, max_matvecs=20, **limit)
        found[f"{name} mixed"] = fit_here(
            Sharded(Mixed(), momentum, shard=partial(by_parts, names=("block",))), [callback], **mixed
        )
    for name, limit, ranks in (("gathered", GATHERED, (1,)), ("shards", DEALT_OUT, (0, 1))):
        callback = monitor(1, ["hessian", "critical"], loss_fn=breaks_on(*ranks), **{**limit, "strict": False})
        found[f"{name} breaks"] = fit_here(Sharded(breakable()), [callback], steps=6)
    found["plain rounded"] = fit_here(rounded(), [], steps=3)
    callback = monitor(1, ["hessian", "directional", "critical"], tol=1e-2)
    found["rounded"] = fit_here(rounded(), [callback], steps=3)
    found["neither"] = fit_here(rounded(), [monitor(1, ["hessian"], **copies(1))], steps=3)
    return found


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return in_processes(lambda _: fits())


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {
        "gathered": fit_here(Sharded(small()), [monitor(3)], steps=4),
        "shards": fit_here(Sharded(small()), [monitor(3, IN_SHARDS)], steps=4),
        "gathered bounds": fit_here(Sharded(small()), [monitor(1, BOUNDS)], steps=6),
        "rounded": fit_here(Sharded(small(), plain_descent), [monitor(1, ["hessian", "critical"])], steps=1),
    }


TAGS = {
    "gathered": {
        "sharpness/batch",
        "sharpness/critical",
        "sharpness/update_share",
        "sharpness/ggn_max",
        "sharpness/trace",
    },
    "shards": {"sharpness/batch", "sharpness/critical", "sharpness/update_share", "sharpness/preconditioned_max"},
    "bounds": {"sharpness/hessian_max_bracket", "sharpness/stability_ratio_bracket", "sharpness/hessian_max_upper"},
}


@pytest.mark.parametrize("name", ["gathered", "shards", "gathered bounds", "shards bounds"])
def test_every_tag_is_that_of_one_process(both, one, name: str) -> None:
    expected, found = one[name.replace("shards b", "gathered b")]["tables"], both[0][name]["tables"]
    assert {tag for tag in expected if not NOT_OF_SHARDS.fullmatch(tag)} == set(found)
    assert TAGS[name.split()[-1]] <= set(found)
    for tag in set(found) - {"dynamon/overhead"}:
        assert expected[tag]["steps"] == found[tag]["steps"], tag
        assert torch.equal(found[tag]["values"].nan_to_num(), both[1][name]["tables"][tag]["values"].nan_to_num()), tag
        if NOT_A_VALUE.fullmatch(tag) or name.startswith("shards") and BY_CHANCE.fullmatch(tag):
            continue
        # Differences of gradients; one process alone may take one-sided ones for what it tracks.
        exact = 1e-10 if name.startswith("gathered") and not TRACKED.fullmatch(tag) else 1e-6
        within = 1e-5 if EIGENVECTORS.fullmatch(tag) else exact
        if name.startswith("shards") and FIRST_ORDER.fullmatch(tag):
            within = exact**0.5
        torch.testing.assert_close(
            found[tag]["values"], expected[tag]["values"], rtol=within, atol=1e-12, msg=lambda m, t=tag: t + m
        )


def test_the_hessian_is_the_dense_one(both) -> None:
    """After the first step, on the samples of both processes."""
    x, y = regression()[:16]
    network = small()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    cross_entropy(network(x), y).backward()
    optimizer.step()
    truth = float(torch.linalg.eigvalsh(dense_hessian(network, lambda f: cross_entropy(f(x), y)))[-1])
    assert float(values(both[1]["gathered"], "sharpness/hessian_max")[0]) == pytest.approx(truth, rel=1e-10)
    assert float(values(both[1]["shards"], "sharpness/hessian_max")[0]) == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize(
    "seen,plain",
    [("gathered", "plain 4"), ("shards", "plain 4"), ("gathered mixed", "plain mixed"), ("shards mixed", "plain mixed"),
     ("gathered breaks", "plain 6"), ("shards breaks", "plain 6"), ("rounded", "plain rounded")],
)  # fmt: skip
def test_training_is_what_it_was(both, seen: str, plain: str) -> None:
    for found in both:
        assert same(found[seen], found[plain])
        assert torch.equal(found[seen]["random"], found[plain]["random"])


@pytest.mark.parametrize("name", ["gathered", "shards"])
def test_a_pass_that_fails_in_the_middle_fails_everywhere(both, name: str) -> None:
    for found in both:
        assert found[f"{name} breaks"]["failures"] == [6]  # two meters, three times each
    said = both[0][f"{name} breaks"]["said"]
    where = "on 1 of 2 processes, first on rank 1: " if name == "gathered" else ""
    assert any(f"measurement failed: {where}broken in the middle" in line for line in said)


def test_what_is_done_about_memory_is_said_once(both) -> None:
    for name, sentence in (
        ("gathered", "They are gathered while"),
        ("shards", "Parameters stay sharded"),
    ):
        assert len([line for line in both[0][f"{name} mixed"]["said"] if sentence in line]) == 1
    assert any("ggn is left out" in line for line in both[0]["shards mixed"]["said"])
    assert any("gradients are too coarse" in line for line in both[0]["neither"]["said"])
    assert "sharpness/critical_multiple" in both[0]["neither"]["tables"]
    assert "sharpness/hessian_max" not in both[0]["neither"]["tables"]


@pytest.mark.parametrize("name", [pytest.param("gathered", marks=pytest.mark.slow), "shards"])
def test_a_resumed_run_measures_what_the_whole_one_did(tmp_path: Path, name: str) -> None:
    """Bitwise, but for eigenvalues of shards, whose vectors are not saved: both are within the tolerance of 1e-2."""
    limit = {"gathered": GATHERED, "shards": DEALT_OUT}[name]
    for whole, rest in in_processes(lambda _: resumed(tmp_path, limit)):
        assert same(whole, rest) and rest["failures"] == [0]
        for tag in ("hessian_max", "stability_ratio", "directional", "batch", "probe_loss"):
            before, after = values(whole, f"sharpness/{tag}")[-2:], values(rest, f"sharpness/{tag}")
            solved = name == "shards" and tag in ("hessian_max", "stability_ratio")
            torch.testing.assert_close(after, before, rtol=1e-2 if solved else 0.0, atol=0.0)


def test_mixed_precision_rounds_products_but_not_steps(both, one) -> None:
    for tag, within in (("sharpness/hessian_max", 0.03), ("sharpness/critical_multiple", 0.03)):
        found, expected = values(both[0]["rounded"], tag)[0], values(one["rounded"], tag)[0]
        assert float(found) == pytest.approx(float(expected), rel=within), tag


def test_differences_need_every_trained_parameter_sharded() -> None:
    """A vector's part on each process would hold a whole parameter as often as there are processes."""
    module = small()
    run = SimpleNamespace(module=module, loop=SimpleNamespace(precision="64-true"))
    assert _why_no_differences(run, list(module.parameters())) == "4 trained parameters are not sharded"
    assert _why_no_differences(run, []) is None
