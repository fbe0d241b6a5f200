"""Steering inside a Trainer: base rates, optimizer state and checkpoints stay the user's."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, NoiseAdaptiveLR
from dynamon.rates import FixedRates, NoiseAdaptiveRates, SpectralTailRates
from tests.helpers import Classifier, batches, fit, mlp, same_weights

SCHEDULERS = {
    "step": lambda o: StepLR(o, 3, 0.5),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "cosine": lambda o: CosineAnnealingLR(o, 20),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 5),
    "linear": lambda o: LinearLR(o, 0.1, total_iters=10),
    "lambda": lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
    "one cycle": lambda o: OneCycleLR(o, 0.05, total_steps=30),
    "multi-step": lambda o: MultiStepLR(o, [4, 9], 0.3),
    "polynomial": lambda o: PolynomialLR(o, 20, 2.0),
    "cyclic": lambda o: CyclicLR(o, 0.001, 0.02, step_size_up=5, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)], [5]),
}


class Gradients(Callback):
    """Keeps the gradients as the optimizer is about to see them, before clipping."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters()})


def steering(**arguments) -> NoiseAdaptiveLR:
    return NoiseAdaptiveLR(**{"warmup": 2, "group_by": "all", **arguments})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_their_base_rates(name: str) -> None:
    plain, steered = (Classifier(mlp(), scheduler=SCHEDULERS[name]) for _ in range(2))
    one, other = fit(plain, []), fit(steered, [steering()])
    assert plain.rates == steered.rates
    assert one.lr_scheduler_configs[0].scheduler.state_dict() == other.lr_scheduler_configs[0].scheduler.state_dict()
    assert not same_weights(plain, steered)  # it did steer


def test_ratios_agree_with_an_independent_calculation() -> None:
    """LANTON's rule in ten lines, on the gradients of a real run; the readings act one step later."""
    gradients, callback = Gradients(), steering(warmup=0, beta2=0.9, alpha=0.2, floor=0.05)
    fit(Classifier(mlp()), [callback, gradients], gradient_clip_val=0.1, log_every_n_steps=1)
    average, weight, previous = {}, 0.0, None
    for step, now in enumerate(gradients.seen):
        if previous is not None:
            weight = 0.9 * weight + 0.1
            for n, g in now.items():
                noise = ((g - previous[n]).abs().sum() / g.numel()) ** 2
                average[n] = 0.9 * average.get(n, 0.0) + 0.1 * float(noise)
        previous = now
        if weight and step < len(gradients.seen) - 1:
            h = np.array([average[n] / weight for n in now])
            expected = np.maximum(((0.04 * np.median(h) + h.min()) / (0.04 * np.median(h) + h)) ** 0.25, 0.05)
            series = callback.history["lr/ratio"]
            at = list(series.steps).index(step + 1)
            np.testing.assert_allclose(series.values[at], expected, rtol=1e-5)
    assert expected.min() < 0.9


def test_steps_are_those_of_permanently_scaled_groups() -> None:
    ratios = {"network.0.weight": 0.5, "network.3.bias": 0.25}

    def split(parameters):
        names = ["network.0.weight", "network.0.bias", "network.3.weight", "network.3.bias"]
        groups = [{"params": [p], "lr": 1e-2 * ratios.get(n, 1.0)} for n, p in zip(names, parameters, strict=True)]
        return torch.optim.AdamW(groups, lr=1e-2)

    permanent, steered = Classifier(mlp(), optimizer=split), Classifier(mlp())
    fit(permanent, [])
    fit(steered, [LayerwiseLR(FixedRates(ratios))])
    assert same_weights(permanent, steered)


def _checkpoint(tmp_path, callbacks, name):
    module = Classifier(mlp(), scheduler=SCHEDULERS["cosine"])
    save = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(module, [*callbacks, save], steps=16, max_epochs=-1, enable_checkpointing=True)
    return torch.load(tmp_path / name / "step=8.ckpt", weights_only=True), tmp_path / name / "step=8.ckpt"


