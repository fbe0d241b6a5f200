"""What is documented is what is written: event files, key tables, layout, metrics."""

import re
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from dynamon.callbacks import (
    ActivationMonitor,
    DynamicsMonitor,
    GradientMonitor,
    LayerwiseLR,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.layers import describe_layers
from dynamon.monitoring.recorder import layer_tag
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.quantities import REGISTRY, Condition, quantities_of
from tests.helpers import Classifier, documented, fit, mlp

QUANTILES = ("p10", "median", "p90")
OURS = {one.group for one in REGISTRY.values()}
SHARED = {one.tag for one in quantities_of("monitor")}
# Of the run of AdamW under automatic optimisation that `written` is; others of these may hold by chance.
HOLDS = (
    Condition.KEEPS_STATE
    | Condition.NUMERIC_BATCH
    | Condition.AUTOMATIC
    | Condition.RETURNED_LOSS
    | Condition.COMPARABLE
    | Condition.DECOUPLED_DECAY
    | Condition.STABILITY_FORMULA
    | Condition.SECOND_MOMENT
    | Condition.COMPUTED_STEP
    | Condition.CONVERGED
    | Condition.OTHER_SAMPLES
    | Condition.KNOWN_SAMPLES
    | Condition.TRUSTED_LOSS
    | Condition.ACTIVATION_FUNCTIONS
)
CHANCE = (
    Condition.SIGNAL
    | Condition.RESOLVED
    | Condition.POWER_LAW
    | Condition.UNCONVERGED
    | Condition.ONE_RATE
    | Condition.POSITIVE_CURVATURE
    | Condition.DESCENDS
)


def declared(meters) -> tuple[set[str], set[str]]:
    return {t for m in meters for t in m.tags}, {q for m in meters for q in m.quantities}


@pytest.mark.parametrize("monitor", [GradientMonitor, WeightMonitor, SharpnessMonitor, ActivationMonitor])
def test_docstring_table_is_the_declared_one(monitor) -> None:
    every = {"quantities": QUANTITIES} if monitor is SharpnessMonitor else {}
    tags, quantities = declared(monitor(**every)._meters)
    binned = {h for m in monitor(**every)._meters for h in m.histograms}
    assert documented(monitor) == tags | quantities | binned | SHARED


def test_docstring_table_of_steering() -> None:
    assert documented(LayerwiseLR) == set(LayerwiseLR.tags) | set(LayerwiseLR.quantities)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, DynamicsMonitor, NoiseAdaptiveLR, Classifier]:
    root = tmp_path_factory.mktemp("run")
    monitor, steering = DynamicsMonitor("full", every_n_steps=1, strict=True), NoiseAdaptiveLR(warmup=2)
    module = Classifier(mlp())
    logger = TensorBoardLogger(root, name=None, version="tb")
    fit(module, [monitor, steering], logger=logger, steps=24, max_epochs=-1, gradient_clip_val=0.1)
    return root / "tb", monitor, steering, module


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_event_file_holds_the_documented_tags(written) -> None:
    folder, monitor, steering, module = written
    tags, quantities = declared(monitor._meters)
    tags |= set(LayerwiseLR.tags) | SHARED
    quantities |= set(LayerwiseLR.quantities)
    names = {layer.name for layer in describe_layers(module)}
    matrices = {layer.name for layer in describe_layers(module) if layer.role != "vector"}

    def rows(quantity: str) -> set[str]:
        if quantity == "activation/saturated":
            return {"network.1"}
        if REGISTRY[quantity].rows == "module":
            return {"network.0", "network.1", "network.3"}
        return matrices if quantity.startswith("spectrum") else names

    def written_for(conditions: Condition) -> set[str]:
        mine = {tag for tag in tags | quantities if REGISTRY[tag].condition in conditions}
        found = mine & tags | {f"{q}_{quantile}" for q in mine & quantities for quantile in QUANTILES}
        return found | {layer_tag(q, n) for q in mine & quantities for n in rows(q)}

    found = {t for t in read(folder).Tags()["scalars"] if re.split(r"[/.]", t)[0] in OURS}
    assert written_for(HOLDS) - found == set()
    assert found - written_for(HOLDS | CHANCE) == set()


