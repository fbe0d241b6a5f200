"""FSDP2: what goes wrong on one process ends a measurement on all, and what a measurement sends."""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from dynamon.callbacks import GradientMonitor, NoiseAdaptiveLR, WeightMonitor
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.distributed import work_sharing as dealing
from dynamon.optim import Lanton
from dynamon.quantities import dual_norms, gradient_statistics, weights
from dynamon.quantities.gradient_reader import GradientReader
from tests.helpers import mlp
from tests.processes import Breaks, ProcessFailedError, Sharded, fit_in_processes, loader

# A collective without its partner waits for half an hour.
pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


def orthogonal(parameters: Any) -> torch.optim.Optimizer:
    return Lanton(parameters, lr=0.02, noise_adaptive=False)


def classifier() -> Sharded:
    return Sharded(mlp().double())


def orthogonalised() -> Sharded:
    return Sharded(mlp().double(), orthogonal)


BREAKS = {
    "reading": (classifier, GradientMonitor, gradient_statistics, "gradient_stats", 1),
    "keeping": (classifier, GradientMonitor, GradientReader, "store", 0),
    "making room for a gradient": (orthogonalised, GradientMonitor, dealing, "Gathering", 1),
    "a nuclear norm": (orthogonalised, GradientMonitor, dual_norms, "dual_norms", 0),
    "making room for a weight": (classifier, WeightMonitor, dealing, "Gathering", 0),
    "a spectrum": (classifier, WeightMonitor, weights, "extremes_of", 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_one_process_cannot_measure(name: str) -> None:
    make, monitor, owner, attribute, on = BREAKS[name]
    broken = Breaks(owner, attribute, begin=2, end=5, on=on)
    callback = monitor(every_n_steps=3)
    ranks = fit_in_processes(make, [callback], others=[broken], data=loader(), steps=10)
    assert ranks[0]["failures"] == ranks[1]["failures"] == [1]
    tag = "gradient/norm" if monitor is GradientMonitor else "weight/frobenius"
    assert [found["tables"][tag]["steps"] for found in ranks] == [[0, 6, 9]] * 2
    for other in ranks[0]["tables"]:
        if "overhead" not in other:
            values = [found["tables"][other]["values"].nan_to_num() for found in ranks]
            assert torch.equal(*values), other
    assert all(torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key]) for key in ranks[0]["weights"])


@pytest.mark.parametrize("make", [classifier, orthogonalised])
def test_steering_that_fails_on_one_process_stops_the_run(make: Any) -> None:
    broken = Breaks(gradient_statistics, "gradient_stats", begin=3, end=5)
    with pytest.raises(ProcessFailedError, match="broken"):
        fit_in_processes(make, [NoiseAdaptiveLR(warmup=1)], others=[broken], data=loader(), steps=8)


class Counts(Callback):
    """Counts what dynamon sends at each step, and the numbers in it.

    Checks are reductions of two numbers; the first one after a batch takes along the sum and the number of losses, and
    whether a process asks to stop.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: Counter[str] = Counter()
        self.by_step: list[dict[str, int]] = []
        for name in ("all_reduce", "broadcast", "all_gather_object", "gather"):
            monkeypatch.setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name: str, function: Any) -> Any:
        def call(tensor: Any, *arguments: Any, **named: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("dynamon"):
                is_check = name == "all_reduce" and tensor.numel() in (2, 2 + 3)
                self.now["check" if is_check else name] += 1
                self.now["numbers"] += tensor.numel() * (name == "all_reduce" and not is_check)
            return function(tensor, *arguments, **named)

        return call

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.by_step.append(dict(self.now))
        self.now.clear()

    def __call__(self, module: Any) -> list[dict[str, int]]:
        return self.by_step


def test_under_a_budget_the_first_process_decides() -> None:
    callbacks = [GradientMonitor(budget=1.0, strict=True), WeightMonitor(budget=1.0, strict=True)]
    plain = fit_in_processes(classifier, [], data=loader(), steps=60)
    ranks = fit_in_processes(classifier, callbacks, data=loader(), steps=60)
    steps = [{tag: table["steps"] for tag, table in found["tables"].items()} for found in ranks]
    assert steps[0] == steps[1] and len(steps[0]["gradient/norm"]) > 2 and len(steps[0]["weight/frobenius"]) > 1
    assert all(torch.equal(plain[0]["weights"][key], ranks[0]["weights"][key]) for key in plain[0]["weights"])


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_hide_their_parameters_say_what_to_take_instead(name: str) -> None:
    strategy = type("Own" + name, (type(name, (), {}),), {})()
    reason = TrainerLoop(SimpleNamespace(strategy=strategy), mlp()).off_reason()
    assert reason is not None and reason.startswith(f"Own{name} ") and "ModelParallelStrategy" in reason
    assert TrainerLoop(SimpleNamespace(strategy=ModelParallelStrategy()), mlp()).off_reason() is None


# One reduction before the step and one after it, for what is clipped in between. Of two matrices the head's norm by
# role takes its rows only, which are not cut; the hidden one is gathered, and so is its change or its step. What the
# weights' dtype has lost takes a reduction of its own.
MESSAGES = {
    "gradients": (
        classifier,
        lambda: GradientMonitor(3, strict=True),
        {"all_reduce": 2, "check": 2, "numbers": 2 + 4 * 13 + 4 * 7},
    ),
    "gradients, nuclear": (
        orthogonalised,
        lambda: GradientMonitor(3, strict=True),
        {"all_reduce": 2, "check": 6, "gather": 3, "numbers": 4 * 13 + 3 + 4 * 7},
    ),
    "weights": (
        classifier,
        lambda: WeightMonitor(3, strict=True),
        {"all_reduce": 3, "check": 5, "gather": 3, "numbers": 4 * 12 + 2 * 6 + 4 * 3 + 4 * 8},
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_measurement_sends_one_reduction_and_gathers_each_matrix_once(monkeypatch, name: str) -> None:
    make, monitor, expected = MESSAGES[name]
    counts = Counts(monkeypatch)
    ranks = fit_in_processes(make, [monitor()], others=[counts], data=loader(), steps=7, more=counts)
    for found in ranks:
        # The first process tells the others what it plans, by one broadcast at most.
        assert all(sent.pop("broadcast", 0) <= 1 for sent in found["more"])
        assert [step for step, sent in enumerate(found["more"]) if any(sent.values())] == [0, 3, 6]
        assert found["more"][3] == expected


def test_steering_sends_one_reduction_a_step(monkeypatch) -> None:
    counts = Counts(monkeypatch)
    steering = NoiseAdaptiveLR(warmup=1)
    ranks = fit_in_processes(classifier, [steering], others=[counts], data=loader(), steps=4, more=counts)
    assert ranks[0]["more"] == [{"all_reduce": 1, "numbers": 2 + 4 * 13}] * 4
