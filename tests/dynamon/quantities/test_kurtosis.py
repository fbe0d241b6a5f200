"""``weight/kurtosis``: against plain numbers, and on a device."""

import numpy as np
import pytest
import torch

from dynamon.layers import describe_layers
from dynamon.quantities import REGISTRY
from dynamon.quantities.entrywise import entrywise_readings
from tests.launches import Launches, gpt2

KURTOSIS = REGISTRY["weight/kurtosis"]


def kurtosis(weights: torch.Tensor) -> float:
    module = torch.nn.ParameterList([torch.nn.Parameter(weights)])
    return float(entrywise_readings(describe_layers(module), [KURTOSIS])[0, 0])


def oracle(weights: torch.Tensor) -> float:
    entries = weights.detach().double().numpy().ravel()
    entries = entries / np.abs(entries).max()
    return float(np.mean(entries**4) / np.mean(entries**2) ** 2)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_quotient_of_moments_at_any_scale(scale, dtype) -> None:
    weights = (scale * torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) ** 3).to(dtype)
    assert kurtosis(weights) == pytest.approx(oracle(weights), rel=1e-6)


def test_known_values() -> None:
    drawn = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(drawn) == pytest.approx(3, abs=5 * (96 / 1e6) ** 0.5)  # five standard errors
    assert kurtosis(drawn.sign()) == pytest.approx(1, rel=1e-6)
    assert kurtosis(torch.nn.functional.one_hot(torch.tensor(3), 50).float()) == 50
    assert np.isnan(kurtosis(torch.zeros(4)))


def test_gpt2_takes_few_device_calls() -> None:
    layers = describe_layers(gpt2("meta", dtype=torch.bfloat16))
    entrywise_readings(layers, [KURTOSIS])  # puts constants on the device
    with Launches("meta") as launches:
        entrywise_readings(layers, [KURTOSIS])
    assert launches.total <= 15 and launches.waits == 0, launches
