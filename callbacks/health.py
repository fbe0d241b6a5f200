"""The health rules while training goes on: what they find is said once, as a warning."""

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dynamon.callbacks.base import callbacks_of
from dynamon.callbacks.meter import Run
from dynamon.health import Finding, findings
from dynamon.history import History, RunData

_LOSS = "loss"
_SHARE = 0.01  # of the run's time, where measurements have no budget
_OF_BUDGET = 0.1  # where they have one
_EVERY = 5  # readings: fewer tell nothing new
_TOLD = ("dynamon/", "gradient/nonfinite")  # by those who measure


class HealthWatch:
    """Applies :func:`dynamon.health.findings` to what has been measured so far and warns of what is new.

    A rule is quoted once a run, when two looks in a row found the same, or at once where the loss is not finite or the
    run is over. Only faults and warnings are; failed measurements and gradients with NaN have had a warning of their
    own. The loss is what ``training_step`` returned on measured steps. Host work only, on the first process.

    Args:
        name: Who speaks.

    Cost: about 1 % of the run's time, a tenth of the budget where there is one: the next look waits until the last
    one has been earned. So in a long run of many layers a finding may come a minute late.
    """

    def __init__(self, name: str) -> None:
        """Nothing seen."""
        self._name = name
        self._losses = History()
        self._said: set[str] = set()
        self._found: set[str] = set()
        self._readings, self._looked_at = 0, 0.0
        self._took, self._is_off = 0.0, False

    def forget_from(self, step: int) -> None:
        """Training has gone back to before a step."""
        self._losses.forget_from(step)

    def findings(self, *histories: History) -> list[Finding]:
        """What the rules find in what some callbacks have measured, the worst first."""
        return findings(RunData.of(*histories, self._losses), _LOSS if _LOSS in self._losses else None)

    def see(self, run: Run, outputs: Any, *histories: History) -> None:
        """A step was measured: keep its loss, and look at everything if that has been earned."""
        loss = _loss_of(outputs)
        if loss is not None:
            self._losses.add(_LOSS, run.step, loss * run.trainer.accumulate_grad_batches)
        self._readings += 1
        waited, budget = time.monotonic() - self._looked_at, run.budget.fraction
        share = _SHARE if budget is None else min(_SHARE, _OF_BUDGET * budget)
        if self._readings >= _EVERY and waited * share >= self._took:
            self.look(run, *histories)

    def look(self, run: Run, *histories: History, is_last: bool = False) -> None:
        """Say what is new; a rule that fails costs a warning and ends the watch."""
        if self._is_off:
            return
        begin = time.monotonic()
        try:
            with run.budget.charge("health"):
                found = self.findings(*histories)
        except Exception as error:  # not raised under strict either: other processes do not look, and would wait
            self._is_off = True
            rank_zero_warn(f"{self._name}: the health rules failed and are off for this run: {error!r}")
            return
        self._readings, self._looked_at = 0, time.monotonic()
        self._took = self._looked_at - begin
        self._say([one for one in found if is_last or one.rule in self._found or one.rule == "loss/nonfinite"])
        self._found = {one.rule for one in found}

    def _say(self, found: list[Finding]) -> None:
        for one in found:
            if one.severity != "note" and not one.rule.startswith(_TOLD) and one.rule not in self._said:
                self._said.add(one.rule)
                rank_zero_warn(f"{self._name}: {one.message} {one.advice}")


def _loss_of(outputs: Any) -> float | None:
    """The loss in what ``training_step`` returned, as Lightning hands it to hooks: over the batches accumulated."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    return None


def histories_of(trainer: pl.Trainer) -> list[History]:
    """Those of all dynamon callbacks of a Trainer."""
    return [h for callback in callbacks_of(trainer) if isinstance(h := getattr(callback, "history", None), History)]
