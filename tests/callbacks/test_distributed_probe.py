"""Two processes: what one of them finds or lacks concerns the probe of both."""

import warnings
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dynamon.callbacks import SharpnessMonitor
from dynamon.monitoring import effect_check
from tests.helpers import Classifier
from tests.models import dense_hessian
from tests.processes import fit_here, in_processes, loader, rank, regression, same, small, values

pytestmark = pytest.mark.processes

NOTES = SimpleNamespace(count=0)


def still(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def loss_fn(module, batch) -> torch.Tensor:
    return cross_entropy(module.network(batch[0]), batch[1])


class Notes(Classifier):
    """Counts outside of the module, on the second process only."""

    def training_step(self, batch, batch_idx):
        NOTES.count += rank()
        return super().training_step(batch, batch_idx)


class ByHand(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_fn(self, batch))
        optimizer.step()


class NoRoom:
    """No memory on one process for more than so many samples; on the other something else goes wrong meanwhile."""

    def __init__(self, fits: int, on: int = 1, other: str = "") -> None:
        self.fits, self.on, self.other = fits, on, other

    def __call__(self, module, batch) -> torch.Tensor:
        if rank() == self.on and len(batch[0]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.other and rank() != self.on and len(batch[0]) > self.fits:
            raise ValueError(self.other)
        return loss_fn(module, batch)


class Picky:
    """No loss on one process for the first batch of all, or an error there for fewer than so many samples."""

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def __call__(self, module, batch) -> torch.Tensor | None:
        if rank() == 1 and len(batch["x"]) < self.least:
            raise IndexError("index 7 is out of bounds")
        first = any(torch.equal(row, batch["x"][0]) for row in regression()[:16][0])
        return None if rank() == 1 and first and not self.least else loss_fn(module, (batch["x"], batch["y"]))


class Mapped(UserDict):
    """A batch of a class of its own."""


class OnMappings(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def mappings() -> DataLoader[Any]:
    data = loader()
    collate = lambda items: Mapped(zip("xy", map(torch.stack, zip(*items, strict=True)), strict=True))  # noqa: E731
    return DataLoader(data.dataset, batch_sampler=data.batch_sampler, collate_fn=collate)


def monitor(every: int = 1, quantities: tuple[str, ...] = ("hessian",), **arguments: Any) -> SharpnessMonitor:
    return SharpnessMonitor(every, quantities=quantities, **{"probe_fraction": 1.0, "tol": 1e-7, **arguments})


def strict_effects() -> str:
    try:
        fit_here(Notes(small()), [monitor(strict=True)])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def spread(parameters) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on import
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)


class Adds(Callback):
    """A SyncBatchNorm, which DDP takes on a GPU only: here after DDP has looked for one."""

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.idle = nn.SyncBatchNorm(4)


def fits() -> dict[str, Any]:
    """Every fit of this file, in one fork."""
    found = {"plain": fit_here(Classifier(small()), [])}
    found["effects"] = fit_here(Notes(small()), [monitor()])
    found["strict"] = strict_effects()
    kept = effect_check.external_state
    effect_check.external_state = (lambda *_, **__: 1 / 0) if rank() == 1 else kept
    found["check fails"] = fit_here(Classifier(small()), [monitor()])
    effect_check.external_state = kept
    uneven = {"data": loader(bounds=(3,))}
    for name, loss in (("on 1", NoRoom(4)), ("on 0", NoRoom(2, on=0)), ("both", NoRoom(4, other="no loss today"))):
        found[f"halved {name}"] = fit_here(
            Classifier(small(), still), [monitor(1, ("hessian", "bracket"), loss_fn=loss)], steps=9, **uneven
        )
    for name, loss in (("no loss on 1", Picky()), ("no part on 1", Picky(8))):
        callback = monitor(1, loss_fn=loss, probe_fraction=0.5, strict=True)
        found[name] = fit_here(OnMappings(small(), still), [callback], steps=6, data=mappings())
    found["never"] = fit_here(Classifier(small()), [monitor(loss_fn=NoRoom(0, on=0))])
    zero = Classifier(small(), spread)
    found["zero"] = fit_here(zero, [monitor(quantities=("stability_ratio", "hessian"), strict=True)])
    found["sync"] = fit_here(Classifier(small()), [Adds(), monitor(strict=True)])
    found["by hand"] = fit_here(ByHand(small(), still), [monitor(loss_fn=loss_fn, strict=True)], **uneven)
    found["by hand, without"] = fit_here(ByHand(small(), still), [monitor(strict=True)])
    return found


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    return in_processes(lambda _: fits())


def truth(places: list[int]) -> float:
    x, y = (part[places] for part in regression()[:])
    return float(torch.linalg.eigvalsh(dense_hessian(small(), lambda f: cross_entropy(f(x), y)))[-1])


def test_effects_on_one_process_switch_sharpness_off_on_both(both) -> None:
    for found in both:
        assert same(found["plain"], found["effects"]) and found["effects"]["failures"] == [0]
        assert not any(tag.startswith("sharpness/") for tag in found["effects"]["tables"])
        assert "training_step has effects outside the module" in found["strict"] and "NOTES.count" in found["strict"]
    (line,) = both[0]["effects"]["said"][-1:]
    assert "training_step has effects outside" in line and "it changes NOTES.count" in line


def test_a_check_that_fails_on_one_process_fails_on_both(both) -> None:
    for found in both:
        assert found["check fails"]["failures"] == [3] and same(found["plain"], found["check fails"])
    assert any("first on rank 1: division by zero" in line for line in both[0]["check fails"]["said"])


HALVED = {  # the first so many samples of each process, after how many failures
    "on 1": (2, 3, 2),  # 3 and 13 samples: 2 and 6, 2 and 3
    "on 0": (2, 6, 1),
    "both": (2, 3, 2),
}


@pytest.mark.parametrize("name", HALVED)
def test_memory_that_one_process_lacks_halves_the_probe_of_both(both, name: str) -> None:
    first, second, failures = HALVED[name]
    expected = truth([*range(first), *range(3, 3 + second)])
    for found in both:
        run = found[f"halved {name}"]
        assert run["failures"] == [failures]
        steps = run["tables"]["sharpness/hessian_max"]["steps"]
        assert steps == list(range(failures, 9))
        assert values(run, "sharpness/probe_samples").tolist() == [float(first + second)] * len(steps)
        assert values(run, "sharpness/hessian_max")[-1] == pytest.approx(expected, rel=1e-7)
    lines = [line for line in both[0][f"halved {name}"]["said"] if "The probe is halved" in line]
    assert len(lines) == 1 and "The probe is halved on each process." in lines[0]
    assert "sharpness/hessian_max_bracket" in both[0]["halved on 1"]["tables"]


@pytest.mark.parametrize(("name", "places"), [
    ("no loss on 1", [16, 18, 20, 22, 17, 19, 21, 23]),  # a half of the second batch, of each process
    ("no part on 1", [*range(16, 32)]),  # all of it
])  # fmt: skip
def test_what_one_process_cannot_evaluate_is_let_go_of_by_both(both, name: str, places: list[int]) -> None:
    for found in both:
        run = found[name]
        assert run["failures"] == [0]
        assert values(run, "sharpness/probe_samples").tolist() == [float(len(places))] * 5
        assert values(run, "sharpness/hessian_max")[-1] == pytest.approx(truth(places), rel=1e-8)


def test_memory_that_never_suffices_pauses_on_both(both) -> None:
    for found in both:
        assert found["never"]["failures"] == [3] and same(found["plain"], found["never"])
    assert "paused" in both[0]["never"]["said"][-1]


def test_what_cannot_be_measured_is_said_once_and_the_rest_goes_on(both) -> None:
    for found in both:
        assert len(values(found["zero"], "sharpness/hessian_max")) == 6
        assert "sharpness/stability_ratio" not in found["zero"]["tables"] and found["zero"]["failures"] == [0]
        for name in ("sync", "by hand, without"):
            assert not any(tag.startswith("sharpness/") for tag in found[name]["tables"])
    for name, line in (("zero", "no stability ratio: Zero"), ("sync", "SyncBatchNorm has no second derivative"),
                       ("by hand, without", "with manual optimisation training_step would train")):  # fmt: skip
        assert len([text for text in both[0][name]["said"] if line in text]) == 1, name


def test_manual_optimisation_with_a_loss_of_its_own(both) -> None:
    for found in both:
        assert values(found["by hand"], "sharpness/hessian_max").tolist() == pytest.approx([truth([*range(16)])] * 6)
