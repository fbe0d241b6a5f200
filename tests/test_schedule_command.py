"""``dynamon schedule`` on real runs, with both loggers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from dynamon.callbacks import GradientMonitor
from dynamon.cli import main
from dynamon.runs import read_run
from dynamon.schedule import refined_schedule
from tests.helpers import Classifier, fit, mlp

OPTIMIZERS = {"adam": lambda p: torch.optim.AdamW(p, lr=1e-2), "sgd": lambda p: torch.optim.SGD(p, lr=0.1)}
STEPS = 120


class Norms(Callback):
    """The l1 and l2 norm of the whole gradient, in float64."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"l1": [], "l2": []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        whole = torch.cat([p.grad.double().flatten() for p in pl_module.parameters()])
        self.seen["l1"].append(float(whole.abs().sum()))
        self.seen["l2"].append(float(whole.norm()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    root, seen = tmp_path_factory.mktemp("runs"), {}
    for name, optimizer in OPTIMIZERS.items():
        norms = Norms()
        loggers = [CSVLogger(root, name=name, version="csv"), TensorBoardLogger(root, name=name, version="tb")]
        callbacks = [GradientMonitor(every_n_steps=4), norms]
        fit(Classifier(mlp(), optimizer=optimizer), callbacks, logger=loggers, steps=STEPS, max_epochs=-1)
        seen[name] = norms.seen
    return root, seen


def expected(norms, norm):
    return refined_schedule(norms[norm][::4], norm=norm, steps=range(0, STEPS, 4), total=STEPS)


@pytest.mark.parametrize("logger", ["tb", "csv"])
@pytest.mark.parametrize(("name", "norm"), [("adam", "l1"), ("sgd", "l2")])
def test_the_norm_fits_the_optimizer_and_the_factors_are_those_of_the_gradients(
    runs, logger, name, norm, tmp_path, capsys
) -> None:
    root, seen = runs
    output, picture = tmp_path / "schedule.npy", tmp_path / "schedule.png"
    assert main(["schedule", str(root / name / logger), "--output", str(output), "--plot", str(picture)]) == 0
    np.testing.assert_allclose(np.load(output), expected(seen[name], norm), rtol=1e-4, atol=1e-7)
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert f"{STEPS} steps, from 30 readings of gradient/norm" in text and f"norm          {norm}: " in text
    peak = int(np.argmax(np.load(output)))
    assert f"ends at step {peak} (" in text
    rows = re.findall(r"^ +(\d+)% +([\d.]+) +([\d.]+)$", text, re.M)
    assert [int(row[0]) for row in rows] == list(range(0, 101, 10)) and rows[-1][1:] == ("0.000", "0.000")
    assert float(rows[5][1]) == pytest.approx(np.load(output)[60], abs=5e-4)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".json"])
def test_the_lines_it_prints_make_a_scheduler(runs, suffix, tmp_path, capsys) -> None:
    root, seen = runs
    output = tmp_path / f"factors{suffix}"
    assert main(["schedule", str(root / "sgd" / "csv"), "--output", str(output)]) == 0
    lines = re.findall(r"^    (.*)$", capsys.readouterr().out.split("any length:")[1], re.M)
    names = {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}
    exec("\n".join(lines), names)  # noqa: S102
    np.testing.assert_allclose(names["factors"], expected(seen["sgd"], "l2"), rtol=1e-4, atol=1e-7)
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(names["factors"][0])


def test_the_norm_can_be_asked_for(runs, capsys) -> None:
    root, _ = runs
    assert main(["schedule", str(root / "adam" / "tb"), "--norm", "l2"]) == 0
    assert "readings of gradient/norm\n" in capsys.readouterr().out
    assert main(["schedule", str(root / "sgd" / "tb"), "--norm", "l1"]) == 0
    assert "readings of gradient/norm_l1\n" in capsys.readouterr().out


def write(folder: Path, values, tag="gradient/norm", last=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"step,{tag},train/loss", *(f"{4 * i},{v},0.5" for i, v in enumerate(values))]
    (folder / "metrics.csv").write_text("\n".join([*lines, *([f"{last},,0.5"] if last else [])]) + "\n")
    return folder


def test_without_dual_norms_the_l2_norm_serves(tmp_path, capsys) -> None:
    values = [*np.random.default_rng(0).lognormal(size=30), "nan", 0.0, "inf"]
    run = write(tmp_path, values, last=150)
    assert main(["schedule", str(run), "--output", str(tmp_path / "s.json")]) == 0
    text = capsys.readouterr().out
    assert "l2: gradient/norm_l1 was not logged" in text
    assert "151 steps, from 30 readings of gradient/norm, 3 more were zero or not finite" in text
    steps, total = range(0, 120, 4), 151  # what was logged last ends the run
    expected = refined_schedule(values[:30], steps=steps, total=total)
    np.testing.assert_allclose(json.loads((tmp_path / "s.json").read_text()), expected, rtol=1e-12)


def test_errors(tmp_path, capsys, monkeypatch) -> None:
    def says(*arguments, status=2):
        assert main(["schedule", *map(str, arguments)]) == status
        captured = capsys.readouterr()
        assert captured.err.startswith("dynamon schedule: ") and captured.err.count("\n") == 1 and not captured.out
        return captured.err

    run = write(tmp_path / "good", [1.0] * 20)
    assert "nowhere is not a folder" in says(tmp_path / "nowhere")
    other = write(tmp_path / "other", [1.0] * 20, tag="grad_norm")
    assert "holds no gradient/norm. It holds: grad_norm, train/loss. Add GradientMonitor()" in says(other)
    assert "holds no gradient/norm_l1" in says(run, "--norm", "l1")
    few = write(tmp_path / "few", [1.0] * 9 + ["nan"] * 5)
    assert "9 readings of gradient/norm that are finite and not zero, and it takes 10" in says(few)
    assert "s.png cannot be opened: No such file or directory" in says(run, "--plot", tmp_path / "missing" / "s.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs matplotlib: pip install 'lightning-dynamon[demo]'" in says(run, "--plot", tmp_path / "s.png")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--output", "s.txt", "must end in .npy, .json, .csv, got 's.txt'"), ("--plot", "s.jpg", "must end in .png")],
)
def test_files_of_another_kind(option, value, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["schedule", "run", option, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_resumed_run_in_two_event_files(tmp_path) -> None:
    """The second file, from a checkpoint before the end of the first, counts from where it begins."""
    monitors = []
    for steps in (60, 100):
        monitors.append(GradientMonitor(every_n_steps=2))
        logger = TensorBoardLogger(tmp_path, name=None, version="tb")
        fit(Classifier(mlp()), [monitors[-1]], logger=logger, steps=steps, max_epochs=-1)
    assert len(list((tmp_path / "tb").glob("*tfevents*"))) == 2
    series = read_run(tmp_path / "tb")["gradient/norm"]
    second = monitors[1].history["gradient/norm"]
    np.testing.assert_array_equal(series.steps, second.steps)
    np.testing.assert_allclose(series.values, second.values, rtol=1e-6)
    assert main(["schedule", str(tmp_path / "tb")]) == 0


def test_the_program(runs) -> None:
    root, _ = runs
    command = [sys.executable, "-m", "dynamon.cli", "schedule", str(root / "adam" / "csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "give --output schedule.npy" in done.stdout and not done.stderr
