"""What is guessed by name is said, can be stated, and gives way to what is known."""

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, LayerwiseLR, NoiseAdaptiveLR, WeightMonitor
from dynamon.callbacks.lightning.loop import TrainerLoop
from dynamon.cli import main
from dynamon.health import findings, judged_loss
from dynamon.norms.geometry import geometry_assumption, optimizer_family, optimizer_geometry
from dynamon.optim import unsupported_reason
from dynamon.quantities.weight_decay import decay_assumption, is_decoupled
from dynamon.rates import FixedRates
from dynamon.runs import read_run_data
from dynamon.runs.history import RunData, Series
from dynamon.stability import has_stability_condition
from tests.helpers import Classifier, fit, mlp

STEPS = np.arange(120)


# Which loss.


class Parts(Classifier):
    """The box part rises by design, the total falls; the total is returned, and logged or not."""

    logs_total = True

    def training_step(self, batch, batch_idx):
        box = 0.2 + 1.5 * self.global_step / 80
        classes = cross_entropy(self.network(batch[0]), batch[1]) + 4 * 0.95**self.global_step
        self.log_dict({"train/loss_box": box, "train/loss_cls": classes})
        if self.logs_total:
            self.log("train/total_loss", classes + box)
        return {"loss": classes + box}


@pytest.mark.parametrize("logs_total", [True, False])
def test_a_part_is_not_taken_for_the_loss(tmp_path, capsys, logs_total):
    module, monitor = Parts(mlp(), lambda p: torch.optim.SGD(p, lr=1e-2)), GradientMonitor(every_n_steps=1)
    module.logs_total = logs_total
    fit(module, [monitor], steps=80, max_epochs=-1, logger=CSVLogger(tmp_path, name="", version="r"))
    assert monitor.findings == [] and findings(read_run_data(tmp_path / "r")) == []  # the live watch and the report
    assert main(["report", str(tmp_path / "r"), "--text"]) == 0
    assert "loss: dynamon/loss, what training_step returned" in capsys.readouterr().out


class Recording(Classifier):
    """Keeps the losses it returns."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.returned = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.returned.append(float(loss.detach()))
        return loss


class ByHand(Recording):
    """Manual optimisation."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


@pytest.mark.parametrize(
    ("kind", "window", "settings"),
    [
        (Recording, 1, {}),
        (Recording, 4, {"accumulate_grad_batches": 4}),
        (Recording, 1, {"gradient_clip_val": 0.01, "precision": "bf16-mixed"}),
        (Recording, 1, {"plugins": "16-mixed"}),
        (ByHand, 1, {}),
    ],
)
def test_the_logged_loss_is_the_one_returned(kind, window, settings):
    if settings.get("plugins"):
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}
    module, monitor = kind(mlp()), GradientMonitor(every_n_steps=2)
    fit(module, [monitor], steps=10, max_epochs=-1, **settings)
    loss = monitor.history["dynamon/loss"]
    assert loss.steps.tolist() == monitor.history["gradient/norm"].steps.tolist() == [0, 2, 4, 6, 8]
    expected = np.array(module.returned[window - 1 :: window])[loss.steps]
    np.testing.assert_allclose(loss.values, expected, rtol=1e-6)


def test_steps_that_measure_nothing_read_no_loss(monkeypatch):
    read = []
    monkeypatch.setattr(TrainerLoop, "loss_of", lambda *_: read.append(0))
    fit(Classifier(mlp()), [GradientMonitor(every_n_steps=5)], steps=20, max_epochs=-1)
    assert len(read) == 4


@pytest.mark.parametrize(
    ("tags", "tag", "source"),
    [
        (["train/loss_box", "train/loss_cls", "train/total_loss"], "train/total_loss", "name"),
        (["loss_box", "loss_total", "val/loss"], "loss_total", "name"),
        (["train/loss", "train/aux_loss"], "train/loss", "name"),
        (["train_loss_epoch", "train_loss_step"], "train_loss_step", "name"),
        (["train/loss_box", "sharpness/probe_loss"], "sharpness/probe_loss", "probe"),
        (["train/loss_box", "dynamon/loss"], "dynamon/loss", "returned"),
        (["train/loss_box_step", "train/loss_box_epoch"], "train/loss_box_step", "guess"),
        (["train/loss_box", "train/loss_cls"], "train/loss_box", "part"),
        (["g_loss", "d_loss"], "g_loss", "part"),
        (["val/loss", "test_loss", "train/loss_scale", "lossless"], "lossless", "guess"),
        (["val/loss", "train/accuracy"], None, None),
    ],
)
def test_which_loss_is_judged_and_why(tags, tag, source):
    judged = judged_loss(dict.fromkeys(tags))
    assert (judged and judged.tag, judged and judged.source) == (tag, source)
    assert judged is None or tag in judged.reason


