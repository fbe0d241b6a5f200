"""Tests of the suite that a GPU is needed for, or that another version of torch should pass."""

import os
import subprocess
import sys

from tests.gpu.place import ROOT, is_installed
from tests.gpu.report import Check, Report, Skip, add
from tests.gpu.subjects import ON_GPU

TWINS = "tests/kernels/test_triton.py"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def run(report: Report, arguments: list[str], environment: dict[str, str]) -> None:
    """Run pytest in a process of its own."""
    if not ON_GPU:
        raise Skip("`make test` runs these tests here; the twins under Triton's interpreter")
    start = "import sys, tests.gpu.place, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    # Without the project's settings: a machine that is lent may lack plugins that they speak of.
    settings = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-m", "not slow"]
    command = [sys.executable, "-c", start, "-q", "-x", "-p", "no:cacheprovider", *settings, *arguments]
    if not is_installed():  # of these, one starts a Python that must find the package by itself
        command += ["--deselect", f"{TWINS}::test_without_triton_the_modules_import_and_say_what_is_missing"]
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
