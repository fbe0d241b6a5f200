"""What each monitor costs on the model of the demo: milliseconds a reading, and in training steps.

Run ``python benchmarks/monitoring_cost.py``; the result goes to ``benchmarks/results/monitoring_cost.json``. The
time each monitor states is held against the whole run's time measured from outside.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.cli.demo_data import standard_library_text, training_batches
from dynamon.cli.language_model import LanguageModel

CASES: dict[str, Any] = {
    "none": lambda: None,
    "gradient": lambda: GradientMonitor(every_n_steps=2),
    "weight": lambda: WeightMonitor(every_n_steps=5),
    "along the step": lambda: SharpnessMonitor(every_n_steps=20, quantities=["directional", "critical"]),
    "stability ratio": lambda: SharpnessMonitor(every_n_steps=20, quantities=["stability_ratio"]),
    "stability ratio and Hessian": lambda: SharpnessMonitor(every_n_steps=20),
    "steering": NoiseAdaptiveLR,
    "steering, noise every 10th step": lambda: NoiseAdaptiveLR(read_every=10),
    "economy, budget 0.02": lambda: DynamicsMonitor(budget=0.02),
}


def train(callback: Any, steps: int, text: torch.Tensor, accelerator: str) -> float:
    """Seconds of a run with one callback, without start-up."""

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
        trainer.fit(LanguageModel(steps), training_batches(text, 16, 128, steps, 0))
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu")
    default = Path(__file__).parent / "results" / "monitoring_cost.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    text, _ = standard_library_text()
    train(None, 20, text, options.accelerator)  # warm up
    runs: dict[str, list[tuple[float, Any]]] = {name: [] for name in CASES}
    for _ in range(options.rounds):  # side by side: a slow minute of the machine meets every case
        for name, make in CASES.items():
            callback = make()
            runs[name].append((train(callback, options.steps, text, options.accelerator), callback))
            print(f"{name}: {runs[name][-1][0]:.2f} s", flush=True)
    base = min(seconds for seconds, _ in runs["none"])
    results = {name: summary(done, base, options.steps) for name, done in runs.items()}
    environment = {
        "command": f"python benchmarks/monitoring_cost.py --steps {options.steps} --rounds {options.rounds}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.accelerator != "cpu" else platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "ms a training step": round(1000 * base / options.steps, 1),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
