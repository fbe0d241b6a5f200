"""Ratios that make the most progress at the same curvature, and what of them is certain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, lsq_linear
from scipy.stats import norm, t

Array = NDArray[np.float64]
BOUNDS = (0.5, 2.0)  # in our study, wider ones made advice lose
FEWEST_READINGS = 4
_CONFIDENCE = 0.95
_DRAWS = 400
_POSITIVE = 0.975  # of the draws in which the matrix must be positive definite
_NEAR = 2  # readings on either side of one that tell its scale
_LEAST = 1e-3  # of the median scale


def even_out(total: Array) -> tuple[Array, Array]:
    """Return by what to divide readings of progress and of curvature, so that early and late ones count alike.

    Over a run steps and gradients shrink by orders of magnitude, and plain means are those of the first readings.
    Curvature is divided by a running median of its total over five readings, progress by the square root: neither the
    rate of a schedule nor the scale of the loss then matters.

    Args:
        total: Curvature of the whole step ``[T]``.

    Returns:
        Divisors of progress and of curvature, ``[T]`` each; ones where the median is not positive.
    """
    middle = float(np.median(total)) if len(total) else 0.0
    if not middle > 0:
        return np.ones(len(total)), np.ones(len(total))
    smooth = [float(np.median(total[max(0, at - _NEAR) : at + _NEAR + 1])) for at in range(len(total))]
    scale = np.maximum(smooth, _LEAST * middle)
    return np.sqrt(scale), scale


def most_progress(
    progress: Array,
    curvature: Array,
    low: float = BOUNDS[0],
    high: float = BOUNDS[1],
    held: NDArray[np.bool_] | None = None,
    reserve: Array | None = None,
) -> Array:
    r"""Return the ratios that make the most progress at the curvature that ratios of 1 spend.

    With G groups whose steps are multiplied by s, the loss changes by :math:`-s^T p + s^T C s / 2`. This solves

    .. math:: \max_s\; s^T p \quad\text{where}\quad s^T C s \le 1^T C 1,\; \mathrm{low} \le s_g \le \mathrm{high}.

    Without bounds that is :math:`s \propto C^{-1} p`: the quotient of a group's curvature and progress is the same in
    all groups.

    Args:
        progress: p, the first-order decrease of the loss by the step of each group, ``[G]``.
        curvature: C, symmetric, ``[G, G]``: :math:`u_g^T H u_m` of the steps of two groups. Among the groups that are
            not held it must be positive definite.
        low: Smallest ratio, at most 1.
        high: Largest ratio, at least 1.
        held: True for groups whose ratio stays 1, ``[G]``; None for none.
        reserve: Curvature :math:`\sum_g \mathrm{reserve}_g (s_g - 1)^2` that is added to what ratios spend, ``[G]``: it
            grows with the distance from the steps that were measured, so that weakly determined ratios stay near 1.

    Returns:
        The ratios ``[G]``, in float64.

    Raises:
        numpy.linalg.LinAlgError: If the matrix is not positive definite.
        ValueError: If the progress is zero in all groups that are not held.

    Cost: a few solves of systems of G equations: some 0.1 ms.

    Example:
        >>> import numpy as np
        >>> from dynamon.rates.allocation import most_progress
        >>> most_progress(np.array([2.0, 1.0]), np.array([[1.0, 0.0], [0.0, 1.0]])).round(4).tolist()
        [1.2649, 0.6325]
    """
    free = np.ones(len(progress), bool) if held is None else ~np.asarray(held, bool)
    ratios = np.ones(len(progress))
    if not free.any():
        return ratios
    p, c, h = progress[free], curvature[np.ix_(free, free)], curvature[np.ix_(free, ~free)].sum(1)
    if reserve is not None:
        c, h = c + np.diag(reserve[free]), h - reserve[free]
    np.linalg.cholesky(c)
    if not p.any():
        raise ValueError("no group that may move makes progress.")
    budget = float(c.sum() + 2 * h.sum())
    found = _by_active_set(p, c, h, budget, low, high)
    ratios[free] = _by_bisection(p, c, h, budget, low, high) if found is None else found
    return ratios


def _by_active_set(p: Array, c: Array, h: Array, budget: float, low: float, high: float) -> Array | None:
    """Guess which ratios are at a bound until the conditions of optimality hold; None where that leads nowhere."""
    s, fixed = np.ones(len(p)), np.zeros(len(p), int)  # -1: at low, 1: at high
    for _ in range(4 * len(p) + 4):
        free = fixed == 0
        s[~free] = np.where(fixed[~free] < 0, low, high)
        if not free.any():
            return None
        pull = h[free] + c[np.ix_(free, ~free)] @ s[~free]
        a, b = np.linalg.solve(c[np.ix_(free, free)], np.stack([p[free], -pull], 1)).T
        s[free] = b
        left, gain = budget - float(s @ c @ s + 2 * s @ h), float(p[free] @ a)
        if left <= 0 or gain <= 0:
            return None
        multiple = math.sqrt(left / gain)
        s[free] = multiple * a + b
        excess = np.where(free, np.maximum(low - s, s - high), 0.0)
        if excess.max() > 1e-12:
            worst = int(excess.argmax())
            fixed[worst] = -1 if s[worst] < low else 1
            continue
        force = fixed * (multiple * p - c @ s - h)
        if force.min() >= -1e-12 * np.abs(multiple * p).max():
            return s
        fixed[int(force.argmin())] = 0
    return None


def _by_bisection(p: Array, c: Array, h: Array, budget: float, low: float, high: float) -> Array:
    """Solve for the ratios by the multiplier of the curvature, which is monotone in it."""
    root = np.linalg.cholesky(c)

    def ratios(multiple: float) -> Array:
        goal = np.linalg.solve(root, multiple * p - h)
        return np.asarray(lsq_linear(root.T, goal, (low, high), method="bvls", tol=1e-14).x)

    def excess(multiple: float) -> float:
        s = ratios(multiple)
        return float(s @ c @ s + 2 * s @ h) - budget

    upper = math.sqrt(max(budget, 1e-300) / float(p @ np.linalg.solve(c, p)))
    for _ in range(60):
        if excess(upper) >= 0:
            return ratios(float(brentq(excess, 0.0, upper, xtol=1e-300, rtol=1e-14)))
        upper *= 2
    return ratios(upper)  # all ratios are at a bound before the curvature is spent


@dataclass(frozen=True)
class Advice:
    """Ratios for G groups of layers, and how certain they are.

    Attributes:
        refusal: Why there is no advice, in one sentence; None where there is. All ratios are then 1.
        ratios: The estimated ratios, ``[G]``.
        low: Lower ends of their intervals, ``[G]``: all of them together hold with a confidence of 95 %.
        high: Upper ends, ``[G]``.
        certain: True where the interval does not contain 1, ``[G]``.
        committed: The ratios to use, ``[G]``: all groups that are not certain have one in common; 1 if none is certain.
        gain: First-order progress of these over that of ratios 1, both at the same curvature; 1 is no gain.
        readings: How many readings it rests on.
    """

    refusal: str | None
    ratios: Array
    low: Array
    high: Array
    certain: NDArray[np.bool_]
    committed: Array
    gain: float
    readings: int


def advise(
    progress: Array, curvature: Array, *, low: float = BOUNDS[0], high: float = BOUNDS[1], seed: int = 0
) -> Advice:
    """Solve for ratios from the readings of a pilot, with intervals by resampling the readings.

    Readings are scaled alike (:func:`even_out`) and averaged. The ratios are those of :func:`most_progress` with the
    groups' own curvature as reserve: that between groups is never known well enough to trust large changes. A group
    whose own curvature does not come out positive keeps ratio 1.

    The interval draws blocks of successive readings with replacement, widens their deviations for the small number of
    readings (Student's t) and the number of groups (Bonferroni), and moves each pair of the matrix between its two
    readings, ``C[g, m]`` and ``C[m, g]``, whose difference is the third order of the loss. To be used are the ratios of
    groups that are certain; the others get one in common, with which the curvature stays the same. If the ratios of 1
    are right, any group moves in at most 5 % of pilots with independent readings; if readings are noise around zero,
    the advice is refused.

    Args:
        progress: First-order decrease of the loss by group and reading, ``[R, G]``.
        curvature: ``[R, G, G]``, not symmetric: ``C[g, m]`` is the change of the gradient by the step of group g, along
            the step of group m.
        low: Smallest ratio, in (0, 1].
        high: Largest ratio, at least 1.
        seed: Of the resampling.

    Returns:
        The advice; where the data do not support one, with the reason in ``refusal``.

    Cost: 400 solves: about 0.1 s.

    Reference: Künsch, The jackknife and the bootstrap for general stationary observations, 1989 (blocks).
    """
    progress, curvature = np.asarray(progress, np.float64), np.asarray(curvature, np.float64)
    finite = np.isfinite(progress).all(1) & np.isfinite(curvature).all((1, 2))
    progress, curvature = progress[finite], curvature[finite]
    count, groups = progress.shape
    ones = np.ones(groups)
    nothing = Advice(None, ones, 0 * ones, np.inf * ones, ones < 1, ones, 1.0, count)
    if count < FEWEST_READINGS:
        return replace(nothing, refusal=f"there are {count} finite readings, and {FEWEST_READINGS} are needed.")
    first, second = even_out(curvature.sum((1, 2)))
    progress, curvature = progress / first[:, None], curvature / second[:, None, None]
    p, c = progress.mean(0), _symmetric(curvature.mean(0))
    reserve, (ps, cs) = _reserve(c), _draws(progress, curvature, np.random.default_rng(seed))
    single, joint = (_widening(count, tests) for tests in (1, groups))
    if (reason := _reason(p + single * (ps - p), c + single * (cs - c), c, reserve)) is not None:
        return replace(nothing, refusal=reason)
    drawn = [
        most_progress(one, _definite(each, reserve), low, high, reserve <= 0, reserve)
        for one, each in zip(p + joint * (ps - p), c + joint * (cs - c), strict=True)
    ]
    lower, upper = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2], axis=0)
    certain = (lower > 1) | (upper < 1)
    ratios = _solve(p, c, low, high)
    committed = _in_common(ratios, c, certain, low, high)
    gain = float(committed @ p / p.sum() * math.sqrt(c.sum() / (committed @ c @ committed)))
    return Advice(None, ratios, lower, upper, certain, committed, gain, count)


def _in_common(ratios: Array, curvature: Array, certain: NDArray[np.bool_], low: float, high: float) -> Array:
    """Give all groups that are not certain one ratio, with which the curvature is that of ratios of 1."""
    if not certain.any() or certain.all():
        return np.where(certain, ratios, 1.0)
    fixed, rest = np.where(certain, ratios, 0.0), (~certain).astype(float)
    square, cross = float(rest @ curvature @ rest), float(rest @ curvature @ fixed)
    left = float(curvature.sum() - fixed @ curvature @ fixed)
    root = cross**2 + square * left
    common = (math.sqrt(root) - cross) / square if square > 0 and root >= 0 else 1.0
    return fixed + rest * min(max(common, low), high)


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2


def _reserve(curvature: Array) -> Array:
    return np.maximum(np.diag(curvature), 0.0)


def _solve(progress: Array, curvature: Array, low: float, high: float) -> Array:
    """Return the ratios for means over readings, with the reserve; groups without curvature are held."""
    reserve = _reserve(curvature)
    return most_progress(progress, _definite(curvature, reserve), low, high, reserve <= 0, reserve)


def _draws(progress: Array, curvature: Array, random: np.random.Generator) -> tuple[Array, Array]:
    """Draw averages of p ``[B, G]`` and of the symmetric C ``[B, G, G]`` as they could have come out."""
    count, groups = progress.shape
    block = _block(count)
    starts = random.integers(count, size=(_DRAWS, math.ceil(count / block)))
    picked = (starts[..., None] + np.arange(block)).reshape(_DRAWS, -1)[:, :count] % count
    symmetric = (curvature + curvature.transpose(0, 2, 1)) / 2
    twist = (curvature.mean(0) - curvature.mean(0).T) / 2
    turned = np.triu(random.uniform(-1, 1, (_DRAWS, groups, groups)), 1) * twist
    cs = symmetric[picked].mean(1) + turned + turned.transpose(0, 2, 1)
    return progress[picked].mean(1), cs


def _block(count: int) -> int:
    return max(1, round(count ** (1 / 3)))


def _widening(count: int, tests: int) -> float:
    """Return by what deviations of draws are to be multiplied, for few readings and several tests."""
    block = _block(count)
    quantile = t.isf((1 - _CONFIDENCE) / (2 * tests), count / block - 1) / norm.isf((1 - _CONFIDENCE) / 2)
    return math.sqrt(count / (count - block)) * float(quantile)


def _reason(ps: Array, cs: Array, c: Array, reserve: Array) -> str | None:
    """Say why draws of progress and curvature carry no advice; None where they do."""
    share = 1 - _POSITIVE
    if np.quantile(ps.sum(1), share) <= 0:
        return (
            "the progress of all groups together is not positive beyond its error: take more readings (readings=40), or"
            " larger batches."
        )
    if np.quantile(cs.sum((1, 2)), share) <= 0:
        return (
            "the curvature along the step is not positive beyond its error, so the rate as a whole is too small to tell"
            " groups apart: take more readings (readings=40), or raise the learning rate first."
        )
    bends = reserve > 0
    is_known = np.mean([_is_positive((each + np.diag(reserve))[np.ix_(bends, bends)]) for each in cs]) >= _POSITIVE
    if not _is_positive(c[np.ix_(bends, bends)]) or not is_known:
        return (
            "the curvature between the groups is not positive definite beyond its error: take fewer groups (group_by=),"
            " or more readings (readings=40)."
        )
    return None


def _definite(matrix: Array, reserve: Array) -> Array:
    """Raise what is negative in a draw, the reserve included, so that it can be solved: ratios then reach bounds."""
    unit = np.sqrt(np.where(reserve > 0, reserve, 1.0))
    values, vectors = np.linalg.eigh(matrix / np.outer(unit, unit) + np.diag(reserve / unit**2))
    if values[0] >= _LEAST:
        return matrix
    raised = vectors @ np.diag(np.maximum(values, _LEAST)) @ vectors.T
    return raised * np.outer(unit, unit) - np.diag(reserve)


def _is_positive(matrix: Array) -> bool:
    return bool(np.linalg.eigvalsh(matrix)[0] > 0)


def ratios_by_key(keys: Sequence[Sequence[str]], ratios: Array, digits: int = 2) -> dict[str, float]:
    """Return the argument of :class:`dynamon.rates.FixedRates` for ratios ``[G]``, without those that are 1."""
    rounded = [float(f"{ratio:.{digits}g}") for ratio in ratios]
    return {key: ratio for each, ratio in zip(keys, rounded, strict=True) for key in each if ratio != 1}
