"""The stability ratio of the step that would be taken on the probe, in a run."""

import copy
import logging

import pytest
import torch
from torch.nn.functional import cross_entropy

from dynamon.callbacks import SharpnessMonitor
from dynamon.curvature import HessianOperator
from dynamon.stability import stability_scaling
from tests.helpers import Classifier, batches, fit, mlp

TAG = "sharpness/stability_ratio_next"


def monitored(steps=6, make=None, **arguments):
    monitor = SharpnessMonitor(1, None, ["stability_ratio", "next"], probe_fraction=1.0, tol=1e-5, strict=True)
    module = Classifier(mlp(), optimizer=make or (lambda p: torch.optim.AdamW(p, lr=1e-2)))
    trainer = fit(module, [monitor], steps=steps, **arguments)
    return monitor, module, trainer


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        ({}, lambda g: g),
        ({"gradient_clip_val": 1e-2}, lambda g: g * min(1e-2 / float(g.norm()), 1)),
        ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, lambda g: g.clamp(-1e-3, 1e-3)),
    ],
    ids=["whole", "by norm", "by value"],
)
def test_it_is_the_ratio_after_that_step(arguments, clip) -> None:
    """Against the dense Hessian and the state of torch's own optimizer after a step with the probe's gradient."""
    monitor, module, _ = monitored(**arguments)
    x, y = next(iter(batches()))
    params = list(module.parameters())
    hessian = HessianOperator(lambda: cross_entropy(module.network(x), y), params)
    dense = (hessian @ torch.eye(hessian.shape[0])).double()
    optimizer = module.trainer.optimizers[0]
    state = copy.deepcopy(optimizer.state_dict())
    twin_params = [p.detach().clone().requires_grad_() for p in params]
    twin = torch.optim.AdamW(twin_params, lr=1e-2)
    twin.load_state_dict(state)
    for p, g in zip(twin_params, clip(hessian.gradient).split([p.numel() for p in params]), strict=True):
        p.grad = g.view_as(p).clone()
    twin.step()
    for tag, owner, owned in ((TAG, twin, twin_params), ("sharpness/stability_ratio", optimizer, params)):
        scale = stability_scaling(owner, owned).scale.double()
        truth = float(torch.linalg.eigvalsh(scale[:, None] * dense * scale)[-1])
        assert monitor.history[tag].values[-1] == pytest.approx(truth, rel=1e-3)


def test_sgd_has_none_and_says_so(caplog) -> None:
    with caplog.at_level(logging.INFO):
        monitor, _, _ = monitored(make=lambda p: torch.optim.SGD(p, lr=1e-2))
    assert TAG not in monitor.history and "next: there is no single Adam" in caplog.text
    assert "sharpness/stability_ratio" in monitor.history
