"""The benchmark of faults: what is injected, what counts as named, what the other detectors are."""

import math
import sys

import numpy as np
import pytest
import torch

from benchmarks.environment import RESULTS
from benchmarks.faults import tables
from benchmarks.faults.book import Book
from benchmarks.faults.fit import fit
from benchmarks.faults.injected import KINDS, kinds_of, onset_of, stream
from benchmarks.faults.plan import FULL, rate_of, set_strengths
from benchmarks.faults.reference import sigma_alarms, spike_alarms, step_of_the_loss
from benchmarks.faults.score import Results, count_alarms, judge, judge_reference, read
from benchmarks.faults.subjects import (
    REPORTED,
    REPORTED_SEEDS,
    SCHEDULES,
    SUBJECTS,
    TUNING,
    TUNING_SEEDS,
    is_reported,
)

sys.path.insert(0, str(RESULTS.parents[1] / "docs"))
import generated  # noqa: E402

LSTM, GPT = SUBJECTS["LSTM"], SUBJECTS["GPT"]


def finding(rule="spike/gradient", step=100, known=109, layers=(), severity="note"):
    return {"rule": rule, "severity": severity, "step": step, "known": known, "layers": list(layers)}


def run(*findings, loss=None, spikes=(), sigmas=()):
    return {"findings": list(findings), "loss": loss, "SpikeDetection": list(spikes), "three sigma": list(sigmas)}


def test_what_is_tuned_on_is_not_reported():
    assert not set(TUNING) & set(REPORTED) and not set(TUNING_SEEDS) & set(REPORTED_SEEDS)
    assert FULL.seeds[is_reported("GPT")] == REPORTED_SEEDS and FULL.seeds[is_reported("MLP")] == TUNING_SEEDS
    for name in TUNING:
        assert type(SUBJECTS[name].make(2)).__name__ != "LSTMBytes"


@pytest.mark.parametrize("name", SUBJECTS)
def test_layers_at_fault_exist(name):
    subject = SUBJECTS[name]
    names = dict(subject.make(2).model(0).named_parameters())
    functions = {"relu", "relu_2", "lstm.layer.0"}  # called, in a forward pass
    assert {layer for layers in subject.layers.values() for layer in layers} <= set(names) | functions
    assert {kind.name for kind in kinds_of(subject)} >= {"labels", "rate", "moments", "bf16", "frozen", "nan"}


@pytest.mark.parametrize("kind", ["labels", "scale", "token", "nan", "repeat"])
@pytest.mark.parametrize("subject", ["LSTM", "pixels"])
def test_data_are_as_they_were_before_a_fault(kind, subject):
    def batches():
        generator = torch.Generator().manual_seed(0)
        while True:
            if subject == "LSTM":
                yield torch.randint(256, (2, 9), generator=generator), torch.randint(256, (2, 9), generator=generator)
            else:
                yield torch.rand(4, 1, 3, 3, generator=generator), torch.randint(10, (4,), generator=generator)

    fault = KINDS[kind](LSTM, 3, 2.0)
    pairs = list(zip(stream(batches(), None, 8), stream(batches(), fault, 8), strict=True))
    alike = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    last = {"labels": 5, "token": 5, "scale": 4, "nan": 4, "repeat": 8}[kind]
    wanted = [not 3 <= step < last for step in range(8)]
    assert alike == (wanted if kind != "repeat" else [True] * 4 + [False] * 4)
    (inputs, targets, weights), (bad_inputs, bad_targets, bad_weights) = pairs[3]
    if kind == "labels":
        assert torch.equal(targets.flatten().sort()[0], bad_targets.flatten().sort()[0])
    if kind == "token":
        assert torch.equal(bad_inputs[:1].expand_as(bad_inputs), bad_inputs) and len(bad_targets.unique()) == 1
    if kind == "scale":
        changed, before = (bad_weights, weights) if subject == "LSTM" else (bad_inputs, inputs)
        assert torch.equal(changed, 2 * before)
    if kind == "nan":
        spoiled = bad_weights if subject == "LSTM" else bad_inputs
        assert spoiled[0].isnan().all() and spoiled[1:].isfinite().all()
    if kind == "repeat":
        assert all(torch.equal(pair[1][0], pairs[3][0][0]) for pair in pairs[3:])


