"""Every benchmark starts: its help and its smallest run, as scripts in forked processes."""

import json
import multiprocessing
import os
import re
import runpy
import sys
import traceback
import warnings
from importlib import metadata
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported once, before the forks
import pytest
import scipy.sparse.linalg  # noqa: F401
import torch
from torch.distributed.fsdp import fully_shard  # noqa: F401

import dynamon.callbacks  # noqa: F401
from benchmarks.environment import RESULTS, SKIPPED
from tests.processes import in_forks

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
SCRIPTS += sorted(path.parent.name for path in FOLDER.glob("*/__main__.py"))
PICTURES = {"adaptive_plot"}  # all others write JSON
LONG = {"distributed"}  # a dozen fits in several processes
MISSING_PACKAGE = re.compile(r"^skipped: .+, since (\S+) is missing: pip install .+$")


def run(name: str, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Return the exit status of a script and what it printed; a fork has torch and Lightning imported already."""
    printed = folder / "printed"
    (status,) = in_forks(lambda _: _script(name, arguments, printed), 1)
    return status, printed.read_text()


def _script(name: str, arguments: list[str], printed: Path) -> int:
    file = printed.open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    sys.argv = [f"benchmarks/{name}.py", *arguments]
    warnings.resetwarnings()  # pytest makes errors of them
    multiprocessing.set_start_method("fork", force=True)
    for module in [m for m in sys.modules if m.startswith("benchmarks.")]:
        del sys.modules[module]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def kept() -> dict[Path, float]:
    """Return when each file was last written that a benchmark writes unless told otherwise."""
    return {path: path.stat().st_mtime_ns for path in [*RESULTS.iterdir(), *(FOLDER.parent / "docs").glob("*.png")]}


def test_scripts_are_found():
    assert {"adaptive", "sharpness", "kernels", "faults"} <= set(SCRIPTS)
    assert "models" not in SCRIPTS


@pytest.mark.processes
def test_a_script_that_fails_is_seen(tmp_path):
    status, said = run("missing", [], tmp_path)
    assert status == 1
    assert "No module named benchmarks.missing" in said


@pytest.mark.processes
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, tmp_path):
    status, said = run(name, ["--help"], tmp_path)
    assert status == 0, said
    assert said.startswith(f"usage: python -m benchmarks.{name} ")
    assert "--smallest" in said
    assert "--output" in said


@pytest.mark.processes
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in SCRIPTS])
def test_smallest_run(name, tmp_path):
    before = kept()
    output = tmp_path / f"found.{'png' if name in PICTURES else 'json'}"
    status, said = run(name, ["--smallest", "--output", str(output)], tmp_path)
    assert kept() == before
    skipped = [line for line in said.splitlines() if line.startswith("skipped: ")]
    if status == SKIPPED:
        assert len(skipped) == 1
        assert name == "kernels" and not torch.cuda.is_available()  # it alone needs a GPU
        pytest.skip(skipped[0])
    assert status == 0, said
    for line in skipped:  # nothing is left out that could be measured
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version(MISSING_PACKAGE.match(line)[1])
    if name in PICTURES:
        assert output.read_bytes().startswith(b"\x89PNG")
    else:
        found = json.loads(output.read_text())
        assert found.pop("environment" if "environment" in found else "runs")
        assert all(found.values())


@pytest.mark.processes
def test_nothing_is_written_without_a_path(tmp_path):
    before = kept()
    status, said = run("spectra", ["--smallest"], tmp_path)
    assert status == 0, said
    assert kept() == before
    assert "wrote" not in said
