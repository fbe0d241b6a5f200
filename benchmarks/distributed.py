"""What several processes measure under DDP and FSDP2, held against one process on all of their samples, tag by tag.

Run ``python -m benchmarks.distributed``; the tables are printed, and go to ``benchmarks/results/distributed.json``
with what agreeing costs (a decision under a budget, and the check that every reduction begins with) and what a
reading sends under FSDP2. A difference is the largest of a tag's series relative to the largest value in it; the
values beside it are those of the last reading, the mean over layers. Takes a few minutes on two cores.
"""

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks.environment import environment, parser, write
from dynamon.callbacks import DynamicsMonitor, GradientMonitor, NoiseAdaptiveLR, SharpnessMonitor, WeightMonitor
from dynamon.distributed.ranks import Ranks
from dynamon.monitoring.planner import Planner
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from dynamon.optim import Lanton

GLOBAL_BATCH, BATCHES = 32, 6
WITH_SHARPNESS = ("DDP", "FSDP2")
OTHERWISE = ("dynamon/overhead", "noise/independent", "noise/scale", "noise/snr")  # a clock; another source of noise
HOW_IT_WENT = ("_residual", "/products")  # of a solve that has reached rounding


class Module(pl.LightningModule):
    """A small network on inputs of 16 numbers."""

    def __init__(self, kind: str, dtype: torch.dtype, orthogonal: bool = False) -> None:
        super().__init__()
        self.orthogonal = orthogonal
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

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            for part in self.network:
                if any(True for _ in part.parameters()):
                    fully_shard(part, mesh=mesh["data_parallel"])
            fully_shard(self.network, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.orthogonal:
            return Lanton(self.network, lr=1e-2, noise_adaptive=False)
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


@dataclass(frozen=True)
class Case:
    """One comparison with one process.

    Attributes:
        kind: The network.
        dtype: Its dtype.
        strategy: "DDP" or "FSDP2", whatever the number of processes.
        ranks: The number of processes.
        orthogonal: Whether steps are orthogonalised, so that dual norms need whole matrices.
    """

    kind: str
    dtype: torch.dtype
    strategy: str
    ranks: int
    orthogonal: bool = False

    @property
    def name(self) -> str:
        """What the tables call it."""
        steps = ", orthogonalised" if self.orthogonal else ""
        return f"{self.kind}{steps}, {str(self.dtype)[6:]}, {self.strategy}, {self.ranks} processes"


def fit(case: Case, callbacks: list[Any], report: Callable[[], Any], steps: int) -> Any:
    """What the first of some processes reports of a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.pt"
        run = partial(train, case, [*callbacks, Report(path, report)], steps)
        if case.ranks == 1:
            run("auto")
        else:
            sizes = {"DDP": (), "FSDP2": (case.ranks, 1)}[case.strategy]
            kind = DDPStrategy if case.strategy == "DDP" else ModelParallelStrategy
            in_processes(lambda: run(kind(*sizes, process_group_backend="gloo")), case.ranks)
        return torch.load(path, weights_only=False)


def in_processes(work: Callable[[], None], processes: int) -> None:
    """Call a function in forked processes, in which a Trainer finds the others.

    The port at which they meet is taken here and stays taken, so that nobody else comes between. They end without
    destroying anything: torch 2.13 may hang where DDP is the last to hold a process group.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_processes(_work, (work, store.port, processes), nprocs=processes, start_method="fork")


def _work(rank: int, work: Callable[[], None], port: int, processes: int) -> None:
    # LOCAL_RANK tells Lightning that somebody else has made the processes, the last two torch where its store is.
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0}
    names |= {"WORLD_SIZE": processes, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    work()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train(case: Case, callbacks: list[Any], steps: int, strategy: Any) -> None:
    """Fit."""
    module = Module(case.kind, case.dtype, case.orthogonal)
    quiet_trainer(case.ranks, strategy, steps, callbacks).fit(module, data(case.dtype))


def quiet_trainer(processes: int, strategy: Any, steps: int, callbacks: list[Any]) -> pl.Trainer:
    """On the CPU, without files."""
    return pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


def monitors(case: Case, every: int = 3) -> list[Any]:
    """What measures."""
    tolerance = 1e-6 if case.dtype == torch.float64 else 1e-4
    found: list[Any] = [GradientMonitor(every_n_steps=every), WeightMonitor(every_n_steps=every)]
    if case.strategy in WITH_SHARPNESS:
        found.append(SharpnessMonitor(every, quantities=QUANTITIES, probe_fraction=1.0, tol=tolerance, max_matvecs=150))
    return found


def measured(case: Case, steps: int) -> dict[str, Any]:
    """Every tag's values."""
    callbacks = monitors(case)

    def report() -> dict[str, Any]:
        return {tag: np.asarray(c.history[tag].values) for c in callbacks for tag in c.history}

    return fit(case, callbacks, report, steps)["report"]


class Sent(pl.Callback):
    """Counts what dynamon sends at each step, and how many bytes; checks apart, which are reductions of two numbers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, dict[str, int]]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.now: dict[str, dict[str, int]] = {}
        for name in ("all_reduce", "broadcast", "gather"):
            setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("dynamon"):
                what = "check" if name == "all_reduce" and tensor.numel() == 2 else name
                entry = self.now.setdefault(what, {"messages": 0, "bytes": 0})
                entry["messages"] += 1
                entry["bytes"] += tensor.nbytes
            return function(tensor, *arguments, **named)

        return call

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(self.now)
        self.now = {}


def messages(case: Case) -> dict[str, Any]:
    """What one process sends for a reading, by what reads; the fourth, when nothing is measured for the first time."""
    callbacks = {
        "GradientMonitor": GradientMonitor(every_n_steps=1),
        "WeightMonitor": WeightMonitor(every_n_steps=1),
        "NoiseAdaptiveLR": NoiseAdaptiveLR(warmup=1),
    }
    found = {}
    for name, callback in callbacks.items():
        sent = Sent()
        found[name] = fit(case, [callback, sent], lambda sent=sent: sent.steps[3], 5)["report"]
    parameters = sum(p.numel() * p.element_size() for p in Module(case.kind, case.dtype).parameters())
    return {
        "bytes of the parameters": parameters,
        "layers": len(list(Module(case.kind, case.dtype).parameters())),
        **found,
    }


def differences(one: dict[str, Any], several: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The last values of each tag, and the largest difference relative to its largest value."""
    found = {}
    for tag in sorted(set(one) - set(OTHERWISE)):
        if tag.endswith((*HOW_IT_WENT, "_p10", "_p90", "_median")) or not np.isfinite(one[tag]).any():
            continue
        if tag not in several or several[tag].shape != one[tag].shape:
            found[tag] = {"difference": float("nan")}
            continue
        size = np.nanmax(np.abs(one[tag]))
        difference = float(np.nanmax(np.abs(one[tag] - several[tag])) / size) if size else 0.0
        found[tag] = {"one process": _last(one[tag]), "distributed": _last(several[tag]), "difference": difference}
    return found


def _last(values: Any) -> float:
    """The mean over layers of the last reading that has a value."""
    means = [np.mean(row[np.isfinite(row)]) for row in (np.atleast_1d(v) for v in values) if np.isfinite(row).any()]
    return float(means[-1])


def agreeing(ranks: int, steps: int, budget: float) -> dict[str, Any]:
    """What agreeing costs: decisions in a run under a budget, and checks by themselves."""
    case = Case("mlp", torch.float32, "DDP", ranks)
    plain = fit(case, [], lambda: None, steps)["seconds"]
    monitor = DynamicsMonitor(budget=budget)
    decisions = [0]
    take = Planner.take

    def counted(planner: Planner, planned: Sequence[float]) -> None:
        decisions[0] += 1
        take(planner, planned)

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
            "decisions": decisions[0],
            "microseconds a decision": round(1e6 * spent / max(decisions[0], 1), 1),
            "decisions over training time": round(spent / run.budget.training, 5),
            "monitoring over training time": round(run.budget.overhead, 4),
            "readings": {meter.name: meter.points for meter in monitor._meters if meter.points},
            **timed,
        }

    with mock.patch.object(Planner, "take", counted):  # in the processes, which are forked
        found = fit_all(case, monitor, report, steps)
    return {**found, "ms a step without": round(1000 * plain / steps, 2)}


