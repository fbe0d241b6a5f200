"""A rule, and what it checked in a run."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dynamon.health.finding import Finding
from dynamon.health.loss import Loss
from dynamon.runs.history import RunData


@dataclass(frozen=True)
class Check:
    """Hold what a rule checked in a run.

    Attributes:
        words: What is checked.
        value: What was seen, in words with its numbers; None if the readings it needs are missing.
        limit: From what on the rule reports it.
        needs: The readings that it needs.
        severity: The worst severity of what the rule found, None if it found nothing.
    """

    words: str
    value: str | None
    limit: str
    needs: str
    severity: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Convert for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A rule, and how a reader is told what it checks.

    Attributes:
        find: Yields its findings.
        seen: Says what it sees; None if the readings it needs are missing.
        words: What it checks.
        limit: From what on it reports something.
        needs: The readings that it needs.
        names: The names that its findings can have.
    """

    find: Callable[[RunData, Loss], Iterator[Finding]]
    seen: Callable[[RunData, Loss], str | None]
    words: str
    limit: str
    needs: str
    names: tuple[str, ...]
