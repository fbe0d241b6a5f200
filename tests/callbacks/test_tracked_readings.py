"""Readings between two cold starts, which take one-sided differences of gradients where these are good enough."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dynamon.callbacks import SharpnessMonitor
from dynamon.curvature import EigenTracker, HessianOperator
from dynamon.curvature.operators.backends import ForwardDifference
from dynamon.monitoring import probe
from tests.helpers import Classifier, fit, mlp, same_weights

TAG = "sharpness/stability_ratio"
COLD, WARM = "double_backward", "forward_difference"


@pytest.fixture
def backends(monkeypatch) -> list[HessianOperator]:
    """The Hessians of a run as they ended: what each took its last products with."""
    made: list[HessianOperator] = []

    class Kept(HessianOperator):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(probe, "HessianOperator", Kept)
    return made


def monitored(steps=13, make=None, network=mlp, **arguments):
    monitor = SharpnessMonitor(
        **({"every_n_steps": 1, "quantities": ["stability_ratio"], "probe_fraction": 1.0, "strict": True} | arguments)
    )
    module = Classifier(network(), optimizer=make or (lambda p: torch.optim.AdamW(p, lr=1e-2)))
    fit(module, [monitor], steps=steps)
    return monitor, module


def names(made: list[HessianOperator]) -> list[str]:
    return [operator.backend for operator in made]


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_warm_readings_take_differences_and_are_right(backends, make, monkeypatch) -> None:
    optimizer = lambda p: make(p, lr=1e-2)  # noqa: E731
    monitor, module = monitored(make=optimizer)
    assert names(backends) == ([COLD] + [WARM] * 4) + ([COLD] + [WARM] * 7)[: len(backends) - 5]
    assert len(backends) == 13
    monkeypatch.setattr(EigenTracker, "backend", "auto")
    exact, other = monitored(make=optimizer, tol=1e-4)
    assert set(names(backends[13:])) == {COLD} and same_weights(module, other)
    for tag in (TAG, "sharpness/probe_loss"):
        assert list(monitor.history[tag].values) == pytest.approx(list(exact.history[tag].values), rel=1e-2)


def test_dropout_and_a_module_with_state_are_measured_alike(backends) -> None:
    monitor, module = monitored(network=lambda: mlp(0.3))
    assert WARM in names(backends)
    plain = Classifier(mlp(0.3), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(plain, [], steps=13)
    assert same_weights(module, plain) and len(monitor.history[TAG].values) == 13


@pytest.mark.parametrize(
    "arguments",
    [{"tol": 1e-5}, {"quantities": ["stability_ratio", "subspace"]}, {"quantities": ["stability_ratio", "trace"]}],
    ids=["tight", "several values", "trace"],
)
def test_what_needs_exact_products_has_them(backends, arguments) -> None:
    monitored(steps=4, **arguments)
    assert set(names(backends)) == {COLD}


def test_other_solves_on_the_same_loss_take_them_too(backends) -> None:
    monitor, _ = monitored(steps=4, quantities=["stability_ratio", "hessian", "next", "preconditioned"])
    assert names(backends) == [COLD] + [WARM] * 3
    assert all(len(monitor.history[tag].values) == 4 for tag in (TAG, f"{TAG}_next", "sharpness/preconditioned_max"))


def test_a_reading_in_which_they_turn_out_wrong_is_made_exact(backends, monkeypatch) -> None:
    """The products of one reading lose their symmetry: it is solved again on the graph, and its value is right."""
    right = ForwardDifference.product

    def wrong(self, vector, block=None):
        found = right(self, vector, block)
        return found + 0.3 * found.norm() * torch.sin(torch.arange(len(vector)) + 1e6 * vector)

    compared = EigenTracker.compare

    def trusting(self, operator):
        taken = compared(self, operator)
        self.difference_error = 1e-4 if taken else self.difference_error
        return taken

    monkeypatch.setattr(EigenTracker, "compare", trusting)
    monkeypatch.setattr(ForwardDifference, "product", wrong)
    found, _ = monitored(steps=4)
    assert names(backends) == [COLD] * 4
    monkeypatch.undo()
    truth, _ = monitored(steps=4, tol=1e-4)
    assert list(found.history[TAG].values) == pytest.approx(list(truth.history[TAG].values), rel=1e-2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("at", [8, 16])
def test_a_resumed_run_reads_what_the_whole_one_did(backends, tmp_path, at) -> None:
    def callbacks():
        return SharpnessMonitor(1, None, ["stability_ratio"], probe_fraction=1.0, strict=True)

    def module():
        return Classifier(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    whole, rest, one, other = callbacks(), callbacks(), module(), module()
    fit(one, [whole, save], steps=18, max_epochs=-1, enable_checkpointing=True)
    kept = names(backends)
    backends.clear()
    fit(other, [rest], steps=18, max_epochs=-1, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert same_weights(one, other) and names(backends) == kept[at:] and WARM in kept[at:]
    for tag in (TAG, "sharpness/matvecs", "sharpness/probe_loss"):
        assert whole.history[tag].values[at:].tolist() == rest.history[tag].values[-(18 - at) :].tolist()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumed_in_half_precision_has_exact_products(backends, tmp_path) -> None:
    def callback():
        return SharpnessMonitor(1, None, ["stability_ratio"], probe_fraction=1.0, strict=True)

    save, going_on = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8), callback()
    fit(Classifier(mlp()), [callback(), save], steps=8, enable_checkpointing=True)
    assert names(backends)[-1] == WARM
    backends.clear()
    arguments = {"steps": 10, "max_epochs": -1, "ckpt_path": tmp_path / "step=8.ckpt", "precision": "bf16-mixed"}
    fit(Classifier(mlp()), [going_on], **arguments)
    assert names(backends) == [COLD] * 2 and going_on.failures == 0
