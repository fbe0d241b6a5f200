"""GPT-2 124M on a GPU: what a step takes, and what monitoring and steering add to it.

``python -m tests.gpu --parts kernels timing`` (or ``make gpu``, which makes all other checks as well) runs what is here
and holds it to its bars. On a CPU everything runs at tiny sizes; its times then say nothing.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaLaunchKernel_v7000")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")


@dataclass(frozen=True)
class Size:
    """A GPT-2 and its batches."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    context: int = 1024
    tokens: int = 50257
    batch: int = 8


FULL, TINY = Size(), Size(16, 1, 2, 8, 64, 4)


class Block(nn.Module):
    """A block of GPT-2, biases included: twelve tensors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        heads = self.attention(self.ln_1(x)).view(n, t, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with its head tied to its embedding: by default 124 million parameters in 148 tensors."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, context: int = 1024, tokens: int = 50257
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model(size: Size, device: str) -> GPT2:
    """The network, made on its device."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2(size.width, size.depth, size.heads, size.context, size.tokens)


class Task(pl.LightningModule):
    """Next tokens with AdamW."""

    def __init__(self, network: nn.Module, fused: bool) -> None:
        super().__init__()
        self.network, self.fused = network, fused

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.network, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=self.fused, foreach=not self.fused)


def loss_of(network: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, taken in float32."""
    return F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock(pl.Callback):
    """When each step began; it stands before all other callbacks. Only ``exact`` waits for the device at each step."""

    def __init__(self, device: str, warm: int, exact: bool) -> None:
        self.device, self.warm, self.exact = device, warm, exact
        self.times: list[float] = []
        self.begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        wait(self.device)
        self.begin = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.exact or trainer.global_step == self.warm:
            wait(self.device)
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [end - begin for begin, end in zip(self.times, self.times[1:], strict=False)]

    @property
    def mean(self) -> float:
        """Seconds a step, after those that warm up."""
        return (self.times[-1] - self.times[self.warm]) / (len(self.times) - 1 - self.warm)

    @property
    def total(self) -> float:
        """Seconds of the run, what callbacks do at its start included."""
        return self.times[-1] - self.begin

    @property
    def start(self) -> float:
        """Seconds that the start and the steps which warm up took beyond steps like the others."""
        return self.times[self.warm] - self.begin - self.warm * self.mean


def train(
    callbacks: Sequence[pl.Callback],
    steps: int,
    *,
    size: Size,
    device: str,
    fused: bool = True,
    warm: int = 0,
    exact: bool = False,
) -> Clock:
    """Train GPT-2 in bf16-mixed on random tokens, under a clock."""
    if device == "cuda":
        gc.collect()  # what the run before has left
    clock = Clock(device, warm, exact)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size.tokens, (steps * size.batch, size.context + 1), generator=generator)
    data = DataLoader(TensorDataset(tokens), size.batch, pin_memory=device == "cuda")
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(model(size, device), fused), data)
    return clock


def measure(function: Callable[[], Any], device: str, rounds: int = 3) -> dict[str, float]:
    """Milliseconds of a call, of the host until it is queued, and of the device; and how many kernels it launches."""
    function()
    wait(device)
    walls, queued = [], []
    for _ in range(rounds):
        wait(device)
        begin = time.perf_counter()
        function()
        queued.append(time.perf_counter() - begin)
        wait(device)
        walls.append(time.perf_counter() - begin)
    counts, busy = profiled(function, device)
    found = {"ms": 1e3 * min(walls), "host ms": 1e3 * min(queued), "device ms": busy, **counts}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def profiled(function: Callable[[], Any], device: str) -> tuple[dict[str, int], float]:
    """What a call asks of the device: launches, copies, waits; and milliseconds for which the device works on it."""
    with profiler(device) as profile:
        function()
        wait(device)
    return counted(profile, device)


def profiler(device: str) -> Any:
    """Torch's, for host and device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    return profile(activities=activities)


def counted(profile: Any, device: str) -> tuple[dict[str, int], float]:
    """Launches, copies and waits in a profile, and milliseconds of the device. On a CPU calls of operators.

    The events are taken as they are: torch's own tables take ten seconds for a hundred thousand of them.
    """
    counts = {"launches": 0, "graph launches": 0, "copies": 0, "waits": 0, "event waits": 0}
    busy = 0
    for event in profile.profiler.kineto_results.events():
        name = event.name()
        if device == "cpu":
            counts["launches"] += name.startswith("aten::")
        elif event.device_type() == torch.autograd.DeviceType.CUDA:
            # Ranges that have a name are drawn on the device as well, over its kernels.
            if not event.is_user_annotation() and not name.startswith(("Optimizer.", "ProfilerStep")):
                busy += event.duration_ns()
        elif name in LAUNCHES:
            counts["launches"] += 1
        elif name in GRAPHS:
            counts["graph launches"] += 1
        elif name.startswith("cudaMemcpy"):
            counts["copies"] += 1
        elif name in WAITS:
            counts["event waits" if name == "cudaEventSynchronize" else "waits"] += 1
    return counts, busy / 1e6
