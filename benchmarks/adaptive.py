"""Which layers deserve which rate, and what is it worth? Each arm at its own best base rate, on four tasks.

Run ``python -m benchmarks.adaptive`` (some hours on one core), or ``--tasks "GPT, LMO"`` for some of them, also in
several processes. Every run goes to ``benchmarks/results/adaptive.json`` as it ends, and what is there is not run
again. ``docs/evidence.md`` discusses the result, ``python -m benchmarks.adaptive_plot`` draws it.

Arms are tuned on seeds 100 and 101 (controls on 100), on a grid of half octaves that grows until the best rate is
inside of it. Figures are of other seeds at that rate, on other held-out data. All arms see the same initial weights and
batches for the same seed, so they are compared seed by seed.
"""

import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.environment import RESULTS, parser
from benchmarks.rates_study.arms import inverted, permuted, progress_by_cost
from benchmarks.rates_study.book import HALF_OCTAVE, Book
from benchmarks.rates_study.oracle import search
from benchmarks.rates_study.tables import GOOD, Results
from benchmarks.rates_study.tasks import REPORTED, TUNING, FormerRadii, GPTBytes, quarter, tasks, variants

MIDDLE = slice(1, 3)  # the quarters of a run between the fall of its loss and the fall of its rate
# What the default radii of Lanton were until this study, over those of now, by group of the GPT.
FORMER = (2.0, 2.0, 8.0, 1.0, 1.0, 1.0, 1.0, 2.0)


def uniform(book: Book, task: str) -> float:
    """One rate for all layers; every other arm starts from it."""
    known = book.chosen.get(task, {}).get("uniform")
    return float(known["rate"]) if known else book.arm(task, "uniform", book.tasks[task].guess)


def held(book: Book, task: str, name: str, ratios: tuple[float, ...], seeds: Sequence[int] = ()) -> None:
    """Hold some ratios."""
    book.arm(task, name, uniform(book, task), ratios=ratios, seeds=seeds)


def oracle(book: Book, task: str) -> None:
    """Hold the ratios that a coordinate search finds."""
    held(book, task, "oracle", search(book, task, uniform(book, task)))


def observed(book: Book, task: str, arm: str, key: str) -> tuple[float, ...]:
    """The ratios that a rule finds on the tuning seeds at the best uniform rate: their geometric mean."""
    runs = [book.run(task, arm, uniform(book, task), seed)[key] for seed in book.tuning]
    return tuple(float(f"{math.exp(statistics.fmean(map(math.log, each))):.3g}") for each in zip(*runs, strict=True))


def committed_ratios(book: Book, task: str) -> tuple[float, ...]:
    """Ratios from the ends of runs that followed."""
    return observed(book, task, "following", "ratios")


def core(book: Book, task: str) -> None:
    """What the bar is about."""
    oracle(book, task)
    held(book, task, "committed", committed_ratios(book, task))


def steering(book: Book, task: str) -> None:
    """The rule inside of the run: following all the time, and committing after a quarter."""
    steered(book, task, "following")
    steered(book, task, "inside", book.tuning[:1])


def advised(book: Book, task: str) -> None:
    """Ratios from the advisor's pilot, at the best uniform rate; and such within a factor of two."""
    held(book, task, "advised", observed(book, task, "pilot", "committed"), book.tuning[:1])
    held(book, task, "advised within 2", observed(book, task, "pilot within 2", "committed"), book.tuning[:1])


def steered(book: Book, task: str, arm: str, seeds: Sequence[int] = ()) -> None:
    """A rule that steers during the run."""
    book.arm(task, arm, uniform(book, task), arm, seeds=seeds)


def controls(book: Book, task: str) -> None:
    """What tells why, and what others recommend; tuned on one seed."""
    ratios, one = committed_ratios(book, task), book.tuning[:1]
    held(book, task, "permuted", permuted(ratios), one)
    held(book, task, "inverted", inverted(ratios), one)
    for arm in ("mean only", "noise", "LLR", *(["blockwise"] if task.startswith("GPT") else [])):
        steered(book, task, arm, one)
    if task == "GPT, LMO":
        held(book, task, "former radii", FORMER, one)


