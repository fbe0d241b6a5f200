r"""Compute a learning-rate schedule from the gradient norms of a finished run.

Defazio et al., "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement" (arXiv 2310.07831), derive
from the gradients :math:`g_1, \ldots, g_T` of a pilot run the schedule that minimises the bound on its last iterate:

.. math:: w_t = \|g_t\|_2^{-2}, \qquad \eta_t \propto w_t \sum_{p=t+1}^{T} w_p,

for Adam and similar optimizers with :math:`w_t = \|g_t\|_1^{-1}`. Where norms stay constant this is linear decay to
zero; large norms at the start become a warm-up.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

FEWEST_READINGS = 10  # so that a median over a tenth of the run has at least one
POWERS = {"l2": 2.0, "l1": 1.0}
_FARTHEST = 1e70  # times the smallest norm; beyond, the product of two weights could underflow


def refined_schedule(
    gradient_norms: Sequence[float] | NDArray[Any],
    *,
    norm: str = "l2",
    steps: Sequence[int] | NDArray[Any] | None = None,
    total: int | None = None,
    smoothing: float = 0.1,
) -> NDArray[Any]:
    """Compute the refined schedule of a run from the norms of its gradients.

    Readings that are NaN, infinite or zero are left out. The others are interpolated linearly to one norm per step
    (constant before the first and after the last), smoothed by a running median whose window is mirrored at both ends
    of the run, and put into the formula of this module.

    Args:
        gradient_norms: ``[K]``, of the gradient of the whole model before clipping.
        norm: ``"l2"``: Euclidean norms, for SGD and momentum; ``"l1"``: sums of magnitudes, for Adam and similar
            optimizers.
        steps: ``[K]`` increasing optimizer steps of the readings, counted from 0; every step from 0 by default.
        total: Optimizer steps of the run; by default it ends at the last reading.
        smoothing: Width of the median's window as a share of the run; 0 for none.

    Returns:
        ``[total]`` factors on the peak learning rate: 1 at the largest, 0 at the last. Linear decay, with a
        :class:`UserWarning` that gives the reason, if fewer than ten readings can be used.

    Raises:
        ValueError: Naming the argument that is out of range.

    Cost: a few passes over ``[total]`` numbers, a tenth of a second for a million steps.

    Example:
        >>> import numpy as np
        >>> from dynamon.schedule import refined_schedule
        >>> norms = np.concatenate([np.full(10, 4.0), np.full(40, 1.0)])  # large at the start: the schedule warms up
        >>> schedule = refined_schedule(norms, smoothing=0)
        >>> schedule.round(2)[[0, 9, 10, 49]]
        array([0.07, 0.06, 1.  , 0.  ])

    Reference: Defazio et al., arXiv 2310.07831.
    """
    norms = np.asarray(gradient_norms, dtype=np.float64)
    at = np.arange(len(norms)) if steps is None else np.asarray(steps, dtype=np.float64)
    if not (np.isfinite(at) & (at == np.round(at))).all():
        raise ValueError("steps must be whole numbers.")
    at = at.astype(np.int64)
    _check(norms, at, norm, smoothing)
    length = _run_length(at, total)
    usable = usable_readings(norms)
    if usable.sum() < FEWEST_READINGS:
        warnings.warn(
            f"refined_schedule falls back to linear decay: {usable.sum()} of {len(norms)} gradient norms are finite "
            f"and not zero, and it needs {FEWEST_READINGS}.",
            stacklevel=2,
        )
        return linear_decay(length)
    return _refine(smoothed_norms(norms[usable], at[usable], length, smoothing), POWERS[norm])


def smoothed_norms(norms: NDArray[Any], steps: NDArray[Any], total: int, smoothing: float = 0.1) -> NDArray[Any]:
    """Interpolate and smooth norms for :func:`refined_schedule`: one norm per step, without outliers.

    Args:
        norms: ``[K]`` finite numbers.
        steps: ``[K]`` increasing steps.
        total: Steps of the run.
        smoothing: Width of the median's window as a share of the run.

    Returns:
        ``[total]``.
    """
    every = np.interp(np.arange(total), steps, norms)
    return np.asarray(median_filter(every, size=2 * int(smoothing * total / 2) + 1, mode="reflect"))


def usable_readings(norms: NDArray[Any]) -> NDArray[Any]:
    """Mark the readings that the schedule can use, as booleans ``[K]``: those that are finite and not zero."""
    return np.isfinite(norms) & (norms > 0)


def linear_decay(steps: int) -> NDArray[Any]:
    """Return linear decay from 1 at the first step to 0 at the last: the refined schedule of constant norms.

    Args:
        steps: Number of steps, at least 1; a single one has factor 1.

    Returns:
        ``[steps]``.

    Raises:
        ValueError: If ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return np.arange(steps - 1, -1, -1) / (steps - 1) if steps > 1 else np.ones(1)


