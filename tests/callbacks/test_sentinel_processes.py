"""The sentinel where several processes train: DDP and FSDP2."""

from typing import Any

import pytest
import torch
from torch import nn

from dynamon.callbacks import DynamicsMonitor
from tests.helpers import Classifier
from tests.processes import Sharded, fit_in_processes, rank, same, values

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
STEPS, AT = 50, 40


def relu() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 3)).double()


def slips(kind: type) -> type:
    """The inputs of the second process alone are a thousand times too large, once."""

    class Slip(kind):  # type: ignore[misc,valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            times = 1000 if self.trainer.global_step == AT and rank() == 1 else 1
            return super().training_step((times * batch[0], *batch[1:]), batch_idx)

    return Slip


@pytest.mark.parametrize("kind", [Classifier, Sharded])
def test_a_bad_batch_of_one_process_is_seen_by_all(kind: type) -> None:
    """In gradients that are averaged; the loss is that of each. Training is bitwise as without."""

    def make() -> Any:
        return slips(kind)(relu(), lambda p: torch.optim.AdamW(p, lr=1e-3))

    def fit(callbacks: list[Any]) -> list[dict[str, Any]]:
        return fit_in_processes(make, callbacks, 2, steps=STEPS, gradient_clip_val=None)

    monitors = [DynamicsMonitor(every_n_steps=20, quantities=["critical"])]
    plain, found = fit([]), fit(monitors)
    for one, other in zip(plain, found, strict=True):
        assert same(one, other) and other["failures"] == [0]
        assert other["tables"]["spike/batch"]["steps"] == [AT]
    if kind is Classifier:
        assert torch.equal(values(found[0], "spike/gradient"), values(found[1], "spike/gradient"))
        at = found[0]["tables"]["spike/loss"]["steps"].index(AT)
        assert values(found[0], "spike/loss")[at] < 10 < values(found[1], "spike/loss")[at]
    assert any(f"Step {AT} is a spike" in sentence for sentence in found[0]["warned"])
