"""FSDP2: processes that hold parts of the parameters find what one process finds on all of their samples."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from dynamon.callbacks import GradientMonitor, WeightMonitor
from dynamon.optim import Lanton
from tests.processes import Sharded, fit_in_processes, loader, regression

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
OWN_CLOCK = re.compile("dynamon/.*overhead")
SUMS = re.compile("(gradient|noise)/.*")  # in float64; weights are reported in float32
ITERATIVE = re.compile("spectrum/.*|weight/operator.*|update/(operator|ratio).*|weight/constraint_usage.*")


def uneven() -> nn.Module:
    """5, 7, 1 and 3 rows: shards of different sizes, and some that are empty."""
    torch.manual_seed(1)
    sides = [8, 5, 7, 1, 3]
    layers = [nn.Linear(*pair) for pair in zip(sides, sides[1:], strict=False)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()


def convolutions() -> nn.Module:
    """Convolutions, and the bias of one frozen."""
    torch.manual_seed(1)
    parts = [nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 5, 3, padding=1, groups=1), nn.Tanh(), nn.Flatten()]
    network = nn.Sequential(*parts, nn.Linear(20, 3)).double()
    network[1].bias.requires_grad_(False)
    return network


class Tied(nn.Module):
    """Samples binned into tokens, a mean of embeddings, and a head tied to them; beside it an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.other = nn.Embedding(7, 4), nn.Embedding(7, 4)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (x * 2).round().long().clamp(-3, 3) + 3
        hidden = (self.embedding(tokens) + self.other(tokens)).mean(1)
        return self.head(torch.tanh(self.middle(hidden)))


def at_once(network: nn.Module, mesh: Any) -> None:
    fully_shard(network, mesh=mesh["data_parallel"])