def test_every_group_of_the_design_is_there(written) -> None:
    folder, *_ = written
    groups = {t.split("/")[0] for t in read(folder).Tags()["scalars"]}
    assert {"sharpness", "gradient", "noise", "weight", "update", "spectrum", "lr", "dynamon"} <= groups


def test_values_and_steps_are_those_of_the_history(written) -> None:
    folder, monitor, _, module = written
    events = read(folder)
    for tag in ("gradient/norm", "sharpness/stability_ratio", "noise/dual_median"):
        scalars = events.Scalars(tag)
        np.testing.assert_array_equal([s.step for s in scalars], monitor.history[tag].steps)
        np.testing.assert_allclose([s.value for s in scalars], monitor.history[tag].values, rtol=1e-6)


def test_x_axis_is_that_of_the_users_own_metrics(written) -> None:
    folder, *_ = written
    events = read(folder)
    loss, norm = ({s.step for s in events.Scalars(tag)} for tag in ("train/loss", "gradient/norm"))
    assert norm <= loss


def test_tensor_summary_holds_all_layers(written) -> None:
    folder, monitor, _, module = written
    events = read(folder)
    tensors = events.Tensors("noise/dual/layers")
    series = monitor.history["noise/dual"]
    table = np.stack([tensor_util.make_ndarray(t.tensor_proto) for t in tensors])
    np.testing.assert_allclose(table, series.values, rtol=1e-6)
    content = events.SummaryMetadata("noise/dual/layers").plugin_data.content
    assert all(layer.name.encode() in content for layer in describe_layers(module))


def test_custom_scalars_layout_names_tags_that_exist(written) -> None:
    folder, *_ = written
    events = read(folder)
    proto = events.Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(proto).item())
    scalars = events.Tags()["scalars"]
    assert [c.title for c in layout.category] == [
        "1 Stability",
        "2 Gradients",
        "3 Rates",
        "4 Weights",
        "5 Activations",
        "6 dynamon",
    ]
    for category in layout.category:
        for chart in category.chart:
            patterns = list(chart.multiline.tag)
            for series in chart.margin.series:
                patterns += [re.escape(t) for t in (series.value, series.lower, series.upper)]
            assert patterns
            matched = [p for p in patterns if any(re.fullmatch(p, tag) for tag in scalars)]
            missing = {p.replace("\\", "") for p in patterns if p not in matched}
            missing = {re.sub(r"_(p10|median|p90)$", "", p) for p in missing}
            missing = {p for p in missing if p not in REGISTRY or REGISTRY[p].condition in HOLDS}
            assert missing == set(), chart.title


def test_headlines_enter_callback_metrics_and_can_stop_a_run() -> None:
    stop = EarlyStopping("gradient/norm", stopping_threshold=1e9, check_on_train_epoch_end=True)
    monitor = GradientMonitor(every_n_steps=1)
    run = fit(Classifier(mlp()), [monitor, stop], steps=40)
    assert run.callback_metrics["gradient/norm"] == pytest.approx(monitor.history["gradient/norm"].values[-1])
    assert run.global_step == 8  # after the first epoch


def test_several_loggers_and_a_choice(tmp_path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="tb", version=0), CSVLogger(tmp_path, name="csv", version=0)]
    fit(Classifier(mlp()), [GradientMonitor(every_n_steps=2, loggers=["csv"])], logger=loggers)
    assert "gradient/norm" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "gradient/norm" not in read(tmp_path / "tb" / "version_0").Tags()["scalars"]


def test_layers_globs_choose_the_layers_shown() -> None:
    monitor = DynamicsMonitor(every_n_steps=2, layers=["*.weight", "!network.0.*"], strict=True)
    fit(Classifier(mlp()), [monitor])
    assert monitor.history["gradient/dual"].layers == ("network.3.weight",)
    assert monitor.history["weight/operator"].layers == ("network.3.weight",)


def test_many_layers_get_no_scalars_of_their_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dynamon.monitoring.recorder.MAX_LAYER_TAGS", 5)
    logger = TensorBoardLogger(tmp_path, name=None, version="tb")
    fit(Classifier(mlp()), [GradientMonitor(every_n_steps=2)], logger=logger)
    events = read(tmp_path / "tb")
    assert "gradient/dual_median" in events.Tags()["scalars"]
    assert not any(t.startswith("gradient.dual/") for t in events.Tags()["scalars"])
    assert "gradient/dual/layers" in events.Tags()["tensors"]
