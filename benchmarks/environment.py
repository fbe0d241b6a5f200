"""Where the figures of a benchmark come from: what is needed to read them, and to take them again."""

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def environment(name: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Command, versions, device, commit and date.

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
