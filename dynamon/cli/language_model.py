"""A byte-level GPT of about one million parameters and its LightningModule."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

_BYTES = 256


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, time, width]`` to the same shape."""
        batch, time, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Byte-level transformer: embeddings, learned positions, blocks, a head.

    Args:
        width: Model width.
        depth: Number of blocks.
        heads: Attention heads.
        context: Longest input.
    """

    def __init__(self, width: int = 144, depth: int = 4, heads: int = 4, context: int = 128) -> None:
        """Make and initialise the layers."""
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, _BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("projection.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[batch, time]`` to logits ``[batch, time, 256]``."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class LanguageModel(pl.LightningModule):
    """Next-byte prediction with AdamW, linear warm-up and cosine decay.

    Args:
        steps: Length of the schedule.
        rate: Peak learning rate.
        context: Bytes of context.
        width: Model width.
        depth: Number of blocks.
    """

    def __init__(self, steps: int, rate: float = 3e-3, context: int = 128, width: int = 144, depth: int = 4) -> None:
        """Make the network."""
        super().__init__()
        self.network = GPT(width=width, depth=depth, context=context)
        self.steps, self.rate = steps, rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the cross-entropy in nats per byte."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the cross-entropy on held-out files."""
        self.log("validation/loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        """Make AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._rate), "interval": "step"},
        }

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self.network(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _rate(self, step: int) -> float:
        """Warm up over a tenth of the run, then decay along a cosine to a tenth of the peak."""
        warmup = max(self.steps // 10, 1)
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
