"""What each monitor costs on the model of the demo: milliseconds a reading, and in training steps.

Run ``python -m benchmarks.monitoring_cost``; the result goes to ``benchmarks/results/monitoring_cost.json``. The
time each monitor states is held against the whole run's time measured from outside.
"""

import tempfile
import time
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import (
    ActivationMonitor,
    DynamicsMonitor,
    GradientMonitor,
    NoiseAdaptiveLR,
    SharpnessMonitor,
    WeightMonitor,
)
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.language_model import GPT, LanguageModel

CASES: dict[str, Any] = {
    "none": lambda: None,
    "gradient": lambda: GradientMonitor(every_n_steps=2),
    "weight": lambda: WeightMonitor(every_n_steps=5),
    "activations": lambda: ActivationMonitor(every_n_steps=10),
    "along the step": lambda: SharpnessMonitor(every_n_steps=20, quantities=["directional", "critical"]),
    "stability ratio": lambda: SharpnessMonitor(every_n_steps=20, quantities=["stability_ratio"]),
    "stability ratio and Hessian": lambda: SharpnessMonitor(every_n_steps=20),
    "steering": NoiseAdaptiveLR,
    "steering, noise every 10th step": lambda: NoiseAdaptiveLR(read_every=10),
    "economy, budget 0.02": lambda: DynamicsMonitor(budget=0.02),
}


def train(callback: Any, steps: int, text: torch.Tensor, accelerator: str, smallest: bool) -> float:
    """Seconds of a run with one callback, without start-up."""
    context, batch = (8, 2) if smallest else (128, 16)

    class Clock(pl.Callback):
        begin = end = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.begin = time.perf_counter()

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.end = time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[clock, *([] if callback is None else [callback])],
        )
        torch.manual_seed(0)
        module = LanguageModel(steps, context=context)
        if smallest:
            module.network = GPT(16, 1, 2, context)
        trainer.fit(module, training_batches(text, batch, context, steps, 0))
    return clock.end - clock.begin


def summary(runs: list[tuple[float, Any]], base: float, steps: int) -> dict[str, Any]:
    """The quickest of a case's runs, held against the quickest without a callback."""
    seconds, callback = min(runs, key=lambda run: run[0])
    result: dict[str, Any] = {"seconds": round(seconds, 2), "overhead from outside": round(seconds / base - 1, 4)}
    if callback is None:
        return result
    result["overhead stated"] = round(callback.overhead, 4)
    points = sum(meter.points for meter in getattr(callback, "_meters", []))
    if points:
        milliseconds = 1000 * callback._budget.spent / points
        result["readings"] = points
        result["ms a reading"] = round(milliseconds, 1)
        result["steps a reading"] = round(milliseconds / (1000 * base / steps), 2)
    return result


def main() -> None:
    """Measure all cases side by side and write the result."""
    command = parser("monitoring_cost", __doc__)
    command.add_argument("--steps", type=int, default=120)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--accelerator", default="cpu")
    options = command.parse_args()
    if options.smallest:
        options.steps, options.rounds = 21, 1  # the longest interval between readings, and one
    text, _ = standard_library_text()

    def seconds(callback: Any, steps: int) -> float:
        return train(callback, steps, text, options.accelerator, options.smallest)

    seconds(None, 20)  # warm up
    runs: dict[str, list[tuple[float, Any]]] = {name: [] for name in CASES}
    for _ in range(options.rounds):  # side by side: a slow minute of the machine meets every case
        for name, make in CASES.items():
            callback = make()
            runs[name].append((seconds(callback, options.steps), callback))
            print(f"{name}: {runs[name][-1][0]:.2f} s", flush=True)
    base = min(seconds for seconds, _ in runs["none"])
    results = {name: summary(done, base, options.steps) for name, done in runs.items()}
    device = "cpu" if options.accelerator == "cpu" else "cuda"
    more = {"lightning": lightning.__version__, "ms a training step": round(1000 * base / options.steps, 1)}
    content = {"environment": environment("monitoring_cost", device, **more), "results": results}
    write(options, "monitoring_cost", content)


if __name__ == "__main__":
    main()
