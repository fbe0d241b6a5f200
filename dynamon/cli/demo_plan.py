"""Choose model size, threads and number of steps of the demo from the measured time of a step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FEWEST_STEPS, MOST_STEPS = 150, 1500  # fewer make a poor picture, more do not make a better one
VALIDATIONS, VALIDATION_BATCHES = 5, 8
_VALIDATION_STEPS = VALIDATIONS * VALIDATION_BATCHES / 3  # a forward pass is about a third of a step
_GAIN = 1.25  # threads wait for each other where other processes run: more of them must be worth it


@dataclass(frozen=True)
class Size:
    """A model and its batches.

    Attributes:
        batch: Sequences per step.
        context: Bytes per sequence.
        width: Width of the model.
        depth: Number of blocks.
    """

    batch: int
    context: int
    width: int
    depth: int


SIZES = {
    "full": Size(batch=16, context=128, width=144, depth=4),
    "small": Size(batch=8, context=128, width=96, depth=3),  # a step takes about a quarter of the time
}


@dataclass(frozen=True)
class Plan:
    """How large and how long a run is.

    Attributes:
        size: A name from ``SIZES``.
        threads: Threads of PyTorch.
        steps: Optimizer steps.
        step_seconds: Measured time of a step without monitoring; None if it was not measured.
    """

    size: str
    threads: int
    steps: int
    step_seconds: float | None = None


def thread_counts(available: int) -> list[int]:
    """List powers of two below ``available``, and ``available`` itself."""
    return [*(2**power for power in range(available.bit_length()) if 2**power < available), available]


def make_plan(
    step_seconds: Callable[[str, int, float], float],
    sizes: Sequence[str],
    threads: Sequence[int],
    seconds_left: Callable[[], float],
    budget: float,
) -> Plan:
    """Measure the time of a step and choose the longest run that fits into the time left.

    The first size of which enough steps fit is taken, or else the last one.

    Args:
        step_seconds: Measures a step of a size with a number of threads, without monitoring. The third argument is the
            time from which on the result does not matter, so that a slow trial can be cut short.
        sizes: Names from ``SIZES``, the largest first.
        threads: Numbers of threads to try, ascending.
        seconds_left: Seconds that are left for training, with monitoring and validation.
        budget: Time of monitoring as a share of the time of training.

    Returns:
        A plan of ``FEWEST_STEPS`` to ``MOST_STEPS`` steps.
    """
    for size in sizes:
        left = seconds_left() / (1 + budget)
        count = threads[0]
        seconds = step_seconds(size, count, math.inf if size == sizes[-1] else left / FEWEST_STEPS)
        for more in threads[1:]:
            faster = step_seconds(size, more, seconds)
            if faster * _GAIN > seconds:
                break
            count, seconds = more, faster
        fitting = seconds_left() / (1 + budget) / seconds - _VALIDATION_STEPS
        if fitting >= FEWEST_STEPS:
            break
        threads = [number for number in threads if number <= count]  # a smaller model does not need more
    steps = int(min(max(fitting, FEWEST_STEPS), MOST_STEPS))
    return Plan(size, count, steps - steps % 10, seconds)
