"""What goes wrong on one process ends a measurement on all of them, and no process waits for another for ever."""

import sys

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.curvature import HessianOperator
from dynamon.curvature.solvers import lanczos
from dynamon.distributed import work_sharing
from dynamon.isolation.samples import Part
from dynamon.monitoring import eigenvalues
from dynamon.monitoring.budget import Budget
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.quantities import gradient_reader, gradient_statistics
from tests.helpers import Classifier, mlp
from tests.processes import Breaks, ProcessFailedError, fit_in_processes, loader, rank, same

pytestmark = pytest.mark.processes


def classifier() -> Classifier:
    return Classifier(mlp().double())


class FailsInBackward(torch.autograd.Function):
    """The identity, whose second derivative fails on one process."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return SecondTime.apply(gradient)


class SecondTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        if rank() == 1:
            raise MemoryError("no room for the product")
        return gradient


def fails_at_once(module, batch):
    if rank() == 1:
        raise ValueError("no loss today")
    return cross_entropy(module.network(batch[0]), batch[1])


def fails_later(module, batch):
    """In the line search of critical sharpness, and other forward passes after the first."""
    module.calls = getattr(module, "calls", 0) + 1
    if rank() == 1 and not torch.is_grad_enabled():
        raise ValueError("no loss today")
    return cross_entropy(module.network(batch[0]), batch[1])


def runs_out_of_memory(module, batch):
    if rank() == 0:
        raise torch.OutOfMemoryError("out of memory")
    return cross_entropy(module.network(batch[0]), batch[1])


def fails_in_products(module, batch):
    hidden = FailsInBackward.apply(module.network[0](batch[0]))
    return cross_entropy(module.network[1:](hidden), batch[1])


FAILING = {
    "at once": (fails_at_once, "on 1 of 2 processes, first on rank 1: no loss today"),
    "in products": (fails_in_products, "no room for the product"),
    "memory": (runs_out_of_memory, "out of memory"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_loss_that_fails_on_one_process(name: str) -> None:
    loss_fn, message = FAILING[name]
    plain = fit_in_processes(classifier, [], data=loader(), steps=12)
    callback = SharpnessMonitor(every_n_steps=2, quantities=["hessian", "ggn"], loss_fn=loss_fn, probe_fraction=1.0)
    ranks = fit_in_processes(classifier, [callback], data=loader(), steps=12)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [3]  # then it is paused, everywhere
    assert message in ranks[0]["warned"][0] and len(ranks[0]["warned"]) == 2 and ranks[1]["warned"] == []
    assert "paused" in ranks[0]["warned"][1]
    assert same(plain[0], ranks[0]) and same(plain[0], ranks[1])


def test_one_quantity_that_fails_leaves_the_others() -> None:
    callback = SharpnessMonitor(
        every_n_steps=2, quantities=["hessian", "critical", "directional"], loss_fn=fails_later, probe_fraction=1.0
    )
    ranks = fit_in_processes(classifier, [callback], data=loader(), steps=12)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [3]
    for found in ranks:
        assert len(found["tables"]["sharpness/hessian_max"]["steps"]) == 6  # the eigenvalue meter went on


def test_a_process_without_a_probe(monkeypatch) -> None:
    monkeypatch.setattr("dynamon.monitoring.held_samples.take_samples", taken_on_rank_zero)
    callback = SharpnessMonitor(every_n_steps=2, quantities=["hessian"])
    ranks = fit_in_processes(classifier, [callback], data=loader(), steps=10)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [3]
    assert "first on rank 1: there is no batch for the probe." in ranks[0]["warned"][0]


def taken_on_rank_zero(batch, fraction, most=None, sizes=()):
    if rank() == 1:
        raise ValueError("a batch of another kind")
    return Part(batch, len(batch[0]))


BREAKS = {
    "reading": (gradient_statistics, "gradient_stats"),
    "norms": (gradient_statistics.GradientStatistics, "of_tensors"),
    "keeping": (gradient_reader.GradientReader, "store"),
    "hooks": (gradient_reader.LocalGradients, "_keeper"),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("on", [0, 1])
def test_gradients_that_one_process_cannot_read(name: str, on: int) -> None:
    callback = GradientMonitor(every_n_steps=3)
    broken = Breaks(*BREAKS[name], begin=2, end=5, on=on)
    ranks = fit_in_processes(classifier, [callback], others=[broken], data=loader(), steps=12)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [1]
    steps = [found["tables"]["gradient/norm"]["steps"] for found in ranks]
    assert steps == [[0, 6, 9]] * 2
    assert torch.equal(*(found["tables"]["noise/independent"]["values"] for found in ranks))


def test_spectra_that_one_process_cannot_take() -> None:
    broken = Breaks(work_sharing, "assign_by_cost", begin=0, end=3)
    callback = WeightMonitor(every_n_steps=1)
    ranks = fit_in_processes(classifier, [callback], others=[broken], data=loader(), steps=12)
    # Every tenth reading is a full one: the first of them went on without spectra, the second had them.
    assert ranks[0]["failures"] == ranks[1]["failures"] == [1]
    for found in ranks:
        assert found["tables"]["weight/frobenius"]["steps"] == list(range(12))
        assert found["tables"]["spectrum/nuclear"]["steps"] == [10]
    assert "broken" in ranks[0]["warned"][0]


class PartlyUsed(nn.Module):
    """A layer that the first process uses in every other step, and one that no process uses."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.side, self.idle = mlp(), nn.Linear(8, 3), nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.network(x) + (self.side(x) if rank() == 0 and self.calls % 2 else 0)