class TwoOptimizers(Sharded):
    """One optimizer for each half, stepped by hand."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return torch.optim.SGD(parameters[:2], lr=0.1), torch.optim.Adam(parameters[2:], lr=0.01)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def orthogonal(parameters: Any) -> torch.optim.Optimizer:
    return Lanton(parameters, lr=0.02, noise_adaptive=False)


def make(network: Callable[[], nn.Module], optimizer: Any = None, kind: Any = Sharded, shard: Any = None):
    return lambda: kind(network(), optimizer, shard=shard)


def monitors(every: int = 3, **options: Any) -> list[Any]:
    return [
        GradientMonitor(every_n_steps=every, histograms=True, strict=True),
        WeightMonitor(every_n_steps=every, histograms=True, convolutions=True, strict=True),
    ]


def compare(one: dict, several: list[dict]) -> None:
    """Every tag of one process, its steps and values; and all processes agree to the bit."""
    compared = {tag for tag in one["tables"] if not OWN_CLOCK.match(tag)}
    assert compared == {tag for tag in several[0]["tables"] if not OWN_CLOCK.match(tag)}
    for tag in sorted(compared):
        alone, together = one["tables"][tag], several[0]["tables"][tag]
        assert alone["steps"] == together["steps"], tag
        within = 1e-9 if SUMS.fullmatch(tag) else 1e-4 if ITERATIVE.fullmatch(tag) else 1e-6
        size = float(alone["values"].nan_to_num().abs().max())
        # The angle of a step along the weight, of one entry say, is the root of what rounding leaves of zero.
        least = 1e-8 if tag.startswith("update/rotation") else within * size * 1e-3
        torch.testing.assert_close(
            together["values"], alone["values"], rtol=within, atol=least, equal_nan=True,
            msg=lambda m, t=tag: f"{t}: {m}",
        )  # fmt: skip
        for rank in several[1:]:
            assert torch.equal(rank["tables"][tag]["values"].nan_to_num(), together["values"].nan_to_num()), tag


CASES = {
    "uneven, Adam": (make(uneven), {}),
    "convolutions, orthogonalised": (make(convolutions, orthogonal), {}),
    "tied, SGD": (make(lambda: Tied().double(), sgd, shard=at_once), {}),
    "windows, clipped": (make(uneven), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "two optimizers": (make(uneven, kind=TwoOptimizers), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tag_is_that_of_one_process(name: str) -> None:
    module, settings = CASES[name]
    settings = {"data": loader(), "steps": 7, **settings}
    (one,) = fit_in_processes(module, monitors(), 1, **settings)
    several = fit_in_processes(module, monitors(), 2, **settings)
    compare(one, several)
    tags = set(one["tables"])
    assert {"gradient/dual", "noise/dual", "update/operator", "spectrum/nuclear", "weight/initial_fraction"} - tags <= {
        "weight/initial_fraction"
    }
    if name == "windows, clipped":
        assert "noise/independent" in tags and max(one["tables"]["gradient/clip_share"]["values"]) > 0
    if "convolutions" in name:
        assert "spectrum/convolution_upper" in tags


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_and_with_four_processes(name: str) -> None:
    module, settings = CASES[name]
    settings = {"data": loader(), "steps": 7, **settings}
    (one,) = fit_in_processes(module, monitors(), 1, **settings)
    compare(one, fit_in_processes(module, monitors(), 4, **settings))


def test_monitors_do_not_change_training() -> None:
    settings = {"data": loader(), "steps": 10, "gradient_clip_val": 0.1}
    plain = fit_in_processes(make(uneven), [], 2, **settings)
    seen = fit_in_processes(make(uneven), monitors(every=2), 2, **settings)
    for one, other in zip(plain, seen, strict=True):
        assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])
        assert other["failures"] == [0, 0]


def whole_batches() -> DataLoader[Any]:
    return DataLoader(regression(), batch_size=16)


def rows_and_columns(network: nn.Module, mesh: Any) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(network, mesh["tensor_parallel"], plan)
    if mesh["data_parallel"].size() > 1:
        fully_shard(network, mesh=mesh["data_parallel"])


def even() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_tensor_parallelism() -> None:
    """Columns cut in two, whole biases on both processes, and a last layer that is not cut at all."""
    settings = {"data": whole_batches(), "steps": 4}
    module = make(even, orthogonal, shard=rows_and_columns)
    (one,) = fit_in_processes(module, monitors(), 1, **settings)
    compare(one, fit_in_processes(module, monitors(), 2, mesh=(1, 2), **settings))


def in_copies(network: nn.Module, mesh: Any) -> None:
    """Each half of the processes holds a whole copy (HSDP)."""
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)


MESHES = {
    "copies of rows": (make(uneven, shard=in_copies), loader()),
    "columns, and rows of those": (make(even, orthogonal, shard=rows_and_columns), whole_batches()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_meshes_of_two_dimensions(name: str) -> None:
    module, data = MESHES[name]
    settings = {"data": data, "steps": 4}
    (one,) = fit_in_processes(module, monitors(), 1, **settings)
    compare(one, fit_in_processes(module, monitors(), 4, mesh=(2, 2), **settings))


def mixed(network: nn.Module, mesh: Any) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(network, mesh=mesh["data_parallel"], mp_policy=policy)


HALF = {
    "mixed precision": (lambda: uneven().float(), mixed, torch.float32),
    "weights of sixteen bits": (lambda: uneven().bfloat16(), at_once, torch.bfloat16),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str) -> None:
    """Training is what it was, and readings are the same everywhere; one process without FSDP2 rounds elsewhere."""
    network, shard, dtype = HALF[name]
    data = DataLoader(regression(), batch_size=16)
    data.dataset.tensors = (data.dataset.tensors[0].to(dtype), data.dataset.tensors[1])
    settings = {"data": data, "steps": 4}
    plain, seen = (fit_in_processes(make(network, shard=shard), used, 2, **settings) for used in ([], monitors()))
    assert all(torch.equal(plain[0]["weights"][key], seen[0]["weights"][key]) for key in plain[0]["weights"])
    compare(seen[1], seen)
    expected = torch.linalg.vector_norm(seen[0]["weights"]["network.2.weight"].double())
    found = seen[0]["tables"]["weight/frobenius"]["values"][-1, 2]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
