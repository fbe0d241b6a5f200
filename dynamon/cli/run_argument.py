"""The argument RUN of the commands: which run a folder stands for, and the warnings while it is read."""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dynamon.runs.folders import newest_run, printable

_Read = TypeVar("_Read")
RUN_HELP = (
    "folder of a run, with event files or metrics.csv; for a folder above runs the newest run with readings is taken, "
    "and named"
)


def run_folder(text: str) -> Path:
    """Convert the argument; an empty one, of a variable that is not set say, is no folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("RUN is empty; write . for the folder that you are in")
    return Path(text)


def read_run_argument(command: str, folder: Path, reader: Callable[[Path], _Read]) -> tuple[Path, _Read]:
    """Read the run that a folder stands for, and print what of it is damaged as an error.

    Args:
        command: The name of the command, for what is printed.
        folder: What the user gave.
        reader: :func:`dynamon.runs.read_run` or :func:`dynamon.runs.read_run_data`.

    Returns:
        The folder of the run, and what was read.

    Raises:
        ValueError: If there is nothing to read, with the reason.
        OSError: Likewise.
    """
    run = newest_run(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = reader(run)
    for warning in caught:
        print(f"dynamon {command}: {warning.message}", file=sys.stderr)
    return run, data


def selection_line(folder: Path, run: Path) -> str | None:
    """Say which run was taken; None if the folder is the run."""
    if run == folder:
        return None
    return f"run           {printable(run)}, the newest that can be shown below {printable(folder)}"
