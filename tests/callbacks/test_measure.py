"""``measure()`` has the tags and the values of the monitors, on the same batch and weights."""

import math

import pytest
import torch
from torch import nn

from dynamon import measure
from dynamon.callbacks import ActivationMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor
from dynamon.norms import get_norm
from dynamon.quantities import REGISTRY
from dynamon.runs import RunData
from tests.helpers import Classifier, batches, cnn, fit, mlp

# So small a rate moves no float32 weight: all readings of a step are of the same weights.
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-12, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-12),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("made", [mlp, cnn])
def test_the_same_tags_and_values_as_the_monitors(made, kind):
    network = made()
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module = Classifier(network, OPTIMIZERS[kind])
    features = (8,) if made is mlp else (2, 8, 8)
    data = batches(8, 8, features)  # one batch
    monitors = [
        GradientMonitor(1),
        WeightMonitor(1, convolutions=True),
        ActivationMonitor(1, probe_fraction=1.0),
        SharpnessMonitor(1, probe_batches=1, probe_fraction=1.0, tol=1e-4),
    ]
    fit(module, monitors, data, steps=2)
    run = RunData.of(*(monitor.history for monitor in monitors))
    found = measure(module, next(iter(data)), optimizer=module.optimizers().optimizer, certify=False, tol=1e-4)

    compared = set()
    for tag, value in found.items():
        base = tag.removesuffix("_unconverged")
        assert tag in REGISTRY or base in REGISTRY, tag
        if isinstance(value, dict):
            assert all(isinstance(number, float) for number in value.values())
            if tag in run.tables:
                table = run.tables[tag]
                known = {n: v for n, v in zip(table.layers, table.values[-1], strict=True) if math.isfinite(v)}
                assert value.keys() >= known.keys(), tag
                assert {n: value[n] for n in known} == pytest.approx(known, rel=0.02, abs=1e-7), tag
                compared.add(tag)
        else:
            assert isinstance(value, float), tag
            if (
                tag in run.scalars
                and "residual" not in tag
                and tag not in ("sharpness/matvecs", "sharpness/hessian_min")
            ):
                assert value == pytest.approx(run.scalars[tag].values[-1], rel=2e-3, abs=1e-12), tag
                compared.add(tag)
    assert compared >= {
        "gradient/norm",
        "gradient/l2",
        "gradient/dual",
        "activation/rms",
        "activation/gradient",
        "activation/saturated",
        "weight/operator",
        "weight/rms",
        "spectrum/sigma_max",
        "spectrum/stable_rank",
        "sharpness/hessian_max",
        "sharpness/probe_loss",
        "sharpness/stability_ratio",
    }


def test_roles_that_the_module_states_reach_monitors():
    module = Classifier(mlp(), OPTIMIZERS["SGD"])
    module.dynamon_roles = {"network.0.weight": "embedding"}
    monitor = WeightMonitor(1)
    fit(module, [monitor], batches(8), steps=2)
    table = monitor.history["weight/operator"]
    shown = table.values[-1, table.layers.index("network.0.weight")]
    weight = module.network[0].weight.detach()  # as an override of nn.Linear: [d, tokens]
    assert shown == pytest.approx(float(get_norm("one_to_rms").primal(weight)), rel=1e-5)
    assert shown != pytest.approx(float(get_norm("rms_to_rms").primal(weight)), rel=1e-2)
