"""The table of cases: models (in subjects.py), set-ups, callbacks, which cells cannot exist, and which fail."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, NamedTuple

from tests.conformance.subjects import MODELS

EVERY_CELL = "DYNAMON_EVERY_CELL"  # in the environment: tests are made of all cells, which takes seconds by itself
STEPS = 7  # all are measured; the first has none before it, and steering shows noise a step late: five remain


@dataclass(frozen=True)
class Setup:
    """A row of the table of set-ups.

    Attributes:
        trainer: Arguments of the Trainer.
        subject: Arguments of :class:`Subject`.
        data: Arguments of :class:`Data`.
        loggers: ``"memory"``, ``"none"`` or ``"several"``.
        measures: Whether monitors measure at all.
        skipped: Why this machine cannot run it.
        cli: Run by a LightningCLI.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    subject: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    loggers: str = "memory"
    measures: bool = True
    skipped: str = ""
    cli: bool = False


SETUPS = {
    "plain": Setup(),
    "accumulation": Setup({"accumulate_grad_batches": 2, "max_steps": 13}),  # an epoch has two pairs of alike windows
    "clipping by norm": Setup({"gradient_clip_val": 0.05}),
    "clipping by value": Setup({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": Setup({"precision": "bf16-mixed"}),
    "16-mixed": Setup({"precision": "16-mixed"}),
    "foreach": Setup(subject={"options": {"foreach": True}}),
    "fused": Setup(subject={"options": {"fused": True}}),
    "skipped batches": Setup(
        {"max_steps": 13}, {"skips": True}
    ),  # skipped ones count as steps of Lightning: 8 are real
    "SAM": Setup(subject={"sam": True}),
    "manual optimisation": Setup(subject={"manual": True}),
    "several optimizers": Setup(subject={"optimizers": 2}),
    "torch.compile": Setup(subject={"compiled": True}),
    "activation checkpointing": Setup(subject={"checkpointed": True}),
    "mapping batch": Setup(data={"mapped": True}),
    "fast_dev_run": Setup({"fast_dev_run": STEPS}),
    "overfit_batches": Setup({"overfit_batches": 2}),
    "limited batches": Setup({"limit_train_batches": 3, "limit_val_batches": 1}),
    "max_steps": Setup({"max_steps": STEPS + 2}),
    "max_epochs": Setup({"max_epochs": 1, "max_steps": -1}),
    "barebones": Setup({"barebones": True}, loggers="none", measures=False),
    "no logger": Setup(loggers="none"),
    "several loggers": Setup(loggers="several"),
    "validation in mid-epoch": Setup({"val_check_interval": 2, "limit_val_batches": 1}),
    "sanity check": Setup({"num_sanity_val_steps": 1, "limit_val_batches": 1}),
    "LightningCLI": Setup(cli=True),
}


@dataclass(frozen=True)
class Callbacks:
    """A row of the table of callbacks.

    Attributes:
        classes: Names in ``dynamon.callbacks`` and arguments; a rule as ``class_path`` and ``init_args``, so that the
            same row serves a LightningCLI.
        neutral: Whether training is bitwise that without them.
    """

    classes: tuple[tuple[str, dict[str, Any]], ...]
    neutral: bool = True


def _one(name: str, neutral: bool = True, **arguments: Any) -> Callbacks:
    return Callbacks(((name, arguments),), neutral)


_EVERY = {"every_n_steps": 1, "strict": True}
_ONES = {"class_path": "dynamon.rates.FixedRates", "init_args": {"ratios": {"*": 1.0}}}
_BALANCED = {"class_path": "dynamon.rates.BalancedRates", "init_args": {"every": 1}}
_QUICK = ["stability_ratio", "hessian", "bracket", "directional", "critical", "batch"]
_DEAR = ["subspace", "blocks", "next", "preconditioned", "ggn", "trace", "density"]
CALLBACKS = {
    "GradientMonitor": _one("GradientMonitor", **_EVERY, histograms=True),
    "WeightMonitor": _one("WeightMonitor", **_EVERY, histograms=True, convolutions=True),
    "SharpnessMonitor": _one("SharpnessMonitor", **_EVERY, probe_fraction=0.5, quantities=_QUICK),
    "SharpnessMonitor, dear": _one("SharpnessMonitor", **_EVERY, probe_fraction=0.5, quantities=_DEAR),
    "SharpnessMonitor, progress": _one("SharpnessMonitor", **_EVERY, quantities=["progress"]),
    "ActivationMonitor": _one("ActivationMonitor", **_EVERY, probe_fraction=0.5),
    "DynamicsMonitor economy": _one("DynamicsMonitor", preset="economy", **_EVERY),
    "DynamicsMonitor standard": _one("DynamicsMonitor", preset="standard", **_EVERY),
    "DynamicsMonitor full": _one("DynamicsMonitor", preset="full", **_EVERY),
    "LayerwiseLR of ones": _one("LayerwiseLR", rule=_ONES),
    "NoiseAdaptiveLR, floor 1": _one("NoiseAdaptiveLR", warmup=2, floor=1.0),
    "NoiseAdaptiveLR": _one("NoiseAdaptiveLR", neutral=False, warmup=1),
    "NoiseAdaptiveLR, dry": _one("NoiseAdaptiveLR", warmup=1, apply=False),
    "BalancedRates, dry": _one("LayerwiseLR", rule=_BALANCED, apply=False),
    "RateAdvisor": _one("RateAdvisor", pilot=6, readings=6, group_by="role", strict=True),
    "SpikeGuard at rest": _one("SpikeGuard", warmup=3, deviations=1e5, skip=1e3, stop_after=3),
    "SpikeGuard, dry": _one("SpikeGuard", warmup=1, deviations=0.1, skip=1.01, stop_after=1, apply=False),
    "SpikeGuard": _one("SpikeGuard", neutral=False, warmup=2, deviations=0.1),
    "monitor, steering and guard": Callbacks(
        (
            ("SpikeGuard", {"warmup": 3, "deviations": 1e5}),
            ("DynamicsMonitor", _EVERY),
            ("NoiseAdaptiveLR", {"warmup": 2, "floor": 1.0}),
        )
    ),
    "monitor and steering": Callbacks(
        (("DynamicsMonitor", {"preset": "standard", **_EVERY}), ("NoiseAdaptiveLR", {"warmup": 2, "floor": 1.0}))
    ),
}


class Cell(NamedTuple):
    """One of each table, by name."""

    model: str
    setup: str
    callback: str

    def __str__(self) -> str:
        return " - ".join(self)


class Rule(NamedTuple):
    """Cells about which something is said; None stands for all names of a table."""

    reason: str
    models: tuple[str, ...] | None = None
    setups: tuple[str, ...] | None = None
    callbacks: tuple[str, ...] | None = None

    def holds(self, cell: Cell) -> bool:
        return all(names is None or name in names for name, names in zip(cell, self[1:], strict=True))


# Without dynamon these do not run either, which a test makes sure of.
_CLIPPING = ("clipping by norm", "clipping by value")
IMPOSSIBLE = [
    Rule("Lightning accumulates and clips under automatic optimisation only", ("GAN",), ("accumulation", *_CLIPPING)),
    Rule("torch clips no sparse gradients", ("sparse embedding",), _CLIPPING),
    Rule("torch's fused optimizers take no sparse gradients", ("sparse embedding",), ("fused",)),
    Rule("RMSprop has no fused form", ("tied weights",), ("fused",)),
]
# Another cell of the same callback is the same run.
SAME = [
    Rule(
        "always by hand with two optimizers, as in its plain cell",
        ("GAN",),
        ("manual optimisation", "several optimizers"),
    ),
    Rule("not a chain of layers that could be recomputed", ("GAN",), ("activation checkpointing",)),
]
# Faults that are known; a cell that passes nevertheless fails the suite, so that its line is taken out.
KNOWN: list[Rule] = []


def reason_against(cell: Cell) -> str | None:
    """Why a cell is left out; None where it runs."""
    if SETUPS[cell.setup].skipped:
        return SETUPS[cell.setup].skipped
    return next((rule.reason for rule in (*IMPOSSIBLE, *SAME) if rule.holds(cell)), None)


def known_fault(cell: Cell) -> str | None:
    """Why a cell is expected to fail."""
    return next((rule.reason for rule in KNOWN if rule.holds(cell)), None)


def all_cells() -> list[Cell]:
    """Every triple, those that cannot exist included."""
    return [Cell(*names) for names in product(MODELS, SETUPS, CALLBACKS)]


def cells() -> list[Cell]:
    """Every triple that can exist."""
    return [cell for cell in all_cells() if reason_against(cell) is None]


def _pairs(cell: Cell) -> Iterator[tuple[str, str]]:
    return combinations(cell, 2)


def covering(every: Iterable[Cell]) -> list[Cell]:
    """Cells that hold every pair of names that occurs at all, found greedily and always the same."""
    every = list(every)
    missing = {pair for cell in every for pair in _pairs(cell)}
    chosen: list[Cell] = []
    # Each pair of the two longest tables needs a cell of its own; its third name is the one that covers most. The
    # dearest callbacks choose first, so that the models that are dear too are left for the cheap ones.
    by_pair: dict[tuple[str, ...], list[Cell]] = {}
    for cell in sorted(every, key=seconds_of, reverse=True):
        by_pair.setdefault(cell[1:], []).append(cell)
    for candidates in by_pair.values():
        chosen.append(_best(candidates, missing))
        missing -= set(_pairs(chosen[-1]))
    while missing:
        chosen.append(_best(every, missing))
        missing -= set(_pairs(chosen[-1]))
    return chosen


def every_row(every: Iterable[Cell]) -> list[Cell]:
    """Cells of that subset which hold every name of every table, one a set-up, found greedily and always the same."""
    candidates, chosen = covering(every), []
    held: Counter[str] = Counter()
    while any(not held[name] for cell in candidates for name in cell):
        # Names that were seldom taken come first, so that each set-up meets another model and other callbacks.
        chosen.append(min(candidates, key=lambda cell: (held[cell.setup], held[cell.callback] + held[cell.model])))
        held.update(chosen[-1])
    return chosen


def _best(candidates: list[Cell], missing: set[tuple[str, str]]) -> Cell:
    """The candidate with most missing pairs; of several the quickest."""
    return max(candidates, key=lambda cell: (sum(pair in missing for pair in _pairs(cell)), -seconds_of(cell)))


def seconds_of(cell: Cell) -> float:
    """What a cell takes, roughly: models whose Hessian products are slow, callbacks that take many."""
    slow = {"transformer with SDPA": 4, "LSTM": 4, "CNN with BatchNorm and dropout": 3}
    model = {**slow, "partly frozen": 0.9, "MLP": 1}.get(cell.model, 1.3)
    cheap = 0.4 if "Monitor" in cell.callback else 0.1
    dear = {"SharpnessMonitor, dear": 16, "DynamicsMonitor full": 8, "ActivationMonitor": 0.6}
    dear |= {"GradientMonitor": cheap, "WeightMonitor": cheap}
    callback = dear.get(cell.callback, 4 if cheap == 0.4 or "monitor" in cell.callback else cheap)
    return model * callback if SETUPS[cell.setup].measures else 0.01
