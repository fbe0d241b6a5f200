"""The study of rates: its search, its statistics and its text, on runs whose losses are known."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.environment import RESULTS
from benchmarks.rates_study import book as books
from benchmarks.rates_study.arms import Observed, inverted, permuted, progress_by_cost
from benchmarks.rates_study.averages import WINDOW, Averages
from benchmarks.rates_study.book import Book, key_of
from benchmarks.rates_study.corpus import RADII, STUDY, Corpus, split
from benchmarks.rates_study.oracle import search
from benchmarks.rates_study.tables import Results, interval, read
from benchmarks.rates_study.tasks import Digits, GPTBytes, LSTMBytes, Task, tasks, variants
from benchmarks.rates_study.train import train
from benchmarks.rates_study.trials import PROBES, Trials
from dynamon.layers import describe_layers
from dynamon.quantities.progress import StepReading
from dynamon.rates.rule import matches_key

BEST = (2.0, 1.0, 0.25, 1.0, 4.0, 1.0, 0.5, 1.0)  # within what two passes can reach


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book whose runs have the loss of a parabola in the logarithms of the groups' rates."""
    calls = []

    def train(task, arm, rate, seed, ratios, reported):
        calls.append((rate, seed, ratios, reported))
        wanted = [0.1 * best for best in BEST]
        off = [math.log2(rate * r / w) for r, w in zip(ratios or [1.0] * 8, wanted, strict=True)]
        return {"final": round(1 + 0.01 * sum(x * x for x in off) + 0.001 * seed + reported, 6) if rate < 2 else None}

    monkeypatch.setattr(books, "train", train)
    task = GPTBytes("LMO", guess=0.1)
    made = Book(tmp_path / "found.json", {"GPT": task}, ((5, 6), (0, 1, 2)))
    made.calls = calls
    return made


def test_the_search_finds_what_is_best(book):
    assert search(book, "GPT", 0.1) == BEST
    assert {seed for _, seed, _, _ in book.calls} == {5, 6}  # tuning seeds only


def test_the_best_rate_is_inside_of_the_grid(book):
    rate = book.arm("GPT", "uniform", 1.0)
    tried = sorted({r for r, seed, _, _ in book.calls if seed == 5})
    losses = {r: book.mean("GPT", "fixed", r, ()) for r in tried}
    assert rate == pytest.approx(min(losses, key=losses.get), rel=1e-3)
    assert tried[0] < rate < tried[-1]
    assert tried == pytest.approx([tried[0] * 2 ** (k / 2) for k in range(len(tried))], rel=1e-6)
    assert {(seed, reported) for _, seed, _, reported in book.calls} == {
        *((seed, False) for seed in (5, 6)),
        *((seed, True) for seed in (0, 1, 2)),
    }


def test_what_is_in_the_file_is_not_run_again(book, tmp_path):
    book.arm("GPT", "uniform", 0.1)
    again = Book(tmp_path / "found.json", book.tasks, (book.tuning, book.reported))
    count = len(book.calls)
    again.arm("GPT", "uniform", 0.1)
    assert len(book.calls) == count and again.chosen == book.chosen


def test_two_processes_write_one_file(book, tmp_path):
    other = Book(tmp_path / "found.json", book.tasks, (book.tuning, book.reported))
    book.run("GPT", "fixed", 0.1, 5)
    other.run("GPT", "fixed", 0.2, 5)
    assert len(json.loads((tmp_path / "found.json").read_text())["runs"]) == 2


def test_ratios_of_one_are_the_uniform_arm(book):
    book.arm("GPT", "uniform", 0.1)
    count = len(book.calls)
    book.arm("GPT", "other", 0.1, ratios=(1.0,) * 8)
    assert len(book.calls) == count and book.chosen["GPT"]["other"] == book.chosen["GPT"]["uniform"]


def test_a_lost_run_is_worse_than_any(book):
    assert book.mean("GPT", "fixed", 4.0, ()) == math.inf
    assert json.loads(book._path.read_text())["runs"][key_of("GPT", "fixed", 4.0, 5)]["final"] is None


