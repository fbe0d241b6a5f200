"""Rules see what is wrong everywhere and from the start, and are silent on choices, trends and rounding."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import GradientMonitor, LayerwiseLR, WeightMonitor
from dynamon.health import findings
from dynamon.health.series import noise_level, resolution
from dynamon.quantities.weight_decay import DecayRetention
from dynamon.rates import FixedRates
from dynamon.runs.history import RunData, Series
from tests.helpers import Classifier, fit, mlp

T = 120
STEPS = np.arange(T)


def run_with(**scalars):
    """A run of which some scalars are known, ``gradient_norm`` for ``gradient/norm``; the gradient is calm."""
    known = {"gradient_norm": np.ones(T), **scalars}
    return {name.replace("_", "/", 1): Series(STEPS, np.asarray(v, dtype=float)) for name, v in known.items()}


def found(run):
    return {one.rule: one for one in findings(run)}


def noise(size=0.1, seed=0):
    return size * np.random.default_rng(seed).normal(size=T)


def in_bfloat16(values):
    return torch.tensor(np.asarray(values), dtype=torch.bfloat16).double().numpy()


def fit_watched(module, steps=40, **arguments):
    """All rules on what gradients and weights said at every step."""
    callbacks = [GradientMonitor(every_n_steps=1), WeightMonitor(every_n_steps=1), *arguments.pop("callbacks", [])]
    fit(module, callbacks, steps=steps, max_epochs=-1, **arguments)
    data = RunData.of(*(callback.history for callback in callbacks))
    return data, {one.rule: one for one in findings(data) if one.rule != "dynamon/no_sharpness"}


# Everywhere.


class Lora(Classifier):
    """Both factors are zero, so neither has a gradient."""

    def __init__(self):
        super().__init__(mlp().requires_grad_(False))
        self.a, self.b = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(3, 2))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.network(batch[0]) + batch[0] @ self.a.T @ self.b.T, batch[1])


class CutOff(Classifier):
    """From step 15 on the loss does not depend on the weights."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step < 15 else 0 * loss + loss.detach()


class Idle(torch.optim.SGD):
    """Its step is a stub."""

    def step(self, closure=None):
        return closure()


@pytest.mark.filterwarnings("ignore:GradientMonitor. No gradient has reached")
def test_no_gradient_anywhere():
    _, rules = fit_watched(Lora(), steps=16)
    assert set(rules) == {"gradient/none"} and rules["gradient/none"].severity == "fault"
    assert rules["gradient/none"].step == 0 and "since step 0" in rules["gradient/none"].message
    _, rules = fit_watched(CutOff(mlp(), lambda p: torch.optim.SGD(p, lr=0.1)))
    assert set(rules) == {"gradient/none"} and rules["gradient/none"].step == 15


@pytest.mark.filterwarnings("ignore:GradientMonitor. No weight has moved")
def test_no_weight_moves():
    _, rules = fit_watched(Classifier(mlp(), lambda p: Idle(p, lr=0.1)), steps=16)
    assert set(rules) == {"update/none"} and rules["update/none"].severity == "fault" and not rules["update/none"].step


class Redraw(torch.optim.SGD):
    """Draws all weights anew at each step."""

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.normal_()
        return loss


def scheduled(factor):
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@pytest.mark.parametrize(
    ("factor", "notes"),
    [
        (lambda step: 0.0, {"lr/zero"}),  # for ever
        (lambda step: min(step, 20) / 20, set()),  # a warm-up from 0
        (lambda step: (1 + math.cos(math.pi * min(step, 38) / 38)) / 2, set()),  # a cosine that ends at 0
        (lambda step: float(step >= 3), set()),  # it begins late
    ],
)
def test_a_rate_of_zero_explains_and_is_no_fault(factor, notes):
    module = Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=0.1), scheduled(factor))
    _, rules = fit_watched(module)
    assert set(rules) == notes and all(one.severity == "note" for one in rules.values())


