"""Tests of the suite that a GPU is needed for, or that another version of torch should pass."""

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.report import Check, Report, Skip, add
from tests.gpu.subjects import ON_GPU

ROOT = Path(__file__).parents[2]
TWINS = "tests/kernels/test_triton.py"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def run(report: Report, arguments: list[str], environment: dict[str, str]) -> None:
    """Run pytest in a process of its own."""
    if not ON_GPU:
        raise Skip("`make test` runs these tests here; the twins under Triton's interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    report.note("pytest", lines[-1] if lines else done.stderr[-300:])
    if done.returncode:
        report.note("what failed", "\n".join(lines)[-1500:])
    report.hold("passed", done.returncode == 0)


SUITES: dict[str, tuple[list[str], dict[str, str], float, float]] = {
    "tests: Triton twin of gradient_stats": ([TWINS, "-k", "not gram and not tile"], {}, 35.0, 0.0),
    "tests: Triton twin of symmetric_gram": ([TWINS, "-k", "gram or tile"], {}, 35.0, 50.0),
    "tests: kernels, without the GPU": (["tests/kernels", "--deselect", TWINS], HIDDEN, 60.0, 90.0),
    "tests: dynamon, without the GPU": (["tests/dynamon"], HIDDEN, 300.0, 100.0),
}
for _name, (_arguments, _environment, _seconds, _rank) in SUITES.items():
    add(
        Check(
            _name,
            "suites",
            lambda report, arguments=_arguments, environment=_environment: run(report, arguments, environment),
            _seconds,
            rank=_rank,
        )
    )
