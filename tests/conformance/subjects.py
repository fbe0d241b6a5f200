"""What is trained: small modules of every kind, one LightningModule around them, its data and a logger in memory."""

import copy
import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from dynamon.quantities import REGISTRY
from tests.helpers import cnn, mlp
from tests.models import GPT

SAMPLES, BATCH, CLASSES, TOKENS = 28, 4, 3, 11


class Recurrent(nn.Module):
    """An LSTM, classified by its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Bag(nn.Module):
    """The mean of the tokens' embeddings, through a layer and a head, which may be the embedding again."""

    def __init__(self, tied: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8, sparse=sparse)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens).mean(1))))


class Frozen(nn.Module):
    """The first layer does not learn, nor does the BatchNorm's scale, whose statistics go on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)
        self.first.requires_grad_(False)
        self.norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Unused(nn.Module):
    """One layer never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Odd(nn.Module):
    """A parameter without dimensions and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.scale, self.empty = mlp(), nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.used(x) + self.empty.sum()


class Adversaries(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(x)


def vectors(draw: torch.Generator) -> list[Tensor]:
    return [torch.randn(SAMPLES, 8, generator=draw), torch.randint(CLASSES, (SAMPLES,), generator=draw)]


def images(draw: torch.Generator) -> list[Tensor]:
    return [torch.randn(SAMPLES, 2, 8, 8, generator=draw), torch.randint(CLASSES, (SAMPLES,), generator=draw)]


def series(draw: torch.Generator) -> list[Tensor]:
    return [torch.randn(SAMPLES, 5, 4, generator=draw), torch.randint(CLASSES, (SAMPLES,), generator=draw)]


def text(draw: torch.Generator) -> list[Tensor]:
    tokens = torch.randint(TOKENS, (SAMPLES, 7), generator=draw)
    return [tokens[:, :-1], tokens[:, 1:]]


def words(draw: torch.Generator) -> list[Tensor]:
    tokens = torch.randint(TOKENS, (SAMPLES, 7), generator=draw)
    return [tokens[:, :-1], tokens[:, -1]]


@dataclass(frozen=True)
class Model:
    """A row of the table of models.

    Attributes:
        network: Makes it.
        data: Makes its inputs and labels.
        optimizer: Name of a class in ``torch.optim``, and its arguments.
        sparse: Whether the embedding's gradient is sparse.
        parts: Optimizers it needs by its nature.
    """

    network: Callable[[], nn.Module]
    data: Callable[[torch.Generator], list[Tensor]] = vectors
    optimizer: tuple[str, dict[str, Any]] = ("AdamW", {"lr": 1e-2})
    sparse: bool = False
    parts: int = 1


MODELS = {
    "MLP": Model(lambda: mlp(0.3)),
    "CNN with BatchNorm and dropout": Model(cnn, images, ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True})),
    "LSTM": Model(Recurrent, series, ("Adam", {"lr": 1e-2})),
    "transformer with SDPA": Model(lambda: GPT(TOKENS, 8, 6, depth=1), text),
    "tied weights": Model(lambda: Bag(tied=True), words, ("RMSprop", {"lr": 1e-3})),
    "partly frozen": Model(Frozen, optimizer=("SGD", {"lr": 0.1})),
    "unused parameters": Model(Unused),
    "sparse embedding": Model(lambda: Bag(sparse=True), words, ("SGD", {"lr": 0.1}), sparse=True),
    "0-d and empty parameters": Model(Odd),
    "torchmetrics inside": Model(mlp, optimizer=("Adam", {"lr": 1e-2})),
    "GAN": Model(Adversaries, optimizer=("Adam", {"lr": 1e-2, "betas": (0.5, 0.99)}), parts=2),
}


class Subject(pl.LightningModule):
    """One of :data:`MODELS` in training; it counts, collects, draws random numbers and logs as real modules do.

    Args:
        model: Key of :data:`MODELS`.
        manual: Optimise by hand.
        optimizers: Optimizers that share the parameters; more than one are stepped by hand.
        options: Further arguments of the optimizer (``foreach``, ``fused``).
        compiled: Compile the network.
        checkpointed: Recompute the network's activations in the backward pass.
        skips: Leave out every third batch, the first included.
        sam: Step by the gradient at weights that are worse than these (sharpness-aware minimisation).
    """

    def __init__(
        self,
        model: str = "MLP",
        manual: bool = False,
        optimizers: int = 1,
        options: dict[str, bool] | None = None,
        compiled: bool = False,
        checkpointed: bool = False,
        skips: bool = False,
        sam: bool = False,
    ) -> None:
        super().__init__()
        self.row, self.options, self.checkpointed = MODELS[model], options or {}, checkpointed
        self.skips, self.sam = skips, sam
        self.parts = max(optimizers, self.row.parts)
        self.automatic_optimization = not manual and self.parts == 1
        torch.manual_seed(1)
        network = self.row.network()
        self.network = torch.compile(network, backend="aot_eager") if compiled else network
        self.accuracy = MulticlassAccuracy(CLASSES) if "metrics" in model else None
        self.mean = MeanMetric() if "metrics" in model else None
        self.calls, self.collected = 0, []

    def loss(self, batch: Any, part: int = 0) -> Tensor:
        """The loss of the optimizer ``part``; only a GAN has different ones."""
        if isinstance(self.network, Adversaries) or hasattr(self.network, "generator"):
            return self._contest(batch, part)
        inputs, labels = contents(batch)
        logits = checkpoint(self.network, inputs, use_reentrant=False) if self.checkpointed else self.network(inputs)
        if self.accuracy is not None:
            self.accuracy(logits, labels)
        return cross_entropy(logits.flatten(0, -2), labels.flatten())

    def _contest(self, batch: Any, part: int) -> Tensor:
        real = contents(batch)[0]
        fake = self.network.generator(torch.randn(len(real), 4, device=real.device))
        judged = self.network(fake if part == 0 else fake.detach())
        loss = binary_cross_entropy_with_logits(judged, torch.full_like(judged, 1.0 - part))
        if part == 0:
            return loss
        seen = self.network(real)
        return loss + binary_cross_entropy_with_logits(seen, torch.ones_like(seen))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.calls += 1
        self.collected.append(batch_idx + random.random() + np.random.rand() + float(torch.rand(())))
        if self.skips and batch_idx % 3 == 0:
            return None
        if self.automatic_optimization:
            loss = self.loss(batch)
        else:
            loss = self._by_hand(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/drawn": self.collected[-1], "train/calls": float(self.calls)})
        if self.mean is not None:
            self.mean.update(loss.detach())
            self.log("train/mean", self.mean, on_step=False, on_epoch=True)
            self.log("train/accuracy", self.accuracy)
        return loss if self.automatic_optimization else None

    def _by_hand(self, batch: Any) -> Tensor:
        optimizers = self.optimizers()
        for part, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):

            def backward(part: int = part) -> Tensor:
                loss = self.loss(batch, part if self.row.parts > 1 else 0)
                self.zero_grad()
                self.manual_backward(loss)
                return loss

            if self.sam:
                loss = optimizer.step(closure=backward)
            else:
                loss = backward()
                optimizer.step()
        return loss.detach()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        name, arguments = self.row.optimizer
        make = getattr(torch.optim, name)
        groups = self._groups()
        made = [make(group, **arguments, **self.options) for group in groups]
        if self.row.sparse and self.parts > 1:  # the embedding gets the optimizer made for it
            made[0] = torch.optim.SparseAdam(groups[0], lr=1e-2)
        if self.sam:
            made = [SAM(optimizer) for optimizer in made]
        return made[0] if len(made) == 1 else made

    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimizer: of a GAN by network, of others the first tensor and the rest."""
        parameters = list(self.network.parameters())
        if self.parts == 1:
            return [parameters]
        first = (
            list(self.network.generator.parameters()) if self.row.parts > 1 else parameters[: -(-len(parameters) // 2)]
        )
        if self.row.sparse:
            first = parameters[:1]
        return [first, [p for p in parameters if all(p is not q for q in first)]]


def loss_fn(module: Any, batch: Any) -> Tensor:
    """What a monitor needs under manual optimisation; as a function with a name, so that a CLI finds it."""
    return module.loss(batch)


def in_a_mapping(items: list[Any]) -> UserDict[str, Tensor]:
    """A batch that is a mapping and no dict, as tokenizers return it."""
    return UserDict(zip(("inputs", "labels"), default_collate(items), strict=True))


def contents(batch: Any) -> list[Tensor]:
    """Inputs and labels of a batch, whatever holds them."""
    return list(batch.values()) if isinstance(batch, UserDict) else list(batch)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around an optimizer: its closure runs at the weights and at worse ones nearby."""

    def __init__(self, base: torch.optim.Optimizer, radius: float = 0.01) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base, self.radius = base, radius
        self.param_groups, self.state = base.param_groups, base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in moved]
        length = sum(float(p.grad.to_dense().square().sum()) for p in moved) ** 0.5
        for p in moved:
            p.add_(p.grad.to_dense(), alpha=self.radius / (length + 1e-12))
        closure()
        for p, weight in zip(moved, before, strict=True):
            p.copy_(weight)
        self.base.step()
        return loss


class Data(pl.LightningDataModule):
    """The same samples every time, in an order that the random stream of torch decides."""

    def __init__(self, model: str = "MLP", shuffle: bool = True, mapped: bool = False) -> None:
        super().__init__()
        self.collate = in_a_mapping if mapped else None
        self.samples = TensorDataset(*MODELS[model].data(torch.Generator().manual_seed(0)))
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, BATCH, shuffle=self.shuffle, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, BATCH, collate_fn=self.collate)


class MemoryLogger(Logger):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int | None, dict[str, float]]] = []

    name, version = "memory", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.written.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Witness(pl.Callback):
    """Notes every random stream, the order of the data and the user's metrics, after all other callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note(trainer, batch)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note(trainer, batch)

    def _note(self, trainer: Any, batch: Any) -> None:
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        streams = {"torch": torch_state, "numpy": numpy_state, "python": random.getstate()}
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if is_users(key)}
        self.seen.append({**streams, "batch": contents(batch)[0].clone(), "metrics": metrics})


OURS = {one.group for one in REGISTRY.values()}


def is_users(key: str) -> bool:
    """Whether a key of a logger or of the metrics is not ours."""
    return key.replace(".", "/").split("/")[0] not in OURS


def metric_states(module: nn.Module) -> dict[str, Any]:
    """The states of all torchmetrics in a module, with how often they were updated."""
    found = {n: m for n, m in module.named_modules() if hasattr(m, "metric_state")}
    return {n: {**copy.deepcopy(m.metric_state), "updates": m._update_count} for n, m in found.items()}
