"""What is run, in three stages: strengths of faults, runs with a fault, healthy runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.book import Book
from benchmarks.faults.fit import fit
from benchmarks.faults.injected import Fault, kinds_of, onset_of
from benchmarks.faults.subjects import (
    LIKE,
    OPTIMIZERS,
    REPORTED_SEEDS,
    SCHEDULES,
    TUNING_SEEDS,
    Subject,
    is_reported,
)

RISE = 0.02  # of the final loss, that a fault must cost
CLEAR = 3.0  # times that or its inverse: then one seed decides
BELOW = 0.5  # of the best rate, that runs take: at the best one itself a run may be at the edge of divergence


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: Of a run with a fault, and of its healthy twin.
        search: Of a run in the search for a rate.
        healthy: Of a healthy run that is looked through for false alarms.
        seeds: Tuning and reported seeds.
        subjects: Models; none for those that the command line says.
        kinds: Faults; none for all.
        combinations: Healthy runs per model; 0 for all.
    """

    steps: int
    search: int
    healthy: int
    seeds: tuple[tuple[int, ...], tuple[int, ...]] = (TUNING_SEEDS, REPORTED_SEEDS)
    subjects: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    combinations: int = 0


FULL = Plan(steps=300, search=150, healthy=1000)
SMALLEST = Plan(
    steps=30,
    search=5,
    healthy=30,
    seeds=((100,), (0,)),
    subjects=("LSTM",),
    kinds=("nan", "labels"),
    combinations=1,
)


def _best(subject: Subject, optimizer: str, plan: Plan) -> float:
    start, tried, best = OPTIMIZERS[optimizer][1], dict[int, float](), 0
    while not {best - 1, best, best + 1} <= set(tried):
        for k in (best - 1, best, best + 1):
            if k not in tried:
                final = fit(subject, start * 2.0**k, plan.seeds[0][0], plan.search, optimizer=optimizer)["final"]
                tried[k] = math.inf if final is None else final
        best = min(tried, key=lambda k: tried[k])
    return float(f"{BELOW * start * 2.0**best:.3g}")


def rate_of(book: Book, subject: Subject, plan: Plan, optimizer: str = "") -> float:
    """The rate that runs take: half of the best one, which is searched by factors of two."""
    optimizer = optimizer or subject.optimizer
    return float(book.get("rates", f"{subject.name}|{optimizer}", lambda: _best(subject, optimizer, plan)))


def set_strengths(book: Book, subject: Subject, plan: Plan, rows: Sequence[str]) -> None:
    """Find the weakest strength of every fault that costs 2 % on the tuning seeds, by halving."""
    for kind in _kinds(subject, plan) if subject.name not in LIKE else ():
        book.get("strengths", f"{subject.name}|{kind.name}", lambda k=kind: _weakest(book, subject, k, plan))


def _kinds(subject: Subject, plan: Plan) -> list[type[Fault]]:
    return [kind for kind in kinds_of(subject) if not plan.kinds or kind.name in plan.kinds]


def _weakest(book: Book, subject: Subject, kind: type[Fault], plan: Plan) -> dict[str, object]:
    tried: dict[float, float] = {}

    def suffices(strength: float) -> bool:
        rises = []
        for seed in plan.seeds[0]:
            healthy = book.get(
                "strengths",
                f"{subject.name}|none|{seed}",
                lambda s=seed: fit(subject, rate_of(book, subject, plan), s, plan.steps)["final"],
            )
            fault = kind(subject, onset_of(kind, seed, plan.steps), strength)
            final = fit(subject, rate_of(book, subject, plan), seed, plan.steps, fault=fault)["final"]
            rises.append(math.inf if final is None else final / healthy - 1)
            if not RISE / CLEAR < rises[0] < RISE * CLEAR:
                break
        tried[strength] = statistics.fmean(rises)
        return tried[strength] >= RISE

    low, high = 0, len(kind.strengths) - 1
    reached = suffices(kind.strengths[high])
    while reached and low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(kind.strengths[middle]) else (middle + 1, high)
    rise = tried[kind.strengths[high]]
    rounded = {f"{s:g}": None if math.isinf(r) else round(r, 4) for s, r in sorted(tried.items())}
    return {
        "strength": kind.strengths[high],
        "reached": reached,
        "rise": None if math.isinf(rise) else round(rise, 4),
        "tried": rounded,
    }


def run_faults(book: Book, subject: Subject, plan: Plan, rows: Sequence[str]) -> None:
    """Run every fault at its strength on the seeds that count for this model, each beside its healthy twin."""
    rate, reported = rate_of(book, subject, plan), is_reported(subject.name)
    for seed in plan.seeds[reported]:
        for row in rows:
            key = f"{row}|{subject.name}|none|{seed}"
            book.get(
                "faults",
                key,
                lambda s=seed, r=row: fit(subject, rate, s, plan.steps, row=r, reported=reported),
            )
            for kind in _kinds(subject, plan):
                of = LIKE.get(subject.name, subject.name)
                strength = book.sections["strengths"][f"{of}|{kind.name}"]["strength"]
                fault = kind(subject, onset_of(kind, seed, plan.steps), strength)
                key = f"{row}|{subject.name}|{kind.name}|{seed}"
                book.get(
                    "faults",
                    key,
                    lambda f=fault, s=seed, r=row: (
                        {"onset": f.onset} | fit(subject, rate, s, plan.steps, fault=f, row=r, reported=reported)
                    ),
                )


def run_healthy(book: Book, subject: Subject, plan: Plan, rows: Sequence[str]) -> None:
    """Run every optimizer with every schedule; batch sizes take turns."""
    reported = is_reported(subject.name)
    pairs = [(optimizer, schedule) for optimizer in OPTIMIZERS for schedule in SCHEDULES]
    if plan.combinations:
        pairs = [(subject.optimizer, schedule) for schedule in SCHEDULES][: plan.combinations]
    seed = 10 + plan.seeds[reported][0]  # not one of those with a fault
    for row in rows:
        for number, (optimizer, schedule) in enumerate(pairs):
            # Both sizes for each optimizer and for each schedule.
            batch = subject.batches[(number + number // len(SCHEDULES)) % 2]
            book.get(
                "healthy",
                f"{row}|{subject.name}|{optimizer}|{schedule}|{batch}",
                lambda r=row, o=optimizer, s=schedule, b=batch: (
                    {"steps": plan.healthy}
                    | fit(
                        subject,
                        rate_of(book, subject, plan, o),
                        seed,
                        plan.healthy,
                        row=r,
                        optimizer=o,
                        schedule=s,
                        batch=b,
                        reported=reported,
                    )
                ),
            )
