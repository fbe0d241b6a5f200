"""Every quantity of sharpness on parameters that FSDP2 deals out over processes, against one process on all samples.

Run ``python -m benchmarks.sharded_sharpness``; :func:`sharpness_rows` gives the same to other scripts. A difference is
the largest of a tag's series relative to the largest value in it. *Gathered* is what is done where whole parameters and
vectors fit into memory, *shards* what is done where they do not: products by differences of gradients.
"""

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from benchmarks.distributed import Module, data, differences, in_processes, quiet_trainer
from benchmarks.environment import environment, parser, write
from dynamon.callbacks import SharpnessMonitor
from dynamon.monitoring.sharpness_monitor import QUANTITIES

NOT_IN_SHARDS = ("ggn", "density")  # the first needs gathered parameters, the second the memory for them
BY_CHANCE = ("_upper", "_min", "/trace", "/trace_error")  # of random vectors, which shards draw by themselves


COLUMNS = ("one process", "distributed", "difference")  # of distributed.py


class Row(NamedTuple):
    """One quantity: its last value in one process and in several, and the largest difference."""

    tag: str
    one: float
    several: float
    difference: float


class Sharded(Module):
    """The small network, its layers dealt out where there are several processes."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.network:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)


def sharpness_rows(
    processes: int = 2, dtype: torch.dtype = torch.float64, gathered: bool = True, steps: int = 7
) -> list[Row]:
    """What one process and several measure.

    Args:
        processes: How many.
        dtype: Of the parameters.
        gathered: Whether memory is allowed for whole parameters and vectors.
        steps: Of training; sharpness is read at every third.
    """
    quantities = [q for q in QUANTITIES if gathered or q not in NOT_IN_SHARDS]
    size = sum(p.nbytes for p in Module("mlp", dtype).parameters())
    limit = 100 if gathered else 25  # copies of the parameters; a solve for five takes 25, and 4 gathered
    # Differences in float32 are as coarse as the default tolerance, and would not converge to a finer one.
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4 if gathered else 1e-2
    one = _measured(dtype, 1, quantities, 1.0, tolerance, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.pt"
        given = (dtype, processes, quantities, limit * size / 2**30, tolerance, steps)
        in_processes(lambda: _save(_measured(*given), path), processes)
        several = torch.load(path, weights_only=False)
    skipped = ("dynamon/", *(() if gathered else ("sharpness/trace",)))
    found = differences({tag: v for tag, v in one.items() if not tag.startswith(skipped)}, several)
    if not gathered:
        found = {tag: row for tag, row in found.items() if not tag.endswith(BY_CHANCE)}
    missing = {"one process": np.nan, "distributed": np.nan}  # of a tag that only one process has
    return [Row(tag, *({**missing, **row}[name] for name in COLUMNS)) for tag, row in found.items()]


def _measured(
    dtype: torch.dtype, processes: int, quantities: Sequence[str], limit: float, tolerance: float, steps: int
) -> dict[str, Any]:
    monitor = SharpnessMonitor(
        3, quantities=quantities, probe_fraction=1.0, tol=tolerance, max_matvecs=150, memory_limit=limit, strict=True
    )
    strategy = ModelParallelStrategy(processes, 1) if processes > 1 else "auto"
    quiet_trainer(processes, strategy, steps, [monitor]).fit(Sharded("mlp", dtype), data(dtype))
    return {tag: np.asarray(monitor.history[tag].values) for tag in monitor.history}


def _save(found: dict[str, Any], path: Path) -> None:
    if os.environ["RANK"] == "0":
        torch.save(found, path)


def main() -> None:
    """Compare and print."""
    options = parser("sharded_sharpness", __doc__).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [
        ("float64, gathered", torch.float64, True),
        ("float64, shards", torch.float64, False),
        ("float32, gathered", torch.float32, True),
        ("float32, shards", torch.float32, False),
    ]
    tables = {}
    for name, dtype, gathered in cases[:1] if options.smallest else cases:
        print(f"\n2 processes, {name}\n\n| tag | one process | two processes | relative difference |")
        print("| --- |" + " --- |" * 3)
        rows = sharpness_rows(2, dtype, gathered, 1 if options.smallest else 7)
        for row in rows:
            print(f"| `{row.tag}` | {row.one:.6g} | {row.several:.6g} | {row.difference:.0e} |")
        tables[name] = [row._asdict() for row in rows]
    write(options, "sharded_sharpness", {"environment": environment("sharded_sharpness"), "results": tables})


if __name__ == "__main__":
    main()
