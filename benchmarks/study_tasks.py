"""What the study of adaptive rates trains: bytes with a GPT, digits with a CNN."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamon.cli.demo_data import standard_library_text
from dynamon.cli.language_model import GPT

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """A model, its batches, and its validation loss; all the same for the same seed.

    Attributes:
        name: What tables call it.
        steps: Length of a run.
        batch: Samples of a batch.
    """

    name: str
    steps: int
    batch: int

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A model in its initial state."""

    @abstractmethod
    def batches(self, seed: int, steps: int, batch: int) -> Iterator[Batch]:
        """Training batches."""

    @abstractmethod
    def held_out(self) -> Batch:
        """One batch that no run trains on."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def validation(self, model: nn.Module) -> float:
        """The loss on what is held out, in evaluation mode."""
        model.eval()
        found = float(self.loss(model, self.held_out()))
        model.train()
        return found if math.isfinite(found) else math.inf


class Bytes(Task):
    """A byte-level GPT on the source of the Python standard library, split by file."""

    name, steps, batch = "bytes, GPT", 400, 16
    _context = 64

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        """Read the text."""
        self._width, self._depth = width, depth
        self._train, validation = standard_library_text()
        starts = torch.linspace(0, len(validation) - self._context - 2, 96).long()
        self._held_out = self._windows(validation, starts)

    def model(self, seed: int) -> nn.Module:
        """Three blocks of width 64, 180,000 parameters."""
        torch.manual_seed(seed)
        return GPT(self._width, self._depth, heads=4, context=self._context)

    def batches(self, seed: int, steps: int, batch: int) -> Iterator[Batch]:
        """Random windows."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for _ in range(steps):
            starts = torch.randint(len(self._train) - self._context - 1, (batch,), generator=generator)
            yield self._windows(self._train, starts)

    def held_out(self) -> Batch:
        """Windows spread evenly over the validation files."""
        return self._held_out

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        windows = text[starts[:, None] + torch.arange(self._context + 1)].long()
        return windows[:, :-1], windows[:, 1:]


class Digits(Task):
    """A CNN with BatchNorm on scikit-learn's 1,797 images of digits, a third of them held out."""

    name, steps, batch = "digits, CNN", 200, 64

    def __init__(self) -> None:
        """Load and split the images."""
        from sklearn.datasets import load_digits

        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
        labels = torch.tensor(data.target)[order]
        self._train, self._held_out = (images[600:], labels[600:]), (images[:600], labels[:600])

    def model(self, seed: int) -> nn.Module:
        """Four convolutions and a head, 60,000 parameters."""
        torch.manual_seed(seed)
        widths, blocks = (1, 16, 32, 32, 64), []
        for position, (inside, outside) in enumerate(zip(widths, widths[1:], strict=False)):
            stride = 2 if position in (1, 3) else 1
            convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(outside), nn.ReLU()]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def batches(self, seed: int, steps: int, batch: int) -> Iterator[Batch]:
        """Random images, moved by up to one pixel, a tenth of the labels wrong."""
        generator = torch.Generator().manual_seed(1000 + seed)
        images, labels = self._train
        wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.1
        labels = torch.where(wrong, (labels + 1) % 10, labels)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (batch,), generator=generator)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            yield images[chosen].roll(shift, (-2, -1)), labels[chosen]

    def held_out(self) -> Batch:
        """Six hundred images with their true labels."""
        return self._held_out


TASKS = {"bytes": Bytes, "digits": Digits}
TINY = {"tiny bytes": partial(Bytes, 16, 1), "digits": Digits}


def available(names: Iterable[str]) -> list[str]:
    """Those tasks whose data is there; says so of the others."""
    if find_spec("sklearn") is not None:
        return [*names]
    print('skipped: digits, since scikit-learn is missing: pip install -c constraints.txt -e ".[bench]".')
    return [name for name in names if name != "digits"]
