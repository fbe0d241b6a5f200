"""Steps that are none, and steps that are two: what was skipped has no reading, what is shown is what the step used."""

import logging
import math
import warnings
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.curvature.operators.preconditioner import NoSecondMomentError
from dynamon.optim import Lanton, LayerwiseRates
from dynamon.optim.stepping import StepWatch
from dynamon.rates import FixedRates, NoiseAdaptiveRates, SpectralTailRates
from dynamon.stability import stability_ratio
from tests.helpers import Classifier, batches, fit, mlp, same_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch about itself
    from torch.distributed.optim import _apply_optimizer_in_backward

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
FIRST_SCALE = 2.0**23  # the first steps overflow in float16


def equal_batches(count: int) -> DataLoader:
    """The same eight samples in every batch, so that any two gradients at one point are equal."""
    inputs, labels = next(iter(batches(8)))
    return DataLoader(TensorDataset(inputs.repeat(count, 1), labels.repeat(count)), 8)


def scaler(growth_interval: int = 10**6) -> list[MixedPrecision]:
    made = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=growth_interval)
    return [MixedPrecision("16-mixed", "cpu", made)]


def loss_of(module: pl.LightningModule, batch) -> torch.Tensor:
    return cross_entropy(module.network(batch[0]), batch[1])


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in module.parameters()])


def norms(monitor) -> np.ndarray:
    return monitor.history["gradient/norm"].values


class Skipping(Classifier):
    """Leaves some steps out, in one of the ways people do."""

    def __init__(self, skipped, how: str = "none", **arguments) -> None:
        super().__init__(mlp(), **arguments)
        self.skipped, self.how = skipped, how

    def training_step(self, batch, batch_idx):
        if self.how == "none" and batch_idx in self.skipped:
            return None
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.how == "after backward":
            self._drop()

    def on_before_optimizer_step(self, optimizer) -> None:
        if self.how == "before step":
            self._drop()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
        if self.how == "closure only" and batch_idx in self.skipped:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def _drop(self) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx in self.skipped:
            self.zero_grad()


class Never(Classifier):
    """Runs backward passes and never steps, in one of the ways people forget it."""

    def __init__(self, how: str) -> None:
        super().__init__(mlp())
        self.how, self.automatic_optimization = how, how != "by hand"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.how == "by hand":
            self.manual_backward(loss)
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
        optimizer_closure()


def norms_by_hand(data, skipped, rate: float = 0.1) -> list[float]:
    network, found = mlp(), []
    for i, (inputs, labels) in enumerate(data):
        if i not in skipped:
            network.zero_grad()
            cross_entropy(network(inputs), labels).backward()
            found.append(float(gradients(network).norm()))
            with torch.no_grad():
                for p in network.parameters():
                    p -= rate * p.grad
    return found


@pytest.mark.parametrize("how", ["closure only", "by hand"])
@pytest.mark.parametrize("epochs", [1, 10])
def test_a_run_in_which_nobody_steps_says_so(how: str, epochs: int) -> None:
    """Short of it a run without a reading looks like one whose budget was too small."""
    monitor, module = GradientMonitor(every_n_steps=1), Never(how)
    with pytest.warns(UserWarning, match="the module takes none") as said:
        fit(module, [monitor], steps=-1, max_epochs=epochs)
    assert same_weights(module.network, mlp())
    assert len([w for w in said if "nothing is learned" in str(w.message)]) == 1
    assert "gradient/norm" not in monitor.history


