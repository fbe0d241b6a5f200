"""Give every group of layers as much of the curvature as it turns into progress."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.quantities.progress import Couplings, StepReading, curvature_cost, is_significant
from dynamon.rates.allocation import BOUNDS, Advice, Array, advise, even_out, ratios_by_key
from dynamon.rates.groups import LayerGroup, check_groups, group_layers
from dynamon.rates.ramp import Ramp
from dynamon.rates.rule import Rule

_MEMORY = 12  # readings that are averaged
_EVERY = 150  # steps between readings, of which one takes about two steps
_PILOT_READINGS = 12


def balance(progress: Array, cost: Array) -> Array:
    r"""Return in which direction the learning rate of each group should move: more progress at the same curvature.

    With p the progress and c the curvature cost of a group, both averaged over readings, and
    :math:`\mu = \sum p / \sum c`, the gradient of the Lagrangian in the logarithm of the rate is :math:`p - \mu c`. It
    is divided by its largest possible size:

    .. math:: d = \frac{p - \mu c}{|p| + \mu |c|} \in [-1, 1].

    A group that climbs (p < 0) has -1: it goes down, never up. A direction that is not more than two standard errors
    from zero is 0; so are all, unless the sums of p and of c are positive by as much. The errors come from the readings
    (:func:`dynamon.quantities.progress.standard_error`), the error of :math:`\mu` included.

    Args:
        progress: ``[T, G]``, T successive readings; NaN where a group was not stepped.
        cost: ``[T, G]``.

    Returns:
        ``[G]``, float64. All 0 for fewer than 4 readings.

    Example:
        >>> import numpy as np
        >>> from dynamon.rates.balanced import balance
        >>> jitter = 1 + 0.01 * np.random.default_rng(0).standard_normal((8, 1))
        >>> balance(jitter * [2.0, 1.0, -1.0], jitter * [1.0, 1.0, 1.0]).round(2).tolist()
        [0.5, 0.2, -1.0]
    """
    unknown = np.isnan(progress).any(0) | np.isnan(cost).any(0)
    progress, cost = np.where(unknown, 0.0, progress), np.where(unknown, 0.0, cost)
    totals = np.stack([progress.sum(1), cost.sum(1)], 1)
    if not (is_significant(totals) & (totals.mean(0) > 0)).all():
        return np.zeros(progress.shape[1])
    p, c = progress.mean(0), cost.mean(0)
    multiple = p.sum() / c.sum()
    climbs = p < 0
    pulls = np.where(climbs & (c < 0), progress, progress - multiple * cost)
    influence = (totals[:, :1] - multiple * totals[:, 1:]) * (c / c.sum())  # of the error of the multiple
    sure = is_significant(pulls - np.where(climbs & (c < 0), 0.0, influence)) & ~unknown
    size = np.abs(p) + multiple * np.abs(c)
    direction = np.where(climbs, -1.0, pulls.mean(0) / np.where(size > 0, size, 1.0))
    return np.where(sure, direction, 0.0)


def shift(log_ratios: Array, moves: Array, progress: Array, cost: Array, low: float, high: float) -> Array:
    """Move logarithms of ratios, keeping their mean over groups, weighted by the curvature that each spends.

    To first order the step as a whole then spends as much curvature as before. A group that climbs does not rise.

    Args:
        log_ratios: ``[G]``.
        moves: Changes ``[G]``.
        progress: Mean progress ``[G]``.
        cost: Mean curvature cost ``[G]``; groups with none, or less, have no weight.
        low: Smallest ratio.
        high: Largest ratio.

    Returns:
        ``[G]``, within the bounds.
    """
    if not moves.any():
        return log_ratios
    weight = np.maximum(cost, 0.0)
    moved = moves - weight @ moves / weight.sum()
    moved = np.where(progress < 0, np.minimum(moved, 0.0), moved)
    return np.clip(log_ratios + moved, np.log(low), np.log(high))


def check_bounds(low: float, high: float) -> None:
    """Raise TypeError or ValueError naming the bound that is no number or out of range."""
    for name, value in (("low", low), ("high", high)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < low <= 1:
        raise ValueError(f"low must lie in (0, 1], got {low}.")
    if not 1 <= high < math.inf:
        raise ValueError(f"high must be finite and at least 1, got {high}.")


class BalancedRates(Rule):
    r"""Groups that make more progress for their curvature take larger steps, the others smaller ones.

    The step of a group of layers takes p off the loss to first order, and costs c of it by curvature: both are measured
    on the next batch, which the step has not seen (:mod:`dynamon.quantities.progress`). At the curvature that the step
    spends as a whole, progress is largest where p / c is the same in all groups. The base rate and its schedule keep
    deciding how much curvature is spent; the rule decides who spends it.

    **Following** (``pilot=None``): after each reading the logarithm of a group's ratio moves by ``gain`` times the
    direction of ``balance``, if that is more than two standard errors from zero. The last 12 readings count, scaled
    alike. The mean of the logarithms, weighted by the curvature that the groups spend, is kept. A group that climbs
    goes down, never up.

    **Observing, then committing** (``pilot=300``): for so many steps all ratios are 1, and twelve readings measure the
    curvature C between all groups. Then the ratios that make the most progress at the same curvature
    (:func:`dynamon.rates.allocation.advise`) are in force for the rest of the run. Groups whose ratio is not certain
    share one, and all ratios stay 1 where none is certain; :attr:`advice` says more.

    Args:
        group_by: Which layers share a ratio: ``"kind"``, ``"role"``, ``"parameter_groups"`` or a list of globs
            (:func:`dynamon.rates.groups.group_layers`).
        pilot: Steps to observe before committing; None to follow.
        every: Steps between two readings. None: 150 when following, which costs about 1.5 % of training time, as a
            reading takes about two steps; a twelfth of the pilot in one.
        gain: Largest change of the logarithm of a ratio after a reading, when following.
        low: Smallest ratio, in (0, 1].
        high: Largest ratio, at least 1.
        dead_band: Relative change of a ratio that is ignored: the ratio in force stays, bitwise, until the rule's
            differs by more.

    Attributes:
        advice: What the pilot found; None before its end, and when following.
        groups: The groups of layers.

    Raises:
        ValueError: Naming the argument that is out of range.

    Cost: a reading evaluates two gradients of one batch when following, one more than there are groups in a pilot, and
    keeps a copy of the weights for the length of a step.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates
        >>> from dynamon.rates import BalancedRates
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> rates = LayerwiseRates(optimizer, BalancedRates(group_by="role"), model)
        >>> [group.label for group in rates.rule.groups]
        ['role:embedding', 'role:head', 'role:vector']

    References: the decrease by layer is that of Lan et al., arXiv 1909.01440. The rule is dynamon's own.
    """

    needs_probe = True

    def __init__(
        self,
        group_by: str | Sequence[str] = "kind",
        pilot: int | None = None,
        *,
        every: int | None = None,
        gain: float = 0.1,
        low: float = BOUNDS[0],
        high: float = BOUNDS[1],
        dead_band: float = 0.0,
    ) -> None:
        """Check the arguments."""
        check_groups(group_by)
        if pilot is not None and (type(pilot) is not int or pilot < _PILOT_READINGS):
            raise ValueError(f"pilot must be {_PILOT_READINGS} or more steps, or None, got {pilot!r}.")
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"every must be one or more steps, or None, got {every!r}.")
        if not 0 < gain <= 1:
            raise ValueError(f"gain must lie in (0, 1], got {gain}.")
        check_bounds(low, high)
        if not 0 <= dead_band < 1:
            raise ValueError(f"dead_band must lie in [0, 1), got {dead_band}.")
        self.group_by, self.pilot, self.every, self.gain = group_by, pilot, every, gain
        self.low, self.high, self.dead_band, self.bounds = low, high, dead_band, (low, high)
        self.steps = 0
        self.advice: Advice | None = None

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups."""
        super().start(layers, norms)
        self.groups = group_layers(layers, self.group_by, self.places)
        self._group_of = np.zeros(len(layers), np.int64)
        for number, group in enumerate(self.groups):
            self._group_of[group.indices] = number
        self._log_ratios = np.zeros(len(self.groups))
        self._ramp = Ramp([layer.name for layer in layers], 0, self.dead_band)
        self._progress = np.zeros((0, len(self.groups)))
        self._cost = np.zeros((0, len(self.groups)))
        self._couplings = np.zeros((0, len(self.groups), len(self.groups)))

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError if a glob of ``group_by`` matches no layer of the model."""
        if self.group_by != "parameter_groups":
            group_layers(layers, self.group_by)

    @property
    def interval(self) -> int:
        """Steps between two readings."""
        return self.every or (_EVERY if self.pilot is None else self.pilot // _PILOT_READINGS)

    @property
    def probe_groups(self) -> Mapping[str, Sequence[str]]:
        """The groups between which the pilot measures the curvature: layer names by label."""
        return {group.label: [layer.name for layer in self.members(group)] for group in self.groups}

    def asks_for(self) -> str | None:
        """Return what the rule wants to know of the coming step: ``"step"``, ``"couplings"`` or None."""
        if len(self.groups) < 2 or (self.steps + 1) % self.interval:
            return None
        if self.pilot is None:
            return "step"
        return "couplings" if self.steps < self.pilot else None

    def learn(self, reading: StepReading) -> None:
        """Follow: move the ratios after a reading of a step; one that is not finite, or of no step, is skipped."""
        sums = np.array([self._by_group(reading.names, row) for row in (reading.before, reading.after)])
        losses = [reading.loss_before, reading.loss_after]
        if not np.isfinite(losses).all() or np.isinf(sums).any() or not np.nan_to_num(sums).any():
            return
        progress, cost = -sums[0], curvature_cost(*sums)
        self._progress = np.vstack([self._progress, progress])[-_MEMORY:]
        self._cost = np.vstack([self._cost, cost])[-_MEMORY:]
        first, second = even_out(np.nansum(self._cost, 1))
        progress, cost = self._progress / first[:, None], self._cost / second[:, None]
        moves = self.gain * balance(progress, cost)
        p, c = np.nan_to_num(progress.mean(0)), np.nan_to_num(cost.mean(0))
        moved = shift(self._log_ratios, moves, p, c, self.low, self.high)
        factors = np.exp(moved - self._log_ratios)  # to what earlier readings would have been, but for cross terms
        self._progress, self._cost, self._log_ratios = self._progress * factors, self._cost * factors, moved
        self._aim(np.exp(self._log_ratios))

    def _by_group(self, names: Sequence[str], row: NDArray[Any]) -> Array:
        """Add up a row of a reading by group ``[G]``; NaN for a group of which no layer was stepped."""
        known = {name: value for name, value in zip(names, row.tolist(), strict=True) if not np.isnan(value)}
        ours = ([layer.name for layer in self.members(group)] for group in self.groups)
        sums = [[known[name] for name in each if name in known] for each in ours]
        return np.array([math.fsum(each) if each else math.nan for each in sums])

    def members(self, group: LayerGroup) -> list[Layer]:
        """Return the layers of a group."""
        return [self.layers[index] for index in group.indices]

    def learn_couplings(self, couplings: Couplings) -> None:
        """Observe: keep a reading of the curvature between groups; one that is not finite is skipped."""
        if np.isfinite(couplings.matrix).all() and np.isfinite(couplings.slopes).all():
            self._progress = np.vstack([self._progress, -couplings.slopes])
            self._couplings = np.concatenate([self._couplings, couplings.matrix[None]])

    @property
    def verdict(self) -> str:
        """What the pilot has found, in one sentence; empty before its end."""
        if self.advice is None:
            return ""
        if self.advice.refusal is not None:
            return f"all rates stay as they are: {self.advice.refusal}"
        found = ratios_by_key([group.keys for group in self.groups], self.advice.committed)
        if not self.advice.certain.any():
            return f"all rates stay as they are: after {self.advice.readings} readings no ratio is certain."
        return f"from now on, by {self.advice.readings} readings, FixedRates({found})."

    def begin_step(self) -> None:
        """Count the step, and commit at the end of the pilot."""
        if self.pilot is not None and self.steps >= self.pilot and self.advice is None:
            self.advice = advise(self._progress, self._couplings, low=self.low, high=self.high)
            self._aim(self.advice.committed)
        self.steps += 1

    def _aim(self, ratios: Array) -> None:
        self._ramp.aim(ratios[self._group_of])

    def ratios(self) -> NDArray[Any]:
        """Return the ratios in force, ``[L]``."""
        return self._ramp.ratios()

    def bounded(self) -> int:
        """Return how many layers sit at a bound."""
        ratios = self.ratios()
        return int(((ratios <= self.low * (1 + 1e-12)) | (ratios >= self.high * (1 - 1e-12))).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return the steps, the readings by group, and the ratios by layer."""
        labels = [group.label for group in self.groups]
        return {
            "steps": self.steps,
            "groups": labels,
            "log_ratios": self._log_ratios.tolist(),
            "progress": self._progress.tolist(),
            "cost": self._cost.tolist(),
            "couplings": self._couplings.tolist(),
            "committed": self.advice is not None,
            "ramp": self._ramp.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; readings of other groups than the present ones are left out."""
        self.steps = int(state["steps"])
        self._ramp.load_state_dict(state["ramp"], self.low, self.high)
        self.advice, count = None, len(self.groups)
        self._log_ratios = np.log([self._ramp.ratios()[group.indices].mean() for group in self.groups])
        if state["groups"] != [group.label for group in self.groups]:
            return
        self._log_ratios = np.array(state["log_ratios"])
        self._progress, self._cost = (np.array(state[key]).reshape(-1, count) for key in ("progress", "cost"))
        self._couplings = np.array(state["couplings"]).reshape(-1, count, count)
        if state["committed"]:
            self.advice = advise(self._progress, self._couplings, low=self.low, high=self.high)
