"""Host scalars are float and arrays ndarray; what stays a tensor is what the package's docstring names."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from dynamon.curvature import (
    GGNOperator,
    HessianOperator,
    critical_sharpness,
    directional_sharpness,
    eigenspace_overlap,
    eigenspace_share,
    spectral_density,
    top_eigenvalues,
    trace,
)
from dynamon.curvature.memory import basis_memory
from dynamon.curvature.operators.preconditioner import preconditioner
from dynamon.spectra import spectral_extremes, weight_spectrum
from dynamon.stability import stability_ratio, stability_scaling, stability_threshold

TENSORS = {"Eigenpairs": {"values", "residuals", "errors", "vectors"}, "DirectionalSharpness": {"product"}}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.fixture
def loss_fn(model):
    inputs, targets = torch.randn(9, 4), torch.randn(9, 2)
    return lambda: nn.functional.mse_loss(model(inputs), targets)


def test_estimates_are_floats_and_arrays(model, loss_fn):
    hessian = HessianOperator(loss_fn, model.parameters())
    found = top_eigenvalues(hessian, certify=True)
    step = -0.1 * hessian.gradient
    results = [
        found,
        trace(hessian),
        spectral_density(hessian, steps=10, num_vectors=2),
        directional_sharpness(hessian, step),
        critical_sharpness(loss_fn, model.parameters(), step, rate=0.1),
    ]
    for result in results:
        for field in fields(result):
            value = getattr(result, field.name)
            is_tensor = field.name in TENSORS.get(type(result).__name__, ())
            assert isinstance(value, torch.Tensor) == is_tensor, field.name
            assert isinstance(value, float | int | str | np.ndarray | torch.Tensor), field.name
    assert found.values.dtype == torch.float64 and found.values.device.type == "cpu"
    assert (
        type(eigenspace_share(found.vectors, step)) is type(eigenspace_overlap(found.vectors, found.vectors)) is float
    )
    assert type(stability_threshold(torch.optim.SGD(model.parameters(), lr=0.1))) is float


def test_eigenpairs_as_plain_numbers(model, loss_fn):
    found = top_eigenvalues(HessianOperator(loss_fn, model.parameters()), k=2)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["values"] == found.values.tolist() and plain["residuals"] == found.residuals.tolist()
    assert plain["matvecs"] == found.matvecs and plain["converged"] is found.converged
    assert set(plain) == {field.name for field in fields(found)} - {"vectors"}


def test_spectra_stay_tensors_on_the_device_of_the_weight():
    for found in (weight_spectrum(torch.eye(4, 3)), spectral_extremes(torch.eye(4, 3))):
        assert all(isinstance(value, torch.Tensor) and value.shape == () for value in vars(found).values())


def test_parameters_are_a_sequence_or_a_mapping(model, loss_fn):
    listed, named = list(model.parameters()), dict(model.named_parameters())
    optimizer = torch.optim.Adam(listed, lr=0.1)
    loss_fn().backward()
    optimizer.step()
    ones = torch.ones(sum(p.numel() for p in listed))
    inputs = torch.randn(9, 4)
    for function in (
        lambda params: HessianOperator(loss_fn, params) @ ones,
        lambda params: GGNOperator(lambda: model(inputs), lambda z: z.square().mean(), params) @ ones,
        lambda params: critical_sharpness(loss_fn, params, -0.1 * ones).multiple,
        lambda params: stability_ratio(loss_fn, params, optimizer).values,
        lambda params: stability_scaling(optimizer, params).scale,
        lambda params: preconditioner(optimizer, params),
        basis_memory,
    ):
        one, other = function(listed), function(named)
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=0)


def test_an_optimizer_must_be_one(model, loss_fn):
    for function in (
        lambda: stability_ratio(loss_fn, model.parameters(), "sgd"),
        lambda: preconditioner([0.1], model.parameters()),
    ):
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got (str|list)\."):
            function()
