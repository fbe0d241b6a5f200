"""A deep linear network learns each mode of its data along a known curve (Saxe et al., arXiv 1312.6120)."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dynamon.callbacks import WeightMonitor
from dynamon.spectra import spectral_extremes, weight_spectrum
from tests.helpers import trainer

STRENGTHS = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # singular values of the map to learn
START = 0.002  # strength of every mode in the product of the two layers before training
RATE = 0.002


def orthogonal(rows, columns, seed):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


OUT, MIDDLE, IN = orthogonal(4, 4, 0), orthogonal(4, 4, 1), orthogonal(6, 4, 2)  # singular vectors as columns


def strengths(updates):
    """Closed form of gradient flow: ``[T, modes]`` at these numbers of updates; time is in units of 1/rate."""
    growth = (2 * RATE * torch.as_tensor(updates)[:, None] * STRENGTHS).exp()
    return STRENGTHS * growth / (growth - 1 + STRENGTHS / START)


class DeepLinear(pl.LightningModule):
    """Two layers from a balanced start, half the squared error, plain gradient descent on all the data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
        with torch.no_grad():
            self.first.weight.copy_(START**0.5 * MIDDLE @ IN.mT)
            self.second.weight.copy_(START**0.5 * OUT @ MIDDLE.mT)
        inputs = 50**0.5 * orthogonal(50, 6, 3)  # whitened: their second moment is the identity
        self.data = inputs, inputs @ (OUT * STRENGTHS @ IN.mT).mT

    def loss(self):
        inputs, targets = self.data
        return (self.second(self.first(inputs)) - targets).square().sum(1).mean() / 2

    def training_step(self, batch, batch_idx):
        return self.loss()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


@pytest.fixture(scope="module")
def trained():
    """Both weights after these numbers of updates, of a run that ends with all modes learned."""
    network, updates, first, second = DeepLinear(), [], [], []
    optimizer = network.configure_optimizers()
    for update in range(1, 3001):
        optimizer.zero_grad()
        network.loss().backward()
        optimizer.step()
        if update % 50 == 0:
            updates.append(update)
            first.append(network.first.weight.detach().clone())
            second.append(network.second.weight.detach().clone())
    return updates, torch.stack(first), torch.stack(second)


def test_the_curves_go_from_nothing_to_all_one_after_the_other(trained) -> None:
    """What makes the others worth something: at the first and last reading nothing and everything is learned."""
    expected = strengths(trained[0])
    assert (expected[0] < 0.01 * STRENGTHS).all() and (expected[-1] > 0.98 * STRENGTHS).all()
    halfway = (expected > STRENGTHS / 2).int().argmax(0)
    assert (halfway.diff() > 2).all()


@pytest.mark.parametrize("mode", range(4))
def test_each_mode(trained, mode) -> None:
    """Without the directions of the stronger modes, a mode is the largest singular value of what is left."""
    updates, first, second = trained
    expected = strengths(updates)[:, mode]
    left = IN[:, mode:]
    for measure in (weight_spectrum, spectral_extremes):
        torch.testing.assert_close(measure(first @ left).sigma_max, expected.sqrt(), rtol=0.02, atol=0)
        torch.testing.assert_close(measure(second @ first @ left).sigma_max, expected, rtol=0.04, atol=0)


def test_statistics_of_all_modes_together(trained) -> None:
    updates, first, _ = trained
    spectrum, modes = weight_spectrum(first), strengths(updates)
    sigmas = modes.sqrt()
    shares = sigmas / sigmas.sum(1, keepdim=True)
    expected = {
        "nuclear": sigmas.sum(1),
        "stable_rank": modes.sum(1) / modes[:, 0],
        "participation_ratio": modes.sum(1).square() / modes.square().sum(1),
        "effective_rank": (-shares * shares.log()).sum(1).exp(),
        "condition": sigmas[:, 0] / sigmas[:, -1],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(spectrum, name), value, rtol=0.04, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_monitor_sees_the_largest_one_grow() -> None:
    monitor = WeightMonitor(every_n_steps=20, strict=True)
    trainer([monitor], steps=800, max_epochs=1).fit(DeepLinear(), DataLoader([0] * 800, batch_size=None))
    series = monitor.history["spectrum/sigma_max"]
    updates = series.steps + 1  # weights are measured after the update of the step
    expected = strengths(updates)[:, 0].sqrt().numpy()
    assert len(series) == 40 and series.values[0].max() < 0.05 and series.values[-1].min() > 1.98
    assert series.layers == ("first.weight", "second.weight")
    for values in series.values.T:  # both layers carry the same share: the start was balanced
        np.testing.assert_allclose(values, expected, rtol=0.02)
