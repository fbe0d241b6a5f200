"""What is trained: small models of the kinds that people train, a fit of each, and all that a fit leaves behind."""

import logging
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bitwise repeatable products

import lightning.pytorch as pl  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from benchmarks.gpu import GPT2  # noqa: E402
from dynamon.optim import Lanton  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
WIDTH, CONTEXT, BATCH, STEPS = (64, 64, 16, 8) if ON_GPU else (16, 8, 4, 4)
CLASSES, TOKENS = 10, 256


def begin() -> bool:
    """Prepare a process; whether it has a GPU."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch._dynamo", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ON_GPU:
        torch.ones(1, device=DEVICE).sum().item()
    return ON_GPU


class Grouped(nn.Module):
    """A block as in Llama: RMSNorm, rotary positions, two queries to a key, a gated MLP."""

    def __init__(self, width: int, heads: int, flex: bool) -> None:
        super().__init__()
        self.heads, self.size, self.flex = heads, width // heads, flex
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys, self.values = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.projection = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.first(x)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        q, k = _rotated(q), _rotated(k)
        attention = _flexible if self.flex else partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        mixed = attention(q, k, v)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        normed = self.second(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rate = 10000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device), rate).to(x.dtype)
    one, other = x.chunk(2, -1)
    return torch.cat([one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], -1)


def _flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[-2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    return torch.compile(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True)


class Llama(nn.Module):
    """A small model as Llama is made."""

    def __init__(self, width: int = WIDTH, flex: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.blocks = nn.Sequential(*(Grouped(width, 4, flex) for _ in range(2)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens))))


class ViT(nn.Module):
    """Patches of images through an encoder with dropout."""

    def __init__(self, width: int = WIDTH, size: int = 8) -> None:
        super().__init__()
        self.patch = size
        self.embed = nn.Linear(3 * size * size, width)
        self.places = nn.Parameter(0.02 * torch.randn((32 // size) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def cnn(width: int = WIDTH // 4) -> nn.Sequential:
    """Convolutions with BatchNorm, one of them depthwise."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width),
        nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8 * width, CLASSES),
    )  # fmt: skip


class Recurrent(nn.Module):
    """Two layers of a recurrent network with dropout between them."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = kind(8, WIDTH // 2, 2, batch_first=True, dropout=dropout)  # type: ignore[call-arg]
        self.head = nn.Linear(WIDTH // 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def gpt(**sizes: int) -> GPT2:
    """A small GPT-2."""
    return GPT2(**{"width": WIDTH, "depth": 2, "heads": 4, "context": CONTEXT, "tokens": TOKENS, **sizes})


_seed = torch.Generator().manual_seed(0)
TEXT = TensorDataset(torch.randint(TOKENS, (256, CONTEXT + 1), generator=_seed))
IMAGES = TensorDataset(torch.randn(256, 3, 32, 32, generator=_seed), torch.randint(CLASSES, (256,), generator=_seed))
SERIES = TensorDataset(torch.randn(256, 20, 8, generator=_seed), torch.randint(CLASSES, (256,), generator=_seed))
MODELS: dict[str, tuple[Callable[[], nn.Module], TensorDataset]] = {
    "gpt": (gpt, TEXT),
    "cnn": (cnn, IMAGES),
    "lstm": (Recurrent, SERIES),
    "gru": (lambda: Recurrent(nn.GRU), SERIES),
    "vit": (ViT, IMAGES),
    "llama": (Llama, TEXT),
    "llama, flex attention": (lambda: Llama(flex=True), TEXT),
}


def _capturable(module: nn.Module) -> torch.optim.Optimizer:
    rate = torch.tensor(1e-3, device=next(module.parameters()).device)
    return torch.optim.AdamW(module.parameters(), rate, capturable=ON_GPU)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, fused=True),
    "capturable": _capturable,
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, nesterov=True),
    "lanton": lambda m: Lanton(m, 0.02),
}


class Task(pl.LightningModule):
    """Cross-entropy: of the next token, or of a label."""

    def __init__(self, network: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network, self.make_optimizer = network, optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self)


def loss_of(network: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in float32."""
    if len(batch) == 2:
        return F.cross_entropy(network(batch[0]).float(), batch[1])
    return F.cross_entropy(network(batch[0][:, :-1]).flatten(0, 1).float(), batch[0][:, 1:].flatten())


def fit(
    network: Callable[[], nn.Module],
    data: TensorDataset,
    callbacks: Sequence[pl.Callback] = (),
    optimizer: str = "adamw",
    checkpoint: str | None = None,
    batch: int = BATCH,
    **arguments: Any,
) -> tuple[pl.Trainer, Task]:
    """Train from a fixed seed."""
    _seed_all(1)
    task = Task(network(), OPTIMIZERS[optimizer])
    _seed_all(2)
    settings = {"max_steps": STEPS, "max_epochs": -1, **arguments}
    trainer = pl.Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    extra = {} if checkpoint is None else {"ckpt_path": checkpoint, "weights_only": True}
    try:
        trainer.fit(task, DataLoader(data, batch), **extra)
    finally:
        torch.use_deterministic_algorithms(False)
    return trainer, task


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def state(trainer: pl.Trainer, task: Task) -> dict[str, Tensor]:
    """Weights, buffers, optimizer state and random streams."""
    found = {f"weight {name}": value.detach().cpu().clone() for name, value in task.state_dict().items()}
    for place, kept in enumerate(trainer.optimizers[0].state.values()):
        for name, value in kept.items():
            if isinstance(value, Tensor):
                found[f"state {place} {name}"] = value.detach().cpu().clone()
    found["stream of torch"] = torch.get_rng_state()
    found["stream of numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    found["stream of python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    if ON_GPU:
        found["stream of CUDA"] = torch.cuda.get_rng_state()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What is not bitwise equal, NaN apart."""
    return [name for name in one.keys() | other.keys() if not _same(one.get(name), other.get(name))]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_floating_point():
        return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())
    return torch.equal(one, other)
