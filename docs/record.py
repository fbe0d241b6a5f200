"""Runs the examples and keeps what they print and draw for the gallery: ``python docs/record.py`` (two minutes).

With names it records only those: ``python docs/record.py diverging_run``.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tables that `generated` makes are of benchmarks
from generated import EXAMPLES, source_hash  # noqa: E402

GALLERY = Path(__file__).parent / "gallery"
RUNS = GALLERY / "runs.json"


def record(script: Path) -> dict[str, object]:
    """Run a script; it checks its own numbers and fails where they are wrong."""
    picture = GALLERY / f"{script.stem}.png"
    command = [sys.executable, "-W", "ignore", str(script), "--out", picture.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=GALLERY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"source": source_hash(script), "printed": run.stdout}


def main(names: list[str]) -> None:
    """Record all examples, or those named."""
    GALLERY.mkdir(exist_ok=True)
    known = json.loads(RUNS.read_text())["scripts"] if RUNS.exists() else {}
    scripts = {script.stem: script for script in sorted(EXAMPLES.glob("*.py"))}
    for name in names or scripts:
        print(f"{name} ...", flush=True)
        known[name] = record(scripts[name])
    environment = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread"
    kept = {name: known[name] for name in scripts if name in known}
    RUNS.write_text(json.dumps({"environment": environment, "scripts": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