def test_interval_against_scipy():
    values = [0.3, 0.1, 0.25, -0.05, 0.4]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.upper) == pytest.approx((low, high), rel=1e-12)
    assert interval([0.1]).half == interval([0.1, math.inf]).half == math.inf


def results(uniform, oracle, committed):
    """Results with given final losses by arm on five seeds."""
    losses = {"uniform": ((), uniform), "oracle": ((2.0,), oracle), "committed": ((3.0,), committed)}
    chosen = {"GPT, LMO": {name: {"arm": "fixed", "rate": 0.1, "ratios": list(r)} for name, (r, _) in losses.items()}}
    runs = {
        key_of("GPT, LMO", "fixed", 0.1, seed, r): {"final": finals[seed]}
        for r, finals in losses.values()
        for seed in range(5)
    }
    for ratios, finals in losses.values():
        for rate, more in ((0.05, 0.5), (0.1, 0.0), (0.2, 0.001), (0.4, 0.9)):
            for seed in (100, 101):
                runs[key_of("GPT, LMO", "fixed", rate, seed, ratios)] = {"final": finals[0] + more}
    return Results(runs, chosen)


def test_verdicts():
    uniform = [2.0, 2.1, 2.05, 2.0, 2.1]
    lower = [x - 0.1 for x in uniform]
    near = [x - 0.1 + d for x, d in zip(uniform, (0.01, 0.012, 0.008, 0.009, 0.011), strict=True)]
    assert results(uniform, lower, near).verdict("GPT, LMO").endswith("the bar is passed. Arms that pass: committed.")
    far = [x - 0.1 + d for x, d in zip(uniform, (0.03, 0.022, 0.028, 0.029, 0.021), strict=True)]
    assert results(uniform, lower, far).verdict("GPT, LMO").endswith("the bar is missed.")
    noisy = [x + d for x, d in zip(uniform, (0.1, -0.1, 0.05, -0.1, 0.04), strict=True)]
    assert results(uniform, noisy, near).verdict("GPT, LMO").endswith("the task does not count.")
    assert results(uniform, lower, near).summary().startswith("The bar is passed on 1 of 1 core tasks")
    assert results(uniform, lower, far).summary().startswith("The bar is passed on 0 of 1 core tasks")
    assert results(uniform, noisy, near).summary().startswith("The bar is passed on 0 of 0 core tasks")
    assert results(lower, uniform, uniform).summary().count(" on GPT, LMO (0.1000 ± 0.0000)") == 2  # both are worse


def test_differences_are_paired_by_seed():
    found = results([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 1.5, 2.5, 3.5, 4.5], [1.0] * 5)
    assert found.gap("GPT, LMO").mean == pytest.approx(0.5) and found.gap("GPT, LMO").half == pytest.approx(
        0, abs=1e-12
    )


def test_an_arm_on_fewer_seeds_is_compared_on_those():
    found = results([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 1.4, 2.5, 3.5, 4.5], [1.0] * 5)
    for seed in (0, 2, 4):
        del found.runs[key_of("GPT, LMO", "fixed", 0.1, seed, (2.0,))]
    assert found.apart("GPT, LMO", "oracle", "uniform") == pytest.approx([-0.6, -0.5])
    assert [row[0] for row in found.rows("GPT, LMO")] == ["uniform", "oracle (2 seeds)", "committed"]


def test_pilots_are_counted():
    found = results([2.0] * 5, [1.9] * 5, [1.9] * 5)
    assert found.pilots() == []
    for seed, committed in enumerate(([1.0, 1.0], [1.0, 0.5], [1.0, 1.0])):
        found.runs[key_of("GPT, LMO", "inside", 0.1, seed)] = {"final": 2.0, "committed": committed}
    assert found.summary().endswith(" Of 3 pilots inside of runs 1 found a ratio that is certain.")


def test_range_of_good_rates():
    found = results([2.0] * 5, [1.9] * 5, [1.9] * 5)
    assert found.good_rates("GPT, LMO", "uniform") == (0.1, 0.2, True)
    assert found.sweep("GPT, LMO", "uniform") == pytest.approx({0.05: 2.5, 0.1: 2.0, 0.2: 2.001, 0.4: 2.9})


