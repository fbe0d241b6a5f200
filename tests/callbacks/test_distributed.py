"""Two processes: the run is that without monitors, steering keeps the ranks together, nothing waits for ever."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from tests.helpers import Classifier, fit, mlp, same_weights

pytestmark = pytest.mark.processes


class Report(Callback):
    """Writes what a rank ends with, since the processes are gone afterwards."""

    def __init__(self, folder: Path, monitor: DynamicsMonitor | None, steering: NoiseAdaptiveLR | None) -> None:
        self.folder, self.monitor, self.steering = folder, monitor, steering

    def on_train_end(self, trainer, pl_module) -> None:
        found = {
            "weights": pl_module.state_dict(),
            "ratios": self.steering.ratios if self.steering else {},
            "readings": len(self.monitor.history.get("noise/dual", ())) if self.monitor else 0,
            "sharpness": "sharpness/matvecs" in self.monitor.history if self.monitor else False,
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def run(folder: Path, monitor: DynamicsMonitor | None, steering: NoiseAdaptiveLR | None) -> tuple[Classifier, list]:
    folder.mkdir()
    module = Classifier(mlp())
    callbacks = [c for c in (monitor, steering) if c is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on forking
        settings = {"strategy": "ddp_fork", "devices": 2, "steps": 16, "max_epochs": -1}
        fit(module, [*callbacks, Report(folder, monitor, steering)], **settings)
    return module, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_monitors_are_invisible_under_ddp(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", None, None)
    seen, ranks = run(tmp_path / "seen", DynamicsMonitor(every_n_steps=2, strict=True), None)
    assert same_weights(plain, seen)
    assert ranks[0]["readings"] >= 5 and ranks[1]["readings"] >= 5  # each rank has the metrics a callback may watch
    assert ranks[0]["sharpness"] and ranks[1]["sharpness"]


def test_steering_keeps_the_ranks_together(tmp_path: Path) -> None:
    monitor = DynamicsMonitor(every_n_steps=2, strict=True)
    _, ranks = run(tmp_path / "steered", monitor, NoiseAdaptiveLR(warmup=2, group_by="all"))
    assert ranks[0]["ratios"] == ranks[1]["ratios"] and min(ranks[0]["ratios"].values()) < 1
    first, second = (rank["weights"] for rank in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
