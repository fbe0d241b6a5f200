"""The code in the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from dynamon.callbacks import NoiseAdaptiveLR
from tests.helpers import Classifier, batches, mlp

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_first_commands_are_those_of_the_makefile() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_lightning_block_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"model": Classifier(mlp()), "data": batches()}
    exec(BLOCKS[0], names)  # noqa: S102
    assert names["trainer"].global_step == 200
    assert list((tmp_path / "lightning_logs").rglob("events.*"))


def test_the_plain_loop_runs(capsys) -> None:
    torch.manual_seed(0)
    names = {
        "network": mlp(),
        "batches": list(batches(count=512)),
        "loss_fn": lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
    }
    exec(BLOCKS[1], names)  # noqa: S102
    assert min(names["rates"].ratios.values()) < 1
    readings = names["readings"]
    assert 0 < readings["sharpness/stability_ratio"] <= readings["sharpness/stability_ratio_upper"]


def test_the_adaptive_block_runs() -> None:
    names = {"NoiseAdaptiveLR": NoiseAdaptiveLR}
    exec(BLOCKS[2], names)  # noqa: S102
    assert names["steering"].rule.floor == 0.2


def test_the_optimizer_block_runs() -> None:
    names = {"network": mlp()}
    exec(BLOCKS[3], names)  # noqa: S102
    assert names["optimizer"].rates is None


def test_the_norms_block_runs(capsys) -> None:
    names = {"network": mlp()}
    exec(BLOCKS[4], names)  # noqa: S102
    assert "0.weight" in capsys.readouterr().out and names["lower"] <= names["upper"]


def test_the_curvature_block_runs(capsys) -> None:
    inputs, labels = next(iter(batches()))
    exec(BLOCKS[5], {"network": mlp(), "inputs": inputs, "labels": labels, "cross_entropy": cross_entropy})  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "double_backward" in lines[0] and "True" in lines[0]


def test_the_picture_is_there() -> None:
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / image).read_bytes()[:4] == b"\x89PNG"
