"""What several processes measure under DDP, held against one process on all of their samples, tag by tag.

Run ``python -m benchmarks.distributed``; the table is printed, and goes to ``benchmarks/results/distributed.json``
with what agreeing costs: a decision under a budget, and the check that every reduction begins with. A difference is
the largest of a tag's series relative to the largest value in it. Takes less than two minutes on two cores.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks.environment import environment
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, SharpnessMonitor, WeightMonitor
from dynamon.callbacks.sharpness import QUANTITIES
from dynamon.ranks import Ranks

GLOBAL_BATCH, BATCHES = 32, 6
OTHERWISE = ("dynamon/overhead", "noise/independent", "noise/scale", "noise/snr")  # a clock; another source of noise
HOW_IT_WENT = ("_residual", "/products")  # of a solve that has reached rounding


class Module(pl.LightningModule):
    """A small network on inputs of 16 numbers."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        parts: list[nn.Module] = [nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)]
        if kind == "cnn":
            parts = [
                nn.Unflatten(1, (1, 4, 4)),
                nn.Conv2d(1, 8, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(8, 8, 3),
                nn.Tanh(),
            ]
            parts += [nn.Flatten(), nn.Linear(32, 5)]
        self.network = nn.Sequential(*parts).to(dtype)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Parts(Sampler[list[int]]):
    """Rank r of R takes every R-th sample of each batch."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for batch in range(BATCHES):
            yield list(range(batch * GLOBAL_BATCH, (batch + 1) * GLOBAL_BATCH))[rank::ranks]


def data(dtype: torch.dtype) -> DataLoader[Any]:
    """The same batches whatever the number of processes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(GLOBAL_BATCH * BATCHES, 16, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(5, (len(inputs),), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_sampler=Parts())


class Report(pl.Callback):
    """Saves what the first process has seen: the processes are gone afterwards."""

    def __init__(self, path: Path, report: Callable[[], Any]) -> None:
        self.path, self.report, self.begin = path, report, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save({"seconds": time.perf_counter() - self.begin, "report": self.report()}, self.path)


def fit(kind: str, dtype: torch.dtype, ranks: int, callbacks: list[Any], report: Callable[[], Any], steps: int) -> Any:
    """What the first of some processes reports of a run."""
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if ranks > 1 else "auto"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.pt"
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=strategy,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[*callbacks, Report(path, report)],
        )
        trainer.fit(Module(kind, dtype), data(dtype))
        return torch.load(path, weights_only=False)


def measured(kind: str, dtype: torch.dtype, ranks: int, steps: int = 13) -> dict[str, Any]:
    """Every tag's values."""
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    sharpness = SharpnessMonitor(3, quantities=QUANTITIES, probe_fraction=1.0, tol=tolerance, max_matvecs=150)
    callbacks = [sharpness, GradientMonitor(every_n_steps=3), WeightMonitor(every_n_steps=3)]

    def report() -> dict[str, Any]:
        return {tag: np.asarray(c.history[tag].values) for c in callbacks for tag in c.history}

    return fit(kind, dtype, ranks, callbacks, report, steps)["report"]


def differences(one: dict[str, Any], several: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each tag, relative to its largest value."""
    found = {}
    for tag in sorted(set(one) - set(OTHERWISE)):
        if tag.endswith((*HOW_IT_WENT, "_p10", "_p90", "_median")) or not np.isfinite(one[tag]).any():
            continue
        if tag not in several or several[tag].shape != one[tag].shape:
            found[tag] = float("nan")
            continue
        size = np.nanmax(np.abs(one[tag]))
        found[tag] = float(np.nanmax(np.abs(one[tag] - several[tag])) / size) if size else 0.0
    return found


def agreeing(ranks: int, steps: int, budget: float) -> dict[str, Any]:
    """What agreeing costs: decisions in a run under a budget, and checks by themselves."""
    plain = fit("mlp", torch.float32, ranks, [], lambda: None, steps)["seconds"]
    monitor = DynamicsMonitor(budget=budget)

    def report() -> dict[str, Any]:
        run, timed = monitor._run, {}
        assert run is not None
        ours = Ranks(torch.device("cpu"))
        for name, action in (
            ("check", ours.check),
            ("all-reduce of two numbers", lambda: dist.all_reduce(torch.zeros(2))),
        ):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(500):
                action()
            timed[f"microseconds a {name}"] = round(2000 * (time.perf_counter() - begin), 1)
        spent = run.budget.spent_on.get("decision", 0.0)
        return {
            "budget": budget,
            "steps": steps,
            "decisions": run.decisions.taken,
            "microseconds a decision": round(1e6 * spent / max(run.decisions.taken, 1), 1),
            "decisions over training time": round(spent / run.budget.training, 5),
            "monitoring over training time": round(run.budget.overhead, 4),
            "readings": {meter.name: meter.points for meter in monitor._meters if meter.points},
            **timed,
        }

    return {**fit_all(ranks, monitor, report, steps), "ms a step without": round(1000 * plain / steps, 2)}


def fit_all(ranks: int, monitor: DynamicsMonitor, report: Callable[[], Any], steps: int) -> dict[str, Any]:
    """The report is made on every process, since its checks are collectives."""

    class Everywhere(Report):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found = self.report()
            if trainer.is_global_zero:
                torch.save(found, path)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.pt"
        fit("mlp", torch.float32, ranks, [monitor, Everywhere(path, report)], lambda: None, steps)
        return torch.load(path, weights_only=False)


CASES = {
    "mlp, float64, 2 processes": ("mlp", torch.float64, 2),
    "mlp, float64, 4 processes": ("mlp", torch.float64, 4),
    "cnn, float64, 2 processes": ("cnn", torch.float64, 2),
    "mlp, float32, 2 processes": ("mlp", torch.float32, 2),
}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of the run under a budget")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "distributed.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    alone: dict[Any, dict[str, Any]] = {}
    table: dict[str, dict[str, float]] = {}
    for name, (kind, dtype, ranks) in CASES.items():
        if (kind, dtype) not in alone:
            alone[kind, dtype] = measured(kind, dtype, 1)
        table[name] = differences(alone[kind, dtype], measured(kind, dtype, ranks))
    cost = [agreeing(2, options.steps, budget) for budget in (0.02, 0.1)]
    tags = sorted({tag for column in table.values() for tag in column})
    print("| tag | " + " | ".join(table) + " |\n|" + " --- |" * (len(table) + 1))
    for tag in tags:
        print(f"| `{tag}` | " + " | ".join(f"{c[tag]:.0e}" if tag in c else "" for c in table.values()) + " |")
    print(json.dumps(cost, indent=2))
    worst = {name: max(column.values()) for name, column in table.items()}
    rounded = {name: {tag: float(f"{v:.2g}") for tag, v in column.items()} for name, column in table.items()}
    results = {"largest": worst, "differences": rounded, "agreeing, 2 processes": cost}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"environment": environment("distributed", lightning=pl.__version__), "results": results}
    options.output.write_text(json.dumps(written, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
