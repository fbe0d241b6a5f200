"""What callbacks do at steps at which nothing is measured: few calls of Python, however large the model."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, SharpnessMonitor, WeightMonitor
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.rates import FixedRates
from tests.callbacks.test_steering_cost import Calls
from tests.helpers import Classifier, fit

NEVER = 10**6
MONITORS = {
    "gradient": lambda **how: [GradientMonitor(**how)],
    "weight": lambda **how: [WeightMonitor(**how)],
    "sharpness": lambda **how: [SharpnessMonitor(**how)],
    "dynamics": lambda **how: [DynamicsMonitor(**how, sentinel=False)],
    "sentinel": lambda **how: [DynamicsMonitor(**how)],
    "three": lambda **how: [monitor(**how) for monitor in (GradientMonitor, WeightMonitor, SharpnessMonitor)],
}
# Five hooks of Lightning, whether the step and a row are there, two of the optimizer, and six of what follows decay.
# The sentinel measures and judges each of these steps, its batch and its loss.
MOST = {"gradient": 13, "weight": 20, "sharpness": 13, "dynamics": 20, "sentinel": 240, "three": 46}


def deep(layers: int) -> nn.Module:
    torch.manual_seed(0)
    inner = [layer for _ in range(layers - 1) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(8, 3))


def calls(callbacks: list[pl.Callback], layers: int = 25) -> Calls:
    """Calls of ours in twenty steps after the fortieth, under decoupled decay."""
    counter = Calls()
    module = Classifier(deep(layers), lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1))
    try:
        fit(module, [counter, *callbacks], steps=62, max_epochs=-1, log_every_n_steps=50)
    finally:
        sys.setprofile(None)
    return counter


@pytest.mark.parametrize("name", MONITORS)
def test_calls_at_fixed_steps(name: str) -> None:
    few, many = (calls(MONITORS[name](every_n_steps=NEVER), layers) for layers in (2, 25))
    assert 0 < few.a_step <= MOST[name], few.calls.most_common(20)
    assert many.a_step == few.a_step  # as many for 4 tensors as for 50


def test_calls_under_a_budget_that_is_spent() -> None:
    found = calls(MONITORS["dynamics"](budget=1e-12, grace=0.0))
    assert found.a_step <= MOST["dynamics"] + 5, found.calls.most_common(20)  # now and then all is planned anew


def test_calls_beside_steering() -> None:
    """What steering does itself, and decay with a ratio for each layer."""
    alone = calls([LayerwiseLR(FixedRates({"network.0.*": 0.5}))])
    quiet = DynamicsMonitor(every_n_steps=NEVER, sentinel=False)
    both = calls([LayerwiseLR(FixedRates({"network.0.*": 0.5})), quiet])
    assert both.a_step - alone.a_step <= 80, (both.calls - alone.calls).most_common(20)


@pytest.mark.parametrize("every", [NEVER, 1])
def test_what_a_trainer_takes_to_call_a_monitor_is_booked(every: int, monkeypatch) -> None:
    """At quiet steps as well: there it is most of what a monitor costs."""
    monitors = [GradientMonitor(every_n_steps=every), WeightMonitor(every_n_steps=NEVER)]
    monkeypatch.setattr(TrainerLoop, "call_seconds", lambda *_: 10.0)
    fit(Classifier(deep(2)), monitors, steps=12, max_epochs=-1)
    for monitor in monitors:
        assert 120.0 <= monitor._budget.spent_on["hooks"] < 130.0


def test_calling_a_monitor_is_timed_without_calling_others() -> None:
    called: list[str] = []

    class Others(pl.Callback):
        def on_sanity_check_start(self, *_: object) -> None:
            called.append("it")

    monitor = GradientMonitor(every_n_steps=NEVER)
    fit(Classifier(deep(2)), [monitor, Others()], steps=4)
    assert not called and 0 < monitor._call_seconds < 0.01