def remedies(book: Book, task: str) -> None:
    """Other ways to ratios, where those of the rule miss the bar."""
    if task != "GPT, LMO":  # whose steps have these sizes already
        held(book, task, "by norm", observed(book, task, "step sizes", "ratios"))
    short = f"{task}, a quarter of the length"
    book.tasks[short] = quarter(task)
    rate = book.tune(short, "fixed", (), book.tasks[short].guess)
    held(book, task, "short search", search(book, short, rate))
    held(book, task, "balanced", in_rounds(book, task, "observed"))
    held(book, task, "averaged", in_rounds(book, task, "averaged", MIDDLE))
    held(book, task, "trials", observed(book, task, "trials", "ratios"))


def in_rounds(book: Book, task: str, arm: str, quarters: slice = slice(None), rounds: int = 3) -> tuple[float, ...]:
    """Ratios from all readings of whole runs at ratios that are held, certain or not, in some rounds."""
    ratios = (1.0,) * len(book.tasks[task].groups)
    for _ in range(rounds):
        runs = [book.run(task, arm, uniform(book, task), seed, ratios) for seed in book.tuning]
        moves = progress_by_cost(runs, quarters)
        ratios = tuple(float(f"{r * m:.3g}") for r, m in zip(ratios, np.clip(moves, 0.5, 2.0), strict=True))
    return ratios


def misset(book: Book, task: str) -> None:
    """Whether ratios find back from radii that are known to be wrong: there the present ones are the oracle."""
    if task == "GPT, LMO":
        name = f"{task} at former radii"
        book.tasks[name] = FormerRadii("LMO", guess=0.02)
        uniform(book, name)
        held(book, name, "oracle", inverted(FORMER))
        held(book, name, "committed", committed_ratios(book, name))
        held(book, name, "advised", observed(book, name, "pilot", "committed"), book.tuning[:1])


def ranges(book: Book, task: str) -> None:
    """Base rates half an octave apart until the loss is 2 % above the best, on both sides."""
    for name in ("uniform", "oracle", "committed"):
        chosen = book.chosen[task][name]
        ratios, best = tuple(chosen["ratios"]), math.inf
        for side in (-1, 1):
            for k in range(8):
                rate = chosen["rate"] * HALF_OCTAVE ** (side * k)
                loss = book.mean(task, "fixed", rate, ratios)
                best = min(best, loss)
                if loss > GOOD * best:
                    break


def beyond(book: Book, task: str) -> None:
    """Ratios that were observed at the small size, held at another one."""
    for name, made in variants(task).items():
        book.tasks[name] = made
        uniform(book, name)
        for arm in ("committed", "oracle"):
            held(book, name, arm, tuple(book.chosen[task][arm]["ratios"]))


STAGES = {
    "core": core,
    "steering": steering,
    "advised": advised,
    "controls": controls,
    "remedies": remedies,
    "misset": misset,
    "ranges": ranges,
    "beyond": beyond,
}


def smallest(book: Book) -> None:
    """Every arm for a few steps."""
    for name in ("core", "steering", "advised", "controls", "ranges"):
        STAGES[name](book, "GPT, tiny")


def main() -> None:
    """Run and print."""
    known = tasks()
    command = parser("adaptive", __doc__)
    command.add_argument("--tasks", nargs="+", choices=known, default=[*known], help="default: all")
    command.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES], help="default: all, in this order")
    command.add_argument("--seeds", type=int, default=len(REPORTED), help="reported seeds (default: %(default)s)")
    options = command.parse_args()
    torch.set_num_threads(1)
    if options.smallest:
        tiny = GPTBytes("LMO", width=16, steps=24, batch=2, windows=20)
        book = Book(options.output, {"GPT, tiny": tiny}, ((100,), (0, 1)))
        smallest(book)
    else:
        seeds = TUNING, REPORTED[: options.seeds]
        book = Book(options.output or RESULTS / "adaptive.json", known, seeds)
        names = [name for name in options.tasks if not name.startswith("CNN") or find_spec("sklearn") is not None]
        if names != options.tasks:
            print('skipped: CNN, since scikit-learn is missing: pip install -c constraints.txt -e ".[bench]".')
        for stage in options.stages:
            for name in names:
                STAGES[stage](book, name)
    print(Results(book.runs, book.chosen, book.reported, book.tuning).text())


if __name__ == "__main__":
    main()
