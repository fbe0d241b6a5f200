"""The table of the guard's benchmark: from runs by hand to cells, and from the committed file to the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.environment import RESULTS
from benchmarks.guard import ARMS, REPORTED, ZClip, compared, key_of, mean_of, rows, setups, spoiled, tasks

DOCS = Path(__file__).parents[1] / "docs"


def test_rows_hold_means_lost_runs_and_paired_intervals():
    name, chosen = "GPT, AdamW", {"rate": 0.003, "norm": 1.0, "clip token 1": 0.5, "clip  16": 0.25}
    losses = {arm: [3.0 + 0.1 * seed - 0.2 * ARMS.index(arm) * (seed + 1) for seed in REPORTED] for arm in ARMS}
    runs = {
        key_of(name, "token", arm, 0.5, 0.003, seed): loss
        for arm, own in losses.items()
        for seed, loss in zip(REPORTED, own, strict=True)
    }
    (row,) = rows({"chosen": {name: chosen}, "runs": runs})  # the other set-ups have not run
    assert row[:3] == (name, "bad batches: token", f"{np.mean(losses['none']):.4f}")
    gains = 100 * (1 - np.array(losses["SpikeClipper"]) / np.array(losses["none"]))
    low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
    assert row[6] == f"{gains.mean():+.2f} ± {(high - low) / 2:.2f} %"
    assert len(row) == 9
    assert mean_of([1.0, math.inf, 3.0]) == "2.0000, 1 lost" and mean_of([math.inf]) == "all lost"
    assert compared([1.0, math.inf, 1.0], [1.0, 1.0, 1.0]) == ""


def test_zclip_is_the_published_rule():
    """Equation by equation: mean and variance of a warm-up, then exponential ones; z becomes its threshold over z."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model = nn.ParameterList([weight])
    zclip = ZClip(model, decay=0.9, threshold=2.0, warmup=4)
    norms = [1.0, 1.2, 0.9, 1.1, 1.0, 50.0, 1.05]
    used = []
    for norm in norms:
        weight.grad = torch.tensor([norm, 0.0, 0.0], dtype=torch.float64)
        zclip.clip()
        used.append(float(weight.grad.norm()))
    mean, variance = np.mean(norms[:4]), np.var(norms[:4])
    for norm, own in zip(norms[4:], used[4:], strict=True):
        z = (norm - mean) / np.sqrt(variance)
        expected = mean + 2.0**2 / z * np.sqrt(variance) if z > 2.0 else norm
        assert own == pytest.approx(expected, rel=1e-4)
        mean = 0.9 * mean + 0.1 * expected
        variance = 0.9 * variance + 0.1 * (expected - mean) ** 2
    assert used[5] < 1.5


@pytest.mark.parametrize("kind", ["labels", "scale", "token"])
def test_bad_batches(kind):
    inputs, targets = torch.randint(1, 200, (4, 8)), torch.randint(200, (4, 8))
    found = spoiled((inputs, targets), kind, torch.Generator().manual_seed(0))
    assert found[0].shape == inputs.shape and found[1].shape == targets.shape
    if kind == "labels":
        assert torch.equal(found[0], inputs) and not torch.equal(found[1], targets)
        assert torch.equal(found[1].flatten().sort()[0], targets.flatten().sort()[0])
    if kind == "scale":
        assert torch.equal(found[0], 10 * inputs) and torch.equal(found[1], targets)
    if kind == "token":
        assert len(torch.cat([found[0], found[1]]).unique()) == 1


def test_the_committed_runs_make_the_table_of_the_page():
    found = json.loads((RESULTS / "guard.json").read_text())
    assert found["chosen"].keys() == tasks().keys()
    table = rows(found)
    assert len(table) >= 6 and all(len(row) == 9 for row in table)
    complete = {name: [s for s in setups(name) if f"clip {s[0]} {s[1]:g}" in found["chosen"][name]] for name in tasks()}
    assert all(complete.values())
    assert "generated/guard.md" in (DOCS / "guard.md").read_text()
