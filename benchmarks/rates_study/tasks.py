"""What the study of rates trains: a GPT and an LSTM on bytes, a CNN on images of digits."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.rates_study.corpus import STUDY, Corpus, split
from dynamon.cli.language_model import GPT
from dynamon.optim import Lanton

Batch = tuple[Tensor, Tensor]
TUNING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
FORMER_RADII = {"hidden": 1.0, "conv": 1.0, "embedding": 1.0, "head": 32.0, "vector": 1.0}
_CHUNK = 250  # samples of one evaluation


class Task(ABC):
    """A model, an optimizer, batches and a validation loss; all the same for the same seed.

    Args:
        optimizer: ``"LMO"``, ``"AdamW"`` or ``"SGD"``.
        width: Of the model.
        steps: Length of a run.
        batch: Samples of a batch.
        guess: Where the grid of base rates begins.

    Attributes:
        groups: Globs on parameter names: the groups whose rates are searched, permuted and held.
    """

    groups: ClassVar[Mapping[str, str]]

    def __init__(self, optimizer: str, width: int, steps: int, batch: int, guess: float) -> None:
        """Remember the sizes."""
        self.kind, self.width, self.steps, self.batch, self.guess = optimizer, width, steps, batch, guess

    @abstractmethod
    def network(self) -> nn.Module:
        """Make the model from the global random stream."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches, without end."""

    @abstractmethod
    def held_out(self, reported: bool) -> Batch:
        """Samples that no run trains on; those of reported runs are not those of tuning."""

    def model(self, seed: int) -> nn.Module:
        """A model in its initial state."""
        torch.manual_seed(seed)
        return self.network()

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """The optimizer of this task."""
        if self.kind == "LMO":
            return Lanton(model, rate, noise_adaptive=False)
        if self.kind == "AdamW":
            return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def clip(self, model: nn.Module) -> None:
        """Clip the gradient as people do with AdamW on sequences."""
        if self.kind == "AdamW":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    def factor(self, step: int) -> float:
        """The schedule: 5 % warm-up, cosine to zero."""
        warmup = max(1, round(0.05 * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(self.steps - warmup, 1), 1.0)))

    @torch.no_grad()
    def validation(self, model: nn.Module, reported: bool) -> float:
        """The loss on what is held out, in evaluation mode."""
        model.eval()
        inputs, targets = self.held_out(reported)
        pieces = zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True)
        found = sum(float(self.loss(model, piece)) * len(piece[0]) for piece in pieces) / len(inputs)
        model.train()
        return found if math.isfinite(found) else math.inf


class Bytes(Task):
    """Windows of 32 bytes of Python source; 2,000 of them are held out for tuning and 2,000 for reporting."""

    context = 32

    def __init__(
        self,
        optimizer: str,
        width: int = 64,
        steps: int = 400,
        batch: int = 16,
        guess: float = 0.03,
        corpus: Corpus = STUDY,
        windows: int = 2000,
    ) -> None:
        """Remember the sizes and the text."""
        super().__init__(optimizer, width, steps, batch, guess)
        self._corpus, self._held_out = corpus, windows

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random windows."""
        generator, text = torch.Generator().manual_seed(1000 + seed), split(self._corpus)[0]
        while True:
            starts = torch.randint(len(text) - self.context - 1, (self.batch,), generator=generator)
            yield self._windows(text, starts)

    def held_out(self, reported: bool) -> Batch:
        """Windows spread evenly over the validation files."""
        text = split(self._corpus)[1 + reported]
        return self._windows(text, torch.linspace(0, len(text) - self.context - 2, self._held_out).long())

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        windows = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]


class GPTBytes(Bytes):
    """A byte-level GPT of two blocks."""

    groups: ClassVar[Mapping[str, str]] = {
        "embedding": "embedding.weight",
        "position": "position.weight",
        "norms": "*norm.weight",
        "qkv": "*.qkv.weight",
        "projection": "*.projection.weight",
        "up": "*.up.weight",
        "down": "*.down.weight",
        "head": "head.weight",
    }

    def network(self) -> nn.Module:
        """Width 64: 130,000 parameters."""
        return GPT(self.width, depth=2, heads=4, context=self.context)


class FormerRadii(GPTBytes):
    """The GPT with the radii that were Lanton's defaults until this study."""

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """Lanton at those radii."""
        return Lanton(model, rate, noise_adaptive=False, radii=FORMER_RADII)