def test_a_loss_that_is_zero_or_the_same():
    assert found(run_with(dynamon_loss=np.zeros(T)))["loss/constant"].severity == "warning"
    late = np.where(STEPS >= 80, 0.0, 1 + noise())
    assert found(run_with(dynamon_loss=late))["loss/constant"].step == 80
    assert found(run_with(dynamon_loss=np.full(T, 0.6931)))["loss/constant"].step == 0
    # Nothing to say of zeros that come and go, of a plateau that rounding makes, or twice.
    sparse = np.where(np.random.default_rng(0).random(T) < 0.7, 0.0, 1.0)
    sparse[-12:] = 0
    assert not found(run_with(dynamon_loss=sparse))
    assert not found(run_with(dynamon_loss=in_bfloat16(2 * np.exp(-STEPS / 10) + 0.7)))
    assert set(found(run_with(dynamon_loss=np.zeros(T), gradient_norm=np.zeros(T)))) == {"gradient/none"}


# From the first reading on.


def test_a_loss_that_never_was_finite():
    rules = found(run_with(dynamon_loss=np.full(T, np.nan)))
    assert rules["loss/nonfinite"].severity == "fault" and rules["loss/nonfinite"].step == 0


def test_steps_that_replace_the_weights():
    with pytest.warns(UserWarning, match="A step changes the median layer by"):
        _, rules = fit_watched(Classifier(mlp(), lambda p: Redraw(p, lr=0.1)))
    assert rules["update/large"].step <= 2 and rules["update/large"].numbers["ratio"] > 0.5
    _, rules = fit_watched(Classifier(mlp(), lambda p: torch.optim.Adam(p, lr=1e-2)))
    assert not rules


def test_a_matrix_of_rank_one_from_the_start():
    class Alike(Classifier):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)))
            nn.init.constant_(self.network[2].weight, 0.1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-7)

    with pytest.warns(UserWarning, match="stable rank of network.2.weight is 1 since the start"):
        _, rules = fit_watched(Alike(), steps=8)
    assert rules["spectrum/collapse"].layers == ("network.2.weight",)  # and not one with a single output


@pytest.mark.filterwarnings("ignore:GradientMonitor. Clipping left nothing")
def test_clipping_that_leaves_nothing():
    class Huge(Classifier):
        def training_step(self, batch, batch_idx):
            return 1e22 * super().training_step(batch, batch_idx)

    module = Huge(mlp(), lambda p: torch.optim.SGD(p, lr=1e-26))
    data, rules = fit_watched(module, steps=8, gradient_clip_val=1.0)
    assert data.scalars["gradient/norm_clipped"].values[-1] == 0 and rules["gradient/vanished"].severity == "fault"
    assert "update/none" not in rules
    hard = run_with(
        gradient_norm=np.full(T, 1e4), gradient_norm_clipped=np.ones(T), gradient_clip_coefficient=np.full(T, 1e-4)
    )
    hard = {name.replace("norm/clipped", "norm_clipped"): series for name, series in hard.items()}
    assert found(hard)["gradient/clipping"].severity == "note"


# What was chosen.


class Compared(Classifier):
    """Scores of two batches are compared, so that a shift of all scores changes nothing."""

    def __init__(self, how):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
        self.how = how

    def training_step(self, batch, batch_idx):
        own, other = self.network(batch[0]), self.network(batch[0].roll(1, 0) + 1)
        if self.how == "pairs":
            return -nn.functional.logsigmoid(own - other).mean()
        return other.mean() - own.mean() + (own - other).square().mean()


@pytest.mark.parametrize("how", ["pairs", "critic"])
def test_a_bias_that_cancels_is_not_dead(how):
    torch.manual_seed(0)
    data, rules = fit_watched(Compared(how))
    table = data.tables["gradient/l2"]
    bias, weight = (table.values[:, table.layers.index(f"network.2.{name}")] for name in ("bias", "weight"))
    assert float(bias.max()) < 1e-6 * float(weight.min())
    assert not rules


