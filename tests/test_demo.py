"""``dynamon demo`` from the command line."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamon.cli import main
from dynamon.cli.demo import shortfalls
from dynamon.runs.history import Series

COMMAND = [sys.executable, "-m", "dynamon.cli", "demo"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_a_short_run_ends_with_summary_picture_and_event_files(tmp_path: Path) -> None:
    done = run("--steps", 60, "--budget", 1.0, "--logdir", tmp_path, "--preset", "standard")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("loss", "stability", "noisiest", "quietest", "spectra", "cost", f"tensorboard --logdir {tmp_path}"):
        assert word in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    (picture,) = tmp_path.rglob("dynamon.png")
    assert picture.stat().st_size > 20_000
    tags = EventAccumulator(str(picture.parent)).Reload().Tags()["scalars"]
    assert {"sharpness/stability_ratio", "noise/dual_median", "lr/ratio_median", "validation/loss"} <= set(tags)


@pytest.mark.slow
def test_without_adaptive_rates(tmp_path: Path) -> None:
    done = run("--steps", 40, "--budget", 1.0, "--logdir", tmp_path, "--no-adaptive", "--seed", 3)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rate x" not in done.stdout and "steering" not in done.stdout


def test_a_run_that_falls_short_says_why(tmp_path: Path) -> None:
    done = run("--steps", 8, "--budget", 0.0001, "--logdir", tmp_path)
    assert done.returncode == 1
    assert "dynamon demo fell short: 0 sharpness points, 1 were expected." in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--steps", "5000", "--logdir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.rglob("events.*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr[-2000:]
    assert "stopped early by Ctrl-C" in stdout and "Traceback" not in stderr
    assert list(tmp_path.rglob("dynamon.png"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--steps", "0"], "must be 1 or more, got 0"),
        (["demo", "--budget", "-1"], "must be positive, got -1"),
        (["demo", "--preset", "lavish"], "invalid choice: 'lavish'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_budget_of_two_percent_holds(tmp_path: Path) -> None:
    """Where one reading of sharpness is dearer than two percent of such a run, it ends without one, and says so."""
    done = run("--steps", 600, "--budget", 0.02, "--logdir", tmp_path)
    short = [line for line in done.stderr.splitlines() if line.startswith("dynamon demo fell short")]
    dear = "dynamon demo fell short: 0 sharpness points, 1 were expected."
    assert short in ([], [dear]) and done.returncode == len(short), done.stdout + done.stderr[-2000:]
    assert "(budget 2%)" in done.stdout


@pytest.mark.slow
def test_the_full_demo_keeps_its_promise(tmp_path: Path) -> None:
    """How long it takes is up to the machine, and nothing that it could fall short of."""
    done = run("--logdir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_being_slow_is_no_shortfall() -> None:
    def points(number: int, width: int = 0) -> Series:
        return Series(np.arange(number), np.ones((number, width) if width else number), ("a", "b")[:width] or None)

    def found(sharpness: int, noise: int, overhead: float) -> list[str]:
        history = {"sharpness/stability_ratio": points(sharpness), "noise/dual": points(noise, 2)}
        history["spectrum/sigma_max"] = points(1, 2)
        monitor = SimpleNamespace(history=history, overhead=overhead)
        return shortfalls(Namespace(steps=750, budget=0.35), monitor)

    assert found(5, 20, 0.37) == []
    assert [len(found(*case)) for case in ((4, 20, 0.3), (5, 19, 0.3), (5, 20, 0.39))] == [1, 1, 1]