def test_a_scaler_that_takes_no_step_is_not_called_the_modules_fault() -> None:
    """Gradients that are not finite at any scale."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = Classifier(mlp())
    module.network.register_forward_hook(lambda _, __, outputs: outputs * torch.inf)
    with pytest.warns(UserWarning, match="not finite at any scale"):
        fit(module, [GradientMonitor(every_n_steps=1)], steps=-1, max_epochs=8, plugins=[precision])


@pytest.mark.parametrize("how", ["none", "after backward", "before step", "closure only"])
def test_a_step_that_is_left_out_is_no_reading(how: str) -> None:
    skipped = {0, 3, 4}
    monitors = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)]
    module = Skipping(skipped, how, optimizer=partial(torch.optim.SGD, lr=0.1))
    fit(module, monitors, max_epochs=1)
    right = norms_by_hand(batches(), skipped)
    assert monitors[0].history["gradient/norm"].steps.tolist() == [1, 2, 5, 6, 7]
    np.testing.assert_allclose(norms(monitors[0]), right, rtol=1e-5)
    # Plain gradient descent: the last update is the last gradient times the rate.
    shape = monitors[1].history["update/ratio"]
    assert shape.steps.tolist() == [1, 2, 5, 6, 7] and (shape.values > 0).all()
    cosines, turns = monitors[0].history["gradient/cosine"], monitors[1].history["update/cosine"]
    assert turns.steps.tolist() == [2, 5, 6, 7] and 7 in cosines.steps
    np.testing.assert_allclose(cosines.values, turns.values[np.isin(turns.steps, cosines.steps)], rtol=1e-3)


@pytest.mark.parametrize("how", ["none", "after backward", "before step"])
def test_every_measured_step_is_left_out_and_the_next_stands_in(how: str) -> None:
    """Skipping and measuring at the same interval must not leave a run without any reading."""
    monitor = GradientMonitor(every_n_steps=2)
    fit(Skipping({0, 2, 4, 6}, how, optimizer=partial(torch.optim.SGD, lr=0.1)), [monitor], max_epochs=1)
    assert monitor.history["gradient/norm"].steps.tolist() == [1, 3, 5, 7]
    np.testing.assert_allclose(norms(monitor), norms_by_hand(batches(), {0, 2, 4, 6}), rtol=1e-5)


def test_equal_batches_with_skipped_ones_have_no_noise() -> None:
    monitor = GradientMonitor(every_n_steps=1)
    module = Skipping({1, 4}, optimizer=partial(torch.optim.SGD, lr=1e-6))
    fit(module, [monitor], equal_batches(8), max_epochs=1)
    assert monitor.history["noise/dual"].values.max() < 1e-4 * norms(monitor).min()
    np.testing.assert_allclose(norms(monitor), norms(monitor)[0], rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_steps(fused: bool, caplog) -> None:
    monitor = DynamicsMonitor(every_n_steps=1)
    weights: list[list[torch.Tensor]] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            weights.append([p.detach().clone() for p in module.parameters()])

    module = Classifier(mlp(), optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=fused))
    weights.append([p.detach().clone() for p in module.parameters()])
    with caplog.at_level(logging.INFO):
        fit(module, [Count(), monitor], steps=20, max_epochs=-1, plugins=scaler())
    moved = [not all(map(torch.equal, one, other)) for one, other in zip(weights, weights[1:], strict=False)]
    taken = [step for step, has_moved in enumerate(moved) if has_moved]
    assert 8 < len(taken) < 18
    history = monitor.history
    for tag in ("gradient/norm", "gradient/clip_coefficient", "update/ratio", "sharpness/stability_ratio"):
        assert history[tag].steps.tolist() == taken, tag
    assert not history["sharpness/excluded_coordinates"].values.any() and not history["gradient/nonfinite"].values.any()
    assert (history["sharpness/stability_ratio"].values > 0).all()
    assert np.isfinite(history["weight/constraint_usage"].values).all()
    np.testing.assert_allclose(history["weight/initial_fraction"].values[-1], (1 - 1e-3) ** len(taken), rtol=1e-6)
    assert monitor.failures == 0 and not [f for f in monitor.findings if f.severity == "fault"]
    said = [r.message for r in caplog.records if "was not taken, by a gradient scaler" in r.message]
    assert len(said) == 1 and "step 0 " in said[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_used_by_hand(fused: bool) -> None:
    """Under manual optimisation the Trainer knows neither the scaler nor, without its wrapper, the step."""

    class ByHand(Classifier):
        def __init__(self, seen: list[float]) -> None:
            super().__init__(mlp(), optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=fused))
            self.automatic_optimization, self.seen = False, seen
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-25)

        def training_step(self, batch, batch_idx) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(self, batch)
            self.scaler.scale(loss).backward()
            norm = float(gradients(self).double().norm()) / self.scaler.get_scale()
            if math.isfinite(norm):
                self.seen.append(norm)
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad()

    seen: list[float] = []
    monitors = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)]
    fit(ByHand(seen), monitors, steps=-1, max_epochs=2)
    assert 8 < len(seen) < 16
    np.testing.assert_allclose(norms(monitors[0]), seen, rtol=1e-5)
    memory = monitors[1].history["weight/initial_fraction"].values[-1]
    np.testing.assert_allclose(memory, (1 - 1e-3) ** len(seen), rtol=1e-6)


class InBackward(Classifier):
    """Uses and frees each gradient as it arrives."""

    def __init__(self, kind: str, rate: float = 0.1) -> None:
        super().__init__(mlp(), optimizer=partial(torch.optim.SGD, lr=rate))
        self.kind, parameters = kind, list(self.parameters())
        if kind == "torch":
            _apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": rate})
        for p in parameters:
            own = torch.optim.SGD([p], lr=rate)
            if kind == "hook":
                p.register_post_accumulate_grad_hook(partial(self._use, own))
            elif kind == "in place":  # before it is accumulated, past every optimizer
                p.register_hook(partial(self._use_here, p, rate))

    @staticmethod
    def _use(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    @staticmethod
    def _use_here(parameter: torch.Tensor, rate: float, gradient: torch.Tensor) -> None:
        parameter.data.sub_(rate * gradient)

    def on_after_backward(self) -> None:
        if self.kind == "in place":
            self.zero_grad()


@pytest.mark.filterwarnings("ignore:progress is off. hooks work in the backward pass")
@pytest.mark.parametrize("kind", ["hook", "torch", "in place"])
def test_gradients_that_are_gone_before_the_step(kind: str, caplog) -> None:
    monitor = DynamicsMonitor(every_n_steps=2)
    with caplog.at_level(logging.INFO):
        fit(InBackward(kind), [monitor], steps=8)
    assert sum("gradients are gone before they can be read" in r.message for r in caplog.records) == 1
    assert {tag for tag in monitor.history if tag.startswith(("gradient/", "noise/"))} == {"gradient/norm"}
    assert np.isnan(monitor.history["gradient/norm"].values).all()  # not known, in the history only
    plain = WeightMonitor(every_n_steps=2)  # the same steps, taken where they usually are
    fit(Classifier(mlp(), optimizer=partial(torch.optim.SGD, lr=0.1)), [plain], steps=8)
    for tag in ("update/ratio", "weight/operator"):
        own, right = monitor.history[tag], plain.history[tag]
        # What no hook shows is known from the third step on.
        assert own.steps.tolist() == (right.steps.tolist() if kind != "in place" else [4, 6])
        np.testing.assert_allclose(own.values, right.values[-len(own) :], rtol=1e-5)
    assert monitor.failures == 0


def test_steps_in_backward_that_nobody_calls() -> None:
    class NoOptimizer(InBackward):
        def __init__(self) -> None:
            super().__init__("hook")
            self.automatic_optimization = False

        def on_train_batch_start(self, batch, batch_idx) -> None:
            pass

        def training_step(self, batch, batch_idx) -> None:
            self.manual_backward(loss_of(self, batch))

        def configure_optimizers(self) -> None:
            return None

    monitor, plain = WeightMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="configure_optimizers"):
        fit(NoOptimizer(), [monitor], steps=-1, max_epochs=1)
    fit(Classifier(mlp(), optimizer=partial(torch.optim.SGD, lr=0.1)), [plain], max_epochs=1)
    np.testing.assert_allclose(monitor.history["update/ratio"].values, plain.history["update/ratio"].values, rtol=1e-5)


def test_steering_of_what_steps_in_backward_is_refused() -> None:
    for kind in ("hook", "torch"):
        with pytest.raises(ValueError, match="another optimizer steps during backward"):
            fit(InBackward(kind), [LayerwiseLR(FixedRates({"*": 0.5}))])
    steering = LayerwiseLR(FixedRates({"*": 0.5}))
    with pytest.warns(UserWarning, match="LayerwiseLR is off: gradients are gone before the optimizer's step"):
        fit(InBackward("in place"), [steering], steps=8)
    assert "lr/effective" not in steering.history


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around a base optimizer, as it is commonly written."""

    def __init__(self, params, rho: float = 0.05, base=torch.optim.SGD, **arguments) -> None:
        super().__init__(params, {"rho": rho, **arguments})
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            self.state[p]["up"] = p.grad * (self.param_groups[0]["rho"] / norm)
            p.add_(self.state[p]["up"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "up" in self.state[p]:
                    p.sub_(self.state[p]["up"])
        self.base_optimizer.step()

    def step(self, closure=None):
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class OwnSAM(torch.optim.SGD):
    """The same by inheritance: ``step`` calls that of its base class."""

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            kept = [p.clone() for group in self.param_groups for p in group["params"]]
            parameters = [p for group in self.param_groups for p in group["params"]]
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            for p in parameters:
                p.add_(p.grad * (0.05 / norm))
        closure()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        super().step()
        return loss


class Seeing(Classifier):
    """Notes the gradient of every evaluation, before clipping."""

    def __init__(self, optimizer) -> None:
        super().__init__(mlp(), optimizer=optimizer)
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, optimizer) -> None:
        self.seen.append(gradients(self))


class ManualSAM(Seeing):
    """Both steps by hand: Lightning hears of neither."""

    def __init__(self, optimizer) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            self.zero_grad()
            self.manual_backward(loss_of(self, batch))
            self.seen.append(gradients(self))
            step()


@pytest.mark.parametrize("make", [SAM, OwnSAM])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_closure_that_runs_twice_is_shown_by_the_gradient_that_is_used(make, clip: float | None) -> None:
    monitors = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)]
    module = Seeing(partial(make, lr=0.1))
    fit(module, monitors, steps=8, gradient_clip_val=clip)
    used = module.seen[1::2]
    right = [float(g.norm()) for g in used]
    history = monitors[0].history
    np.testing.assert_allclose(norms(monitors[0]), right, rtol=1e-5)
    np.testing.assert_allclose(history["gradient/norm_clipped"].values, np.minimum(right, clip or np.inf), rtol=1e-5)
    cosines = [float(torch.cosine_similarity(a, b, 0)) for a, b in zip(used, used[1:], strict=False)]
    assert len(history["gradient/cosine"]) >= 6
    np.testing.assert_allclose(history["gradient/cosine"].values[-6:], cosines[-6:], rtol=1e-3, atol=1e-4)
    # The steps are plain gradient descent along that gradient: they turn as it does.
    np.testing.assert_allclose(monitors[1].history["update/cosine"].values, cosines, rtol=1e-3, atol=1e-4)