def test_faults_of_weights_and_optimizers():
    network = GPT.make(2).model(0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    network(torch.randint(256, (2, 9))).sum().backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    moment = optimizer.state[network.get_parameter("blocks.1.up.weight")]["exp_avg"].clone()
    for kind in ("moments", "logits"):
        fault = KINDS[kind](GPT, 5, 0.5)
        fault.before(4, network, optimizer)
        assert all(torch.equal(before[name], p) for name, p in network.named_parameters())
        fault.before(5, network, optimizer)
    assert torch.equal(optimizer.state[network.get_parameter("blocks.1.up.weight")]["exp_avg"], 0.5 * moment)
    changed = [name for name, p in network.named_parameters() if not torch.equal(before[name], p)]
    assert changed == ["blocks.1.qkv.weight"]
    grown = network.get_parameter("blocks.1.qkv.weight") / before["blocks.1.qkv.weight"]
    assert torch.allclose(grown[:64], torch.tensor(1.5)) and torch.equal(grown[64:], torch.ones(32, 32))
    frozen = KINDS["frozen"](GPT, 5, 2)
    frozen.after_backward(5, network)
    assert [name for name, p in network.named_parameters() if p.grad is None] == ["embedding.weight", "head.weight"]
    assert KINDS["clipping"](GPT, 5, 1e-6).clip(5, 1.0) == 1e-6 and KINDS["clipping"](GPT, 5, 1e-6).clip(4, 1.0) == 1
    assert [KINDS["rate"](GPT, 5, 4.0).rate(step) for step in (4, 5, 300)] == [1.0, 4.0, 4.0]


def test_a_fault_is_seen_where_it_is():
    fault = KINDS["nan"](LSTM, 12, 1.0)
    found = fit(LSTM, 0.01, 0, 30, fault=fault, row="every 10 steps", batch=2)
    assert found["final"] is None and found["loss"] == 12
    assert found["three sigma"] == found["SpikeDetection"] == list(range(12, 30))
    steps = {one["rule"]: one["step"] for one in found["findings"]}
    assert 12 <= steps["gradient/nonfinite"] <= 20
    healthy = fit(LSTM, 0.01, 0, 10, row="every 10 steps", batch=2)
    assert healthy["findings"] == [] and math.isfinite(healthy["final"])


def test_a_finding_counts_if_step_and_layer_are_right():
    fault = KINDS["moments"](LSTM, 100, 4.0)
    (layer,) = fault.layers
    right, wrong = finding(layers=[f"network.{layer}"]), finding(layers=["network.head.weight"])
    assert judge(fault, run(right), run()).is_named
    assert judge(fault, run(right), run()).rule == "spike/gradient" and judge(fault, run(right), run()).known == 9
    assert not judge(fault, run(wrong), run()).is_named and judge(fault, run(wrong), run()).layer is False
    assert judge(fault, run(wrong, right), run()).layer is True  # one that is right suffices
    assert judge(fault, run(finding(layers=["network.lstm"])), run()).layer is True  # its module
    assert judge(fault, run(finding(layers=["network.lst"])), run()).layer is False
    assert judge(fault, run(finding()), run()).layer is False
    for step, is_right in ((97, False), (98, True), (120, True), (121, False)):
        late = judge(fault, run(finding(step=step, layers=[layer])), run())
        assert late.is_named == is_right and (is_right or late.others == ("spike/gradient",))
    assert judge(fault, run(right), run(finding(step=149))).rule is None  # the healthy run has it too
    assert judge(fault, run(right), run(finding(step=150))).is_named
    assert judge(fault, run(right), run(finding("other", 100))).is_named
    whole = KINDS["labels"](LSTM, 100, 4.0)
    assert judge(whole, run(wrong), run()).is_named and judge(whole, run(wrong), run()).layer is None


def test_which_comes_first():
    fault = KINDS["labels"](LSTM, 100, 4.0)
    assert judge(fault, run(finding(known=109), loss=109), run()).is_first
    assert not judge(fault, run(finding(known=109), loss=108), run()).is_first
    assert judge(fault, run(finding(known=109)), run()).is_first
    assert judge_reference(fault, run(sigmas=[40, 103]), run(sigmas=[40]), "three sigma").stated == 3
    assert judge_reference(fault, run(sigmas=[103]), run(sigmas=[103]), "three sigma").rule is None


def test_alarms_are_counted_apart():
    steps = [finding(step=step) for step in (0, 49, 98, 150)] + [finding("other", 49)]
    assert count_alarms(steps) == {"spike/gradient": 3, "other": 1}


def test_lightnings_detector_is_its_own():
    losses = [1.0] * 20 + [2.9, 4.0] + [1.0] * 5 + [math.nan, 1.0]
    assert spike_alarms(losses) == [21, 27]  # above three times the mean of ten, which 2.9 has raised


def test_three_standard_deviations():
    rng = np.random.default_rng(0)
    norms = rng.normal(10, 1, size=400)
    norms[300], norms[350] = 20, math.inf
    wanted = []
    for step in range(400):
        past = norms[max(0, step - 100) : step]
        past = past[np.isfinite(past)]
        if step >= 20 and norms[step] > past.mean() + 3 * past.std(ddof=1):
            wanted.append(step)
    assert set(wanted) ^ set(sigma_alarms(norms.tolist())) <= set(range(351, 400))  # where the window has lost one
    assert {300, 350} <= set(sigma_alarms(norms.tolist()))


def test_where_the_loss_leaves_its_level():
    losses = np.random.default_rng(0).normal(2, 0.1, size=300)
    assert step_of_the_loss(losses.tolist(), 200) is None or step_of_the_loss(losses.tolist(), 200) > 220
    losses[200] = 9
    assert step_of_the_loss(losses.tolist(), 200) != 200  # one batch is no level
    losses[200:] += 1
    assert step_of_the_loss(losses.tolist(), 200) == 202
    assert step_of_the_loss([*losses[:200], *([math.nan] * 9)], 200) == 200


def test_strength_is_the_weakest_that_costs_two_percent(monkeypatch):
    tried = []

    def fake(subject, rate, seed, steps, *, fault=None, **options):
        tried.append(getattr(fault, "strength", 0))
        return {"final": 1.0 if fault is None else 1 + 0.006 * fault.strength + 0.001 * (seed % 2)}

    monkeypatch.setattr("benchmarks.faults.plan.fit", fake)
    book = Book(None)
    set_strengths(book, LSTM, FULL, ())
    found = book.sections["strengths"]["LSTM|labels"]
    assert found["strength"] == 4 and found["reached"] and found["rise"] == pytest.approx(0.0245)
    assert 16 in tried and 64 in tried  # the strongest first, then halves
    assert not book.sections["strengths"]["LSTM|clipping"]["reached"]
    assert rate_of(book, LSTM, FULL) == book.sections["rates"]["LSTM|AdamW"]


def test_a_book_goes_on_where_it_was(tmp_path):
    first = Book(tmp_path / "found.json")
    assert first.get("rates", "a", lambda: 1.0) == 1.0
    second = Book(tmp_path / "found.json")
    assert second.get("rates", "a", lambda: 2.0) == 1.0
    first.get("rates", "b", lambda: 3.0)
    assert second.get("rates", "b", lambda: 4.0) == 4.0  # read when it began
    second.forget("rates")
    assert Book(tmp_path / "found.json").sections["rates"] == {}


def test_schedules():
    for factor in SCHEDULES.values():
        values = [factor(step, 1000) for step in range(1000)]
        assert 0 <= min(values) and max(values) == 1
    assert SCHEDULES["warm restarts"](249, 1000) < 1e-4 and SCHEDULES["warm restarts"](250, 1000) == 1


def test_onsets_differ_by_seed():
    assert onset_of(KINDS["rate"], 0, 300) == 150 and onset_of(KINDS["rate"], 1, 300) == 157
    assert onset_of(KINDS["bf16"], 1, 300) == 0


def test_summary_of_known_runs():
    faults = {
        "every 10 steps|LSTM|none|0": run(),
        "every 10 steps|LSTM|nan|0": run(finding(step=150, known=159), loss=152, spikes=[150]) | {"onset": 150},
        "every 10 steps|LSTM|labels|0": run(finding(step=300)) | {"onset": 150},
    }
    strengths = {f"LSTM|{kind}": {"strength": 1.0, "reached": True, "rise": 0.5} for kind in ("nan", "labels")}
    healthy = {
        "every 10 steps|LSTM|SGD|constant|8": run(finding(step=9), finding(step=400, severity="warning"), sigmas=[1, 2])
        | {"steps": 1000}
    }
    rows = list(
        tables.summary_rows(Results({"faults": faults, "strengths": strengths, "healthy": healthy, "rates": {}}))
    )
    assert [row[1:] for row in rows] == [
        (
            "1 of 2 (50%)",
            "1 of 2 (50%); without notes 0",
            "1 of 2 (50%)",
            "9",
            "0 of 1 (0%)",
            "2 in 1,000 steps: 20.0; without notes 10.0",
        ),
        ("1 of 2 (50%)", "names no layer", "1 of 2 (50%)", "0", "1 of 1 (100%)", "0 in 1,000 steps: 0.0"),
        ("0 of 2 (0%)", "names no layer", "0 of 2 (0%)", "", "none", "1 in 1,000 steps: 10.0"),
    ]
    (nan,) = [
        row
        for row in tables.fault_rows(
            Results({"faults": faults, "strengths": strengths, "healthy": {}}), "every 10 steps"
        )
        if row[0].startswith("nan")
    ]
    assert nan == ("nan, LSTM", "1 of 1", "`spike/gradient`", "+0", "+9", "+2", "")


def test_the_results_that_are_kept_can_be_read():
    found = read(RESULTS / "faults.json")
    verdicts = found.verdicts("every 10 steps", list(REPORTED))
    for (subject, kind), each in verdicts.items():
        assert subject in REPORTED and kind in KINDS and 1 <= len(each) <= len(REPORTED_SEEDS)
    assert list(tables.summary_rows(found))
    assert len(list(tables.fault_rows(found, "every 10 steps"))) == len(verdicts)
    assert len(list(tables.strength_rows(found))) == len(KINDS)
    page = generated.fault_tables()
    assert all(f"| {cell} |" in page for row in tables.summary_rows(found) for cell in row if cell)