def fit_all(case: Case, monitor: DynamicsMonitor, report: Callable[[], Any], steps: int) -> dict[str, Any]:
    """The report is made on every process, since its checks are collectives."""

    class Everywhere(Report):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found = self.report()
            if trainer.is_global_zero:
                torch.save(found, path)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.pt"
        fit(case, [monitor, Everywhere(path, report)], lambda: None, steps)
        return torch.load(path, weights_only=False)


CASES = [
    Case("mlp", torch.float64, "DDP", 2),
    Case("mlp", torch.float64, "DDP", 4),
    Case("cnn", torch.float64, "DDP", 2),
    Case("mlp", torch.float32, "DDP", 2),
    Case("mlp", torch.float64, "FSDP2", 2),
    Case("mlp", torch.float64, "FSDP2", 4),
    Case("cnn", torch.float64, "FSDP2", 2),
    Case("cnn", torch.float64, "FSDP2", 4),
    Case("mlp", torch.float32, "FSDP2", 2),
    Case("mlp", torch.float64, "FSDP2", 2, orthogonal=True),
    Case("mlp", torch.float64, "FSDP2", 4, orthogonal=True),
]
SMALLEST = [Case("mlp", torch.float64, "DDP", 2), Case("mlp", torch.float64, "FSDP2", 2)]


def show(name: str, table: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    print(f"\n{name}\n\n| quantity | one process | distributed | relative difference |\n| --- | --- | --- | --- |")
    for tag, row in table.items():
        values = [f"{row[key]:.6g}" if key in row else "" for key in ("one process", "distributed")]
        print(f"| `{tag}` | {' | '.join(values)} | {row['difference']:.0e} |")


def main() -> None:
    """Compare, print and write."""
    command = parser("distributed", __doc__)
    command.add_argument("--steps", type=int, default=1000, help="of the run under a budget")
    options = command.parse_args()
    steps, cases, budgets = 13, CASES, [0.02, 0.1]
    if options.smallest:
        steps, cases, budgets, options.steps = 4, SMALLEST, [0.1], 5
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    alone: dict[Case, dict[str, Any]] = {}
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        one = replace(case, ranks=1)
        if one not in alone:
            alone[one] = measured(one, steps)
        tables[case.name] = differences(alone[one], measured(case, steps))
        show(case.name, tables[case.name])
    sent = {case.name: messages(case) for case in cases if case.strategy == "FSDP2" and case.dtype == torch.float64}
    cost = [agreeing(2, options.steps, budget) for budget in budgets]
    print(json.dumps([sent, cost], indent=2))
    largest = {name: max(row["difference"] for row in table.values()) for name, table in tables.items()}
    rounded = {
        name: {tag: {key: float(f"{v:.6g}") for key, v in row.items()} for tag, row in table.items()}
        for name, table in tables.items()
    }
    results = {
        "largest": {name: float(f"{value:.2g}") for name, value in largest.items()},
        "tables": rounded,
        "one reading sends, FSDP2": sent,
        "agreeing, 2 processes": cost,
    }
    content = {"environment": environment("distributed", lightning=pl.__version__), "results": results}
    write(options, "distributed", content)


if __name__ == "__main__":
    main()