def warmup_end(schedule: Sequence[float] | NDArray[Any]) -> int:
    """Return the step at which a schedule first has its largest factor: 0 if there is no warm-up."""
    return int(np.argmax(schedule))


def schedule_factor(schedule: Sequence[float] | NDArray[Any], steps: int | None = None) -> Callable[[int], float]:
    """Make the function that ``torch.optim.lr_scheduler.LambdaLR`` takes, for a run of any length.

    Args:
        schedule: ``[T]`` factors, the first and the last for the first and the last step.
        steps: Length of the new run; that of the schedule by default. Between its points the schedule is linear.

    Returns:
        A function from the step, counted from 0, to the factor. From the last step on the last factor is kept.

    Raises:
        ValueError: If ``schedule`` is not one-dimensional with finite, non-negative factors, or ``steps`` is less than
            1.

    Example:
        >>> import torch
        >>> from dynamon.schedule import linear_decay, schedule_factor
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> factor = schedule_factor(linear_decay(11), steps=101)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)  # call scheduler.step() after each step
        >>> factor(0), factor(50), factor(100)
        (1.0, 0.5, 0.0)
    """
    factors = np.array(schedule, dtype=np.float64)
    if factors.ndim != 1 or not len(factors) or not np.isfinite(factors).all() or factors.min() < 0:
        raise ValueError("schedule must be a sequence of finite, non-negative factors, at least one.")
    length = len(factors) if steps is None else steps
    if length < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    places, stretch = np.arange(len(factors)), (len(factors) - 1) / max(length - 1, 1)

    def factor(step: int) -> float:
        if step >= length - 1 > 0:  # rounding could leave a trace of the previous factor
            return float(factors[-1])
        return float(np.interp(step * stretch, places, factors))

    return factor


def _refine(norms: NDArray[Any], power: float) -> NDArray[Any]:
    """Apply the formula to positive finite norms ``[T]``."""
    with np.errstate(over="ignore"):
        weights = np.minimum(norms / norms.min(), _FARTHEST) ** -power
    rates = weights * np.append(weights[:0:-1].cumsum()[::-1], 0.0)
    return np.asarray(rates / rates.max())


def _check(norms: NDArray[Any], steps: NDArray[Any], norm: str, smoothing: float) -> None:
    if norms.ndim != 1 or not len(norms):
        raise ValueError(f"gradient_norms must be a sequence of at least one number, got shape {norms.shape}.")
    if (norms < 0).any():
        raise ValueError(f"gradient_norms must not be negative, got {norms[norms < 0][0]}.")
    if steps.shape != norms.shape:
        raise ValueError(f"steps must have one entry per gradient norm, {norms.shape}, got {steps.shape}.")
    if (np.diff(steps) <= 0).any() or steps[0] < 0:
        raise ValueError("steps must increase and not be negative.")
    if norm not in POWERS:
        raise ValueError(f"norm must be one of {', '.join(POWERS)}, got {norm!r}.")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be a share of the run in [0, 1], got {smoothing}.")


def _run_length(steps: NDArray[Any], total: int | None) -> int:
    last = int(steps[-1])
    if total is not None and total <= last:
        raise ValueError(f"total must be more than the last step {last}, got {total}.")
    return last + 1 if total is None else total
