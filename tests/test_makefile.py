"""What `make` installs, and when."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing is installed, with a Python that only writes down what it is called with."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program = '#!/bin/sh\necho "$@" >> "$CALLS"\nif [ "$2" = venv ]; then mkdir -p .venv/bin; '
    program += 'for n in python dynamon ruff; do cp "$0" .venv/bin/$n; done; fi\n'
    (tmp_path / "python").write_text(program)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> list[str]:
    """Run make; the lists of extras that it had pip install."""
    calls = checkout / "calls"
    calls.write_text("")
    environment = {"PATH": os.environ["PATH"], "CALLS": str(calls)}
    command = ["make", f"PYTHON={checkout / 'python'}", *arguments]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    return [line.rsplit(" ", 1)[1] for line in calls.read_text().splitlines() if "pip install" in line]


def test_the_demo_installs_only_what_it_needs_and_the_tests_add_the_rest(checkout: Path) -> None:
    assert make(checkout, "demo") == [".[demo]"]
    assert make(checkout, "demo") == []
    assert make(checkout, "quick") == [".[demo,docs,test]"]
    assert make(checkout, "quick") == make(checkout, "demo") == make(checkout, "lint") == []


def test_after_the_tests_the_demo_installs_nothing(checkout: Path) -> None:
    assert make(checkout, "quick")[-1] == ".[demo,docs,test]"
    assert make(checkout, "demo") == make(checkout, "quick") == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_package_table_is_installed_by_both(checkout: Path, changed: str) -> None:
    make(checkout, "quick")
    now = time.time()
    ages = {"pyproject.toml": 40, "constraints.txt": 40, ".venv/.ready-demo": 30, ".venv/.ready": 20, changed: 10}
    for name, seconds in ages.items():
        os.utime(checkout / name, (now - seconds, now - seconds))
    assert make(checkout, "demo") == [".[demo]"]
    assert make(checkout, "quick") == [".[demo,docs,test]"]


@pytest.mark.parametrize("name", ["slow.txt", "long.txt"])
def test_every_line_of_a_list_of_tests_names_one(name: str) -> None:
    for line in (ROOT / "tests" / name).read_text().splitlines():
        if line and not line.startswith("#"):
            file, _, test = line.partition("::")
            assert f"def {test}" in (ROOT / file).read_text(), line