class LSTM(nn.Module):
    """A byte-level LSTM of two layers."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[batch, time]`` to logits ``[batch, time, 256]``."""
        logits: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return logits


class LSTMBytes(Bytes):
    """The LSTM."""

    groups: ClassVar[Mapping[str, str]] = {
        "embedding": "embedding.weight",
        "first input": "lstm.weight_ih_l0",
        "first recurrent": "lstm.weight_hh_l0",
        "second input": "lstm.weight_ih_l1",
        "second recurrent": "lstm.weight_hh_l1",
        "gate biases": "lstm.bias*",
        "head": "head.weight",
        "head bias": "head.bias",
    }

    def network(self) -> nn.Module:
        """Width 64: 100,000 parameters."""
        return LSTM(self.width)


class CNN(nn.Module):
    """Four convolutions with BatchNorm and a head."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        sides = (1, width, 2 * width, 2 * width, 4 * width)
        for number, (inside, outside) in enumerate(zip(sides, sides[1:], strict=False), 1):
            stride = 2 if number in (1, 3) else 1
            self.add_module(f"conv{number}", nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False))
            self.add_module(f"norm{number}", nn.BatchNorm2d(outside))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, 1, 16, 16]`` to logits ``[batch, 10]``."""
        for number in range(1, 5):
            x = F.relu(self.get_submodule(f"norm{number}")(self.get_submodule(f"conv{number}")(x)))
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


class Digits(Task):
    """Scikit-learn's 1,797 images of digits, enlarged, turned, sheared, moved and noisy; a third is held out."""

    groups: ClassVar[Mapping[str, str]] = {
        "conv1": "conv1.weight",
        "conv2": "conv2.weight",
        "conv3": "conv3.weight",
        "conv4": "conv4.weight",
        "norm gains": "norm*.weight",
        "norm biases": "norm*.bias",
        "head": "head.weight",
        "head bias": "head.bias",
    }

    def __init__(self, optimizer: str, width: int = 16, steps: int = 400, batch: int = 64, guess: float = 0.4) -> None:
        """Remember the sizes."""
        super().__init__(optimizer, width, steps, batch, guess)

    def network(self) -> nn.Module:
        """Width 16: 33,000 parameters."""
        return CNN(self.width)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random images, changed at random."""
        generator = torch.Generator().manual_seed(1000 + seed)
        images, labels = _digits()
        images, labels = images[600:], labels[600:]
        while True:
            chosen = torch.randint(len(labels), (self.batch,), generator=generator)
            yield _changed(images[chosen], generator), labels[chosen]

    def held_out(self, reported: bool) -> Batch:
        """Three hundred images, each changed in eight ways."""
        return _changed_digits(reported)


@cache
def _digits() -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


@cache
def _changed_digits(reported: bool) -> Batch:
    images, labels = (part[300 * reported :][:300].repeat_interleave(8, 0) for part in _digits())
    return _changed(images, torch.Generator().manual_seed(7)), labels


def _changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[n, 1, 8, 8]`` as ``[n, 1, 16, 16]`` after a random affine map, with noise."""
    maps = 0.25 * torch.randn(len(images), 2, 3, generator=generator)
    maps[:, :, :2] += torch.eye(2)
    grid = F.affine_grid(maps, [len(images), 1, 16, 16], align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.3 * torch.randn(moved.shape, generator=generator)


_MADE: Mapping[str, Callable[..., Task]] = {
    "GPT, LMO": partial(GPTBytes, "LMO"),
    "GPT, AdamW": partial(GPTBytes, "AdamW", steps=800, guess=0.004),
    "CNN, SGD": partial(Digits, "SGD"),
    "LSTM, AdamW": partial(LSTMBytes, "AdamW", steps=600, guess=0.02),
}
_SIZES = {"twice the width": "width", "twice the length": "steps", "four times the batch": "batch"}


def tasks() -> dict[str, Task]:
    """The tasks by name."""
    return {name: make() for name, make in _MADE.items()}


def variants(name: str) -> dict[str, Task]:
    """A task at other sizes, by name."""
    made = _MADE[name]()
    return {
        f"{name}, {words}": _MADE[name](**{size: (4 if size == "batch" else 2) * getattr(made, size)})
        for words, size in _SIZES.items()
    }


def quarter(name: str) -> Task:
    """A task with a quarter of the steps."""
    return _MADE[name](steps=_MADE[name]().steps // 4)
