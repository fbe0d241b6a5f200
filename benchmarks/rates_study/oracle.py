"""Group rates by coordinate search: what a person with patience would find."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rates_study.book import Book

FACTORS = (0.5, 2.0)


def search(book: "Book", task: str, rate: float) -> tuple[float, ...]:
    """Ratios of the groups with the least mean loss on the tuning seeds."""

    def loss(ratios: tuple[float, ...]) -> float:
        return book.mean(task, "fixed", rate, ratios if any(r != 1 for r in ratios) else ())

    return coordinate_search(loss, len(book.tasks[task].groups))


def coordinate_search(loss: Callable[[tuple[float, ...]], float], groups: int, passes: int = 2) -> tuple[float, ...]:
    """For each group in turn take the best of half its ratio, the same and twice."""
    ratios = (1.0,) * groups
    best = loss(ratios)
    for _ in range(passes):
        before = ratios
        for place in range(groups):
            here = ratios[place]
            for factor in FACTORS:
                tried = (*ratios[:place], here * factor, *ratios[place + 1 :])
                found = loss(tried)
                if found < best:
                    best, ratios = found, tried
        if ratios == before:
            break
    return ratios