def _shape(value):
    """Structure of nested state: keys, types and tensor shapes, without the numbers."""
    if isinstance(value, dict):
        return {k: _shape(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shape(v) for v in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value)


def test_checkpoints_look_as_without_steering(tmp_path) -> None:
    plain, _ = _checkpoint(tmp_path, [], "plain")
    steered, _ = _checkpoint(tmp_path, [steering()], "steered")
    assert plain.keys() == steered.keys()
    assert plain["lr_schedulers"] == steered["lr_schedulers"]
    assert plain["loops"] == steered["loops"]
    for key in ("optimizer_states", "state_dict"):
        assert _shape(plain[key]) == _shape(steered[key])
    groups = [s["optimizer_states"][0]["param_groups"] for s in (plain, steered)]
    assert groups[0] == groups[1]
    assert set(steered["callbacks"]) - set(plain["callbacks"]) == {"NoiseAdaptiveLR"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumes_with_and_without(tmp_path) -> None:
    _, with_steering = _checkpoint(tmp_path, [steering(), DynamicsMonitor(every_n_steps=2)], "steered")
    _, without = _checkpoint(tmp_path, [], "plain")
    for path, callbacks in ((with_steering, []), (without, [steering()]), (with_steering, [steering()])):
        module = Classifier(mlp(), scheduler=SCHEDULERS["cosine"])
        run = fit(module, callbacks, steps=24, max_epochs=-1, ckpt_path=path)
        assert run.global_step == 24
        assert len(run.optimizers[0].param_groups) == 1


def test_save_gradient_false_keeps_checkpoints_small(tmp_path) -> None:
    large, _ = _checkpoint(tmp_path, [steering()], "large")
    small, _ = _checkpoint(tmp_path, [steering(save_gradient=False)], "small")
    stored = [s["callbacks"]["NoiseAdaptiveLR"]["optimizers"][0]["gradients"]["previous"] for s in (large, small)]
    assert len(stored[0]) == 4 and stored[1] == {}


def test_it_freezes_where_gradients_are_not_finite() -> None:
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.global_step == 10 else loss

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
            before = [p.detach().clone() for p in self.parameters()]
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            if self.trainer.global_step == 10:  # undo the broken step
                with torch.no_grad():
                    for p, b in zip(self.parameters(), before, strict=True):
                        p.copy_(b)
                optimizer.state.clear()

    callback = steering(warmup=0, lag=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Broken(mlp()), [callback], steps=15, max_epochs=-1)
    series = callback.history["lr/ratio"]
    assert np.isfinite(series.values).all()
    by_step = dict(zip(series.steps.tolist(), series.values, strict=True))
    np.testing.assert_array_equal(by_step[9], by_step[10])  # this step
    np.testing.assert_array_equal(by_step[9], by_step[11])  # and the next, whose difference holds it too
    assert (by_step[12] != by_step[11]).any()


def test_monitor_and_steering_share_one_pass(monkeypatch) -> None:
    calls = []
    from dynamon.quantities import gradient_statistics as gradients

    counted = gradients.gradient_stats
    monkeypatch.setattr(gradients, "gradient_stats", lambda *a, **k: calls.append(1) or counted(*a, **k))
    monitor, callback = GradientMonitor(every_n_steps=1, strict=True), steering(warmup=0)
    for order in ([monitor, callback], [steering(warmup=0), GradientMonitor(every_n_steps=1, strict=True)]):
        calls.clear()
        fit(Classifier(mlp()), order)
        assert len(calls) == 20
    assert set(monitor.history["noise/dual"].layers or ()) == set(callback.ratios)


def test_the_order_of_monitor_and_steering_does_not_matter() -> None:
    one, other = Classifier(mlp()), Classifier(mlp())
    fit(one, [GradientMonitor(every_n_steps=1), steering()])
    fit(other, [steering(), GradientMonitor(every_n_steps=1)])
    assert same_weights(one, other)


def test_learning_rate_monitor_sees_base_rates(tmp_path) -> None:
    logger = CSVLogger(tmp_path, name=None, version="csv")
    callback = steering()
    fit(Classifier(mlp()), [LearningRateMonitor("step"), callback], logger=logger)
    text = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("lr-AdamW")
    assert {line.split(",")[column] for line in text[1:]} - {""} == {"0.01"}
    base, ratio, effective = (callback.history[t].values for t in ("lr/base", "lr/ratio", "lr/effective"))
    np.testing.assert_allclose(effective, base[:, None] * ratio, rtol=1e-12)


def test_an_exception_in_training_leaves_the_optimizer_as_it_was() -> None:
    class Fails(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 12:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    module, callback = Fails(mlp()), steering()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, [callback], max_epochs=-1)
    optimizer = module.trainer.optimizers[0]
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 1e-2
    assert not optimizer._optimizer_step_pre_hooks


def test_a_second_fit_starts_anew() -> None:
    callback = steering()
    first, second = Classifier(mlp()), Classifier(mlp())
    fit(first, [callback])
    fit(second, [callback])
    assert same_weights(first, second)


def test_fixed_rates_act_by_glob_and_role() -> None:
    callback = LayerwiseLR(FixedRates({"role:vector": 0.5, "network.0.*": 0.1}))
    fit(Classifier(mlp()), [callback], data=batches())
    assert callback.ratios == {
        "network.0.weight": 0.1,
        "network.0.bias": 0.5,
        "network.3.weight": 1.0,
        "network.3.bias": 0.5,
    }


def test_parameters_that_join_later_are_measured_and_steered() -> None:
    """As fine-tuning callbacks do it: freeze, then unfreeze and ``add_param_group``."""

    class Joins(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 10:
                for p in pl_module.network[0].parameters():
                    p.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.network[0].parameters()), "lr": 5e-3})

    network = mlp()
    for p in network[0].parameters():
        p.requires_grad_(False)
    module = Classifier(network, optimizer=lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-2))
    for callbacks in ([steering()], [steering(), GradientMonitor(every_n_steps=1, strict=True)]):
        fit(module, [*callbacks, Joins()], steps=30, max_epochs=-1)
        assert set(callbacks[0].ratios) == {n for n, _ in module.named_parameters()}
        assert callbacks[0].ratios["network.0.weight"] != callbacks[0].ratios["network.3.weight"]
        assert len(module.trainer.optimizers[0].param_groups) == 2
        for p in network[0].parameters():
            p.requires_grad_(False)
    monitor = GradientMonitor(every_n_steps=1, strict=True)
    fit(module, [monitor, Joins()], steps=20, max_epochs=-1)
    assert len(monitor.history["noise/dual"].layers) == 4


