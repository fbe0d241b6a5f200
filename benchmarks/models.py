"""The models that the benchmarks measure: small ones on synthetic data, and the shape of GPT-2.

Each function returns a :class:`Problem` in its initial state, the same on every call with one seed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dynamon.cli.language_model import GPT

_SAMPLES = 2048
_CLASSES = 10
_WRONG_LABELS = 0.1  # without any, the loss and with it the curvature would go to zero in training


@dataclass
class Problem:
    """A model, a fixed data set, and a fixed probe batch out of it.

    Attributes:
        name: What tables call it.
        model: Takes a batch of inputs and returns logits ``[rows, classes]``.
        inputs: The data set, ``[samples, ...]``.
        targets: ``[samples]``, or ``[samples, time]`` for a language model.
        rate: The rate of Adam that :meth:`train` uses.
        probe_size: How many samples :meth:`loss_fn` takes, the first ones.
        batch_size: Samples of a training batch.
        criterion: The loss of logits and flat targets.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    rate: float = 1e-3
    probe_size: int = 256
    batch_size: int = 64
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters, in the order of flat vectors."""
        return list(self.model.parameters())

    @property
    def probe(self) -> tuple[Tensor, Tensor]:
        """Inputs and flat targets of the fixed probe batch."""
        return self.inputs[: self.probe_size], self.targets[: self.probe_size].reshape(-1)

    def loss_fn(self) -> Tensor:
        """The loss on the probe batch."""
        inputs, targets = self.probe
        return self.criterion(self.model(inputs), targets)

    def batches(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Random training batches without end: inputs and flat targets."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.inputs), (self.batch_size,), generator=generator).to(self.inputs.device)
            yield self.inputs[rows], self.targets[rows].reshape(-1)

    def train(
        self,
        steps: int,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[int]:
        """Train, one step each time the iterator is advanced; yields the number of steps taken."""
        make_optimizer = make_optimizer or (lambda params: torch.optim.Adam(params, lr=self.rate))
        optimizer = make_optimizer(self.params)
        for step, (inputs, targets) in zip(range(1, steps + 1), self.batches(seed), strict=False):
            optimizer.zero_grad(set_to_none=True)
            self.criterion(self.model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # some peers would add what is left here to their Hessian
            yield step

    def copy(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> "Problem":
        """An independent copy with the model, and inputs that are not tokens, in another dtype or on a device."""
        keep = dtype if self.inputs.is_floating_point() else None
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(dtype=dtype, device=device)
        twin.inputs = self.inputs.to(dtype=keep, device=device)
        twin.targets = self.targets.to(device=device)
        return twin


class FlatGPT(GPT):
    """The language model of the demo with logits ``[batch * time, classes]``, which every peer takes."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of all places, one row each."""
        return super().forward(tokens).flatten(0, 1)


def mlp(seed: int = 0, *, width: int = 256) -> Problem:
    """Three linear layers with tanh, 101k parameters, on noisy clusters of 128 features."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(128, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(width, _CLASSES))
    return Problem("MLP", model, *clusters((128,), noise=3.0))


def cnn(seed: int = 0) -> Problem:
    """Three convolutions with ReLU, 30k parameters, on noisy pictures of 16 x 16."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, outside in ((3, 20), (20, 40), (40, 60)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, _CLASSES))
    return Problem("CNN", model, *clusters((3, 16, 16), noise=3.0), probe_size=128)


def gpt(seed: int = 0) -> Problem:
    """Three blocks of width 48 with 32 tokens of context, 110k parameters, on a random Markov chain."""
    torch.manual_seed(seed)
    model = FlatGPT(width=48, depth=3, heads=4, context=32)
    return Problem("GPT", model, *markov_chain(256, 32), rate=3e-3, probe_size=64, batch_size=32)


def gpt2(*, batch: int = 4, context: int = 256, tiny: bool = False, seed: int = 0) -> Problem:
    """The shape of GPT-2 124M (12 layers of width 768, 50257 tokens, tied head); ``tiny`` makes it a thousandth."""
    torch.manual_seed(seed)
    width, depth, heads, vocabulary = (32, 2, 2, 1000) if tiny else (768, 12, 12, 50257)
    model = FlatGPT(width=width, depth=depth, heads=heads, context=context)
    model.embedding = nn.Embedding(vocabulary, width)
    nn.init.normal_(model.embedding.weight, std=0.02)
    model.head = nn.Linear(width, vocabulary, bias=False)
    model.head.weight = model.embedding.weight
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (64, context + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 1) % vocabulary  # every second token can be learned
    return Problem("GPT-2", model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 3e-4, batch, batch)


def clusters(shape: tuple[int, ...], noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(_CLASSES, *shape, generator=generator)
    targets = torch.randint(_CLASSES, (_SAMPLES,), generator=generator)
    inputs = centres[targets] + noise * torch.randn(_SAMPLES, *shape, generator=generator)
    wrong = torch.rand(_SAMPLES, generator=generator) < _WRONG_LABELS
    targets[wrong] = torch.randint(_CLASSES, (int(wrong.sum()),), generator=generator)
    return inputs / noise, targets


def markov_chain(vocabulary: int, context: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    table = torch.softmax(3 * torch.randn(vocabulary, vocabulary, generator=generator), 1)
    tokens = [torch.randint(vocabulary, (_SAMPLES,), generator=generator)]
    for _ in range(context):
        tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=generator).squeeze(1))
    sequences = torch.stack(tokens, 1)
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
