"""Bounds on convolution layers against the explicit matrix of the module itself."""

import math

import pytest
import torch
from torch import nn

from dynamon.layers import describe_layers
from dynamon.spectra.convolution import convolution_bounds, has_bounds

CASES = {
    "plain": (lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False), (8, 8)),
    "same": (lambda: nn.Conv2d(3, 2, 3, padding="same", bias=False), (7, 9)),
    "valid": (lambda: nn.Conv1d(3, 2, 4, padding="valid", bias=False), (20,)),
    "stride": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), (8, 8)),
    "dilation and groups": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2, bias=False), (9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (8, 8)),
    "circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False), (8, 8)),
    "3-d": (lambda: nn.Conv3d(2, 3, (3, 1, 2), padding=(1, 0, 1), bias=False), (4, 3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1, bias=False), (8, 8)),
    "transposed groups": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2, bias=False), (16,)),
}


def spectral_norm(module, size):
    """The largest singular value of the module applied to the basis; for transposed ones ``size`` is the output's."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        inputs = [s // module.stride[0] for s in size]
        channels = module.in_channels
    else:
        inputs, channels = size, module.in_channels
    basis = torch.eye(channels * math.prod(inputs), dtype=torch.float64).reshape(-1, channels, *inputs)
    outputs = module(basis)
    assert not isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose1d) or tuple(outputs.shape[2:]) == tuple(size)
    return float(torch.linalg.matrix_norm(outputs.flatten(1).detach(), ord=2))


@pytest.mark.parametrize(("make", "size"), CASES.values(), ids=CASES)
def test_bounds_hold_the_norm_of_the_module(make, size):
    torch.manual_seed(0)
    module = make().double()
    (layer,) = describe_layers(module)
    exact = spectral_norm(module, size)
    lower, upper = (float(bound.detach()) for bound in convolution_bounds(layer, size))
    assert lower <= exact <= upper and upper <= 1.35 * lower
    sup_lower, sup_upper = (float(bound.detach()) for bound in convolution_bounds(layer))
    assert exact <= sup_upper and sup_lower <= sup_upper <= 1.1 * sup_lower


def test_the_flattening_is_another_number():
    """It is within a factor sqrt(prod(k)) of the norm, and a kernel of ones attains the upper end."""
    module = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(module.weight)
    (layer,) = describe_layers(module)
    sigma = float(torch.linalg.matrix_norm(layer.matrices()[0].detach(), ord=2))
    lower, upper = (bound.detach() for bound in convolution_bounds(layer))
    assert sigma == pytest.approx(3) and float(lower) == pytest.approx(9, rel=1e-6) and 9 <= float(upper) <= 9.3


def test_what_has_no_bounds_says_so():
    reflected = nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")
    modules = [nn.Linear(2, 3), reflected, nn.Conv1d(2, 2, 4, padding="same")]
    layers = [describe_layers(module)[0] for module in modules]
    assert [has_bounds(layer) for layer in layers] == [False, False, True]
    with pytest.raises(ValueError, match="weight is not the weight of a convolution"):
        convolution_bounds(layers[0])
    with pytest.raises(ValueError, match="weight pads by 'reflect'; bounds are known for 'zeros' and 'circular'"):
        convolution_bounds(layers[1])
    with pytest.raises(ValueError, match="pads one side more than the other"):
        convolution_bounds(layers[2], 16)
    assert convolution_bounds(layers[2])[1] > 0


def test_the_upper_bound_is_a_regulariser():
    module = nn.Conv2d(2, 3, 3, padding=1)
    convolution_bounds(describe_layers(module)[0])[1].backward()
    assert module.weight.grad is not None and module.weight.grad.isfinite().all() and module.weight.grad.any()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (4, 2), (3, 3), (2, 0), (5, 1)])
def test_circular_padding_of_any_size(kernel, padding, stride):
    """Where the stride does not divide the circle, and where outputs repeat: the bound of any size holds."""
    for seed in range(3):
        torch.manual_seed(seed)
        mode = {"padding_mode": "circular"} if padding else {}
        module = nn.Conv1d(2, 3, kernel, stride=stride, padding=padding, bias=False, **mode).double()
        lower, upper = (float(bound.detach()) for bound in convolution_bounds(describe_layers(module)[0]))
        norms = [spectral_norm(module, (n,)) for n in range(max(padding, kernel - 2 * padding, 1), 30)]
        assert max(norms) <= upper and lower <= max(norms) * 1.02