def test_two_steps_by_hand_are_shown_by_the_second() -> None:
    monitors = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)]
    module = ManualSAM(partial(SAM, lr=0.1))
    fit(module, monitors, steps=-1, max_epochs=1)
    used = module.seen[1::2]
    np.testing.assert_allclose(norms(monitors[0]), [float(g.norm()) for g in used], rtol=1e-5)
    cosines = [float(torch.cosine_similarity(a, b, 0)) for a, b in zip(used, used[1:], strict=False)]
    np.testing.assert_allclose(monitors[0].history["gradient/cosine"].values, cosines, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(monitors[1].history["update/cosine"].values, cosines, rtol=1e-3, atol=1e-4)
    assert "gradient/norm_clipped" not in monitors[0].history


@pytest.mark.parametrize("kind", [Seeing, ManualSAM])
def test_steering_a_wrapper_scales_the_real_step(kind) -> None:
    steering = LayerwiseLR(FixedRates({"*": 0.5}))
    steered, right = kind(partial(SAM, lr=0.1)), kind(partial(SAM, lr=0.05))
    fit(steered, [steering], steps=-1, max_epochs=1)
    fit(right, [], steps=-1, max_epochs=1)
    assert same_weights(steered, right)
    np.testing.assert_allclose(steering.history["lr/effective"].values, 0.05)


def test_the_rule_learns_from_the_gradient_that_is_used() -> None:
    """Plain loop: the noise of the second evaluations, where the first ones are the same at every step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = OwnSAM(model.parameters(), lr=0.0)
    calls, read = [], []
    rates = LayerwiseRates(optimizer, _Listening(read), model, lag=0)

    def closure() -> None:
        calls.append(len(calls))
        model.weight.grad = torch.full_like(model.weight, 1.0 + calls[-1])

    for _ in range(4):
        optimizer.step(closure)
    rates.settle()
    # The first step evaluates once more than was expected, and is read twice.
    assert [value / 6 for value in read] == [1.0, 2.0, 4.0, 6.0, 8.0]


class _Listening(FixedRates):
    needs_gradients = True

    def __init__(self, read: list[float]) -> None:
        super().__init__({"*": 1.0})
        self.read = read

    def update(self, readings) -> None:
        self.read.append(float(readings.l1[0]))


def test_many_evaluations_use_no_one_gradient(caplog) -> None:
    monitor = DynamicsMonitor(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)), [monitor], steps=5)
    assert sum("uses more than one gradient" in r.message for r in caplog.records) == 1
    assert not any(tag.startswith(("gradient/", "noise/")) for tag in monitor.history)
    assert len(monitor.history["update/ratio"]) == 5 and monitor.failures == 0
    one = GradientMonitor(every_n_steps=1)
    fit(Classifier(mlp(), optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1)), [one], steps=5)
    assert len(norms(one)) == 5


class LineSearch(torch.optim.SGD):
    """Halves the rate until the loss has fallen: the last evaluation judges a step that another gradient has made."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        loss = float(closure())
        used, kept = [p.grad.clone() for p in parameters], [p.detach().clone() for p in parameters]
        rate = self.param_groups[0]["lr"]
        while True:
            with torch.no_grad():
                for p, old, g in zip(parameters, kept, used, strict=True):
                    p.copy_(old - rate * g)
            if float(closure()) <= loss:
                return loss
            rate /= 2


def test_a_gradient_that_judges_a_step_was_not_used_by_it(caplog) -> None:
    monitors = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1)]
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp(), optimizer=partial(LineSearch, lr=0.1)), monitors, steps=5)
    assert "gradient/norm" not in monitors[0].history and len(monitors[1].history["update/ratio"]) == 5
    assert sum("LineSearch evaluates its closure 2 times" in r.message for r in caplog.records) == 1


