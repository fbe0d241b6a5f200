"""The set of layers is not constant, and may not be known when training starts."""

import logging
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune

from dynamon.callbacks import (
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.layers import describe_layers, known_layers, measurable_layers
from dynamon.optim import LayerwiseRates
from dynamon.rates import FixedRates, NoiseAdaptiveRates
from tests.helpers import Classifier, batches, fit

RATE, DECAY, STEPS = 1e-2, 0.1, 32


class Net(pl.LightningModule):
    """Two layers; ``change(module)`` is called before the step of that number."""

    def __init__(self, change: Any = None, at: int = 10) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.change, self.at = change, at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at and self.change is not None:
            self.change(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = torch.relu(self.first(batch[0]))
        hidden = hidden + self.extra(hidden) if getattr(self, "extra", None) is not None else hidden
        return cross_entropy(self.head(hidden), batch[1])

    def configure_optimizers(self) -> Any:
        own = [p for name, p in self.named_parameters() if "unused" not in name]
        return torch.optim.AdamW(own, lr=RATE, weight_decay=DECAY)


class Norms(pl.Callback):
    """Gradient norms by name and step, by hand."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in pl_module.named_parameters() if id(p) in own and p.grad is not None]
        self.rows.append({n: float(p.grad.double().norm()) for n, p in named})


def assert_norms(monitor: Any, norms: Norms) -> None:
    """``gradient/l2`` of a monitor that measures every step is what was found by hand, NaN where there was none."""
    found = monitor.history["gradient/l2"]
    assert found.steps.tolist() == list(range(len(norms.rows)))
    assert set(found.layers) == {name for row in norms.rows for name in row}
    right = [[row.get(name, np.nan) for name in found.layers] for row in norms.rows]
    np.testing.assert_allclose(found.values, right, rtol=1e-5)


def run(module: Any, monitor: Any = None, steering: Any = None, **arguments: Any) -> tuple[Any, Any, Norms, Any]:
    """Fit with everything at every step; nothing may fail, and training is what it is without the monitor."""
    monitor = monitor or DynamicsMonitor(every_n_steps=1, strict=True)
    norms = Norms()
    steering = steering or NoiseAdaptiveLR(warmup=0, apply=False)
    fitted = fit(module(), [norms, monitor, steering], **{"steps": STEPS, **arguments})
    assert fitted.global_step == STEPS and monitor.failures == 0
    alone = fit(module(), [], **{"steps": STEPS, **arguments})
    same = [torch.equal(*pair) for pair in zip(weights(fitted), weights(alone), strict=True)]
    assert same and all(same)
    return monitor, steering, norms, fitted.lightning_module


def weights(fitted: Any) -> list[Tensor]:
    return [p.detach() for p in fitted.lightning_module.parameters() if not is_lazy(p)]


def with_lazy_branch() -> Net:
    module = Net()
    module.unused = nn.LazyLinear(5)
    return module


class AllLazy(Classifier):
    """Nothing has a shape before the first batch, and the optimizer holds it all."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)


pytestmark = pytest.mark.filterwarnings("ignore:.*[Ll]azy", "ignore:.*UninitializedParameter", "ignore:.*uninitialized")


def test_a_lazy_branch_that_is_never_used_is_left_out(caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        monitor, steering, norms, module = run(with_lazy_branch)
    assert_norms(monitor, norms)
    assert set(steering.ratios) == {"first.weight", "first.bias", "head.weight", "head.bias"}
    said = [record.message for record in caplog.records if "leaves out" in record.message]
    assert said == [
        "DynamicsMonitor leaves out 2 layers without a shape so far, first unused.weight. Lazy modules join with their "
        "first batch."
    ]
    assert {layer.name: layer.role for layer in known_layers(module)}["head.weight"] == "head"
    with pytest.raises(ValueError, match=r"unused\.weight has no shape yet"):
        describe_layers(module)


def test_a_model_that_is_lazy_all_over() -> None:
    monitor, steering, norms, module = run(AllLazy)
    assert_norms(monitor, norms)
    assert len(monitor.history["sharpness/stability_ratio"]) >= STEPS - 1
    np.testing.assert_allclose(
        monitor.history["weight/initial_fraction"].values[:, 0], np.cumprod(np.full(STEPS, 1 - RATE * DECAY)), rtol=1e-5
    )
    assert set(steering.ratios) == {layer.name for layer in describe_layers(module)}
    assert steering.state_dict()["optimizers"][0]["rule"]["updates"] == STEPS - 1


def test_globs_and_keys_that_match_a_lazy_layer_wait_for_it() -> None:
    monitor = GradientMonitor(every_n_steps=1, layers=["network.2.*"], strict=True)
    steering = LayerwiseLR(FixedRates({"network.2.weight": 0.5}))
    fit(AllLazy(), [monitor, steering], steps=4)
    assert monitor.history["gradient/l2"].layers == ("network.2.weight", "network.2.bias")
    assert steering.ratios["network.2.weight"] == 0.5
    with pytest.warns(UserWarning, match=r"GradientMonitor is off: layers=\['nothing'\] matches no layer of AllLazy"):
        fit(AllLazy(), [GradientMonitor(every_n_steps=1, layers=["nothing"])], steps=4)
    with pytest.raises(ValueError, match=r"layers=\['nothing'\] matches no layer of Net"):
        fit(Net(), [GradientMonitor(every_n_steps=1, layers=["nothing"])], steps=4)


def join(module: Net) -> None:
    torch.manual_seed(7)
    module.extra = nn.Linear(16, 16)
    module.trainer.optimizers[0].add_param_group({"params": list(module.extra.parameters())})


def test_a_layer_that_joins_has_a_column_from_then_on() -> None:
    monitor, steering, norms, _ = run(lambda: Net(join))
    assert_norms(monitor, norms)
    table = monitor.history["gradient/l2"]
    assert np.isnan(table.values[:10, table.layers.index("extra.weight")]).all()
    assert np.isfinite(table.values[:, table.layers.index("first.weight")]).all()
    memory = monitor.history["weight/initial_fraction"]
    for name, steps in (("first.weight", STEPS), ("extra.weight", STEPS - 10)):
        assert memory.values[-1, memory.layers.index(name)] == pytest.approx((1 - RATE * DECAY) ** steps, rel=1e-5)
    assert "extra.weight" in steering.ratios
    ratios = steering.history["lr/ratio"]
    assert ratios.steps.tolist() == list(range(STEPS)) and np.isnan(ratios.values[:10, -1]).all()


def test_a_layer_that_joins_between_two_readings_decays_from_its_first_step() -> None:
    monitor, *_ = run(lambda: Net(join), WeightMonitor(every_n_steps=31, strict=True))
    memory = monitor.history["weight/initial_fraction"]
    assert memory.steps.tolist() == [0, 31] and memory.layers[-1] == "extra.bias"
    right = [(1 - RATE * DECAY) ** 32] * 4 + [(1 - RATE * DECAY) ** 22] * 2
    np.testing.assert_allclose(memory.values[-1], right, rtol=1e-5)


def renew_head(module: Net) -> None:
    """A new head in the place of the old one, known to the same optimizer: the number of tensors stays."""
    torch.manual_seed(7)
    old, module.head = module.head, nn.Linear(16, 3)
    group = module.trainer.optimizers[0].param_groups[0]
    new = dict(zip(map(id, old.parameters()), module.head.parameters(), strict=True))
    group["params"] = [new.get(id(p), p) for p in group["params"]]


def test_a_layer_made_anew_is_measured_as_it_is() -> None:
    monitor, steering, norms, module = run(lambda: Net(renew_head))
    assert_norms(monitor, norms)
    sizes = monitor.history["weight/frobenius"]
    last = sizes.values[-1, sizes.layers.index("head.weight")]
    assert last == pytest.approx(float(module.head.weight.detach().double().norm()), rel=1e-5)
    assert set(steering.ratios) == {"first.weight", "first.bias", "head.weight", "head.bias"}


class NewOptimizers(Net):
    """Another head and another optimizer in the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(7)
            self.head = nn.Linear(16, 3)
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=RATE)]


def test_a_new_optimizer_with_a_new_layer() -> None:
    monitor, steering, norms, _ = run(NewOptimizers)
    assert_norms(monitor, norms)
    assert steering.history["lr/base"].steps.tolist() == list(range(STEPS))


class Late(Net):
    """The first optimizer is made when training has begun."""

    def configure_optimizers(self) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 0:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=RATE)]


@pytest.mark.filterwarnings("ignore:.LightningModule.configure_optimizers. returned .None.")
def test_an_optimizer_that_is_set_later() -> None:
    monitor, steering, norms, _ = run(Late)
    assert_norms(monitor, norms)
    assert "sharpness/stability_ratio" in monitor.history and len(steering.ratios) == 4


def leave(module: Net) -> None:
    """A layer is taken out of the model and out of the optimizer."""
    gone = {id(p) for p in module.extra.parameters()}
    group = module.trainer.optimizers[0].param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in gone]
    module.extra = None


def with_extra(change: Any) -> Net:
    module = Net(change)
    torch.manual_seed(5)
    module.extra = nn.Linear(16, 16)
    return module


def test_a_layer_that_leaves_keeps_its_rows() -> None:
    monitor, steering, norms, _ = run(lambda: with_extra(leave))
    assert_norms(monitor, norms)
    sizes = monitor.history["weight/frobenius"]
    column = sizes.values[:, sizes.layers.index("extra.weight")]
    assert np.isfinite(column[:10]).all() and np.isnan(column[10:]).all() and len(column) == STEPS
    assert "extra.weight" not in steering.ratios


def freeze(module: Net) -> None:
    module.first.requires_grad_(False)


def test_a_frozen_layer_keeps_its_rows() -> None:
    blocks = SharpnessMonitor(every_n_steps=1, quantities=("blocks",), strict=True)
    monitor, *_ = run(lambda: Net(freeze), blocks)
    table = monitor.history["sharpness/block"]
    assert table.steps.tolist() == list(range(STEPS)) and len(table.layers) == 4
    first, head = table.layers.index("first.weight"), table.layers.index("head.weight")
    assert np.isfinite(table.values[:10, first]).all() and np.isnan(table.values[11:, first]).all()
    assert np.isfinite(table.values[:, head]).all()


def prune_head(module: Net) -> None:
    """The weight becomes ``weight_orig`` times a mask: a new name, the same tensor in the optimizer."""
    prune.random_unstructured(module.head, "weight", amount=0.5)


def test_a_pruned_layer_goes_on_under_its_new_name() -> None:
    def module() -> Net:
        return Net(lambda m: (torch.manual_seed(2), prune_head(m)))

    monitor, _, norms, _ = run(module)
    assert_norms(monitor, norms)


def normalise(module: Net) -> None:
    """Spectral normalisation registered in mid-run: the weight becomes ``parametrizations.weight.original``."""
    torch.manual_seed(2)
    parametrizations.spectral_norm(module.head)


def test_a_parametrized_layer_goes_on() -> None:
    monitor, _, norms, _ = run(lambda: Net(normalise), GradientMonitor(every_n_steps=1, strict=True))
    assert_norms(monitor, norms)


class Finetuned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.head(torch.relu(self.backbone(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_backbone_that_is_unfrozen() -> None:
    monitor, steering = DynamicsMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=0)
    norms, module = Norms(), Finetuned()
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=2), norms, monitor, steering]
    fit(module, callbacks, steps=STEPS)
    assert_norms(monitor, norms)
    column = monitor.history["gradient/l2"].values[
        :, list(monitor.history["gradient/l2"].layers).index("backbone.bias")
    ]
    assert np.isnan(column[:16]).all() and np.isfinite(column[16:]).all() and "backbone.bias" in steering.ratios


class Unmeasurable(pl.LightningModule):
    """All weights are eight-bit floats: nothing can be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.scale.float() * batch[0][:, :3]).sum()

    def configure_optimizers(self) -> Any:
        return Still([self.scale], {"lr": 0.1})


class Still(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None


@pytest.mark.parametrize("make", [DynamicsMonitor, NoiseAdaptiveLR, WeightMonitor, SharpnessMonitor])
def test_a_model_without_anything_measurable_costs_one_sentence(make: Any) -> None:
    with pytest.warns(UserWarning) as caught:
        fitted = fit(Unmeasurable(), [make()], steps=STEPS)
    said = [one for one in caught if make.__name__ in str(one.message)]
    assert fitted.global_step == STEPS and len(said) == 1, [str(one.message) for one in caught]
    assert "cannot be measured" in str(said[0].message) or "does not steer" in str(said[0].message)


def test_one_of_two_optimizers_without_anything_measurable() -> None:
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.automatic_optimization = Unmeasurable().scale, False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            layers = [*self.first.parameters(), *self.head.parameters()]
            return [torch.optim.SGD(layers, lr=0.1), Still([self.scale], {"lr": 0.1})]

    monitor, steering = GradientMonitor(every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=0)
    with pytest.warns(UserWarning, match="NoiseAdaptiveLR does not steer 1 of the optimizers"):
        fit(Both(), [monitor, steering], steps=8)
    assert len(monitor.history["gradient/l2"]) >= 4 and monitor.failures == 0 and len(steering.ratios) == 4


def broken(*_: Any) -> Any:
    raise RuntimeError("no layers today")


def test_what_fails_before_the_first_measurement_costs_a_sentence(monkeypatch: Any) -> None:
    monkeypatch.setattr("dynamon.monitoring.layer_set.measurable_layers", broken)
    with pytest.warns(UserWarning, match="WeightMonitor is off: it failed when training began: no layers today"):
        fitted = fit(Net(), [WeightMonitor(every_n_steps=1)], steps=4)
    assert fitted.global_step == 4
    with pytest.raises(RuntimeError, match="no layers today"):
        fit(Net(), [WeightMonitor(every_n_steps=1, strict=True)], steps=4)


def test_layers_that_cannot_be_read_again_cost_a_failed_measurement(monkeypatch: Any) -> None:
    def fail(module: Net) -> None:
        join(module)
        monkeypatch.setattr("dynamon.monitoring.layer_set.measurable_layers", broken)

    monitor = WeightMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="the weight measurement failed: no layers today"):
        fitted = fit(Net(fail), [monitor], steps=STEPS)
    assert fitted.global_step == STEPS and monitor.failures >= 1 and len(monitor.history["weight/rms"]) == 10


def test_steering_in_a_plain_loop_follows_lazy_and_new_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(warmup=0), model)
    assert set(rates.ratios) == {"2.weight", "2.bias"} and "2 layers of SGD" in repr(rates)
    for inputs, labels in list(batches())[:4]:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    rates.settle()
    assert set(rates.ratios) == {"0.weight", "0.bias", "2.weight", "2.bias"} and rates.rule.updates == 3
    with pytest.raises(ValueError, match="there is nothing to steer"):
        LayerwiseRates(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), NoiseAdaptiveRates(), model)


