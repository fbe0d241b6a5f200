"""What counts as a fault that was named, and as a false alarm: the same for all detectors."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.fit import ROWS
from benchmarks.faults.injected import KINDS, Fault
from benchmarks.faults.subjects import LIKE, SUBJECTS

EARLY = 2  # steps before the fault that a stated step may lie: numbering
APART = 50  # steps between two alarms of a rule from which on they are two
REFERENCES = ("SpikeDetection", "three sigma")
SEEN = "every 10 steps"  # the row whose runs they have seen; losses and gradients are those of the other rows
PER = 10_000  # steps that false alarms are counted by


@dataclass(frozen=True)
class Verdict:
    """What a detector made of one fault.

    Attributes:
        rule: The first rule that named it, None if none did.
        stated: Stated step less the true one.
        known: Steps after the fault at which this was known.
        layer: Whether a layer at fault is the first that is named; None where no layer is at fault.
        loss: Steps after the fault at which the training loss left its level; None if it never did.
        others: Rules that found something in this run only, but not the right step.
    """

    rule: str | None
    stated: int = 0
    known: int = 0
    layer: bool | None = None
    loss: int | None = None
    others: tuple[str, ...] = ()

    @property
    def is_named(self) -> bool:
        """Whether the step is right, and the layer where one is at fault."""
        return self.rule is not None and self.layer is not False

    @property
    def is_first(self) -> bool:
        """Whether it was known before the loss left its level, or at the same step."""
        return self.rule is not None and (self.loss is None or self.known <= self.loss)


def judge(fault: Fault, run: Mapping[str, Any], healthy: Mapping[str, Any]) -> Verdict:
    """What the monitor made of a fault.

    Of the findings with the right step the first one with the right layer counts, else the first one.

    Args:
        fault: The truth.
        run: With the fault.
        healthy: The same run without it.
    """
    own = [one for one in run["findings"] if not _is_in(one, healthy["findings"])]
    right = [one for one in own if -EARLY <= one["step"] - fault.onset <= fault.within]
    right.sort(key=lambda one: (not _names(fault, one["layers"]), one["known"]))
    loss = None if run["loss"] is None else run["loss"] - fault.onset
    if not right:
        return Verdict(None, loss=loss, others=tuple(dict.fromkeys(one["rule"] for one in own)))
    one = right[0]
    layer = _names(fault, one["layers"]) if fault.layers else None
    return Verdict(one["rule"], one["step"] - fault.onset, one["known"] - fault.onset, layer, loss)


def judge_reference(fault: Fault, run: Mapping[str, Any], healthy: Mapping[str, Any], name: str) -> Verdict:
    """What a detector made of a fault that states steps only: alarms that the healthy run does not have."""
    own = [step for step in run[name] if step not in healthy[name]]
    right = [step for step in own if -EARLY <= step - fault.onset <= fault.within]
    loss = None if run["loss"] is None else run["loss"] - fault.onset
    if not right:
        return Verdict(None, loss=loss)
    return Verdict(name, right[0] - fault.onset, right[0] - fault.onset, None, loss)


def _names(fault: Fault, layers: Sequence[str]) -> bool:
    """Whether the first one named is at fault, or the module of one that is, or none is at fault."""
    if not fault.layers:
        return True
    if not layers:
        return False
    named = layers[0].removeprefix("network.").split(".heads.")[0]  # heads are named after their module
    return any(name == named or name.startswith(f"{named}.") for name in fault.layers)


def _is_in(one: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    return any(one["rule"] == other["rule"] and abs(one["step"] - other["step"]) < APART for other in others)


def count_alarms(findings: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Alarms by rule; a finding less than fifty steps after one of its rule that counts does not."""
    found: Counter[str] = Counter()
    for rule in {one["rule"] for one in findings}:
        found[rule] = _apart([one["step"] for one in findings if one["rule"] == rule])
    return found


def _apart(steps: Sequence[int]) -> int:
    counted: list[int] = []
    for step in sorted(steps):
        if not counted or step - counted[-1] >= APART:
            counted.append(step)
    return len(counted)


class Results:
    """What the file holds, judged.

    Args:
        found: Its content.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        """Remember it."""
        self.faults, self.healthy = found.get("faults", {}), found.get("healthy", {})
        self.strengths = found["strengths"]

    def fault(self, subject: str, kind: str, onset: int) -> Fault:
        """A fault as it was injected."""
        return KINDS[kind](SUBJECTS[subject], onset, self.strengths[f"{LIKE.get(subject, subject)}|{kind}"]["strength"])

    def verdicts(
        self, detector: str, subjects: Sequence[str], without_notes: bool = False
    ) -> dict[tuple[str, str], list[Verdict]]:
        """Verdicts by subject and kind of fault, one for each seed.

        Args:
            detector: A row of the monitor, or one of the references.
            subjects: Of which models.
            without_notes: Whether only findings count that a user is warned of.
        """
        row = detector if detector in ROWS else SEEN
        found: dict[tuple[str, str], list[Verdict]] = {}
        for key, run in self.faults.items():
            its_row, subject, kind, seed = key.split("|")
            if without_notes:
                run = run | {"findings": [one for one in run["findings"] if one["severity"] != "note"]}
            if its_row != row or subject not in subjects or kind == "none":
                continue
            healthy = self.faults[f"{row}|{subject}|none|{seed}"]
            fault = self.fault(subject, kind, run["onset"])
            verdict = judge_reference(fault, run, healthy, detector) if detector in REFERENCES else None
            found.setdefault((subject, kind), []).append(verdict or judge(fault, run, healthy))
        return found

    def alarms(self, detector: str, subjects: Sequence[str], without_notes: bool = False) -> tuple[int, Counter[str]]:
        """Healthy steps, and alarms by rule; without notes those that a user is warned of."""
        row = detector if detector in ROWS else SEEN
        steps, found = 0, Counter[str]()
        for key, run in self.healthy.items():
            its_row, subject, *_ = key.split("|")
            if its_row == row and subject in subjects:
                steps += run["steps"]
                if detector in REFERENCES:
                    found += Counter({detector: _apart(run[detector])})
                else:
                    kept = [one for one in run["findings"] if not without_notes or one["severity"] != "note"]
                    found += count_alarms(kept)
        return steps, found


def read(path: Path) -> Results:
    """Read a file of results."""
    return Results(json.loads(path.read_text()))


def median(values: Iterable[float]) -> float | None:
    """The median; None of nothing."""
    kept = list(values)
    return statistics.median(kept) if kept else None