class After(Classifier):
    """Frees the gradients right after the step, as old recipes do."""

    def optimizer_step(self, *arguments) -> None:
        super().optimizer_step(*arguments)
        self.zero_grad()


def test_clipping_is_seen_in_the_gradient_that_the_step_uses() -> None:
    nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True)  # adds to .grad in place
    for module in (Classifier(mlp(), optimizer=nesterov), After(mlp())):
        for clip in (None, 0.3):
            monitor = GradientMonitor(every_n_steps=1)
            fit(module, [monitor], steps=6, gradient_clip_val=clip)
            right = np.minimum(norms(monitor), clip or np.inf)
            np.testing.assert_allclose(monitor.history["gradient/norm_clipped"].values, right, rtol=1e-5)


def test_gradients_that_are_changed_are_not_called_clipped() -> None:
    class Changing(Classifier):
        def on_before_optimizer_step(self, optimizer) -> None:
            for p in self.parameters():
                p.grad += torch.ones_like(p)

    monitor = GradientMonitor(every_n_steps=1)
    fit(Changing(mlp()), [monitor], steps=4)
    assert len(norms(monitor)) == 4 and "gradient/clip_coefficient" not in monitor.history


def test_a_rule_that_counts_steps_counts_those_that_were_taken() -> None:
    counted = {}
    for name, module, arguments in (
        ("skipping", Skipping({1, 5}), {}),
        ("scaled", Classifier(mlp()), {"plugins": scaler()}),
    ):
        steering = LayerwiseLR(SpectralTailRates(refresh=1000, ramp=0))
        run = fit(module, [steering], max_epochs=1, **arguments)
        counted[name] = next(iter(steering._steered.values())).rule.steps
        if name == "scaled":
            assert counted[name] == int(next(iter(run.optimizers[0].state.values()))["step"]) < 8
    assert counted["skipping"] == 6


