"""A quantity of a user's own, written from what ``dynamon.callbacks`` makes public."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from dynamon.board.custom_scalars import band_chart
from dynamon.callbacks import Cadence, DynamicsMonitor, GradientMonitor, Meter, Monitor, Run
from tests.helpers import Classifier, fit, mlp, same_weights


class LargestMeter(Meter):
    name = "largest"
    quantities = {"weight/largest": "largest entry"}
    panels = {"6 Mine": {"largest entry across layers": band_chart("weight/largest")}}

    def batch_end(self, run: Run) -> None:
        if self.is_due(run):
            with run.together(self.name):
                values = torch.stack([layer.parameter.detach().abs().max() for layer in run.layers])
                run.recorder.layers("weight/largest", values.numpy(), [layer.name for layer in run.layers])
            self.done(run)


class LargestMonitor(Monitor):
    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(lambda: [LargestMeter(Cadence(every_n_steps, interval=20))])


def test_it_stands_beside_the_monitor_of_everything(tmp_path) -> None:
    alone, watched = Classifier(mlp()), Classifier(mlp())
    fit(alone, [])
    own = LargestMonitor(every_n_steps=4)
    logger = CSVLogger(tmp_path, name="csv", version=0)
    fit(watched, [DynamicsMonitor(every_n_steps=4, strict=True), own], logger=logger)
    assert same_weights(alone, watched)
    series = own.history["weight/largest"]
    np.testing.assert_array_equal(series.steps, [0, 4, 8, 12, 16])
    assert series.layers == tuple(name for name, _ in watched.named_parameters())
    assert own.failures == 0 and "6 Mine" in own.panels
    assert "weight/largest_median" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


def test_its_last_reading_is_the_weight_as_it_is() -> None:
    module, own = Classifier(mlp()), LargestMonitor(every_n_steps=1)
    fit(module, [own])
    expected = [float(p.detach().abs().max()) for p in module.parameters()]
    np.testing.assert_array_equal(own.history["weight/largest"].values[-1], expected)


def test_a_part_of_the_monitor_of_everything_is_still_refused() -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        fit(Classifier(mlp()), [DynamicsMonitor(), GradientMonitor()])


def test_two_of_ones_own_are_refused() -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        fit(Classifier(mlp()), [LargestMonitor(), LargestMonitor()])
