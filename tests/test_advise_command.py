"""``dynamon advise`` on runs without RateAdvisor: directions from the readings of a monitor, or a refusal."""

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from dynamon.callbacks import SharpnessMonitor
from dynamon.cli import main
from dynamon.cli.advise import _directions
from dynamon.runs import RunData, Series
from tests.helpers import Classifier, fit, mlp


def table(values, layers):
    values = np.array(values)
    return Series(np.arange(len(values)), values, layers)


def test_directions_by_hand():
    layers = ("blocks.0.up.weight", "blocks.1.up.weight", "norm.weight", "head.weight")
    jitter = 1 + 0.01 * np.random.default_rng(0).standard_normal((12, 4))
    progress, cost = jitter * [2.0, 2.0, 1.0, -0.5], jitter[::-1] * [0.5, 0.5, 1.0, 0.5]
    data = RunData(
        {}, {"progress/first_order": table(progress, layers), "progress/curvature_cost": table(cost, layers)}
    )
    lines = _directions(data)
    assert lines[1] == "advice        directions only: 3 of 3 are certain"
    told = {line.split()[-1]: line for line in lines if line.endswith("weight")}
    assert set(told) == {"blocks.*.up.weight", "norm.weight", "head.weight"}
    assert "raise it" in told["blocks.*.up.weight"] and "lower it" in told["norm.weight"]
    assert "climbs" in told["head.weight"] and "lower it" in told["head.weight"]
    # (1 / 4) / (2.5 / 4.5)
    assert float(told["blocks.*.up.weight"].split()[0]) == pytest.approx(0.45, abs=0.02)


def test_where_nothing_is_certain_rates_stay():
    noise = np.random.default_rng(0).standard_normal((12, 2))
    readings = {"progress/first_order": table(noise, ("a.weight", "b.weight"))}
    readings["progress/curvature_cost"] = table(noise[::-1], ("a.weight", "b.weight"))
    told = "0 of 2 are certain, so all rates stay as they are"
    assert _directions(RunData({}, readings))[1].endswith(told)


@pytest.mark.filterwarnings("ignore")
def test_a_monitored_run_is_told_directions(tmp_path, capsys):
    monitor = SharpnessMonitor(every_n_steps=2, quantities=["progress"])
    fit(Classifier(mlp()), [monitor], logger=TensorBoardLogger(tmp_path), steps=30, max_epochs=-1)
    assert main(["advise", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "directions only" in told and "network.*.weight" in told


def test_a_run_without_readings_is_refused(tmp_path, capsys):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("gradient/norm", 1.0, 0)
    assert main(["advise", str(tmp_path)]) == 2
    assert "no readings of RateAdvisor" in capsys.readouterr().err
