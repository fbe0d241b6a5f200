"""``dynamon demo`` from the command line."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynamon.cli import demo, main, plots
from dynamon.cli.demo_plan import FEWEST_STEPS, MOST_STEPS, SIZES, Plan, make_plan, thread_counts
from dynamon.cli.demo_summary import Outcome, shortfalls, summary
from dynamon.runs.history import Series

COMMAND = [sys.executable, "-m", "dynamon.cli", "demo"]
SMALL = ("--size", "small", "--threads", 1)
PROMISED = ("sharpness/stability_ratio", "noise/dual", "progress/decrease", "spectrum/sigma_max")


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, **more)


def losses(logdir: Path) -> list[float]:
    (picture,) = logdir.rglob("dynamon.png")
    return [point.value for point in EventAccumulator(str(picture.parent)).Reload().Scalars("train/loss")]


def test_a_short_run_ends_with_summary_picture_and_event_files(tmp_path: Path) -> None:
    done = run("--steps", 60, *SMALL, "--budget", 1.0, "--logdir", tmp_path, "--preset", "standard")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "60 steps of 8 x 128 bytes" in done.stdout and "timing" not in done.stdout
    for word in (
        "loss",
        "stability",
        "noisiest",
        "quietest",
        "spectra",
        "progress",
        "cost",
        f"tensorboard --logdir {tmp_path}",
    ):
        assert word in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    (picture,) = tmp_path.rglob("dynamon.png")
    assert picture.stat().st_size > 20_000
    tags = EventAccumulator(str(picture.parent)).Reload().Tags()["scalars"]
    assert {"sharpness/stability_ratio", "noise/dual_median", "lr/ratio_median", "validation/loss"} <= set(tags)


def test_with_steps_given_a_seed_decides_the_training(tmp_path: Path) -> None:
    """Bitwise, whatever is measured; and another seed trains something else."""
    runs = {"a": ["--budget", 0.5], "b": ["--preset", "full", "--budget", 0.1], "c": ["--seed", 1]}
    found = {}
    for name, arguments in runs.items():
        given = ["--steps", 25, *SMALL, "--logdir", tmp_path / name, *arguments]
        assert main(["demo", *map(str, given)]) in (0, 1)  # a small budget may leave a quantity out
        found[name] = losses(tmp_path / name)
    assert len(found["a"]) == 5 and found["a"] == found["b"] != found["c"]


def test_the_length_follows_from_a_measured_step(tmp_path, monkeypatch, capsys, recwarn) -> None:
    """The command that is printed at the end trains the same again, without timing."""
    monkeypatch.setattr("dynamon.cli.demo_plan.FEWEST_STEPS", 30)
    monkeypatch.setattr("dynamon.cli.demo_plan.MOST_STEPS", 40)
    monkeypatch.setattr(demo, "_TRIAL_SECONDS", 0.2)
    threads = torch.get_num_threads()
    assert main(["demo", "--budget", "2", "--logdir", str(tmp_path / "first")]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "timing a step of the full model, 1 thread ..." in told and re.search(
        r"a step takes [\d.]+ s: [34]0 of", told
    )
    (command,) = re.findall(r"again +dynamon (demo --steps [34]0 --size \w+ --threads \d+ --seed 0)$", told, re.M)
    assert main([*command.split(), "--budget", "0.5", "--logdir", str(tmp_path / "second")]) in (0, 1)
    assert "timing" not in capsys.readouterr().out
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert torch.get_num_threads() == threads


# Seconds of a step by size and threads, on machines that are made up.
MACHINES: dict[str, tuple[Callable[[str, int], float], int, str, int]] = {
    "two free cores": (lambda size, n: (0.22 if size == "full" else 0.05) / (1, 1.8)[n - 1], 2, "full", 2),
    "one core": (lambda size, n: 0.22 if size == "full" else 0.05, 1, "full", 1),
    "two cores, one of them busy": (lambda size, n: (0.25 if size == "full" else 0.06) * (1, 8)[n - 1], 2, "full", 1),
    "one slow core": (lambda size, n: 0.9 if size == "full" else 0.2, 1, "small", 1),
    "one very slow core": (lambda size, n: 9.0 if size == "full" else 2.0, 1, "small", 1),
    "many cores": (lambda size, n: 0.2 / min(n, 6) + 0.004 * n, 64, "full", 4),
    "an accelerator": (lambda size, n: 0.004, 1, "full", 1),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("budget", [0.02, 0.35, 1.0])
def test_a_plan_uses_the_time_that_is_left(machine: str, budget: float) -> None:
    cost, available, size, threads = MACHINES[machine]
    clock = [5.0]
    trials = []

    def step_seconds(tried: str, count: int, too_slow: float) -> float:
        seconds = cost(tried, count)
        clock[0] += (1 if seconds > 3 * too_slow else 4) * seconds
        trials.append((tried, count))
        return seconds

    plan = make_plan(step_seconds, list(SIZES), thread_counts(available), lambda: 80 - clock[0], budget)
    assert plan.threads == threads and len(trials) == len(set(trials)) <= 6
    assert plan.step_seconds == cost(plan.size, threads)

    def seconds(steps: int, of: str) -> float:
        validation = 5 * 8 / 3
        return (steps + validation) * cost(of, threads) * (1 + budget)

    if budget < 1:
        assert plan.size == size
    else:
        assert plan.size == "small" or seconds(FEWEST_STEPS, "full") <= 80 - clock[0]
    assert FEWEST_STEPS <= plan.steps <= MOST_STEPS and plan.steps % 10 == 0
    assert plan.steps == FEWEST_STEPS or seconds(plan.steps, plan.size) <= 80 - clock[0]
    assert plan.steps == MOST_STEPS or seconds(plan.steps + 10, plan.size) > 80 - clock[0]


def test_a_plan_keeps_to_what_is_given() -> None:
    plan = make_plan(lambda size, count, too_slow: 0.3, ["full"], [3], lambda: 10.0, 0.35)
    assert plan == Plan("full", 3, FEWEST_STEPS, 0.3)
    assert thread_counts(1) == [1] and thread_counts(2) == [1, 2] and thread_counts(6) == [1, 2, 4, 6]
    assert thread_counts(8) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("seconds", "too_slow", "steps", "mean"),
    [
        ([1.0, *[0.2] * 20], 0.4, 9, 0.2),  # after 1.5 s; its first step does not count
        ([9.0, 2.0, 4.0, 2.0], math.inf, 3, 3.0),
        ([1.0, *[0.2] * 20], 0.3, 1, 1.0),  # cannot come to less
        ([0.5, *[0.001] * 20], 0.4, 20, 0.001),
    ],
)
def test_a_trial_is_as_long_as_it_must_be(seconds, too_slow, steps, mean, monkeypatch) -> None:
    now = [7.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, trainer = demo._Clock(too_slow), SimpleNamespace(should_stop=False)
    taken = 0
    while not trainer.should_stop and taken < demo._MOST_TRIAL_STEPS:
        clock.on_train_batch_start(trainer, None, None, taken)
        now[0] += seconds[taken]
        taken += 1
        clock.on_train_batch_end(trainer, None, None, None, taken)
    assert taken == steps and clock.seconds == pytest.approx(mean)


def test_without_adaptive_rates(tmp_path: Path, capsys) -> None:
    given = ["--steps", 40, *SMALL, "--budget", 1.0, "--logdir", tmp_path, "--no-adaptive", "--seed", 3]
    assert main(["demo", *map(str, given)]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "rate x" not in told and "steering" not in told
    assert "--steps 40 --size small --threads 1 --seed 3 --no-adaptive\n" in told


def test_a_run_that_falls_short_says_why(tmp_path: Path, capsys) -> None:
    """Gradient noise takes two steps."""
    assert main(["demo", "--steps", "1", *map(str, SMALL), "--logdir", str(tmp_path)]) == 1
    sentence = "dynamon demo fell short: no reading of gradient noise (noise/dual): give more --steps"
    assert sentence in capsys.readouterr().err


def outcome(overhead: float = 0.3, losses: Any = None, missing: str = "", fit_seconds: float = 90.0) -> Outcome:
    history = {tag: Series(np.arange(2), np.ones(2)) for tag in PROMISED if tag != missing}
    monitor: Any = SimpleNamespace(history=history, overhead=overhead)
    values = np.linspace(5, 2, 150) if losses is None else np.asarray(losses)
    training = np.arange(len(values)), values
    return Outcome(None, monitor, None, training, training, len(values), fit_seconds + 9, fit_seconds, 0.35, 3.0)


def test_results_can_fall_short_and_speed_can_not() -> None:
    assert list(shortfalls(outcome())) == list(shortfalls(outcome(fit_seconds=10_000.0))) == []
    for tag in PROMISED:
        (sentence,) = shortfalls(outcome(missing=tag))
        assert sentence.startswith("no reading of") and tag in sentence


@pytest.mark.parametrize("noise", [0.1, 20.0])
def test_the_summary_tells_decrease_from_noise(noise: float) -> None:
    layers, means = ("network.blocks.0.down.weight", "network.head.weight"), np.array([3.0, 1.0])
    drawn = means + noise * np.random.default_rng(0).normal(size=(40, 2))
    tables = {
        f"progress/{name}": Series(np.arange(40), drawn, layers)
        for name in ("decrease", "first_order", "curvature_cost")
    }
    run = outcome()
    run.monitor.history, run.monitor.failures = tables, 0  # type: ignore[misc]
    said = "\n".join(summary(run))
    assert "progress      40 readings: a step took" in said
    assert ("Most of it: blocks.0.down 7" in said) == (noise < 1)
    assert ("cannot be told from noise" in said) == (noise > 1)
    assert max(map(len, said.splitlines())) <= 120


def test_a_map_covers_the_run_from_end_to_end() -> None:
    """Cells meet half way between readings."""
    figure = plots._figure(4, 3)
    axes = figure.add_subplot()
    series = Series(np.array([4, 10, 30]), np.ones((3, 2)), ("a", "b"))
    plots._draw_map(figure, axes, series, "label", None, "viridis", "", 40)
    assert axes.get_xlim() == (0, 40)
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 7, 20, 40])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([5.0, 4.0, math.nan, 3.0], "the training loss is not finite at step 2."),
        (np.linspace(2, 5, 150), "did not fall: 2.141 at the beginning, 4.859 at the end."),
        ([3.0] * 5, None),  # too few steps to say
        (5 - np.sin(np.arange(150)) - np.arange(150) / 100, None),
    ],
)
def test_the_loss_must_fall(values: Any, sentence: str | None) -> None:
    found = list(shortfalls(outcome(losses=values)))
    assert found == [] if sentence is None else len(found) == 1 and sentence in found[0]


@pytest.mark.parametrize(
    ("overhead", "training", "holds"),
    [(0.38, 1000, True), (0.55, 1000, False), (0.55, 60, True), (1.0, 60, False), (1.0, 4, True), (1.8, 4, False)],
)
def test_the_budget_must_hold(overhead: float, training: float, holds: bool) -> None:
    """Up to a tenth of it and of the grace, and a reading that takes as long as twenty of the 150 steps."""
    assert holds == (overhead * training <= 1.1 * (0.35 * training + 3) + training * 20 / 150)
    found = list(shortfalls(outcome(overhead=overhead, fit_seconds=training * (1 + overhead))))
    assert found == [] if holds else len(found) == 1 and "; 35% of training and 3 s allow" in found[0]


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


@pytest.mark.parametrize("when", ["_step_seconds", "_train"])
def test_ctrl_c_outside_of_training(when, tmp_path, monkeypatch, capsys) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, when, interrupt)
    arguments = ["--steps", "5"] if when == "_train" else []
    assert main(["demo", "--logdir", str(tmp_path), *arguments]) == 130
    assert capsys.readouterr().err == "dynamon demo: stopped by Ctrl-C.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--steps", "0"], "must be a whole number, 1 or more, got 0"),
        (["demo", "--steps", "many"], "must be a whole number, 1 or more, got many"),
        (["demo", "--threads", "1.5"], "must be a whole number, 1 or more, got 1.5"),
        (["demo", "--budget", "-1"], "must be a positive number, got -1"),
        (["demo", "--budget", "nan"], "must be a positive number, got nan"),
        (["demo", "--budget", "little"], "must be a positive number, got little"),
        (["demo", "--preset", "lavish"], "invalid choice: 'lavish'"),
        (["demo", "--size", "huge"], "invalid choice: 'huge'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], sentence: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_refusals_end_with_status_2(tmp_path, monkeypatch, capsys) -> None:
    def says(*arguments: object) -> str:
        assert main(["demo", "--steps", "5", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dynamon demo: ")
        return line

    (tmp_path / "file").write_text("")
    assert "there is a file where a folder is needed" in says("--logdir", tmp_path / "file")
    assert "there is a file where a folder is needed" in says("--logdir", tmp_path / "file" / "below")
    assert "abacus" in says("--logdir", tmp_path, "--accelerator", "abacus")
    if not torch.cuda.is_available():
        assert "No supported gpu backend found" in says("--logdir", tmp_path, "--accelerator", "gpu")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert "run it with an interpreter that ships its library as source." in says("--logdir", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs matplotlib: pip install 'lightning-dynamon[demo]'" in says("--logdir", tmp_path)


@pytest.mark.slow
def test_the_budget_of_two_percent_holds(tmp_path: Path) -> None:
    done = run("--steps", 400, *SMALL, "--budget", 0.02, "--logdir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "(budget 2% and " in done.stdout


@contextmanager
def busy_loop() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
@pytest.mark.parametrize("harsh", [False, True], ids=["all cores", "one core, shared with a busy loop"])
def test_the_full_demo_keeps_its_promise(tmp_path: Path, harsh: bool) -> None:
    """How long it takes is up to the machine; what it shows is not."""
    cores = os.sched_getaffinity(0)
    try:
        if harsh:
            os.sched_setaffinity(0, {min(cores)})
        with busy_loop() if harsh else contextmanager(lambda: iter([None]))():
            done = run("--logdir", tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    steps = int(re.search(r"^(\d+) steps in", done.stdout, re.M)[1])
    readings = int(re.search(r"^ +(\d+) readings where the preset", done.stdout, re.M)[1])
    spent = float(re.search(r"monitoring took ([\d.]+)%", done.stdout)[1])
    assert FEWEST_STEPS <= steps <= MOST_STEPS
    assert readings >= 5 or spent >= 25, done.stdout  # a budget that is not used must not leave the picture empty