def test_the_stability_ratio_knows_steering_that_is_not_the_callback() -> None:
    class Steered(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.steering = LayerwiseRates(optimizer, FixedRates({"*": 0.1}), self)
            return optimizer

    monitor = SharpnessMonitor(every_n_steps=1, probe_fraction=1.0)
    fit(Steered(mlp()), [monitor], equal_batches(1), max_epochs=1)
    ratio = monitor.history["sharpness/stability_ratio"].values[0]
    sharpest = monitor.history["sharpness/hessian_max"].values[0]
    assert ratio == pytest.approx(0.1 * 0.1 * sharpest / 2, rel=1e-3)


def test_no_second_moment_is_no_ratio() -> None:
    model, (inputs, labels) = mlp(), next(iter(batches()))
    for fused in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        loss_fn = lambda: cross_entropy(model(inputs), labels)  # noqa: E731
        for _ in range(2):
            with pytest.raises(NoSecondMomentError, match="no step yet"):
                stability_ratio(loss_fn, list(model.parameters()), optimizer)
            # The state is there, the step is not: a scaler has skipped it.
            loss_fn().backward()
            optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
            if fused:
                optimizer.step()
            optimizer.zero_grad()
            del optimizer.found_inf, optimizer.grad_scale


def test_what_fails_for_a_while_comes_back() -> None:
    """A loss that is not finite for some steps, once there is a probe, is no failure for ever."""
    monitor = DynamicsMonitor(every_n_steps=1)

    class Infinite(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (math.inf if 2 <= self.trainer.global_step < 6 else 0.0)

    with pytest.warns(UserWarning) as caught:
        fit(Infinite(mlp(), optimizer=partial(torch.optim.SGD, lr=0.0)), [monitor], steps=20, max_epochs=-1)
    assert sum("It is paused now. It is tried again in 10 readings" in str(w.message) for w in caught) == 1
    assert monitor.history["sharpness/stability_ratio"].steps.tolist() == [0, *range(14, 20)]


def test_rests_grow(monkeypatch) -> None:
    from dynamon.monitoring import weight_meter as weights

    tried: list[int] = []

    def fail(*_, **__):
        tried.append(monitor._run.step)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(weights, "weight_readings", fail)
    monitor = WeightMonitor(every_n_steps=1)
    with pytest.warns(UserWarning) as caught:
        fit(Classifier(mlp()), [monitor], steps=60, max_epochs=-1)
    assert tried == [0, 1, 2, 13, 34] and monitor.failures == 5
    assert sum("no such kernel" in str(w.message) for w in caught) == 2


def test_a_comparison_does_not_bridge_a_rest(monkeypatch) -> None:
    from dynamon.monitoring import gradient_meter as module

    real, monitor = module._to_host, GradientMonitor(every_n_steps=1)

    def fail(*arguments):
        if 3 <= monitor._run.step < 6:
            raise RuntimeError("for a while")
        return real(*arguments)

    monkeypatch.setattr(module, "_to_host", fail)
    with pytest.warns(UserWarning, match="for a while"):
        fit(Classifier(mlp()), [monitor], steps=20, max_epochs=-1)
    assert monitor.history["gradient/norm"].steps.tolist() == [0, 1, 2, 16, 17, 18, 19]
    assert monitor.history["gradient/cosine"].steps.tolist() == [1, 2, 17, 18, 19]


@pytest.mark.parametrize("make", [GradientMonitor, DynamicsMonitor])
@pytest.mark.parametrize("skipped, length", [((), 1), ((), 3), ({1, 4}, 1)])
def test_a_monitor_teaches_an_optimizer_that_steers_itself_nothing(make, skipped, length: int) -> None:
    """Windows of three batches and of two, skipped batches, steps that are read and steps that are not."""

    class Leaving(Classifier):  # and no hook that could touch gradients
        def training_step(self, batch, batch_idx):
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    def run(*callbacks) -> tuple[pl.LightningModule, Lanton]:
        rule = NoiseAdaptiveRates(warmup=4)
        module = Leaving(mlp(), optimizer=lambda p: Lanton(list(p), lr=0.01, rule=rule))
        fit(module, list(callbacks), steps=24, max_epochs=-1, accumulate_grad_batches=length)
        return module, module.optimizers().optimizer

    (plain, alone), (other, watched) = run(), run(make(every_n_steps=3))
    assert same_weights(plain, other) and min(alone.ratios.values()) < 1
    assert alone.ratios == watched.ratios and repr(alone.state_dict()) == repr(watched.state_dict())


class Averaging(torch.optim.Optimizer):
    """Steps another optimizer, halfway back at every second step, and never calls ``Optimizer.__init__``."""

    def __init__(self, base: torch.optim.Optimizer, places: bool) -> None:
        self.base, self.count = base, 0
        self.defaults, self.state, self.param_groups = base.defaults, base.state, base.param_groups
        self.slow = [p.detach().clone() for p in base.param_groups[0]["params"]]
        if places:  # as some do, and nothing ever looks there
            self._optimizer_step_pre_hooks: dict = {}
            self._optimizer_step_post_hooks: dict = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state) -> None:
        self.base.load_state_dict(state)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        self.count += 1
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            if self.count % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))
        return loss


