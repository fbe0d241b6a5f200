"""What each callback takes at most, and what it keeps, in copies of the parameters, against what it says."""

import re

import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from tests.helpers import Classifier, batches, fit
from tests.peak import Peak

HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
_WIDTH, _STEPS = 96, 16  # so wide that activations on two samples are nothing beside the parameters


def wide() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.Tanh())]
    return nn.Sequential(nn.Linear(8, _WIDTH), nn.Tanh(), *layers, nn.Linear(_WIDTH, 3))


def alive(callbacks: list, steps: int = _STEPS) -> tuple[list[list[int]], list[list[int]], int]:
    """Bytes at a peak inside our hooks and after them, by hook and step, and those of the parameters."""
    module = Classifier(wide())
    peak = Peak(module.parameters())
    most: dict[str, list[int]] = {hook: [] for hook in HOOKS}
    after: dict[str, list[int]] = {hook: [] for hook in HOOKS}

    def begin(*_, **__) -> None:
        peak.most = peak.now

    def end(hook: str):
        return lambda *_, **__: (most[hook].append(peak.most), after[hook].append(peak.now))

    first, last = Callback(), type("Last", (Callback,), {})()
    for hook in HOOKS:
        setattr(first, hook, begin)
        setattr(last, hook, end(hook))
    with peak:
        fit(module, [first, *callbacks, last], batches(32, 2), steps=steps, max_epochs=-1)
    return list(most.values()), list(after.values()), sum(p.nbytes for p in module.parameters())


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return alive([])[1]


def extra(callbacks: list, plain: list[list[int]], steps: slice) -> tuple[float, float]:
    return beyond(alive(callbacks), plain, steps)


def beyond(found: tuple, plain: list[list[int]], steps: slice) -> tuple[float, float]:
    """Copies of the parameters beyond the run without callbacks: at a peak, and kept when a step is over."""
    most, after, size = found
    pairs = [
        (m, p) for row, base in zip(most, plain, strict=True) for m, p in zip(row[steps], base[steps], strict=True)
    ]
    kept = [(a, p) for a, p in zip(after[-1][steps], plain[-1][steps], strict=True)]
    return tuple(max(own - base for own, base in rows) / size for rows in (pairs, kept))


def stated(callback: type) -> tuple[int, int]:
    text = re.sub(r"\s+", " ", callback.__doc__ or "")
    found = re.search(r"Memory: (\d+) copies of the parameters at a peak, (\d+) in between", text)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientMonitor(every_n_steps=1, strict=True),
        lambda: WeightMonitor(every_n_steps=1, strict=True),
        lambda: NoiseAdaptiveLR(warmup=2),
    ],
    ids=["gradient", "weight", "noise"],
)
def test_a_callback_takes_what_it_says(make, plain) -> None:
    callback = make()
    peak, kept = extra([callback], plain, slice(2, None))
    most, between = stated(type(callback))
    assert 0.6 * most <= peak <= most + 0.05 and 0.45 * between <= kept <= between + 0.05


TABLE = {
    row[0]: tuple(map(int, row[1:]))
    for row in re.findall(r"^    ``(\w+)`` +(\d+) +(\d+) +(\d+)$", SharpnessMonitor.__doc__ or "", re.M)
}


def test_every_quantity_says_what_it_takes() -> None:
    assert set(TABLE) == set(QUANTITIES)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_sharpness_takes_what_it_says(quantity: str, plain) -> None:
    """The first five measurements bring no bound, the sixth does."""
    wanted = [quantity, "hessian"] if quantity == "bracket" else [quantity]
    found = alive([SharpnessMonitor(every_n_steps=1, quantities=wanted, strict=True)], steps=6)
    most, with_bound, kept = TABLE[quantity]
    peak, between = beyond(found, plain, slice(1, 5))
    assert 0.7 * most <= peak <= most + 0.05 and between <= kept + 0.05
    peak, between = beyond(found, plain, slice(5, 6))
    assert 0.7 * with_bound <= peak <= with_bound + 0.05 and between <= kept + 0.05


def test_the_monitors_together_take_one_peak_at_a_time(plain) -> None:
    peak, kept = extra([DynamicsMonitor(every_n_steps=1, strict=True)], plain, slice(1, None))
    held = TABLE["stability_ratio"][2] + TABLE["directional"][2] + stated(GradientMonitor)[1] + stated(WeightMonitor)[1]
    assert kept <= held and peak <= TABLE["stability_ratio"][1] + held


def test_a_density_that_does_not_fit_is_left_out() -> None:
    size = sum(p.numel() for p in Classifier(wide()).parameters())
    with pytest.warns(UserWarning, match="density is left out: its vectors take"):
        monitor = SharpnessMonitor(
            every_n_steps=4, quantities=["hessian", "density"], memory_limit=40 * 4 * size / 2**30, strict=True
        )
        fit(Classifier(wide()), [monitor], steps=8)
    assert len(monitor.history["sharpness/hessian_max"]) == 2 and "sharpness/outliers" not in monitor.history
