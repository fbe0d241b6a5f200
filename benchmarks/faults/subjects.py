"""What is trained: models, optimizers and schedules, those that thresholds are tuned on and those that are reported."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.rates_study.corpus import RADII
from benchmarks.rates_study.tasks import Digits, GPTBytes, LSTMBytes, Task
from dynamon.optim import Lanton

WINDOWS = 250  # held-out windows of text


class MLP(nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.first, self.second = nn.Linear(256, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, 1, 16, 16]`` to logits ``[batch, 10]``."""
        logits: Tensor = self.head(self.second(self.first(x.flatten(1)).relu()).relu())
        return logits


class MLPDigits(Digits):
    """The MLP on the images of the CNN."""

    def network(self) -> nn.Module:
        """Make it."""
        return MLP(self.width)


@dataclass(frozen=True)
class Subject:
    """A model with its data and the settings in which faults are injected.

    Attributes:
        name: Of the model.
        make: Makes the task, given samples of a batch.
        batches: Samples of a batch: the usual number, and a second one.
        optimizer: A name in :data:`OPTIMIZERS`.
        clip: Limit of the gradient's norm.
        layers: By fault that concerns layers: the layers, the first ones first where the strength is their number.
    """

    name: str
    make: Callable[[int], Task]
    batches: tuple[int, int]
    optimizer: str
    clip: float | None
    layers: Mapping[str, tuple[str, ...]]


_GPT_LAYERS = {
    "moments": ("blocks.1.up.weight",),
    "logits": ("blocks.1.qkv.weight",),
    "frozen": (
        "head.weight",
        "embedding.weight",
        *(f"blocks.{i}.{m}.weight" for i in (1, 0) for m in ("up", "down", "qkv", "projection")),
    ),
}
REPORTED = {
    one.name: one
    for one in (
        Subject("GPT", lambda n: GPTBytes("", 32, batch=n, windows=WINDOWS), (8, 16), "AdamW", 1.0, _GPT_LAYERS),
        Subject(
            "CNN",
            lambda n: Digits("", 8, batch=n),
            (32, 64),
            "SGD, momentum",
            None,
            {
                "moments": ("conv3.weight",),
                # Nothing goes through a dead ReLU: both neighbours lose their gradient. Functions have names of rows.
                "dead": ("norm2.weight", "norm2.bias", "conv2.weight", "conv3.weight", "relu_2"),
                "frozen": ("conv4.weight", "conv3.weight", "conv2.weight", "head.weight", "conv1.weight"),
            },
        ),
        Subject(
            "LSTM",
            lambda n: LSTMBytes("", 32, batch=n, windows=WINDOWS),
            (8, 16),
            "AdamW",
            1.0,
            {
                "moments": ("lstm.weight_hh_l1",),
                "dead": tuple(f"lstm.{kind}_l0" for kind in ("bias_ih", "bias_hh", "weight_ih", "weight_hh"))
                + ("embedding.weight", "lstm.weight_ih_l1", "lstm.layer.0"),
                "frozen": ("head.weight", "embedding.weight")
                + tuple(f"lstm.weight_{kind}_l{layer}" for layer in (1, 0) for kind in ("ih", "hh")),
            },
        ),
    )
}
TUNING = {
    one.name: one
    for one in (
        Subject(
            "GPT of width 24",
            lambda n: GPTBytes("", 24, batch=n, corpus=RADII, windows=WINDOWS),
            (8, 16),
            "AdamW",
            1.0,
            _GPT_LAYERS,
        ),
        Subject(
            "MLP",
            lambda n: MLPDigits("", 32, batch=n),
            (32, 64),
            "SGD, momentum",
            None,
            {
                "moments": ("second.weight",),
                "dead": ("first.weight", "first.bias", "second.weight", "relu"),
                "frozen": ("first.weight", "second.weight", "head.weight"),
            },
        ),
    )
}
SUBJECTS = TUNING | REPORTED
LIKE = {"GPT of width 24": "GPT", "MLP": "CNN"}  # whose strengths the models for tuning take
# 0 and 1 were reported before rules were added for what they had missed. Faults come at the same steps as in those.
TUNING_SEEDS, REPORTED_SEEDS = (100, 101), (20, 21)


def is_reported(subject: str) -> bool:
    """Whether no threshold may be chosen by what this model does."""
    return subject in REPORTED


OPTIMIZERS: Mapping[str, tuple[Callable[[nn.Module, float], Optimizer], float]] = {
    "SGD": (lambda model, rate: torch.optim.SGD(model.parameters(), rate), 0.3),
    "SGD, momentum": (lambda model, rate: torch.optim.SGD(model.parameters(), rate, momentum=0.9), 0.1),
    "AdamW": (
        lambda model, rate: torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1),
        0.004,
    ),
    "Adam": (lambda model, rate: torch.optim.Adam(model.parameters(), rate), 0.004),
    "RMSprop": (lambda model, rate: torch.optim.RMSprop(model.parameters(), rate), 0.002),
    "Lanton": (lambda model, rate: Lanton(model, rate, noise_adaptive=False), 0.02),
}  # with the rate where the search for the best one begins
WARMUP = 0.05  # of the run


def constant(step: int, steps: int) -> float:
    """One rate."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Warm up, then a cosine to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))


def step_decay(step: int, steps: int) -> float:
    """A tenth after half of the run, a hundredth after three quarters."""
    return 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4))


def restarts(step: int, steps: int) -> float:
    """Four cosines to zero, each from the top."""
    quarter = steps / 4
    return 0.5 + 0.5 * math.cos(math.pi * (step % quarter) / quarter)


SCHEDULES: Mapping[str, Callable[[int, int], float]] = {
    "constant": constant,
    "warm-up and cosine": cosine,
    "step decay": step_decay,
    "warm restarts": restarts,
}