@pytest.mark.parametrize("places", [True, False])
def test_wrappers_whose_steps_run_no_hooks(places: bool) -> None:
    def run(callbacks, steps: int = 12, **arguments) -> pl.LightningModule:
        module = Classifier(mlp(), optimizer=lambda p: Averaging(torch.optim.SGD(p, lr=0.1), places))
        fit(module, callbacks, steps=steps, max_epochs=-1, **arguments)
        return module

    monitor = DynamicsMonitor(every_n_steps=1, strict=True)
    assert same_weights(run([]), run([monitor]))
    assert monitor.history["gradient/norm"].steps.tolist() == list(range(12))
    skipping = GradientMonitor(every_n_steps=1, strict=True)
    run([skipping], plugins=scaler())
    assert skipping.history["gradient/norm"].steps[0] > 0  # the step that the scaler skipped is none
    start, plain = mlp(), run([], 1)
    halved = run([LayerwiseLR(FixedRates({"*.0.weight": 0.5}))], 1)
    trios = zip(start.parameters(), plain.parameters(), halved.parameters(), strict=True)
    shares = [((half - w).norm() / (one - w).norm()).item() for w, one, half in trios]
    assert shares == pytest.approx([0.5, *[1.0] * (len(shares) - 1)], rel=1e-4)


