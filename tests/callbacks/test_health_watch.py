"""The health rules while a run goes on."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dynamon.monitoring.health_watch as live
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, WeightMonitor
from dynamon.callbacks.lightning.loop import TrainerLoop
from tests.helpers import Classifier, fit, mlp, same_weights

ROUNDS = {"every_n_steps": 1}


def classify(rate, steps, callbacks):
    """A small network under plain SGD, whose loss explodes where the rate is too high."""
    module = Classifier(mlp(), lambda parameters: torch.optim.SGD(parameters, lr=rate))
    fit(module, callbacks, labelled(), steps=steps, max_epochs=-1)
    return module


def labelled():
    """Three classes that a line tells apart."""
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=64)


def said(caught):
    return [str(one.message) for one in caught if "Monitor: " in str(one.message)]


def test_a_diverging_run_is_named_while_it_goes_on_and_before_the_loss_is_nan():
    monitor = DynamicsMonitor(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classify(300.0, 120, [monitor])
    messages = said(caught)
    found = {one.rule: one for one in monitor.findings}
    rising = [m for m in messages if "loss rose" in m]
    assert rising and all(one.advice for one in found.values())
    assert len(messages) == len(set(messages)), "each rule speaks once"
    broken = found.get("loss/nonfinite")
    earliest = min(one.step for one in found.values() if one.severity != "note")
    assert broken is None or earliest < broken.step


def test_a_healthy_run_is_silent():
    monitor = DynamicsMonitor(every_n_steps=1)
    classify(0.1, 80, [monitor])  # a warning would be an error
    assert [one.rule for one in monitor.findings if one.severity != "note"] == []


def test_a_budget_that_carries_nothing_is_no_missing_monitor():
    monitor = DynamicsMonitor(budget=1e-9, grace=0)
    classify(0.1, 20, [monitor])
    (note,) = monitor.findings
    assert note.rule == "dynamon/nothing" and note.advice.startswith(
        "A monitor was present. Where the log says that something is off, do as it says there. Else, if"
    )


def test_of_several_monitors_one_speaks():
    monitors = [GradientMonitor(**ROUNDS), WeightMonitor(**ROUNDS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classify(300.0, 120, monitors)
    messages = said(caught)
    assert messages and all(message.startswith("GradientMonitor: ") for message in messages)
    assert len(messages) == len(set(messages))


def test_a_rule_that_fails_costs_one_warning_and_nothing_else(monkeypatch):
    def broken(*_):
        raise KeyError("a rule")

    plain = classify(0.1, 40, [])
    monkeypatch.setattr(live, "findings", broken)
    monitor = DynamicsMonitor(strict=True, every_n_steps=1)
    with pytest.warns(UserWarning, match="health rules failed") as caught:
        watched = classify(0.1, 40, [monitor])
    assert len(said(caught)) == 1
    assert same_weights(plain, watched)
    assert len(monitor.history["gradient/norm"]) == 40


def test_looking_is_earned_by_training_first(monkeypatch):
    looks = []
    clock = [0.0]

    def slow(*_):
        looks.append(clock[0])
        clock[0] += 1.0  # a look takes a second
        return []

    monkeypatch.setattr(live, "findings", slow)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    watch = live.HealthWatch("DynamicsMonitor")

    class Budget:
        fraction = 0.02

        def charge(self, name):
            return warnings.catch_warnings()

    class Run:
        budget = Budget()
        step = 0

        class trainer:
            accumulate_grad_batches = 1

    for _ in range(20_000):
        Run.step += 1
        clock[0] += 0.1
        watch.see(Run)
    training = clock[0] - len(looks)
    assert len(looks) >= 3
    assert len(looks) - 1 <= 0.0021 * training  # a tenth of the budget


def test_the_loss_of_an_accumulated_step_is_that_of_a_batch():
    class trainer:
        accumulate_grad_batches = 4

    loop = TrainerLoop(trainer, mlp())
    assert loop.loss_of({"loss": torch.tensor(0.5)}) == 2.0
    assert loop.loss_of(None) is None  # manual optimisation may return nothing
    assert loop.loss_of({"loss": torch.ones(3)}) is None
