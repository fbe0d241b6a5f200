"""The rules on activations in real runs: networks of all kinds raise nothing, faults are found from the start."""

import math

import pytest
import torch
from torch import Tensor, nn

from dynamon.callbacks import ActivationMonitor
from tests.callbacks.test_health_runs import LanguageModel, adam, relu, samples, tokens
from tests.helpers import Classifier, cnn, fit
from tests.models import GPT

pytestmark = pytest.mark.filterwarnings("ignore:ActivationMonitor")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lstm, self.head = nn.LSTM(4, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Vision(nn.Module):
    """Patches, torch's own pre-norm encoder layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.patch = nn.Conv2d(2, 16, 4, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, **options) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Block(nn.Module):
    def __init__(self, act: nn.Module, gain: float | None, width: int = 32) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), act
        if gain is not None:
            nn.init.normal_(self.linear.weight, std=gain / math.sqrt(width))
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


def deep(act: type[nn.Module], gain: float | None = None, depth: int = 8) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.Sequential(*(Block(act(), gain) for _ in range(depth))), nn.Linear(32, 3))


def with_dead_units() -> nn.Module:
    network = relu()
    nn.init.constant_(network[2].bias, -20.0)
    return network


def with_large_logits() -> nn.Module:
    network = GPT()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "qkv" in name:
                p.mul_(40)
    return network


def found_in(module, data, steps=60) -> dict:
    monitor = ActivationMonitor(every_n_steps=5, strict=True)
    torch.manual_seed(0)
    fit(module, [monitor], data, steps=steps, max_epochs=-1)
    return {one.rule: one for one in monitor.findings}


HEALTHY = {
    "gpt": lambda: (LanguageModel(GPT(), adam(3e-3)), tokens()),
    "relu": lambda: (Classifier(relu(), adam(1e-2)), samples(8)),
    "vit": lambda: (Classifier(Vision(), adam(3e-3)), samples(2, 16, 16)),
    "deep, default initialisation": lambda: (Classifier(deep(nn.ReLU), adam(3e-3)), samples(8)),
    "cnn": lambda: (Classifier(cnn(), adam(1e-2)), samples(2, 8, 8)),
    "lstm": lambda: (Classifier(Recurrent(), adam(1e-2)), samples(6, 4)),
    "deep tanh": lambda: (Classifier(deep(nn.Tanh), adam(3e-3)), samples(8)),
    "gpt, high rate": lambda: (LanguageModel(GPT(), adam(2e-2)), tokens()),
}
QUICK = ("gpt", "relu", "vit", "deep, default initialisation")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in HEALTHY])
@pytest.mark.parametrize("steps", [11, 100])
def test_networks_at_random_weights_and_trained_raise_nothing(name, steps):
    assert found_in(*HEALTHY[name](), steps=steps) == {}


def test_a_dead_layer():
    found = found_in(Classifier(with_dead_units(), adam(1e-3)), samples(8))
    assert found["activation/dead"].severity == "fault" and found["activation/dead"].layers == ("network.3",)
    assert {"network.0", "network.2"} <= {name for name in found["activation/vanished"].layers}


@pytest.mark.parametrize(("gain", "word"), [(6.0, "explodes"), (0.3, "vanishes")])
def test_a_signal_that_changes_its_size_with_depth(gain, word):
    found = found_in(Classifier(deep(nn.ReLU, gain), adam(1e-5)), samples(8))
    assert word in found["activation/residual"].message and found["activation/residual"].step == 0
    assert found["activation/residual"].layers == ("network.1.7",)


def test_gradients_that_vanish_through_sigmoids():
    found = found_in(Classifier(deep(nn.Sigmoid, 0.5, depth=12), adam(1e-5)), samples(8))
    assert "network.0" in found["activation/vanished"].layers and set(found) == {"activation/vanished"}


def test_attention_on_single_keys():
    found = found_in(LanguageModel(with_large_logits(), adam(1e-4)), tokens())
    assert "heads" in found["attention/logits"].layers[0] and found["attention/logits"].numbers["logit"] > 100
