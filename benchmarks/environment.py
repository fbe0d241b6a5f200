"""What all benchmarks share: their options, where results go, and what is needed to read the figures."""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

RESULTS = Path(__file__).parent / "results"
SKIPPED = 77  # the exit status of a run that lacks what it measures, as in automake's test protocol


def parser(name: str, description: str | None, default: str = "") -> argparse.ArgumentParser:
    """Make a command line with ``--output`` and ``--smallest``.

    Args:
        name: The benchmark's module, without its package.
        description: Its docstring.
        default: Where its output goes, if not to the folder of results.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = default or f"benchmarks/results/{name}.json"
    made.add_argument("--output", type=Path, help=f"default: {default}, and nothing is written with --smallest")
    made.add_argument("--smallest", action="store_true", help="tiny sizes, one round: shows in seconds that it runs")
    return made


def write(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    """Write results to ``--output`` or to the folder of results; those of the smallest run only to ``--output``."""
    path = options.output or (None if options.smallest else RESULTS / f"{name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {path}", flush=True)


def skip(reason: str) -> NoReturn:
    """End with one sentence and the status of a run that was skipped."""
    print(f"skipped: {reason}", file=sys.stderr)
    sys.exit(SKIPPED)


def environment(name: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Return command, versions, device, commit and date.

    Args:
        name: The benchmark's module, without its package.
        device: ``"cpu"`` or ``"cuda"``.
        more: What else to note.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "command": " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None,
        "date": datetime.now(UTC).date().isoformat(),
        **more,
    }