def test_ratios_are_shown_relative_to_their_mean_and_balance_to_the_whole_step():
    chosen = {
        arm: {"arm": "fixed", "rate": 0.1, "ratios": r} for arm, r in (("uniform", []), ("oracle", [4.0] + [1.0] * 7))
    }
    seen = {"progress": [[2.0] + [1.0] * 7] * 4, "cost": [[1.0] * 8] * 4}
    runs = {key_of("GPT, LMO", "observed", 0.1, seed, [1.0] * 8): seen for seed in (100, 101)}
    columns, rows = Results(runs, {"GPT, LMO": chosen}).ratios("GPT, LMO")
    assert columns == ["oracle", "progress by curvature"]
    assert rows[0] == ("embedding", "3.4", "1.8")  # 4 / 4 ** (1 / 8), and 2 * 8 / 9
    assert rows[1] == ("position", "0.84", "0.89")


def test_an_arm_that_was_tuned_on_one_seed_has_a_sweep():
    found = results([2.0] * 5, [1.9] * 5, [1.9] * 5)
    for rate in (0.05, 0.1, 0.2, 0.4):
        del found.runs[key_of("GPT, LMO", "fixed", rate, 101, ())]
    assert found.sweep("GPT, LMO", "uniform") == pytest.approx({0.05: 2.5, 0.1: 2.0, 0.2: 2.001, 0.4: 2.9})


def test_steps_of_lanton_have_the_sizes_of_lanton():
    task = GPTBytes("LMO", width=16, steps=24, batch=2, windows=20)
    assert train(task, "step sizes", 0.03, 0, (), False)["ratios"] == pytest.approx([1.0] * 8, abs=0.08)


def test_a_reading_is_added_up_by_group():
    task = GPTBytes("LMO", width=16, steps=2, batch=2, windows=20)
    rule, layers = Observed(task, ()), describe_layers(task.model(0))
    rule.start(layers, [None] * len(layers))
    before = np.arange(1.0, len(layers) + 1)
    nothing = np.zeros(len(layers))
    names = tuple(layer.name for layer in layers)
    reading = StepReading(names, -before, 2 * before, nothing, nothing, 1.0, 1.0, 1.0)
    rule.learn(reading)
    rule.begin_step()  # the second of two steps: half of the run
    rule.learn(reading)
    for place, glob in enumerate(task.groups.values()):
        own = sum(b for b, layer in zip(before, layers, strict=True) if matches_key(layer, glob))
        assert rule.progress[:, place].tolist() == pytest.approx([own, 0, own, 0])
        assert rule.cost[:, place].tolist() == pytest.approx([3 * own, 0, 3 * own, 0])