@pytest.mark.parametrize(
    "make",
    [steering, lambda **k: LayerwiseLR(FixedRates({"role:vector": 0.5}), **k)],
    ids=["noise", "fixed"],
)
def test_a_dry_run_is_bitwise_the_run_without_and_logs_what_it_would_do(make) -> None:
    plain, dry = (Classifier(mlp(), scheduler=SCHEDULERS["cosine"]) for _ in range(2))
    fit(plain, [])
    callback = make(apply=False)
    run = fit(dry, [callback, DynamicsMonitor(every_n_steps=3, strict=True)])
    assert same_weights(plain, dry) and plain.rates == dry.rates
    assert callback.history["lr/ratio"].values.min() < 1 and min(callback.ratios.values()) < 1
    effective = callback.history["lr/base"].values[:, None] * callback.history["lr/ratio"].values
    np.testing.assert_allclose(callback.history["lr/effective"].values, effective)
    assert run.global_step == 20


def test_a_dry_run_does_not_enter_what_monitors_take_for_the_rates_in_force() -> None:
    monitors = [DynamicsMonitor(every_n_steps=5, strict=True) for _ in range(2)]
    fit(Classifier(mlp()), [monitors[0]])
    fit(Classifier(mlp()), [monitors[1], LayerwiseLR(FixedRates({"network.*": 0.1}), apply=False)])
    for tag in ("update/effective_rate", "sharpness/stability_ratio"):
        if tag in monitors[0].history:
            np.testing.assert_allclose(monitors[1].history[tag].values, monitors[0].history[tag].values, rtol=1e-6)
    assert "sharpness/stability_ratio" in monitors[0].history


def test_noise_is_logged_once(tmp_path) -> None:
    alone, beside, monitor = steering(), steering(), GradientMonitor(every_n_steps=1)
    logger = CSVLogger(tmp_path, name=None, version="alone")
    fit(Classifier(mlp()), [alone], logger=logger)
    fit(Classifier(mlp()), [beside, monitor])
    fixed = LayerwiseLR(FixedRates({"role:vector": 0.5}))
    fit(Classifier(mlp()), [fixed])
    shown, known = alone.history["noise/dual"], monitor.history["noise/dual"]
    assert shown.layers == known.layers and "noise/dual" not in beside.history and "noise/dual" not in fixed.history
    np.testing.assert_array_equal(shown.steps, known.steps)
    np.testing.assert_allclose(shown.values, known.values, rtol=1e-12)
    assert len(shown) > 10
    assert "noise/dual_median" in (tmp_path / "alone" / "metrics.csv").read_text()
    charts = [chart for category in alone.panels.values() for chart in category]
    assert "noise in the dual norm across layers" in charts
    assert not any("noise" in chart for category in beside.panels.values() for chart in category)


