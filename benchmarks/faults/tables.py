"""The tables of ``docs/evidence_faults.md``, as rows of text."""

from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.faults.fit import ROWS
from benchmarks.faults.injected import KINDS
from benchmarks.faults.score import PER, REFERENCES, Results, Verdict, median
from benchmarks.faults.subjects import REPORTED

DETECTORS = (*ROWS, *REFERENCES)
WORDS = {
    "default": "`DynamicsMonitor()`",
    "no budget": "`DynamicsMonitor(budget=None)`",
    "every 10 steps": "`DynamicsMonitor(every_n_steps=10)`",
    "standard": '`DynamicsMonitor("standard", every_n_steps=10)`',
    "SpikeDetection": "Lightning's `SpikeDetection()`",
    "three sigma": "gradient norm above mean + 3 standard deviations of the last 100",
}


def costs(found: Results, subject: str, kind: str) -> bool:
    """Whether the fault raises the final loss by 2 % at the strength that is injected."""
    return bool(found.strengths[f"{subject}|{kind}"]["reached"])


def strength_rows(found: Results) -> Iterator[tuple[str, ...]]:
    """Each fault's strength by model, with the rise of the final loss; brackets where it stays below 2 %."""
    for kind in KINDS.values():
        cells = []
        for subject in REPORTED:
            one = found.strengths.get(f"{subject}|{kind.name}")
            if one is None:
                cells.append("")
                continue
            rise = "lost" if one["rise"] is None else f"{one['rise']:+.1%}"
            text = f"{one['strength']:g}: {rise}" if kind.measure else rise
            cells.append(text if one["reached"] else f"({text})")
        yield (kind.words, kind.measure or "as it is", *cells)


def summary_rows(found: Results) -> Iterator[tuple[str, ...]]:
    """Each detector: shares of what it named, how soon, and its false alarms."""
    for detector in DETECTORS:
        verdicts = found.verdicts(detector, list(REPORTED))
        costly = [v for (s, k), each in verdicts.items() if costs(found, s, k) for v in each]
        every = [v for each in verdicts.values() for v in each]
        if not every:
            continue
        named = [v for v in costly if v.is_named]
        loud = found.verdicts(detector, list(REPORTED), without_notes=True)
        told_of = sum(v.is_named for (s, k), each in loud.items() if costs(found, s, k) for v in each)
        steps, alarms = found.alarms(detector, list(REPORTED))
        told = found.alarms(detector, list(REPORTED), without_notes=True)[1].total()
        rate = f"{alarms.total()} in {steps:,} steps: {PER * alarms.total() / steps:.1f}" if steps else "not run"
        rate += f"; without notes {PER * told / steps:.1f}" if steps and detector in ROWS else ""
        late = median([v.known for v in named])
        yield (
            WORDS[detector],
            _share([v.rule is not None for v in costly]),
            f"{_share([v.is_named for v in costly])}; without notes {told_of}"
            if detector in ROWS
            else "names no layer",
            _share([v.is_named for v in every]) if detector in ROWS else _share([v.rule is not None for v in every]),
            "" if late is None else f"{late:g}",
            _share([v.is_first for v in named]),
            rate,
        )


def fault_rows(found: Results, detector: str) -> Iterator[tuple[str, ...]]:
    """Each fault in each model: how often it was named, by which rules, how soon."""
    verdicts = found.verdicts(detector, list(REPORTED))
    for kind in KINDS.values():
        for subject in REPORTED:
            each = verdicts.get((subject, kind.name))
            if each is None:
                continue
            seen = [v for v in each if v.rule is not None]
            harmless = "" if costs(found, subject, kind.name) else " (harmless)"
            yield (
                f"{kind.name}, {subject}{harmless}",
                f"{sum(v.is_named for v in each)} of {len(each)}",
                ", ".join(f"`{rule}`" for rule in dict.fromkeys(v.rule for v in seen)) or _others(each),
                _numbers([v.stated for v in seen]),
                _numbers([v.known for v in seen]),
                _numbers([v.loss for v in each]),
                _layer(seen),
            )


def alarm_rows(found: Results) -> Iterator[tuple[str, ...]]:
    """False alarms by rule and detector."""
    counted: dict[str, Counter[str]] = {}
    for detector in ROWS:
        steps, alarms = found.alarms(detector, list(REPORTED))
        if steps:
            counted[detector] = alarms
    for rule in sorted({rule for alarms in counted.values() for rule in alarms}):
        yield (f"`{rule}`", *(str(counted[detector][rule]) if detector in counted else "" for detector in ROWS))


def _others(each: Sequence[Verdict]) -> str:
    names = dict.fromkeys(rule for v in each for rule in v.others)
    return f"missed; at another step {', '.join(f'`{name}`' for name in names)}" if names else "missed"


def _layer(seen: Sequence[Verdict]) -> str:
    judged = [v.layer for v in seen if v.layer is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else ""


def _share(said: Sequence[bool]) -> str:
    return f"{sum(said)} of {len(said)} ({sum(said) / len(said):.0%})" if said else "none"


def _numbers(values: Sequence[int | None]) -> str:
    return ", ".join("never" if v is None else f"{v:+d}" for v in values)
