"""Small modules, data and fits that many tests share."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def batches(count: int = 64, size: int = 8, features: tuple[int, ...] = (8,), classes: int = 3) -> DataLoader[Any]:
    """The same random batches every time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, *features, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=size)


class Classifier(pl.LightningModule):
    """Cross-entropy on whatever network; ``optimizer`` makes the optimizer from the parameters."""

    def __init__(self, network: nn.Module, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.make_scheduler = scheduler
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


class ByHand(Classifier):
    """The same, optimised by hand."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()


def mlp(dropout: float = 0.0) -> nn.Module:
    """Two tanh layers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))


def cnn() -> nn.Module:
    """Convolutions with BatchNorm and dropout, on ``[n, 2, 8, 8]``."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def trainer(callbacks: list[Any], steps: int = 20, root: Path | None = None, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return pl.Trainer(**{**settings, **arguments})


def fit(module: pl.LightningModule, callbacks: list[Any], data: DataLoader[Any] | None = None, **arguments: Any) -> Any:
    """Fit from a fixed seed and return the Trainer; other arguments go to :func:`trainer` and ``fit``."""
    checkpoint, validation = arguments.pop("ckpt_path", None), arguments.pop("validation", None)
    torch.manual_seed(3)
    run = trainer(callbacks, **arguments)
    extra = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}
    run.fit(module, data if data is not None else batches(), validation, **extra)
    return run


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers are bitwise equal."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def documented(cls: type) -> set[str]:
    """The tags in the table of a docstring."""
    return set(re.findall(r"^    ``([a-z_]+/[a-z_0-9]+)``", cls.__doc__ or "", re.M))
