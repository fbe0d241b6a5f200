"""Processes that meet something different: none waits in a collective that another one does not come to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy

import dynamon
from dynamon.callbacks import GradientMonitor, LayerwiseLR, SharpnessMonitor, WeightMonitor
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.curvature import HessianOperator, MeanOverRanks, top_eigenvalues
from dynamon.curvature.operators.blocks import blockwise_sharpness
from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.monitoring import step_probe
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.weight_monitor import WeightMonitor as PlainWeightMonitor
from dynamon.quantities.weight_decay import DecayRetention
from dynamon.rates import BalancedRates
from tests.helpers import Classifier, mlp
from tests.processes import Breaks, fit_in_processes, in_processes, loader, rank, regression, small

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


def classifier() -> Classifier:
    return Classifier(mlp().double())


def fits(callbacks: list[Any], *others: Any, **settings: Any) -> list[dict[str, Any]]:
    ranks = fit_in_processes(classifier, callbacks, others=list(others), **{"steps": 8, **settings})
    assert ranks[0]["failures"] == ranks[1]["failures"]
    for tag in ranks[0]["tables"].keys() - {"dynamon/overhead"}:
        assert ranks[0]["tables"][tag]["steps"] == ranks[1]["tables"][tag]["steps"], tag
    return ranks


@pytest.mark.parametrize("on", [0, 1])
def test_a_decay_that_one_process_cannot_follow(on: int) -> None:
    """What went wrong in a step that nobody measures is told in the next measurement, that of all."""
    broken = Breaks(DecayRetention, "note", begin=3, end=4, on=on)
    found = fits([WeightMonitor(every_n_steps=1)], broken)
    assert found[0]["failures"] == [1]


def test_weights_that_one_process_cannot_copy_where_a_scaler_is_asked() -> None:
    broken = Breaks(RunContext, "copies", begin=3, end=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    found = fits([WeightMonitor(every_n_steps=3)], broken, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert found[0]["failures"] == [1]


def test_a_monitor_that_fails_when_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the layers are read, on one process only, as where a logger cannot write."""
    warnings_of = TrainerLoop.warnings_of

    def fails(*arguments: Any) -> Any:
        if rank() == 0:
            raise OSError("no space left on device")
        return warnings_of(*arguments)

    monkeypatch.setattr(TrainerLoop, "warnings_of", fails)
    ranks = fits([GradientMonitor(every_n_steps=1)])
    assert ranks[0]["tables"] == ranks[1]["tables"] == {}
    assert "no space left on device" in ranks[0]["warned"][0]


LATE = {"timing": "hessian", "shrinking": "_halvings_that_fit"}


@pytest.mark.parametrize("name", LATE)
def test_a_probe_that_one_process_cannot_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole, failed = getattr(ProbeMeter, LATE[name]), []

    def fails(self: ProbeMeter, run: Any, *arguments: Any, **named: Any) -> Any:
        found = whole(self, run, *arguments, **named) if name == "timing" else None
        if rank() == 1 and not failed:
            failed.append(True)
            raise ValueError("no such sample")
        return found if name == "timing" else whole(self, run, *arguments, **named)

    monkeypatch.setattr(ProbeMeter, LATE[name], fails)
    ranks = fits([SharpnessMonitor(budget=1.0, quantities=["hessian"])], steps=40)
    assert ranks[0]["failures"] == [1] and ranks[0]["tables"]["sharpness/hessian_max"]["steps"]


class Looks(Callback):
    """Hooks that see gradients in the backward pass, so that weights are copied before it."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for p in pl_module.parameters():
            p.register_post_accumulate_grad_hook(lambda _: None)


def test_weights_that_one_process_cannot_copy_before_the_batch() -> None:
    broken = Breaks(RunContext, "copies", begin=3, end=4)
    found = fits([SharpnessMonitor(1, quantities=["batch", "directional"])], Looks(), broken)
    assert found[0]["failures"] == [2]  # of the batch, and along the update
    assert found[0]["tables"]["sharpness/batch"]["steps"] == [0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("on", [0, 1])
def test_weights_that_one_process_cannot_keep_for_the_next_batch(on: int) -> None:
    broken = Breaks(RunContext, "copies", begin=3, end=4, on=on)
    found = fits([SharpnessMonitor(1, quantities=["progress"])], broken)
    assert found[0]["failures"] == [1]
    assert found[0]["tables"]["progress/total_decrease"]["steps"] == [1, 2, 3, 4, 7]  # the one that fails keeps none


@pytest.mark.parametrize("on", [0, 1])
def test_weights_that_one_process_cannot_keep_for_steering(on: int) -> None:
    broken = Breaks(step_probe, "copied", begin=2, end=4, on=on)
    rates = LayerwiseLR(BalancedRates(every=1))
    ranks = fit_in_processes(classifier, [], others=[rates, broken], steps=8)
    assert all(torch.equal(weight, ranks[1]["weights"][name]) for name, weight in ranks[0]["weights"].items())


class Odd:
    """A loss that is no number."""

    def __float__(self) -> float:
        raise TypeError("not a number")


def test_a_loss_that_is_no_number_on_one_process() -> None:
    def work(own: int) -> list[float]:
        inner = small()
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        watch = dynamon.Watch(model, optimizer, monitors=[PlainWeightMonitor(every_n_steps=1)])
        for batch in loader():
            with watch.batch(batch) as watched:
                loss = cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                watched.loss = Odd() if own else loss
                optimizer.step()
        watch.close()
        return list(map(float, watch.history["dynamon/loss"].values))

    first, second = in_processes(work, group=True)
    assert first == second and len(first) == 6


def rounds_otherwise(inner: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Inner products as on another machine, with a rounding that is easier to see."""
    noise = torch.Generator().manual_seed(1)

    def rounded(self: VectorSpace, vectors: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        found = inner(self, vectors, vector)
        return found * (1 + 1e-1 * torch.randn(found.shape, generator=noise, dtype=found.dtype))

    return rounded


SOLVERS = {
    "one": lambda hessian, seed: top_eigenvalues(hessian, tol=1e-5, max_matvecs=60, seed=seed).matvecs,
    "several": lambda hessian, seed: top_eigenvalues(hessian, 3, tol=1e-5, max_matvecs=90, seed=seed).matvecs,
    "power": lambda hessian, seed: top_eigenvalues(hessian, method="power", max_matvecs=200, seed=seed).matvecs,
    "blocks": lambda hessian, seed: [
        one.matvecs
        for one in blockwise_sharpness(hessian, {"a": "0.*", "b": "2.*"}, tol=1e-5, max_matvecs=40, seed=seed).values()
    ],
}


@pytest.mark.parametrize("name", SOLVERS)
def test_machines_that_round_differently_take_the_same_products(name: str) -> None:
    def work(own: int) -> list[Any]:
        if own:
            VectorSpace.inner = rounds_otherwise(VectorSpace.inner)
        model, (x, y) = small(), regression()[own::2]
        hessian = MeanOverRanks(HessianOperator(lambda: cross_entropy(model(x), y), dict(model.named_parameters())))
        taken = [SOLVERS[name](hessian, seed) for seed in range(4)]
        dist.barrier()
        return taken

    first, second = in_processes(work, group=True)
    assert first == second
