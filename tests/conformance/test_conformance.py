"""Every callback in every set-up on every kind of model: see tables.py for the rows, checks.py for what must hold.

A subset that holds every pair of rows runs each time; `make conformance` runs all of it and writes the table.
"""

from pathlib import Path

import pytest

from tests.conformance.checks import (
    callbacks_of,
    check_keys,
    check_neutral,
    check_readings,
    check_solved,
    check_state,
    check_twice,
    histories,
    plain,
    run,
    run_by_cli,
)
from tests.conformance.tables import (
    IMPOSSIBLE,
    MODELS,
    SETUPS,
    Cell,
    cells,
    covering,
    known_fault,
    reason_against,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),  # under barebones
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI's
]


def _parameters() -> list:
    every = cells()
    quick = set(covering(every))
    return [pytest.param(cell, id=str(cell), marks=_marks(cell, cell in quick)) for cell in every]


def _marks(cell: Cell, quick: bool) -> list:
    fault = known_fault(cell)
    marks = [pytest.mark.xfail(strict=True, reason=fault)] if fault else []
    return marks if quick else [*marks, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("cell", _parameters())
def test_cell(cell: Cell, root: Path) -> None:
    expected = plain(cell.model, cell.setup, root)
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
