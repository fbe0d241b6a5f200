"""What the sharpness monitor measures, on what, and what happens where it cannot."""

import logging
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

from dynamon.callbacks import DynamicsMonitor, SharpnessMonitor
from dynamon.curvature import GGNOperator, HessianOperator, top_eigenvalues
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from tests.helpers import Classifier, batches, cnn, fit, mlp, same_weights

SGD = torch.optim.SGD


def still(p):
    """An optimizer that moves nothing, so that every measurement is of the same weights."""
    return SGD(p, lr=0.0)


def exact(network: nn.Module, loss_fn) -> torch.Tensor:
    """Eigenvalues of the dense Hessian, ascending."""
    params = list(network.parameters())
    operator = HessianOperator(loss_fn, params)
    return torch.linalg.eigvalsh((operator @ torch.eye(operator.shape[0])).double())


def whole_probe(**arguments) -> SharpnessMonitor:
    return SharpnessMonitor(**({"every_n_steps": 1, "probe_fraction": 1.0, "tol": 1e-4, "strict": True} | arguments))


def test_unknown_quantities_are_named() -> None:
    with pytest.raises(ValueError, match="quantities must be chosen from stability_ratio, next, hessian"):
        SharpnessMonitor(quantities=["sharpnes"])
    with pytest.raises(ValueError, match="quantities must be a list of names"):
        SharpnessMonitor(quantities="hessian")
    for arguments, message in [
        ({"probe_size": 1}, "probe_size must be at least 2"),
        ({"outputs": 3}, "outputs must be a function of"),
        ({"memory_limit": 0}, "memory_limit must be a positive number of GiB"),
    ]:
        with pytest.raises(ValueError, match=message):
            SharpnessMonitor(**arguments)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_quantity_alone(quantity) -> None:
    """Each can be had without the others, writes what it declares and nothing of the rest."""
    monitor = whole_probe(quantities=[quantity, "hessian"] if quantity == "bracket" else [quantity], tol=1e-2)
    module = Classifier(mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    fit(module, [monitor], steps=8)
    declared = {t for m in monitor._meters for t in (*m.tags, *m.quantities)}
    undefined = ("_unconverged", "threshold", "decay_decrease")  # no such thing here
    missing = {t for t in declared - set(monitor.history) if not t.endswith(undefined)}
    assert missing <= {"sharpness/stability_ratio_bracket", "sharpness/best_multiple", "sharpness/critical"}
    assert monitor.failures == 0


def test_the_gauss_newton_matrix_finds_the_outputs(caplog) -> None:
    monitor, own = whole_probe(quantities=["ggn"]), None
    module = Classifier(mlp(), optimizer=still)
    x, y = next(iter(batches()))
    with caplog.at_level(logging.INFO):
        fit(module, [monitor], steps=2)
    assert "the outputs are what goes into cross_entropy" in caplog.text
    operator = GGNOperator(lambda: module.network(x), lambda z: cross_entropy(z, y), list(module.parameters()))
    truth = float(torch.linalg.eigvalsh((operator @ torch.eye(operator.shape[0])).double())[-1])
    assert monitor.history["sharpness/ggn_max"].values[0] == pytest.approx(truth, rel=1e-3)

    def outputs(module, batch):
        logits = module.network(batch[0])
        return logits, cross_entropy(logits, batch[1])

    own = whole_probe(quantities=["ggn"], outputs=outputs)
    fit(Classifier(mlp(), optimizer=still), [own], steps=2)
    assert own.history["sharpness/ggn_max"].values[0] == pytest.approx(truth, rel=1e-3)


def test_the_probe_weighs_batches_by_samples() -> None:
    """Two batches of different sizes: the Hessian is that of the mean over all samples."""
    monitor, module = whole_probe(probe_batches=2), Classifier(mlp(), optimizer=still)
    data = batches(count=11)  # 8 samples, then 3
    fit(module, [monitor], data, steps=4, max_epochs=-1)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    top = float(exact(module.network, lambda: cross_entropy(module.network(x), y))[-1])
    assert monitor.history["sharpness/probe_samples"].values[-1] == 11
    assert monitor.history["sharpness/hessian_max"].values[-1] == pytest.approx(top, rel=1e-3)


def test_probe_size_takes_as_many_batches_as_it_needs() -> None:
    monitor, module = whole_probe(probe_size=20), Classifier(mlp(), optimizer=still)
    data = batches()
    fit(module, [monitor], data, steps=6)
    assert monitor.history["sharpness/probe_samples"].values.tolist() == [8, 16, 20, 20, 20, 20]
    x, y = (torch.cat(parts)[:20] for parts in zip(*data, strict=True))
    top = float(exact(module.network, lambda: cross_entropy(module.network(x), y))[-1])
    assert monitor.history["sharpness/hessian_max"].values[-1] == pytest.approx(top, rel=1e-3)


class Sentences(Dataset):
    """Token batches of which a mask says how many tokens count."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        mask = torch.ones(8) if i < 4 else torch.tensor([1.0] + [0] * 7)
        return {
            "x": torch.randn(8, 8, generator=generator),
            "y": torch.randint(3, (8,), generator=generator),
            "mask": mask,
        }


class Masked(Classifier):
    def training_step(self, batch, batch_idx):
        losses = cross_entropy(self.network(batch["x"]).transpose(1, 2), batch["y"], reduction="none")
        return (losses * batch["mask"]).sum() / batch["mask"].sum()


def test_the_probe_can_weigh_by_tokens() -> None:
    monitor, module = whole_probe(probe_batches=2, probe_weight="mask"), Masked(mlp(), optimizer=still)
    data = DataLoader(Sentences(), batch_size=4)
    fit(module, [monitor], data, steps=4, max_epochs=-1)
    whole = next(iter(DataLoader(Sentences(), batch_size=8)))
    top = float(exact(module.network, lambda: module.training_step(whole, 0))[-1])
    assert monitor.history["sharpness/hessian_max"].values[-1] == pytest.approx(top, rel=1e-3)
    with pytest.raises(ValueError, match=r"the batch has no 'length' to weight it by; it is \['mask', 'x', 'y'\]"):
        fit(Masked(mlp()), [whole_probe(probe_weight="length")], data)


def test_the_bracket_is_the_top_direction_on_other_samples() -> None:
    """Small probes are sharper: on average the bracket's lower end lies below, the probe's own value above."""
    monitor, module = whole_probe(), Classifier(mlp(), optimizer=still)
    data = batches()
    fit(module, [monitor], data, steps=7)
    (first, second, *_) = list(data)
    params = list(module.parameters())
    own, other = (
        HessianOperator(lambda b=b: cross_entropy(module.network(b[0]), b[1]), params) for b in (first, second)
    )
    v = top_eigenvalues(own, tol=1e-5).vectors[:, 0]
    assert monitor.history["sharpness/hessian_max_bracket"].values[0] == pytest.approx(float(v @ (other @ v)), rel=1e-2)
    ratio = (
        monitor.history["sharpness/hessian_max_bracket"].values[0] / monitor.history["sharpness/hessian_max"].values[0]
    )
    assert ratio < 1


def test_blocks_are_those_of_the_dense_hessian() -> None:
    monitor, module = whole_probe(quantities=["blocks"]), Classifier(mlp(), optimizer=still)
    fit(module, [monitor], steps=2)
    x, y = next(iter(batches()))
    series = monitor.history["sharpness/block"]
    for name, value in zip(series.layers, series.values[0], strict=True):
        p = module.get_parameter(name)
        operator = HessianOperator(lambda: cross_entropy(module.network(x), y), [p])
        assert value == pytest.approx(float(torch.linalg.eigvalsh(operator @ torch.eye(p.numel()))[-1]), rel=2e-2)


def test_along_the_step_on_a_quadratic_everything_is_known() -> None:
    """Squared error of a linear model: greedy and critical multiples have closed forms."""

    class Linear(Classifier):
        def training_step(self, batch, batch_idx):
            return mse_loss(self.network(batch[0]).squeeze(1), batch[1].float())

    torch.manual_seed(0)
    rate = 0.05
    module = Linear(nn.Linear(8, 1), optimizer=lambda p: SGD(p, lr=rate))
    monitor = whole_probe(quantities=["directional", "critical", "batch"])
    fit(module, [monitor], batches(count=8), steps=12, max_epochs=-1)  # full batch: the update is a gradient step
    history = {q: monitor.history[f"sharpness/{q}"].values for q in ("directional", "critical", "batch")}
    greedy = monitor.history["sharpness/best_multiple"].values
    np.testing.assert_allclose(greedy, 1 / (rate * history["directional"]), rtol=1e-3)
    np.testing.assert_allclose(history["critical"], history["directional"], rtol=2e-2)
    np.testing.assert_allclose(history["batch"], history["directional"], rtol=1e-3)  # same batch, same direction
    np.testing.assert_allclose(monitor.history["sharpness/critical_multiple"].values, 2 * greedy, rtol=2e-2)


def test_sign_descent_is_measured_in_its_own_norm(caplog) -> None:
    """Without a formula: no line, but u.Hu over the squared l-infinity norm of the step."""

    class SignDescent(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-3})

        def step(self, closure=None):
            loss = closure()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(1e-3 * p.grad.sign())
            return loss

    monitor, module = whole_probe(), Classifier(mlp(), optimizer=SignDescent)
    with caplog.at_level(logging.INFO):
        fit(module, [monitor], steps=6)
    assert "SignDescent has no known stability condition" in caplog.text
    assert "sharpness/stability_ratio" not in monitor.history
    plain, own = (monitor.history[f"sharpness/directional{which}"].values for which in ("", "_norm"))
    size = sum(p.numel() for p in module.parameters())
    np.testing.assert_allclose(own, plain * size, rtol=1e-2)  # a step of n entries of one size


def test_a_basis_that_does_not_fit_gives_way_to_critical_sharpness() -> None:
    monitor = SharpnessMonitor(every_n_steps=2, memory_limit=1e-6, strict=True)
    with pytest.warns(UserWarning, match="critical sharpness, which needs forward passes only, is shown instead"):
        fit(Classifier(mlp(), optimizer=lambda p: SGD(p, lr=0.1)), [monitor])
    assert len(monitor.history["sharpness/critical_multiple"]) >= 5
    assert "sharpness/hessian_max" not in monitor.history


class Failing(Classifier):
    """A module whose loss fails in a stated way at some of the evaluations on the probe."""

    def __init__(self, how: str) -> None:
        super().__init__(mlp(), optimizer=lambda p: SGD(p, lr=0.05))
        self.how, self.probes = how, [0]  # a list in a list is put back by the probe, a class attribute is not
        type(self).evaluations = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(batch[0]) == 8:  # a training batch; the probe has 2 samples
            return loss
        type(self).evaluations += 1
        if type(self).evaluations in (3, 4):
            if self.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return None if self.how == "none" else loss * math.nan
        return loss


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("memory", "sharpness measurement failed: CUDA out of memory"),
        ("none", "sharpness measurement failed: training_step must return a scalar tensor as loss, got NoneType"),
        ("nan", "sharpness measurement failed: the loss on the probe is not finite"),
    ],
)
def test_a_failed_measurement_costs_one_warning_and_the_next_succeeds(how, message, recwarn) -> None:
    plain, module = Classifier(mlp(), optimizer=lambda p: SGD(p, lr=0.05)), Failing(how)
    fit(plain, [])
    monitor = SharpnessMonitor(every_n_steps=2, quantities=["stability_ratio", "hessian"])
    with pytest.warns(UserWarning, match=message) as caught:
        fit(module, [monitor])
    assert sum("measurement failed" in str(w.message) for w in caught) == 1
    assert same_weights(plain, module)
    failures = 1 if how == "none" else 2  # where there is no loss once more, the next batch is taken
    assert monitor.failures == failures and monitor.history["dynamon/failures"].values[-1] == failures
    series = monitor.history["sharpness/hessian_max"]
    assert series.steps.tolist() == [s for s in range(2, 21, 2) if s not in (6, 8)] or len(series) >= 6
    assert np.isfinite(series.values).all()


class Attention(pl.LightningModule):
    """One head of scaled_dot_product_attention between linear layers."""

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 3), nn.LayerNorm(8)
        self.run = torch.compile(self.forward, backend="aot_eager") if compiled else self.forward

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.run(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.0)


def attention_batches():
    return batches(count=32, features=(5, 8))


def top_of_attention() -> float:
    module = Attention()
    x, y = next(iter(attention_batches()))
    return float(exact(module, lambda: cross_entropy(module(x), y))[-1])


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_and_compiled_modules(compiled) -> None:
    monitor = whole_probe()
    fit(Attention(compiled), [monitor], attention_batches(), steps=3)
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(top_of_attention(), rel=1e-3)


def test_bf16_mixed_precision_is_within_its_rounding() -> None:
    monitor = whole_probe(tol=1e-2)
    fit(Attention(), [monitor], attention_batches(), steps=3, precision="bf16-mixed")
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(top_of_attention(), rel=3e-2)


def test_a_compiled_module_as_a_whole() -> None:
    monitor, module = whole_probe(), Attention()
    fit(torch.compile(module, backend="aot_eager"), [monitor], attention_batches(), steps=3)
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(top_of_attention(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_probe_that_was_too_large_to_save_is_taken_anew_and_said(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("dynamon.monitoring.held_samples.SAVED_NUMBERS", 3)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    fit(Classifier(mlp()), [SharpnessMonitor(every_n_steps=2), save], steps=4, enable_checkpointing=True)
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp()), [SharpnessMonitor(every_n_steps=2)], steps=8, ckpt_path=tmp_path / "step=4.ckpt")
    assert "the checkpoint did not hold the probe, so it is taken anew" in caplog.text


def test_convolutions_with_batch_norm_in_train_mode() -> None:
    """The probe is in train mode: batch statistics are part of the loss, running ones are not moved."""
    monitor, module = whole_probe(), Classifier(cnn(), optimizer=still)
    module.network[3].p = 0.0
    data = batches(count=32, features=(2, 8, 8))
    fit(module, [monitor], data, steps=2)
    x, y = next(iter(data))
    module.train()
    top = float(exact(module.network, lambda: cross_entropy(module.network(x), y))[-1])
    assert monitor.history["sharpness/hessian_max"].values[0] == pytest.approx(top, rel=1e-3)


class Huber(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.huber_loss(self.network(batch[0])[:, 0], batch[1].float())


def test_a_quantity_that_fails_leaves_the_others_alone() -> None:
    """The outputs of a Huber loss are not found: that is said by name, once, and after three times it rests."""
    monitor = SharpnessMonitor(every_n_steps=2, quantities=["hessian", "ggn", "trace"])
    with pytest.warns(UserWarning, match="ggn could not be measured: the outputs were not found") as caught:
        fit(Huber(mlp()), [monitor])
    said = [str(w.message) for w in caught if "could not be measured" in str(w.message)]
    assert len(said) == 2 and said[0].endswith("The other quantities go on.")
    assert "tried again in 10 readings" in said[1]
    assert len(monitor.history["sharpness/hessian_max"]) == len(monitor.history["sharpness/trace"]) == 10
    assert monitor.failures == 3 and "sharpness/ggn_max" not in monitor.history
    with pytest.raises(ValueError, match="the outputs were not found"):
        fit(Huber(mlp()), [SharpnessMonitor(every_n_steps=2, quantities=["hessian", "ggn"], strict=True)])


def test_a_gauss_newton_matrix_of_a_part_of_the_loss_is_said() -> None:
    class TwoHeads(Classifier):
        def training_step(self, batch, batch_idx):
            z = self.network(batch[0])
            return cross_entropy(z[:, :2], batch[1] % 2) + torch.nn.functional.huber_loss(z[:, 2], batch[1].float())

    with pytest.warns(UserWarning, match="ggn covers a part of the loss only"):
        fit(TwoHeads(mlp()), [SharpnessMonitor(every_n_steps=5, quantities=["ggn"])])


def test_blocks_in_pure_half_precision() -> None:
    monitor = SharpnessMonitor(every_n_steps=5, quantities=["blocks"], strict=True)
    fit(Classifier(mlp()), [monitor], precision="bf16-true")
    assert np.isfinite(monitor.history["sharpness/block"].values).all()


def test_several_optimizers_have_no_stability_ratio_and_are_told(caplog) -> None:
    class Two(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first, *rest = self.parameters()
            return SGD([first], lr=0.1), SGD(rest, lr=0.1)

    def loss_fn(module, batch):
        return cross_entropy(module.network(batch[0]), batch[1])

    monitor = SharpnessMonitor(every_n_steps=5, loss_fn=loss_fn, strict=True)
    with caplog.at_level(logging.INFO):
        fit(Two(), [monitor])
    assert "no stability ratio: it is defined for one optimizer" in caplog.text
    assert len(monitor.history["sharpness/hessian_max"]) >= 2


def test_transformer_engine_is_refused_by_one_sentence(recwarn) -> None:
    class Linear(nn.Linear):
        __module__ = "transformer_engine.pytorch.module.linear"

    module = Classifier(nn.Sequential(nn.Linear(8, 4), Linear(4, 3)))
    monitor = DynamicsMonitor(every_n_steps=2)
    fit(module, [monitor], steps=4)
    said = [str(w.message) for w in recwarn if "Transformer Engine" in str(w.message)]
    assert len(said) == 1 and monitor.failures == 0
    assert "gradient/norm" in monitor.history and not any(tag.startswith("sharpness/") for tag in monitor.history)
