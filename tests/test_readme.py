"""The README is short, and its code and figures are true."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dynamon.cli import main
from dynamon.quantities import REGISTRY
from tests.helpers import Classifier, batches, mlp

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_it_is_read_in_two_minutes() -> None:
    assert len(TEXT.splitlines()) <= 100 and len(TEXT.split()) <= 700


def test_the_first_commands_are_those_of_the_makefile() -> None:
    assert TEXT.index("make demo") < TEXT.index("make test") < TEXT.index("```python")
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_first_example_shows_something(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    block, *others = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert others == [] and "LR(" not in block, "the first example is the monitor alone"
    names = {"model": Classifier(mlp()), "data": batches()}
    exec(block, names)  # noqa: S102
    assert names["trainer"].global_step == 200
    for tag in ("sharpness/stability_ratio", "gradient/norm", "update/ratio", "spectrum/sigma_max"):
        assert len(names["monitor"].history[tag]) >= 15, tag
    assert list((tmp_path / "lightning_logs").rglob("events.*"))
    commands = [line.partition("#")[0] for line in TEXT.splitlines() if line.startswith(("dynamon ", "tensorboard "))]
    report = next(shlex.split(line) for line in commands if line.startswith("dynamon report"))
    assert main(report[1:]) == 0 and (tmp_path / "report.html").exists()


def test_costs_are_those_of_the_benchmark() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "monitoring_cost.json").read_text())
    assert f"measured on {found['environment']['date']}" in TEXT
    rows = {"gradient": "gradients and noise", "weight": "weights, updates and spectra", "activations": "activations"}
    for case, row in {**rows, "stability ratio": "stability ratio"}.items():
        stated = re.search(rf"^\| {row} \| ([\d.]+) \|$", TEXT, re.M)
        assert stated is not None, row
        assert float(stated[1]) == pytest.approx(found["results"][case]["steps a reading"], rel=0.05), row


def test_tags_exist() -> None:
    named = re.findall(r"`([a-z]+/[a-z_]+)`", TEXT)
    assert len(named) >= 8 and set(named) <= set(REGISTRY)


def test_links_and_pictures_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT)
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / image).read_bytes()[:4] == b"\x89PNG"
