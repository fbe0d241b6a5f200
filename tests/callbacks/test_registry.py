"""Every tag that a callback writes has an entry in the registry, and every entry is written by some run."""

import re
import warnings

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamon.callbacks import (
    ActivationMonitor,
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    RateAdvisor,
    SharpnessMonitor,
    SpikeGuard,
    WeightMonitor,
)
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.quantities import REGISTRY, Condition
from dynamon.rates import FixedRates
from tests.helpers import Classifier, batches, cnn, fit, mlp
from tests.models import gpt

EVERY = {"every_n_steps": 1, "strict": True}
# No run is sure to fulfil these: they are a matter of the data.
CHANCE = (
    Condition.SIGNAL
    | Condition.RESOLVED
    | Condition.POWER_LAW
    | Condition.CONVERGED
    | Condition.UNCONVERGED
    | Condition.POSITIVE_CURVATURE
    | Condition.DESCENDS
    | Condition.RATE_JUMPED
)


def adam() -> tuple:
    """Everything, of windows of two batches under AdamW with steering."""
    monitors = [
        GradientMonitor(**EVERY, histograms=True),
        WeightMonitor(**EVERY, histograms=True),
        SharpnessMonitor(every_n_steps=2, strict=True, probe_fraction=0.5, quantities=QUANTITIES),
        NoiseAdaptiveLR(warmup=2, floor=1.0),
    ]
    return Classifier(mlp()), monitors, batches(128), {"accumulate_grad_batches": 2, "steps": 24}


def sgd() -> tuple:
    """Convolutions under SGD with a rate for each half, and a solver that has too little time."""
    halves = lambda p: (lambda p: [{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02}])(list(p))  # noqa: E731
    module = Classifier(cnn(), optimizer=lambda p: torch.optim.SGD(halves(p), lr=0.01))
    advisor = RateAdvisor(pilot=4, readings=4, group_by="role", strict=True)
    monitors = [WeightMonitor(**EVERY, convolutions=True), LayerwiseLR(FixedRates({"*": 1.0})), advisor, SpikeGuard()]
    return module, monitors, batches(count=64, features=(2, 8, 8)), {"steps": 4}


def short_solves() -> tuple:
    """One rate for all layers under SGD, and solves that end before they converge."""
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    quantities = ["stability_ratio", "hessian", "ggn", "critical"]
    monitors = [SharpnessMonitor(**EVERY, tol=1e-9, max_matvecs=8, quantities=quantities)]
    return module, monitors, batches(), {"steps": 4}


class Slip(Classifier):
    """Inputs that are a thousand times too large, once; later a loss that is too large for twenty steps."""

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        loss = super().training_step((batch[0] * (1000 if step == 40 else 1), batch[1]), batch_idx)
        return loss * (3 if 70 <= step < 90 else 1)


def spike() -> tuple:
    """One step that is out of line, and over; a batch that is; a shift of the loss."""
    data = [batch for _ in range(15) for batch in batches()]
    data[110] = data[110][0] * 1000, data[110][1]
    module = Slip(torch.nn.Sequential(*mlp()[:1], torch.nn.ReLU(), mlp()[3]), lambda p: torch.optim.AdamW(p, lr=1e-3))
    monitor = DynamicsMonitor(every_n_steps=20, quantities=["critical"])
    return module, [monitor], torch.utils.data.DataLoader(data, batch_size=None), {"steps": 120}


class Texts(Classifier):
    """Next tokens."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.network(batch[0]).flatten(0, 1), batch[0].flatten())


def attention() -> tuple:
    """Blocks with attention and activation functions."""
    tokens = torch.utils.data.TensorDataset(torch.randint(11, (16, 6), generator=torch.Generator().manual_seed(0)))
    return Texts(gpt()), [ActivationMonitor(**EVERY)], torch.utils.data.DataLoader(tokens, 8), {"steps": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DynamicsMonitor: Step (40|110) is a spike")
        return write(tmp_path_factory)


def write(tmp_path_factory) -> set[str]:
    """Every tag that the runs write or have in a history."""
    found = set()
    for make in (adam, sgd, short_solves, attention, spike):
        module, callbacks, data, settings = make()
        folder = tmp_path_factory.mktemp(make.__name__)
        logger = TensorBoardLogger(folder, name=None, version="tb")
        fit(module, callbacks, data, logger=logger, max_epochs=-1, **settings)
        events = EventAccumulator(str(folder / "tb"), size_guidance={"histograms": 1}).Reload().Tags()
        scalars = {tag for tag in events["scalars"] if tag not in ("train/loss", "epoch", "hp_metric")}
        found |= {_quantity(tag) for tag in scalars}
        found |= {"/".join(tag.split("/")[:2]) for tag in events["histograms"]}
        found |= {
            tag for callback in callbacks for tag in callback.history if not re.search(r"_(p10|median|p90)$", tag)
        }
    return found


def _quantity(tag: str) -> str:
    """The quantity of a scalar, of a quantile across layers (``a/b_p10``) or of a layer (``a.b/<layer>``)."""
    first = tag.split("/")[0]
    return first.replace(".", "/") if "." in first else re.sub(r"_(p10|median|p90)$", "", tag)


def test_every_tag_that_is_written_has_an_entry(written) -> None:
    assert len(written) > 60
    assert written - set(REGISTRY) == set()


def test_every_entry_is_written_where_its_condition_holds(written) -> None:
    missing = {tag for tag in REGISTRY.keys() - written if not REGISTRY[tag].condition & CHANCE}
    assert missing == set()
