"""Two processes: the run is that without monitors, steering keeps the ranks together, nothing waits for ever."""

import pytest

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from tests.helpers import Classifier, batches, mlp
from tests.processes import fit_in_processes, same

pytestmark = pytest.mark.processes


def fits(*callbacks) -> list[dict]:
    # The distributed sampler of Lightning deals out the batches.
    settings = {"data": batches(), "steps": 16, "use_distributed_sampler": True}
    return fit_in_processes(lambda: Classifier(mlp()), list(callbacks), **settings)


def test_monitors_are_invisible_under_ddp() -> None:
    plain, seen = fits(), fits(DynamicsMonitor(every_n_steps=2, strict=True))
    for one, other in zip(plain, seen, strict=True):
        assert same(one, other)
        # Each rank has the metrics that a callback may watch.
        assert len(other["tables"]["noise/dual"]["steps"]) >= 5 and "sharpness/matvecs" in other["tables"]


def test_steering_keeps_the_ranks_together() -> None:
    first, second = fits(DynamicsMonitor(every_n_steps=2, strict=True), NoiseAdaptiveLR(warmup=2, group_by="all"))
    assert first["ratios"] == second["ratios"] and min(first["ratios"][0].values()) < 1
    assert same(first, second)