def test_an_optimizer_whose_steps_run_no_hooks_is_not_steered() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters) -> None:
            self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": 0.1}], {}, {}

        def step(self, closure=None):
            return closure()

    with pytest.raises(ValueError, match="Plain cannot take layerwise rates: its class never calls Optimizer.__init__"):
        LayerwiseRates(Plain(mlp().parameters()), FixedRates({"*": 0.5}), mlp())


SETUPS = {
    "16-mixed": (lambda: Classifier(mlp()), lambda: {"plugins": scaler(6)}),
    "16-mixed, fused": (
        lambda: Classifier(mlp(), optimizer=partial(torch.optim.AdamW, lr=1e-2, fused=True)),
        lambda: {"plugins": scaler(6)},
    ),
    "16-mixed, clipped, accumulated": (
        lambda: Classifier(mlp()),
        lambda: {"plugins": scaler(6), "gradient_clip_val": 0.2, "accumulate_grad_batches": 2},
    ),
    "skipped": (lambda: Skipping({1, 4, 5}), dict),
    "skipped, accumulated": (lambda: Skipping({1, 4, 5}), lambda: {"accumulate_grad_batches": 2}),
    "zeroed": (lambda: Skipping({1, 4}, "before step"), dict),
    "SAM": (lambda: Classifier(mlp(), optimizer=partial(SAM, lr=0.1)), lambda: {"gradient_clip_val": 0.3}),
    "own SAM": (lambda: Classifier(mlp(), optimizer=partial(OwnSAM, lr=0.1, momentum=0.9)), dict),
}