def test_parameters_that_some_processes_do_not_use() -> None:
    def make() -> Classifier:
        torch.manual_seed(5)
        return Classifier(PartlyUsed().double())

    settings = {"data": loader(), "steps": 8, "options": {"find_unused_parameters": True}}
    plain = fit_in_processes(make, [], **settings)
    callbacks = [GradientMonitor(1, strict=True), SharpnessMonitor(2, quantities=QUANTITIES, strict=True)]
    ranks = fit_in_processes(make, callbacks, **settings)
    assert same(plain[0], ranks[0]) and same(plain[0], ranks[1])
    assert ranks[0]["failures"] == [0, 0]
    noise = ranks[0]["tables"]["noise/independent"]["values"]
    assert torch.equal(noise.nan_to_num(), ranks[1]["tables"]["noise/independent"]["values"].nan_to_num())


class Counts(Callback):
    """Counts the collectives of each step that dynamon makes; Lightning makes one at every step."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.by_step = 0, []
        for name in ("all_reduce", "broadcast", "all_gather_object", "all_gather"):
            monkeypatch.setattr(dist, name, self.counted(getattr(dist, name)))

    def counted(self, function):
        def call(*arguments, **named):
            self.now += sys._getframe(1).f_globals["__name__"].startswith("dynamon")
            return function(*arguments, **named)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.by_step.append(self.now)

    def __call__(self, module) -> list[int]:
        return [after - before for before, after in zip(self.by_step, [*self.by_step[1:], self.now], strict=True)]


def counted_fit(callback, counts: Counts, steps: int) -> list[dict]:
    return fit_in_processes(classifier, [callback], data=loader(), steps=steps, others=[counts], more=counts)


def test_steps_that_measure_nothing_have_no_collective(monkeypatch) -> None:
    counts = Counts(monkeypatch)
    callback = DynamicsMonitor(every_n_steps=4, strict=True)
    ranks = counted_fit(callback, counts, steps=12)
    # What a measured step begins with, progress on its batch, comes before the count and is that of the step before.
    assert [step for step, count in enumerate(ranks[0]["more"]) if count] == [0, 3, 4, 7, 8]


def test_under_a_budget_the_first_process_decides(monkeypatch) -> None:
    counts = Counts(monkeypatch)
    plain = fit_in_processes(classifier, [], data=loader(), steps=150)
    # The second process's clock says something else: that there is nothing left.
    left = Budget.left.fget
    monkeypatch.setattr(Budget, "left", property(lambda budget: left(budget) if rank() == 0 else -1.0))
    callback = DynamicsMonitor(budget=1.0, strict=True)  # steps of a millisecond: hooks alone cost tenths of it
    ranks = counted_fit(callback, counts, steps=150)
    assert same(plain[0], ranks[0]) and same(plain[0], ranks[1])
    steps = [{tag: table["steps"] for tag, table in found["tables"].items()} for found in ranks]
    assert steps[0] == steps[1] and len(steps[0]["gradient/norm"]) > 2
    assert ranks[0]["more"] == ranks[1]["more"]
    assert sum(count == 0 for count in ranks[0]["more"]) > 30  # many steps cost nothing, for all that is measured


class Hidden(torch.autograd.Function):
    """The identity without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class Once(PartlyUsed):
    def forward(self, x):
        return Hidden.apply(self.network(x) + (self.side(x) if rank() == 0 else 0))


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_differences_of_gradients_leave_the_reducer_alone(option: str) -> None:
    def make() -> Classifier:
        torch.manual_seed(5)
        network = Once() if option == "find_unused_parameters" else nn.Sequential(mlp(), Wrapped())
        return Classifier(network.double())

    settings = {"data": loader(), "steps": 8, "options": {option: True}}
    plain = fit_in_processes(make, [], **settings)
    quantities = ["hessian", "batch", "directional"]
    callback = SharpnessMonitor(2, quantities=quantities, probe_fraction=1.0, strict=True)
    ranks = fit_in_processes(make, [callback], **settings)
    assert same(plain[0], ranks[0]) and same(plain[0], ranks[1])
    assert any(tag.startswith("sharpness/hessian_max") for tag in ranks[0]["tables"])


class Wrapped(nn.Module):
    def forward(self, x):
        return Hidden.apply(x)


LATE = {
    "vectors": (lanczos.Lanczos, "vectors"),
    "products": (HessianOperator, "_product"),
    "judging": (eigenvalues.EigenvalueMeter, "_judge"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_solve_that_one_process_cannot_end(name: str) -> None:
    """What it had tracked until then is forgotten by all, or they would go on from different vectors."""
    quantities = ["hessian", "blocks", "subspace", "trace"]
    callback = SharpnessMonitor(1, quantities=quantities, probe_fraction=1.0)
    broken = Breaks(*LATE[name], begin=3, end=5)
    ranks = fit_in_processes(classifier, [callback], others=[broken], data=loader(), steps=12)
    assert ranks[0]["failures"] == ranks[1]["failures"] and ranks[0]["failures"][0] >= 2
    tables = [found["tables"] for found in ranks]
    assert tables[0].keys() == tables[1].keys() and tables[0]["sharpness/hessian_max"]["steps"][-1] == 11
    for tag in set(tables[0]) - {"dynamon/overhead"}:
        assert tables[0][tag]["steps"] == tables[1][tag]["steps"]
        assert torch.equal(*(table[tag]["values"].nan_to_num() for table in tables)), tag


def test_steering_that_fails_on_one_process_stops_the_run() -> None:
    """Weights that part without a word would be worse."""
    callbacks = [GradientMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=1)]
    broken = Breaks(gradient_statistics, "gradient_stats", begin=3, end=5)
    with pytest.raises(ProcessFailedError, match="reading the gradients for layerwise rates failed: broken"):
        fit_in_processes(classifier, callbacks, others=[broken], data=loader(), steps=12)
