"""One run of the study."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.rates_study.arms import Observed, StepSizes, rule_of
from benchmarks.rates_study.averages import Averages
from benchmarks.rates_study.tasks import Batch, Task
from benchmarks.rates_study.trials import Trials
from dynamon.monitoring.step_probe import StepObserver
from dynamon.optim import LayerwiseRates
from dynamon.rates import BalancedRates, Rule

_LOST = 2.0  # times the first loss


def train(task: Task, arm: str, rate: float, seed: int, ratios: tuple[float, ...], reported: bool) -> dict[str, Any]:
    """Train once.

    Returns:
        ``final``: the validation loss, None if the run was lost. With ratios by group from a rule, ``ratios``: those at
        the end; of a pilot also what it found.
    """
    if arm == "trials":
        return {"final": None, "ratios": _rounded(Trials(task, rate, seed).found())}
    model = task.model(seed)
    optimizer = task.optimizer(model, rate)
    averages = Averages(task, model, seed) if arm == "averaged" else None
    rule = rule_of(arm, task, model, ratios)
    if rule is not None:
        LayerwiseRates(optimizer, rule, model, max_groups=None)
    if not steps(task, model, optimizer, seed, rule, averages):
        return {"final": None}
    final = task.validation(model, reported)
    return {"final": round(final, 5) if math.isfinite(final) else None} | _learned(averages or rule, task)


def steps(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    seed: int,
    rule: Rule | None = None,
    averages: Averages | None = None,
) -> bool:
    """Take the steps of a run, and return whether it was not lost."""
    observer = StepObserver(model, optimizer, task.loss) if rule is not None and rule.needs_probe else None
    schedule = LambdaLR(optimizer, task.factor)
    first = math.inf
    for step, batch in zip(range(task.steps), task.batches(seed), strict=False):
        if observer is not None and observer.is_kept:
            _learn(rule, observer, batch)
        loss = task.loss(model, batch)
        if step % 50 == 0:
            now = loss.item()
            first = min(first, now)
            if not now < _LOST * first:
                return False
        optimizer.zero_grad()
        loss.backward()
        task.clip(model)
        if observer is not None and rule.asks_for():
            observer.keep()
        optimizer.step()
        schedule.step()
        if averages is not None:
            averages.see(step)
    return True


def _learn(rule: Rule, observer: StepObserver, batch: Batch) -> None:
    """Measure what the last step did to the loss of a batch that it has not seen."""
    if rule.pilot is None:
        rule.learn(observer.read(batch))
    else:
        rule.learn_couplings(observer.couplings(batch, rule.probe_groups))


def _learned(rule: Rule | Averages | None, task: Task) -> dict[str, Any]:
    """What a rule by groups has found, in the order of the task's groups."""
    if isinstance(rule, StepSizes):
        return {"ratios": _rounded(rule.found())}
    if isinstance(rule, Observed | Averages):
        return {"progress": [*map(_rounded, rule.progress)], "cost": [*map(_rounded, rule.cost)]}
    if not isinstance(rule, BalancedRates):
        return {}
    place = {group.label: number for number, group in enumerate(rule.groups)}
    order = [place[glob] for glob in task.groups.values()]
    if rule.advice is None:
        ratios = rule.ratios()[[rule.groups[number].indices[0] for number in order]]
        return {"ratios": _rounded(ratios)}
    advice = rule.advice
    found = {"ratios": _rounded(advice.ratios[order]), "committed": _rounded(advice.committed[order])}
    return found | {"refusal": advice.refusal, "gain": round(advice.gain, 3), "readings": advice.readings}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
