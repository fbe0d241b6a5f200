"""Group rates by coordinate search: what a person with patience would find."""

from benchmarks.rates_study.book import Book

FACTORS = (0.5, 2.0)


def search(book: Book, task: str, rate: float, passes: int = 2) -> tuple[float, ...]:
    """Ratios of the groups: for each group in turn the best of half, the same and twice, on the tuning seeds."""
    ratios = [1.0] * len(book.tasks[task].groups)
    best = book.mean(task, "fixed", rate, ())
    for _ in range(passes):
        before = list(ratios)
        for place in range(len(ratios)):
            here = ratios[place]
            for factor in FACTORS:
                tried = [*ratios[:place], here * factor, *ratios[place + 1 :]]
                found = book.mean(task, "fixed", rate, tuple(tried) if any(r != 1 for r in tried) else ())
                if found < best:
                    best, ratios = found, tried
        if ratios == before:
            break
    return tuple(ratios)