@pytest.mark.filterwarnings("ignore:GradientMonitor. The gradient of")
def test_a_bias_is_dead_with_its_weight():
    module = Classifier(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    nn.init.constant_(module.network[0].bias, -100.0)
    _, rules = fit_watched(module)
    assert {"network.0.weight", "network.0.bias"} <= set(rules["gradient/dead"].layers)


class Freezing(Classifier):
    """Its first layer is frozen at step 15."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 15:
            self.network[0].requires_grad_(False)


def test_what_is_frozen_has_not_stopped():
    data, rules = fit_watched(Freezing(mlp()))
    assert not rules
    ratio, steps = data.tables["update/ratio"], data.tables["update/ratio"].steps
    first = np.array([name.startswith("network.0") for name in ratio.layers])
    assert np.isnan(ratio.values[steps >= 15][:, first]).all() and np.isfinite(ratio.values[steps < 15]).all()
    assert np.isfinite(ratio.values[:, ~first]).all()


def test_a_branch_that_is_not_used_is_told_from_a_frozen_one():
    class Branches(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.unused, self.frozen = nn.Linear(8, 3), nn.Linear(8, 3).requires_grad_(False)

    _, rules = fit_watched(Branches())
    assert set(rules) == {"gradient/unused"} and rules["gradient/unused"].severity == "note"
    assert rules["gradient/unused"].layers == ("unused.weight", "unused.bias")


def test_a_ratio_or_rate_of_zero_is_a_choice():
    rates = LayerwiseLR(FixedRates({"network.0.*": 1e-12}))
    _, rules = fit_watched(Classifier(mlp()), callbacks=[rates])
    assert not rules

    class TwoRates(Classifier):
        def configure_optimizers(self):
            first, last = self.network[0].parameters(), self.network[3].parameters()
            return torch.optim.SGD([{"params": first, "lr": 0.0}, {"params": last}], lr=0.1)

    _, rules = fit_watched(TwoRates(mlp()))
    assert not rules


# What passes.


def test_readings_that_are_not_finite_and_pass():
    nonfinite = np.zeros(T)
    for place, severity in ((slice(50, 53), "note"), (slice(0, 6), "note"), (slice(T - 3, T), "note")):
        nonfinite[:] = 0
        nonfinite[place] = 4
        assert found(run_with(gradient_nonfinite=nonfinite))["gradient/nonfinite"].severity == severity, place
    nonfinite[40:] = 4
    lasting = found(run_with(gradient_nonfinite=nonfinite))["gradient/nonfinite"]
    assert lasting.severity == "fault" and lasting.step == 40
    loss = 0.5 + np.exp(-STEPS / 30) + noise()
    loss[50:53] = np.nan
    assert not found(run_with(dynamon_loss=loss))
    loss[-2:] = np.nan  # where it begins to be so, not where it was once
    last = found(run_with(dynamon_loss=loss))["loss/nonfinite"]
    assert last.severity == "warning" and last.step == T - 2


def test_a_scaler_that_settles_is_no_fault():
    """The steps that it leaves out have no reading."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    data, rules = fit_watched(Classifier(mlp()), plugins=[plugin])
    skipped = round(math.log2(2.0**23 / scaler.get_scale()))
    assert skipped >= 3
    series = data.scalars["gradient/nonfinite"]
    assert len(series.steps) == 40 - skipped and (series.values == 0).all()
    assert not rules


# The loss: sign, shift, trend, rounding, design.


@pytest.mark.parametrize("shift", [-1000.0, -2.5, -0.5, 0.0, 1000.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_may_have_any_sign(shift, seed):
    falling = 2 * np.exp(-STEPS / 40) + noise(0.1, seed) + shift
    assert not found(run_with(dynamon_loss=falling))
    beyond = np.where(STEPS > 70, np.exp((STEPS - 70) / 12.0) - 1, 0.0)
    wild = np.exp(0.4 * np.random.default_rng(seed).normal(size=T))  # noise that grows with the loss
    for values in (falling + beyond, falling + beyond * wild):
        rule = found(run_with(dynamon_loss=values))["loss/rising"]
        assert rule.severity == "fault" and 60 <= rule.step <= 105


@pytest.mark.parametrize("shift", [0.0, -2.5, -40.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_of_any_sign_whose_noise_grows_as_it_rises(shift, seed):
    """Of all readings its noise is as large as its rise; of those before, it is not."""
    values = 2 * np.exp(-STEPS / 30) + noise(0.1, seed) + shift
    values[50:] += 20 * np.exp(0.3 * np.random.default_rng(seed).normal(size=T - 50))
    assert found(run_with(dynamon_loss=values))["loss/rising"].severity == "fault"


def test_a_trend_is_no_noise_and_rounding_is():
    assert noise_level(5 - 0.01 * STEPS) < 1e-12 and noise_level(3 * np.exp(-STEPS / 50)) < 0.02
    for seed in range(3):
        assert noise_level(5 - 0.01 * STEPS + noise(0.2, seed)) == pytest.approx(0.2, rel=0.35)
    assert resolution(in_bfloat16(1.5 + 0.1 * noise(1))) == 2**-7 and resolution(2 + noise(1)) == 0
    assert resolution(np.round(2 + noise(0.05), 2)) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rounded", "digit"), [(in_bfloat16, 2**-8), (lambda v: np.round(v, 2), 0.01)])
def test_a_curve_of_a_few_values_raises_nothing(rounded, digit, seed):
    """Most changes are 0 then, and a last digit more is no rise."""
    assert not found(run_with(dynamon_loss=rounded(0.5 + noise(0.4 * digit, seed))))
    assert not found(run_with(dynamon_loss=rounded(2 * np.exp(-STEPS / 40) - 0.4 + noise(0.5 * digit, seed))))


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_grows_by_design_is_a_note(seed):
    """An annealed term adds up slowly, while gradients stay what they are; the same with larger ones is a fault."""
    annealed = 0.5 + np.exp(-STEPS / 10) + 2.0 * STEPS / T + noise(0.02, seed)
    assert found(run_with(dynamon_loss=annealed))["loss/rising"].severity == "note"
    larger = np.where(STEPS > 60, 10.0, 1.0)
    assert found(run_with(dynamon_loss=annealed, gradient_norm=larger))["loss/rising"].severity == "fault"
    adversary = np.sin(STEPS / 9) + 0.3 * np.random.default_rng(seed).normal(size=T)
    assert not found(run_with(dynamon_loss=adversary))


# Decay in half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.24, 2.0])
def test_decay_that_rounds_away_is_none(dtype, share):
    """Against what zero gradients leave of the weights; rate x decay in units of the dtype's eps."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4000).to(dtype))
    start = weight.detach().double().clone()
    optimizer, memory = torch.optim.AdamW([weight], lr=1.0, eps=1e-3), DecayRetention()
    optimizer.param_groups[0]["weight_decay"] = share * torch.finfo(dtype).eps
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        memory.note(optimizer)
        optimizer.step()
        memory.take(optimizer, lambda: {id(weight): "w"})
    left = float(weight.detach().double().norm() / start.norm())
    assert memory.state_dict()["w"] == pytest.approx(left, rel=0.02)
    assert (memory.state_dict()["w"] == 1.0) == (share < 0.25)


@pytest.mark.filterwarnings("ignore:GradientMonitor. .* bfloat16 cannot hold most of the updates")
def test_weight_memory_of_a_run_in_bfloat16():
    module = Classifier(mlp(), lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01))
    data, _ = fit_watched(module, steps=20, precision="bf16-true")
    assert (data.tables["weight/initial_fraction"].values == 1.0).all()
    data, _ = fit_watched(Classifier(mlp(), lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01)), steps=20)
    np.testing.assert_allclose(data.tables["weight/initial_fraction"].values[-1], (1 - 1e-6) ** 20, rtol=1e-7)