@pytest.mark.parametrize("name", SETUPS)
def test_training_is_bitwise_the_same(name: str) -> None:
    make, arguments = SETUPS[name]

    def run(*callbacks) -> pl.LightningModule:
        module = make()
        fit(module, list(callbacks), steps=16, max_epochs=-1, **arguments())
        return module

    def steering() -> NoiseAdaptiveLR:
        return NoiseAdaptiveLR(warmup=2)

    monitors = [GradientMonitor(every_n_steps=2), WeightMonitor(every_n_steps=2)]
    plain = run()
    assert same_weights(plain, run(*monitors, LayerwiseLR(FixedRates({"*": 1.0}))))
    assert same_weights(run(steering()), run(*[GradientMonitor(every_n_steps=2), steering()]))
    assert monitors[0].failures == monitors[1].failures == 0 and len(monitors[0].history["gradient/norm"]) > 2


def test_hooks_do_not_outlive_a_fit() -> None:
    module = Classifier(mlp(), optimizer=partial(SAM, lr=0.1))
    run = fit(module, [DynamicsMonitor(every_n_steps=2), LayerwiseLR(FixedRates({"*": 1.0}))], steps=4)
    for optimizer in (run.optimizers[0], run.optimizers[0].base_optimizer):
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_an_exception_of_the_user_is_not_hidden(monkeypatch) -> None:
    class Failing(Classifier):
        def on_train_batch_end(self, *_) -> None:
            if self.trainer.global_step == 3:
                raise KeyError("the user's own")

    monkeypatch.setattr(LayerwiseRates, "settle", lambda self: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(KeyError, match="the user's own"):
        fit(Failing(mlp()), [LayerwiseLR(FixedRates({"*": 1.0}))], steps=6)


class Plain(torch.optim.Optimizer):
    """Does nothing."""

    def step(self, closure=None):
        return None if closure is None else closure()


class Raising(Plain):
    """Fails when told to; ``step`` calls that of its base class, through a function of any name."""

    fails = False

    def step(self, closure=None):
        def anything():
            return super(Raising, self).step()

        if closure is not None:
            closure()
        if self.fails:
            raise RuntimeError("no step")
        return anything()


def test_a_watch_tells_steps_apart() -> None:
    model = nn.Linear(2, 2)
    optimizer = Raising(model.parameters(), {"lr": 0.1})
    Plain(model.parameters(), {"lr": 0.1})  # from now on torch calls hooks around its step too
    uses, begins = [], []

    def announce() -> None:
        begins.append(1)
        watch.is_announced = True

    watch = StepWatch(optimizer, announce, lambda: uses.append(watch.evaluation))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(watch.outcomes) == 1 and watch.taken and len(begins) == 1 and len(uses) == 2
    optimizer.fails = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step()
    assert len(watch.outcomes) == 1
    optimizer.fails = False
    watch.clear()
    optimizer.step(lambda: None)
    assert len(watch.outcomes) == 1 and watch.evaluations == 1
    watch.clear()
    assert not watch.taken
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert not watch.taken and watch.may_have_stepped and watch.was_told
    watch.remove()
    assert not optimizer._optimizer_step_pre_hooks