def test_a_guess_counts_for_less_and_is_named():
    rising = Series(STEPS, np.where(STEPS > 60, np.exp((STEPS - 60) / 15.0), 1.0) + 0.01 * np.sin(STEPS))
    norms = Series(STEPS, np.ones(120))
    severity = {}
    for tags in (["dynamon/loss"], ["train/loss"], ["train/loss_box"], ["train/loss_box", "train/loss_cls"]):
        (finding,) = findings({**dict.fromkeys(tags, rising), "gradient/norm": norms})
        severity[tags[-1]] = finding.severity
        assert finding.rule == "loss/rising" and (tags[0] in finding.message or tags == ["dynamon/loss"])
    assert list(severity.values()) == ["fault", "fault", "warning", "note"]
    (stated,) = findings({"train/loss_box": rising, "gradient/norm": norms}, "train/loss_box")
    assert stated.severity == "fault"


def test_of_several_monitors_all_points_of_the_loss_count():
    one, other = GradientMonitor(every_n_steps=4), WeightMonitor(every_n_steps=6)
    module = Recording(mlp())
    fit(module, [one, other], steps=24, max_epochs=-1)
    both = RunData.of(one.history, other.history).scalars["dynamon/loss"]
    assert both.steps.tolist() == [0, 4, 6, 8, 12, 16, 18, 20]
    np.testing.assert_allclose(both.values, np.array(module.returned)[both.steps], rtol=1e-6)


# Which rate.


def test_the_headline_of_a_layerwise_decay_is_the_largest_rate():
    class Decayed(Classifier):
        def configure_optimizers(self):
            first, last = self.network[0].parameters(), self.network[3].parameters()
            return torch.optim.AdamW([{"params": first, "lr": 1e-3}, {"params": last, "lr": 1e-2}])

    steering = LayerwiseLR(FixedRates({"*": 1.0}))
    trainer = fit(Decayed(mlp()), [steering], steps=4)
    assert float(trainer.callback_metrics["lr/base"]) == pytest.approx(1e-2)
    assert (steering.history["lr/base_min"].values == 1e-3).all()
    np.testing.assert_allclose(steering.history["lr/effective"].values[-1], [1e-3, 1e-3, 1e-2, 1e-2])
    steering = LayerwiseLR(FixedRates({"*": 1.0}))
    fit(Classifier(mlp()), [steering], steps=4)
    assert "lr/base_min" not in steering.history


def test_of_two_optimizers_that_take_turns_both_rates_are_shown():
    class Adversaries(Classifier):
        automatic_optimization = False

        def configure_optimizers(self):
            first, last = self.network[0].parameters(), self.network[3].parameters()
            return torch.optim.SGD(first, lr=0.1), torch.optim.Adam(last, lr=0.01)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
            optimizer.step()

    steering = LayerwiseLR(FixedRates({"*": 0.5}))
    fit(Adversaries(mlp()), [steering], steps=8)
    assert (steering.history["lr/base"].values == 0.1).all() and (steering.history["lr/base_min"].values == 0.01).all()
    effective = steering.history["lr/effective"]
    assert len(effective) == 8 and len(effective.layers) == 4
    np.testing.assert_allclose(effective.values, np.tile([0.05, 0.05, 0.005, 0.005], (8, 1)))


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_critical_sharpness_needs_one_rate(ratio):
    monitor = DynamicsMonitor(every_n_steps=2)
    steering = LayerwiseLR(FixedRates({"network.0.*": ratio}))
    fit(Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=0.1)), [monitor, steering], steps=10, max_epochs=-1)
    assert ("sharpness/critical" in monitor.history) == (ratio == 1.0)


# Which geometry.


def optimizer(name, base=torch.optim.Optimizer, module="elsewhere", **attributes):
    init = (
        {}
        if base is not torch.optim.Optimizer
        else {"__init__": lambda self, p, lr: torch.optim.Optimizer.__init__(self, p, {"lr": lr, "weight_decay": 0.1})}
    )
    kind = type(name, (base,), {"__module__": module, **init, **attributes})
    return kind([nn.Parameter(torch.ones(2, 2))], lr=0.1)