def test_weight_decay_at_the_base_rate() -> None:
    def shrunk(**arguments) -> float:
        """How much one weight shrinks that has no gradient, at a quarter of the rate."""

        class Extra(Classifier):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + 0 * self.extra.sum()

        module = Extra(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5))
        module.extra = torch.nn.Parameter(torch.ones(3))
        fit(module, [LayerwiseLR(FixedRates({"extra": 0.25}), **arguments)], steps=8)
        return float(module.extra.detach()[0])

    assert shrunk() == pytest.approx((1 - 0.25 * 1e-2 * 0.5) ** 8, rel=1e-6)
    assert shrunk(scale_weight_decay=False) == pytest.approx((1 - 1e-2 * 0.5) ** 8, rel=1e-6)


def test_arguments_of_the_rule_are_passed_on() -> None:
    given = {
        "alpha": 0.3,
        "beta2": 0.5,
        "group_by": "all",
        "normalize_shape": False,
        "floor": 0.2,
        "warmup": 3,
        "exponent": 0.5,
        "relative_to": "mean",
        "cap": 4.0,
        "dead_band": 0.1,
        "refresh": 5,
        "bias_correction": False,
    }
    callback = NoiseAdaptiveLR(**given, apply=False, scale_weight_decay=False)
    assert {name: getattr(callback.rule, name) for name in given} == given
    assert not callback.apply and not callback.scale_weight_decay
    default, rule = NoiseAdaptiveLR().rule, NoiseAdaptiveRates()
    assert {name: getattr(default, name) for name in given} == {name: getattr(rule, name) for name in given}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerwiseLR(SpectralTailRates(refresh=4, ramp=3)),
        lambda: steering(relative_to="mean", dead_band=0.1, refresh=3),
    ],
    ids=["tails", "noise"],
)
def test_rules_with_a_memory_resume_bitwise(tmp_path, make) -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(1)
        made = torch.nn.Sequential(*(torch.nn.Linear(m, n) for m, n in ((8, 32), (32, 32), (32, 32), (32, 3))))
        for layer, exponent in ((made[1], 2.0), (made[2], 4.0)):  # with power laws in their spectra
            sides = torch.linalg.svd(torch.randn(32, 32))
            sigmas = (torch.arange(1, 33) / 33) ** (-0.5 / (exponent - 1))
            layer.weight.data = sides.U * sigmas / 8 @ sides.Vh
        return made

    whole, first, resumed = (Classifier(network()) for _ in range(3))
    callback = make()
    fit(whole, [callback], steps=32, max_epochs=-1)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    fit(first, [make(), save], steps=16, max_epochs=-1, enable_checkpointing=True)
    going_on = make()
    fit(resumed, [going_on], steps=32, max_epochs=-1, ckpt_path=tmp_path / "step=16.ckpt")
    assert same_weights(whole, resumed) and going_on.ratios == callback.ratios
    assert min(callback.ratios.values()) < 0.9 and max(callback.ratios.values()) > 1.1