def test_layers_are_looked_at_only_when_something_is_measured(monkeypatch: Any) -> None:
    looks = []
    named = nn.Module.named_parameters

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Net):
            looks.append(self.global_step)
        return named(self, *args, **kwargs)

    module = Net()
    monitor = DynamicsMonitor(every_n_steps=16)

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            monkeypatch.setattr(nn.Module, "named_parameters", counted)

    fit(module, [Watch(), monitor], steps=STEPS)
    quiet = set(range(2, 15)) | set(range(18, 31))
    assert not quiet & set(looks) and {15, 16} <= set(looks)


def test_what_is_printed_of_a_layer() -> None:
    module = Net()
    assert repr(describe_layers(module)[0]) == "Layer('first.weight', hidden, 16 x 8)"
    assert [layer.name for layer in measurable_layers(Unmeasurable())] == []


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear, lambda out: nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(8, out))]
)
def test_nothing_is_evaluated_before_training_has_drawn_the_values_of_lazy_layers(lazy) -> None:
    """Batch sharpness is measured before the first step: an evaluation there would draw other values."""

    def trained(callbacks: list[Any]) -> list[Tensor]:
        torch.manual_seed(3)
        module = Classifier(nn.Sequential(lazy(16), nn.ReLU(), nn.Linear(16, 3)))
        fit(module, callbacks, steps=4)
        return [*module.state_dict().values(), torch.get_rng_state()]

    monitor = DynamicsMonitor("full", every_n_steps=1, strict=True)
    plain, watched = trained([]), trained([monitor])
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(monitor.history["sharpness/batch"]) >= 2
