"""Every callback in every set-up on every kind of model: see tables.py for the rows, checks.py for what must hold.

A few cells that hold every row run each time, and those that hold every pair of rows are `slow`; `make conformance`
runs every cell and writes the table.
"""

import gc
import importlib
import os
import tracemalloc
from itertools import combinations
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dynamon.callbacks import DynamicsMonitor, LayerwiseLR, NoiseAdaptiveLR, SpikeGuard
from dynamon.rates import FixedRates
from dynamon.runs.history import History
from tests.conformance.checks import (
    OWN_FILES,
    callbacks_of,
    check_keys,
    check_neutral,
    check_readings,
    check_solved,
    check_state,
    check_twice,
    fit_quietly,
    histories,
    plain,
    run,
    run_by_cli,
    waits_by_step,
)
from tests.conformance.subjects import loss_fn
from tests.conformance.tables import (
    EVERY_CELL,
    IMPOSSIBLE,
    SETUPS,
    Cell,
    all_cells,
    cells,
    covering,
    every_row,
    known_fault,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),  # under barebones
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),  # skipped batches
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI's
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),  # pytest has arguments of its own
    pytest.mark.filterwarnings("ignore:SpikeGuard clips, and skips no step. steps of SAM:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # torch.compile
]


def _parameters() -> list:
    rows = set(every_row(cells()))
    chosen = cells() if os.environ.get(EVERY_CELL) else covering(cells())
    return [pytest.param(cell, id=str(cell), marks=_known(cell) + _slow(cell not in rows)) for cell in chosen]


def _slow(is_slow: bool) -> list:
    return [pytest.mark.slow] if is_slow else []


def _known(cell: Cell) -> list:
    fault = known_fault(cell)
    return [pytest.mark.xfail(strict=True, reason=fault)] if fault else []


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("cell", _parameters())
def test_cell(cell: Cell, root: Path) -> None:
    expected = _plain_or_skip(cell, root)
    if SETUPS[cell.setup].cli:
        found, callbacks = run_by_cli(cell, root, plain=False)
    else:
        callbacks = callbacks_of(cell)
        found = run(cell, callbacks, root)
    check_neutral(cell, found, expected)
    check_readings(cell, callbacks)
    check_solved(callbacks)
    check_keys(cell, callbacks, found)
    for callback in callbacks:
        check_state(cell, callback)
    first = [histories(callback) for callback in callbacks]
    check_neutral(cell, run(cell, callbacks, root), expected)  # the same objects again
    for callback, before in zip(callbacks, first, strict=True):
        check_twice(callback, before)


def _plain_or_skip(cell: Cell, root: Path):
    """The run without dynamon; a CPU may lack kernels for half precision, oneDNN's LSTM in bf16 for one."""
    try:
        return plain(cell.model, cell.setup, root)
    except (RuntimeError, NotImplementedError) as error:
        if "precision" not in SETUPS[cell.setup].trainer:
            raise
        pytest.skip(f"this machine cannot run it without dynamon: {error}")


def test_the_subsets_hold_every_pair_and_every_row() -> None:
    every, pairs, rows = cells(), covering(cells()), every_row(cells())
    assert {two for cell in pairs for two in combinations(cell, 2)} == {
        two for cell in every for two in combinations(cell, 2)
    }
    assert {name for cell in rows for name in cell} == {name for cell in every for name in cell}
    assert set(rows) < set(pairs)
    assert len(rows) < len(pairs) / 6 < len(every) / 48


def test_what_is_called_impossible_is(root: Path) -> None:
    """Without dynamon."""
    pairs = {cell[:2] for cell in all_cells() if any(rule.holds(cell) for rule in IMPOSSIBLE)}
    assert pairs
    for model, setup in sorted(pairs):
        with pytest.raises((MisconfigurationException, NotImplementedError, RuntimeError, TypeError)):
            plain(model, setup, root)


# Nothing is kept, and on steps that measure nothing the device is not waited for.
LONG = ["MLP", "GAN"]
ROWS = {
    "monitor": lambda loss: [DynamicsMonitor("full", every_n_steps=10, loss_fn=loss, strict=True)],
    "steering": lambda loss: [NoiseAdaptiveLR(warmup=2)],
    "both": lambda loss: [DynamicsMonitor(every_n_steps=10, loss_fn=loss, strict=True), NoiseAdaptiveLR(warmup=2)],
    "guard": lambda loss: [SpikeGuard(warmup=2)],
    "ratios by hand": lambda loss: [LayerwiseLR(FixedRates({"*.weight": 0.5}))],
}


class Growth(pl.Callback):
    """Counts tensors and objects, and the memory that lines of the package hold, at two steps."""

    def __init__(self, steps: tuple[int, int]) -> None:
        self.steps, self.found = steps, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped in self.steps:
            gc.collect()
            objects = gc.get_objects()
            tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
            new = len(tensors) - len(trainer.callback_metrics)  # a headline that was not there yet is a tensor more
            held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f) for f in OWN_FILES])
            self.found.append((new, len(objects), sum(trace.size for trace in held.traces)))


@pytest.mark.parametrize("row", ["both", *(pytest.param(r, marks=pytest.mark.slow) for r in ROWS if r != "both")])
@pytest.mark.parametrize("model", ["MLP", pytest.param("GAN", marks=pytest.mark.slow)])
def test_nothing_grows_over_160_steps(model: str, row: str, monkeypatch) -> None:
    """The history apart, which holds 4,096 points a quantity at most."""
    monkeypatch.setattr(History, "add", lambda *_, **__: None)
    cell, growth = Cell(model, "no logger", ""), Growth((60, 160))
    tracemalloc.start()
    try:
        fit_quietly(cell, [*ROWS[row](loss_fn if model == "GAN" else None), growth], 162)
    finally:
        tracemalloc.stop()
    (tensors, objects, held), (tensors_late, objects_late, held_late) = growth.found
    assert tensors_late <= tensors  # those of other tests may go
    assert objects_late < objects + 30  # 10 readings in between, and 100 steps
    assert held_late < held + 2**15  # torch keeps some emptied objects for later, up to a limit


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("model", LONG)
def test_steps_that_measure_nothing_wait_for_nothing(model: str, row: str, monkeypatch) -> None:
    """Whatever makes the host wait happens as often as without dynamon, steering with its lag of one included."""
    for name in ("gradient_stats", "lengths"):  # on a CPU they read numbers, where asking costs nothing
        kernel = importlib.import_module(f"dynamon.kernels.{name}")
        monkeypatch.setattr(kernel, "reads_are_free", lambda device: False)
    cell = Cell(model, "no logger", "")
    counts = [waits_by_step(cell, made) for made in ([], ROWS[row](loss_fn if model == "GAN" else None))]
    # At multiples of the interval there is a reading, the step before keeps what it needs; two steps to get going.
    quiet = [step for step in range(2, 24) if step % 10]
    assert len(counts[0]) == 24
    assert [counts[1][step] for step in quiet] == [counts[0][step] for step in quiet]
