"""Runs on disk and in memory: their histories, event files and folders."""

from dynamon.runs.history import History, RunData, Series, last_step
from dynamon.runs.reading import assemble_run, read_run, read_run_data

__all__ = [
    "History",
    "RunData",
    "Series",
    "assemble_run",
    "last_step",
    "read_run",
    "read_run_data",
]
