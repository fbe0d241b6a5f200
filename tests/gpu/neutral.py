"""Training under a monitor, and under steering by ones, is bitwise training without: models, precisions, optimizers."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dynamon.callbacks import DynamicsMonitor, NoiseAdaptiveLR
from dynamon.monitoring.sentinel_pace import Pace
from tests.gpu.report import Check, Report, Skip, add, check
from tests.gpu.subjects import MODELS, ON_GPU, STEPS, TEXT, differing, fit, gpt, state

WARMUP = 2 if ON_GPU else 1  # readings before steering begins
ONE_OF_A_KIND = "on a CPU one cell of each kind is run"


@dataclass(frozen=True)
class Cell:
    """A set-up that must be neutral.

    Attributes:
        model: A name in ``MODELS``.
        precision: Lightning's.
        optimizer: A name in ``OPTIMIZERS``.
        compiled: The mode of ``torch.compile``; empty for none.
        settings: Further arguments of the Trainer.
        seconds: What it takes on an H200.
        on_cpu: Why it is not run on a CPU.
    """

    model: str
    precision: str
    optimizer: str = "adamw"
    compiled: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 6.0
    on_cpu: str = ONE_OF_A_KIND

    @property
    def name(self) -> str:
        """All of it."""
        more = [f"compiled ({self.compiled})"] if self.compiled else []
        more += [f"{key}={value}" for key, value in self.settings.items()]
        return ", ".join([self.model, self.precision, self.optimizer, *more])

    @property
    def network(self) -> Callable[[], nn.Module]:
        """Makes the model."""
        make = MODELS[self.model][0]
        if not self.compiled:
            return make
        how = {"backend": "eager"} if not ON_GPU else {"mode": self.compiled}
        return lambda: torch.compile(make(), **how)  # type: ignore[return-value]

    def train(self, *callbacks: Any) -> dict[str, Tensor]:
        """What training leaves."""
        if self.compiled:
            torch._dynamo.reset()
        before = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = self.model == "cnn" and "benchmark" not in self.settings
        try:
            arguments = {"precision": self.precision, "optimizer": self.optimizer, **self.settings}
            return state(*fit(self.network, MODELS[self.model][1], callbacks, **arguments))
        finally:
            torch.backends.cudnn.deterministic = before


CELLS = [
    Cell("gpt", "bf16-mixed", "fused", on_cpu=""),
    Cell("lstm", "32-true", on_cpu=""),
    Cell("cnn", "16-mixed"),
    Cell("llama", "32-true", on_cpu=""),
    Cell("vit", "bf16-mixed", on_cpu=""),
    Cell("gru", "16-mixed"),
    Cell("gpt", "16-mixed", settings={"gradient_clip_val": 0.5}, on_cpu=""),
    Cell("gpt", "32-true", "lanton", on_cpu=""),
    Cell("cnn", "16-mixed", "fused", settings={"accumulate_grad_batches": 2}, on_cpu=""),
    Cell("vit", "32-true", compiled="default", settings={"deterministic": "warn"}, seconds=30),
    Cell("gpt", "32-true", "capturable", on_cpu=""),
    Cell("gpt", "bf16-mixed", "sgd"),
    Cell("gpt", "bf16-mixed", compiled="default", settings={"deterministic": "warn"}, seconds=30, on_cpu=""),
    Cell("lstm", "16-mixed"),
    Cell("lstm", "bf16-mixed"),
    Cell("gru", "32-true"),
    Cell("gru", "bf16-mixed"),
    Cell("gpt", "16-mixed", "fused"),
    Cell("gpt", "32-true", "fused"),
    Cell("gpt", "16-mixed", "capturable"),
    Cell("gpt", "bf16-mixed", "capturable"),
    Cell("gpt", "bf16-mixed", "lanton"),
    Cell("gpt", "16-mixed", "lanton"),
    Cell("llama", "bf16-mixed"),
    Cell("llama", "16-mixed"),
    Cell("cnn", "32-true"),
    Cell("cnn", "bf16-mixed"),
    Cell("vit", "32-true"),
    Cell("vit", "16-mixed"),
    Cell("gpt", "32-true"),
    Cell("gpt", "bf16-mixed"),
    Cell("gpt", "16-mixed"),
    Cell("gpt", "32-true", "sgd"),
    Cell("gpt", "16-mixed", "sgd"),
    Cell("gpt", "bf16-true"),
    Cell("gpt", "bf16-mixed", "fused", settings={"accumulate_grad_batches": 2}),
    Cell("cnn", "32-true", settings={"benchmark": True}),
    Cell("gpt", "bf16-mixed", "fused", compiled="reduce-overhead", settings={"deterministic": "warn"}, seconds=40),
    Cell("llama, flex attention", "bf16-mixed", seconds=40, on_cpu="flex attention has no gradients on a CPU"),
]


def judge(report: Report, cell: Cell) -> None:
    """Train five times: twice without dynamon, under a monitor, under steering by ones, under steering."""
    try:
        plain, again = cell.train(), cell.train()
    except Exception as error:
        if not cell.compiled and "flex" not in cell.model:
            raise
        raise Skip(f"it cannot be trained without dynamon: {type(error).__name__}: {str(error)[:200]}") from error
    if differing(plain, again):
        raise Skip(f"two runs without dynamon differ: {', '.join(sorted(differing(plain, again))[:3])}")
    monitor = DynamicsMonitor("standard", budget=None, every_n_steps=2)
    _compare(report, "monitored", plain, cell.train(monitor))
    report.note("tags", len(monitor.history))
    _last(report, monitor, "sharpness/stability_ratio")
    if "flex" in cell.model:  # has no second derivative, and differences in half precision are not trusted
        report.note("measurements that failed", monitor.failures)
    else:
        report.hold("no measurement failed", monitor.failures == 0)
    if cell.optimizer == "lanton":
        return  # steers itself
    _compare(report, "steered by ones", plain, cell.train(NoiseAdaptiveLR(floor=1.0)))
    steering = NoiseAdaptiveLR(warmup=WARMUP)
    steered = cell.train(steering)
    report.note("smallest ratio", round(min(steering.ratios.values()), 4))
    report.hold("steering steers", bool(differing(plain, steered)))
    numbers = [value for value in steered.values() if value.is_floating_point()]
    report.hold("steered weights are finite", all(bool(value.isfinite().all()) for value in numbers))


def _compare(report: Report, what: str, plain: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    apart = sorted(differing(plain, found))
    if apart:
        report.note(f"{what}: what differs", [len(apart), len(plain), apart[:4]])
    report.hold(f"{what}: bitwise equal", not apart)


def _last(report: Report, monitor: Any, tag: str) -> None:
    if tag in monitor.history:
        report.note(tag, [float(f"{v:.4g}") for v in monitor.history[tag].values[-2:]])


for _place, _cell in enumerate(CELLS):
    add(
        Check(
            f"neutral: {_cell.name}",
            "neutral",
            lambda report, cell=_cell: judge(report, cell),
            _cell.seconds,
            on_cpu=_cell.on_cpu,
            rank=30.0 + _place,
        )
    )


@check("neutral", 8.0, rank=35.5)
def a_resumed_run_repeats_the_run_that_never_stopped(report: Report) -> None:
    """Weights, optimizer state and ratios, through a checkpoint loaded under ``weights_only``."""
    half = STEPS // 2
    callbacks: list[list[Any]] = []

    def run(**how: Any) -> Any:
        callbacks.append([DynamicsMonitor(budget=None, every_n_steps=2), NoiseAdaptiveLR(warmup=WARMUP)])
        settings = {"max_steps": -1, "limit_train_batches": half, "precision": "bf16-mixed", "optimizer": "fused"}
        return fit(gpt, TEXT, callbacks[-1], **{**settings, **how})

    whole = state(*run(max_epochs=2))
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = run(max_epochs=1)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        resumed = state(*run(max_epochs=2, checkpoint=f"{folder}/half.ckpt"))
    apart = sorted(name for name in differing(whole, resumed) if not name.startswith("stream"))
    report.note("what differs", apart[:4])
    report.hold("weights and optimizer state: bitwise equal", not apart)
    report.hold("ratios equal", callbacks[0][1].ratios == callbacks[2][1].ratios)
    report.hold("no measurement failed", all(monitor.failures == 0 for monitor, _ in callbacks))


@contextmanager
def _checked_from(step: int) -> Iterator[None]:
    """From a step on, the sentinel looks at hardly any other, and checks each."""
    before = Pace.review

    def review(pace: Pace, steps: int) -> bool:
        pace.every = [1, 500, 500, 500] if steps >= step else [1, 1, 1, 1]
        return False

    Pace.review = review  # type: ignore[method-assign]
    try:
        yield
    finally:
        Pace.review = before  # type: ignore[method-assign]


class _Louder(pl.Callback):
    """The gradient of one step is a thousand times as large. It stands before the monitor."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 53:
            for parameter in pl_module.parameters():
                parameter.grad.mul_(1000.0)


@check("neutral", 10.0, rank=35.7)
def a_spike_at_a_step_that_is_only_checked(report: Report) -> None:
    """Its numbers arrive later, and its step is the right one; training is bitwise as without."""

    def train(*callbacks: Any) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"optimizer": "fused", "max_steps": 80, "gradient_clip_val": 1.0}
        return state(*fit(gpt, TEXT, (_Louder(), *callbacks), **settings))

    plain, monitor = train(), DynamicsMonitor(quantities=["critical"])
    with _checked_from(40):
        _compare(report, "checked", plain, train(monitor))
    steps = monitor.history["spike/batch"].steps.tolist() if "spike/batch" in monitor.history else []
    report.note("spikes", steps)
    report.hold("the spike is named at its step", steps == [53])
    gradient = monitor.history["spike/gradient"] if steps else None
    report.hold("by its gradient", gradient is not None and bool((gradient.values[gradient.steps == 53] > 7).all()))
    report.hold("no measurement failed", monitor.failures == 0)