@pytest.mark.parametrize("window", [2, 3, 4])
def test_independent_noise_of_accumulation_windows(window: int) -> None:
    """H in ten lines from the gradients of every batch; a short last window (22 batches) is of another unit."""
    seen: list[list[torch.Tensor]] = []

    class PerBatch(Callback):
        def on_after_backward(self, trainer, pl_module) -> None:
            seen.append([p.grad.double().clone() for p in pl_module.parameters()])

    callback = steering(source="independent", beta2=0.9, warmup=0)
    data = batches(22 * 4, 4)
    fit(Classifier(mlp()), [callback, PerBatch()], data, steps=-1, max_epochs=1, accumulate_grad_batches=window)
    average, weight = 0.0, 0.0
    for begin in range(0, 22, window):
        sums = seen[begin : begin + window]  # .grad adds up inside a window
        length = len(sums)
        if length < window:
            continue
        share, part, whole = (length // 2) / length, sums[length // 2 - 1], sums[-1]
        factor = (2 / (share * (1 - share))) ** 0.5
        noise = np.array([factor * float((p - share * g).abs().sum()) for p, g in zip(part, whole, strict=True)])
        average, weight = 0.9 * average + 0.1 * noise**2, 0.9 * weight + 0.1
    (rates,) = callback._steered.values()
    np.testing.assert_allclose(rates.rule.noise.squared, average / weight, rtol=1e-4)
    assert min(callback.ratios.values()) < 1


def test_independent_noise_needs_windows() -> None:
    with pytest.raises(ValueError, match="set accumulate_grad_batches=2 or more"):
        fit(Classifier(mlp()), [steering(source="independent")])


def test_reading_every_fourth_step() -> None:
    callback = steering(read_every=4, warmup=0)
    fit(Classifier(mlp()), [callback], steps=20)
    (rates,) = callback._steered.values()
    assert rates.rule.updates == 5 and min(callback.ratios.values()) < 1
    with pytest.raises(ValueError, match="read_every must be a whole number of 1 or more, got 0"):
        NoiseAdaptiveLR(read_every=0)


class WithBackbone(Classifier):
    """What BackboneFinetuning wants: an attribute of that name, an optimizer of what is trained at first."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), optimizer=lambda p: torch.optim.AdamW([q for q in p if q.requires_grad]))
        torch.manual_seed(1)
        self.backbone, self.head = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh()), torch.nn.Linear(16, 3)
        self.network = torch.nn.Sequential(self.backbone, self.head)


def test_a_backbone_that_is_unfrozen_in_mid_run() -> None:
    """Its layers are measured and steered from then on, within the bounds."""
    steered, monitor = steering(floor=0.3), DynamicsMonitor("full", every_n_steps=1)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    fit(WithBackbone(), [thaw, steered, monitor], steps=-1, max_epochs=4)
    assert len(steered.ratios) == 4 and all(0.3 <= r <= 1 for r in steered.ratios.values())
    assert min(steered.ratios.values()) < 1 and monitor.failures == 0
    noise = monitor.history["noise/dual"]
    first = noise.values[:, noise.layers.index("network.0.0.weight")]
    assert np.isnan(first[:16]).all() and np.isfinite(first[18:]).all()


class Resumable:
    """A loader that goes on where it stopped, as torchdata's does; Lightning resumes inside an epoch with such."""

    def __init__(self) -> None:
        self._batches, self._begin, self._at = list(batches()), 0, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self):
        begin, self._begin = self._begin, 0
        for at in range(begin, len(self._batches)):
            self._at = at
            yield self._batches[at]

    def state_dict(self) -> dict[str, int]:
        return {"at": self._at + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin = state["at"] % len(self._batches)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [5, 8, 11])
@pytest.mark.parametrize("arguments", [{}, {"read_every": 3}, {"refresh": 4, "dead_band": 0.01}], ids=str)
def test_stopping_anywhere_in_an_epoch_and_going_on(tmp_path, stop: int, arguments: dict) -> None:
    """Epochs of eight steps: weights, ratios and the logged series are those of the run that never stopped."""
    whole, uninterrupted = Classifier(mlp()), steering(**arguments)
    fit(whole, [uninterrupted], Resumable(), steps=20, max_epochs=-1)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    fit(
        Classifier(mlp()),
        [steering(**arguments), keep],
        Resumable(),
        steps=stop,
        max_epochs=-1,
        enable_checkpointing=True,
    )
    again, resumed = Classifier(mlp()), steering(**arguments)
    path = str(tmp_path / f"step={stop}.ckpt")
    fit(again, [resumed], Resumable(), steps=20, max_epochs=-1, ckpt_path=path)
    assert same_weights(whole, again) and resumed.ratios == uninterrupted.ratios
    assert min(resumed.ratios.values()) < 1
    for tag in ("lr/ratio", "lr/effective", "noise/dual"):
        one, other = uninterrupted.history[tag], resumed.history[tag]
        np.testing.assert_array_equal(one.values[-len(other.values) :], other.values)
        assert list(one.steps[-len(other.steps) :]) == list(other.steps)


class Endless(torch.utils.data.IterableDataset):
    """Ten times the same batch, and no length: no noise at all."""

    def __iter__(self):
        yield from [next(iter(batches()))] * 10


@pytest.mark.parametrize("window", [2, 3, 4])
def test_windows_of_an_epoch_without_a_length(window: int) -> None:
    """The last window may be cut short, and is then not taken for a half and a whole."""
    callback, monitor = steering(source="independent", warmup=0), GradientMonitor(every_n_steps=1)
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = torch.utils.data.DataLoader(Endless(), batch_size=None)
    fit(module, [callback, monitor], data, steps=-1, max_epochs=2, accumulate_grad_batches=window)
    noise, sizes = monitor.history["noise/independent"], monitor.history["gradient/dual"]
    assert np.nanmax(noise.values) < 1e-3 * np.nanmin(sizes.values[:, :1])
    (rates,) = callback._steered.values()
    assert rates.rule.updates == 10 // window * 2