@pytest.mark.parametrize(
    ("made", "family", "source"),
    [
        (lambda: optimizer("LambdaSGD", torch.optim.SGD), "euclidean", "class"),
        (lambda: optimizer("SGDWithAdamInit", torch.optim.SGD), "euclidean", "class"),
        (lambda: optimizer("Designed", torch.optim.SGD), "euclidean", "class"),
        (lambda: optimizer("Mine", torch.optim.RMSprop), "sign", "class"),
        (lambda: optimizer("SignSGD", torch.optim.SGD), "sign", "name"),
        (lambda: optimizer("Adam8bit"), "sign", "name"),
        (lambda: optimizer("FusedLAMB"), "sign", "name"),
        (lambda: optimizer("DeepSpeedCPUAdam"), "sign", "name"),
        (lambda: optimizer("Prodigy"), "sign", "name"),
        (lambda: optimizer("SophiaG"), "sign", "name"),
        (lambda: optimizer("SOAP"), "spectral", "name"),
        (lambda: optimizer("DistributedShampoo"), "spectral", "name"),
        (lambda: optimizer("NorMuon"), "spectral", "name"),
        (lambda: optimizer("Lambda"), "euclidean", "nothing"),
        (lambda: optimizer("Lambda", dynamon_geometry="spectral"), "spectral", "stated"),
        (lambda: optimizer("Mine", torch.optim.Adam, dynamon_geometry="euclidean"), "euclidean", "stated"),
    ],
)
def test_geometry_goes_by_class_then_by_whole_words(made, family, source):
    made = made()
    assert optimizer_family(made) == family and optimizer_geometry(made).source == source
    said = geometry_assumption(made)
    assert (said is not None) == (source in ("name", "nothing"))
    assert said is None or ("dynamon_geometry" in said and type(made).__name__ in said and repr(family) in said)


def test_a_wrapper_has_the_geometry_of_what_it_wraps():
    inner = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    outer = optimizer("SharpnessAware")
    outer.base_optimizer = inner
    assert optimizer_geometry(outer) == optimizer_geometry(inner)


def test_a_geometry_that_is_none():
    with pytest.raises(ValueError, match="dynamon_geometry of Mine must be 'sign', .* or 'spectral', got 'l2'"):
        optimizer_geometry(optimizer("Mine", dynamon_geometry="l2"))


class Unheard(torch.optim.Optimizer):
    """Plain descent, of a name that says nothing."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)
        return loss


def test_what_is_assumed_is_said_once(caplog):
    with caplog.at_level(logging.INFO):
        callbacks = [GradientMonitor(every_n_steps=1), NoiseAdaptiveLR(warmup=0)]
        fit(Classifier(mlp(), lambda p: Unheard(p, lr=0.1)), callbacks, steps=4)
    assert len([r for r in caplog.records if "Unheard is assumed to descend in 'euclidean' geometry" in r.message]) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(Classifier(mlp(), lambda p: torch.optim.SGD(p, lr=0.1)), [GradientMonitor(every_n_steps=1)], steps=4)
    assert not [r for r in caplog.records if "is taken to" in r.message]


def test_stability_is_known_for_what_descends_like_its_base():
    assert has_stability_condition(optimizer("LambdaSGD", torch.optim.SGD))
    assert not has_stability_condition(optimizer("SignSGD", torch.optim.SGD))


# Which decay, and which optimizers are refused.


def test_decay_goes_by_class_then_by_whole_words():
    for name, base, expected in (
        ("Adam", torch.optim.Adam, False),
        ("MyAdamW", torch.optim.AdamW, True),
        ("AdamWLike", torch.optim.SGD, False),
        ("Lion", torch.optim.Optimizer, True),
        ("LARS", torch.optim.Optimizer, False),
    ):
        made = optimizer(name, base)
        assert is_decoupled(made, {"weight_decay": 0.1}) == expected, name
        assert decay_assumption(made) is None
    unknown = optimizer("Unheard")
    assert is_decoupled(unknown, unknown.param_groups[0]) and "decoupled_weight_decay" in decay_assumption(unknown)
    unknown.param_groups[0]["decoupled_weight_decay"] = False
    assert not is_decoupled(unknown, unknown.param_groups[0]) and decay_assumption(unknown) is None


@pytest.mark.parametrize(
    ("name", "module", "refused"),
    [
        ("SGD2", "deepspeed_runs.optim", False),
        ("Mine", "my_lbfgs_tools", False),
        ("ProdigyLike", "elsewhere", True),
        ("Mine", "deepspeed.ops", True),
        ("Mine", "schedulefree.sgd", True),
        ("AdamWScheduleFree", "elsewhere", True),
    ],
)
def test_refusals_are_by_whole_words(name, module, refused):
    assert (unsupported_reason(optimizer(name, torch.optim.SGD, module)) is not None) == refused