def test_what_averages_gain_is_what_the_loss_falls_by_on_a_parabola():
    """Progress by group adds up to the fall of the loss, cost to twice what the deviations add to it."""

    class Parabola(Task):
        groups = {"first": "0.weight", "second": "1.weight"}

        def network(self):
            return nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False)).double()

        def batches(self, seed):
            return itertools.repeat(None)

        def held_out(self, reported):
            raise NotImplementedError

        def loss(self, model, batch):
            first, second = (p.flatten() for p in model.parameters())
            return (first**2).sum() + 3 * (second**2).sum() + first @ second

    task = Parabola("SGD", 1, 4 * WINDOW, 1, 0.1)
    model = task.model(0)
    averages, seen, windows = Averages(task, model, 0), [], []

    def loss(weights):
        first, second = (w.flatten() for w in weights)
        return float((first**2).sum() + 3 * (second**2).sum() + first @ second)

    for step in range(4 * WINDOW):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        seen.append([p.detach().clone() for p in model.parameters()])
        averages.see(step)
    for begin in range(0, 4 * WINDOW, WINDOW):
        own = seen[begin : begin + WINDOW]
        average = [torch.stack(each).mean(0) for each in zip(*own, strict=True)]
        deviation = [m - a for m, a in zip(own[WINDOW // 2], average, strict=True)]
        windows.append((loss(average), 2 * loss(deviation)))
    falls = -np.diff([loss for loss, _ in windows])
    assert averages.progress.sum(1).tolist() == pytest.approx([0, *falls], rel=1e-9)
    assert averages.cost.sum(1).tolist() == pytest.approx([cost for _, cost in windows], rel=1e-9)
    assert not np.allclose(averages.cost[:, 0], averages.cost[:, 1])


def test_forks_leave_the_run_as_it_was_and_agree_with_a_run_by_hand():
    task = GPTBytes("AdamW", width=16, steps=40, batch=2, windows=20, guess=0.01)
    trials = Trials(task, 0.01, 0)
    found = [trials.loss((1.0,) * 8), trials.loss((4.0,) + (1.0,) * 7), trials.loss((1.0,) * 8)]
    assert found[0] == found[2] != found[1]
    model = task.model(0)
    optimizer, stream = task.optimizer(model, 0.01), task.batches(0)
    for step in range(10 + 6):  # a quarter of the run, and a fork
        left = 1.0 if step < 13 else 2 * (1 - (step - 10) / 6)
        optimizer.param_groups[0]["lr"] = 0.01 * task.factor(min(step, 9)) * left
        optimizer.zero_grad()
        task.loss(model, next(stream)).backward()
        task.clip(model)
        optimizer.step()
    probes = [next(stream) for _ in range(PROBES)]
    with torch.no_grad():
        wanted = sum(float(task.loss(model, batch)) for batch in probes) / PROBES
    assert found[0] == pytest.approx(wanted, rel=1e-6)


def test_progress_by_cost_is_a_mean_over_quarters_that_count_alike():
    progress = [[800.0, 100.0], [4.0, 1.0], [1.0, 1.0], [-1.0, 2.0]]
    cost = [[100.0, 800.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]]
    first = (4.0 * (4 / 2.5) * 1.0 * 0.25) ** 0.25  # 8 and a negative quotient are at the bounds
    second = (0.25 * (1 / 2.5) * 1.0 * 4.0) ** 0.25
    runs = [{"progress": np.array(progress) / 2, "cost": np.array(cost) / 2}] * 2
    assert progress_by_cost(runs) == pytest.approx([first, second])


def test_controls_of_ratios():
    assert permuted((1.0, 2.0, 3.0, 4.0)) == (3.0, 4.0, 1.0, 2.0)
    assert inverted((1.0, 2.0, 4.0)) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("name", tasks())
def test_groups_hold_every_layer_once(name):
    for task in (tasks()[name], *variants(name).values()):
        layers = describe_layers(task.model(0))
        found = [[glob for glob in task.groups.values() if matches_key(layer, glob)] for layer in layers]
        assert all(len(globs) == 1 for globs in found)
        assert {globs[0] for globs in found} == set(task.groups.values()) and len(task.groups) == 8


def test_text_is_frozen():
    other = replace(STUDY, digest="0" * 64)
    with pytest.raises(ValueError, match=r"as constraints.txt pins them, and what is installed differs: pip install"):
        other.read()
    with pytest.raises(ValueError, match="missing-package"):
        Corpus(("missing-package",), STUDY.digest).read()
    assert STUDY.digest_of({"a": b"x"}) != STUDY.digest_of({"a": b"y"}) != STUDY.digest_of({"b": b"y"})


def test_tuning_and_reporting_see_different_windows():
    for task in (GPTBytes("LMO"), LSTMBytes("AdamW", corpus=RADII)):
        (tuning, _), (reporting, _) = task.held_out(False), task.held_out(True)
        assert len(tuning) == len(reporting) == 2000 and not torch.equal(tuning, reporting)
    training, tuning, reporting = split(STUDY)
    assert min(map(len, (training, tuning, reporting))) > 500_000


def test_digits_are_split():
    pytest.importorskip("sklearn")
    task = Digits("SGD")
    assert [len(part) for part in task.held_out(False)] == [2400, 2400]
    assert not torch.equal(task.held_out(False)[0], task.held_out(True)[0])


def test_the_results_that_are_kept_can_be_read():
    kept = read(RESULTS / "adaptive.json")
    assert "GPT, LMO" in kept.chosen
    for task, arms in kept.chosen.items():
        for arm in arms:
            assert len(kept.finals(task, arm)) == 5 or arm not in ("uniform", "oracle", "committed")
