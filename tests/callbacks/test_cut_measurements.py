"""Measurements that a budget cuts short or makes smaller, in a run."""

import pytest
import torch

from dynamon.callbacks import DynamicsMonitor
from dynamon.monitoring.matvec_allowance import MatvecAllowance
from dynamon.monitoring.probe import ProbeMeter
from tests.helpers import Classifier, fit, mlp


def test_a_cut_measurement_shows_what_it_has(monkeypatch) -> None:
    """Twelve products for a solve and two more quantities: the solve is shown, the rest is left out."""
    monkeypatch.setattr(MatvecAllowance, "rest", lambda self, taken: 12 - taken)
    monitor = DynamicsMonitor("full", budget=10.0, grace=100.0, strict=True)
    fit(Classifier(mlp(), lambda p: torch.optim.AdamW(p, lr=1e-2)), [monitor], steps=30, max_epochs=-1)
    history = monitor.history
    assert history["sharpness/matvecs"].values.max() <= 12
    assert {"sharpness/stability_ratio", "sharpness/stability_ratio_unconverged"} & set(history)
    assert "sharpness/block" not in history


@pytest.mark.parametrize(("given", "is_smaller"), [({}, True), ({"probe_fraction": 1.0}, False)])
def test_a_probe_is_made_smaller_where_the_first_measurement_would_not_fit(monkeypatch, given, is_smaller) -> None:
    """Unless somebody has said how large it is to be. For the budget a gradient takes 20 ms a sample."""
    time_graph = ProbeMeter._time_graph

    def slow(probe: ProbeMeter, run) -> None:
        time_graph(probe, run)
        probe.graph_seconds = 0.02 * (probe.samples or 0)

    monkeypatch.setattr(ProbeMeter, "_time_graph", slow)
    monitor = DynamicsMonitor("full", budget=1.0, grace=3.0, strict=True, **given)
    fit(Classifier(mlp()), [monitor], steps=40, max_epochs=-1)
    (probe,) = (meter for meter in monitor._meters if isinstance(meter, ProbeMeter))
    samples = probe.samples
    assert samples is not None and (2 <= samples < 8) == is_smaller
    if is_smaller:
        assert monitor.history["sharpness/probe_samples"].values.max() == samples
        assert monitor.history["sharpness/probe_samples"].steps[0] < 10


@pytest.mark.parametrize("steps", [50, 200])
def test_a_short_run_shows_every_default_quantity(steps: int) -> None:
    """With steps of a millisecond, which a share of time alone would never pay for."""
    monitor = DynamicsMonitor(strict=True)
    fit(Classifier(mlp()), [monitor], steps=steps, max_epochs=-1)
    for tag in ("gradient/norm", "noise/dual", "weight/operator", "spectrum/sigma_max", "sharpness/directional"):
        assert monitor.history[tag].steps[0] < 50, tag
    shown = {"sharpness/stability_ratio", "sharpness/stability_ratio_unconverged"} & set(monitor.history)
    assert shown and monitor._budget.spent <= 1.1 * (0.02 * monitor._budget.training + monitor._budget.grace)


def test_without_a_grace_a_short_run_keeps_to_its_share() -> None:
    monitor = DynamicsMonitor(grace=0.0, strict=True)
    fit(Classifier(mlp()), [monitor], steps=60, max_epochs=-1)
    assert "sharpness/stability_ratio" not in monitor.history and "sharpness/directional" not in monitor.history


def test_what_the_grace_was_used_for_is_saved() -> None:
    first = DynamicsMonitor(strict=True)
    fit(Classifier(mlp()), [first], steps=30, max_epochs=-1)
    left = first.state_dict()["grace"]
    assert 0 <= left < 3.0
    second = DynamicsMonitor(strict=True)
    second.load_state_dict(first.state_dict())
    fit(Classifier(mlp()), [second], steps=10, max_epochs=-1)
    assert second._budget.grace == left


def test_a_price_that_is_too_high_is_named(monkeypatch, caplog) -> None:
    time_graph = ProbeMeter._time_graph

    def slow(probe: ProbeMeter, run) -> None:
        time_graph(probe, run)
        probe.graph_seconds = 5.0

    monkeypatch.setattr(ProbeMeter, "_time_graph", slow)
    monitor = DynamicsMonitor(strict=True)
    with caplog.at_level("INFO"):
        fit(Classifier(mlp()), [monitor], steps=70, max_epochs=-1)
    assert "one sharpness reading takes about 85 s" in caplog.text and "grace=3" in caplog.text
    assert "no sharpness reading in this run" in caplog.text and "weight/operator" in monitor.history
