"""Gradient noise, layer by layer, in the dual norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamon.arrays import Array
from dynamon.gradients import GradientReadings

SOURCES = ("successive", "independent")


class NoiseEstimator:
    r"""Running mean of the squared dual norm of the difference of two gradients.

    .. math:: H \leftarrow \beta_2 H + (1 - \beta_2) \|G_t - \tilde G_t\|_*^2, \qquad
              \hat H = H / (1 - \beta_2^k) \text{ after } k \text{ updates.}

    The unit is that of :math:`E\|G - \tilde G\|_*^2` for two independent gradients of the full batch. Panels show
    :math:`\sqrt{\hat H}`. With ``source="successive"`` :math:`\tilde G_t = G_{t-1}`: the two share no data but sit at
    neighbouring weights, so the change of the mean gradient (curvature times step) is in the number too. With
    ``"independent"`` they are taken at the same weights, so the gap between the two estimates is curvature: from two
    parts of one accumulation window (:meth:`dynamon.gradients.GradientReader.store_part`), or from the processes of a
    DDP run (:meth:`dynamon.gradients.GradientReader.watch_ranks`), where :math:`\|G - \tilde G\|_*^2` is the mean
    over R processes of :math:`\tfrac{2}{R-1}\|g_r - G\|_*^2`.

    Args:
        names: Layer names, which key the saved state.
        beta2: Decay of the running mean, in [0, 1).
        source: ``"successive"`` or ``"independent"``.

    Raises:
        ValueError: If ``beta2`` is outside [0, 1), or on an unknown source.

    Reference: LANTON, arXiv 2510.14009, options I and II.
    """

    def __init__(self, names: Sequence[str], beta2: float = 0.98, source: str = "successive") -> None:
        """Start with no updates."""
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {beta2}.")
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}.")
        self.names = list(names)
        self.beta2, self.source = beta2, source
        self._mean = np.zeros(len(self.names))
        self._weight = np.zeros(len(self.names))  # 1 - beta2^k, kept by the same recursion

    def update(self, readings: GradientReadings) -> bool:
        """Take in one step's readings.

        Returns:
            Whether anything was taken in: False where a gradient, now or one step before, was not finite
            (then no layer is updated) or no layer had two gradients to compare.
        """
        differences = readings.difference_dual if self.source == "successive" else readings.independent_dual
        seen = ~np.isnan(differences)
        if not readings.finite or not seen.any():
            return False
        self._mean[seen] = self.beta2 * self._mean[seen] + (1 - self.beta2) * differences[seen] ** 2
        self._weight[seen] = self.beta2 * self._weight[seen] + (1 - self.beta2)
        return True

    @property
    def squared(self) -> Array:
        """The estimate of H for each layer, NaN before its first update."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self._weight > 0, self._mean / self._weight, np.nan)

    @property
    def values(self) -> Array:
        """The square root of H, in the unit of the dual norm."""
        return np.sqrt(self.squared)

    def state_dict(self) -> dict[str, Any]:
        """Running means by layer name."""
        return {name: [float(m), float(w)] for name, m, w in zip(self.names, self._mean, self._weight, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved means; a layer that was not saved starts anew."""
        for index, name in enumerate(self.names):
            self._mean[index], self._weight[index] = state.get(name, [0.0, 0.0])


class SignalToNoise:
    r"""How much of each gradient is signal, and the batch size at which noise and signal are equal.

    With :math:`\sigma_l^2 = \tfrac12 E\|G_l - \tilde G_l\|_2^2` the variance of the gradient of a batch and
    :math:`\mu_l^2 = E\|G_l\|_2^2 - \sigma_l^2` the squared length of its mean, both averaged over steps,

    .. math:: \mathrm{SNR}_l = \mu_l^2 / \sigma_l^2, \qquad
              B_{simple} = B \sum_l \sigma_l^2 / \sum_l \mu_l^2 .

    Args:
        names: Layer names, which key the saved state.
        beta: Decay of the averages, in [0, 1).
        source: As for :class:`NoiseEstimator`; successive gradients count curvature as noise.

    Raises:
        ValueError: If ``beta`` is outside [0, 1), or on an unknown source.

    Reference: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162.
    """

    def __init__(self, names: Sequence[str], beta: float = 0.98, source: str = "successive") -> None:
        """Start with no updates."""
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}.")
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}.")
        self.names, self.beta, self.source = list(names), beta, source
        self._sums = np.zeros((3, len(self.names)))  # variance, squared length, weight

    def update(self, readings: GradientReadings) -> bool:
        """Take in one step's readings; False where there was nothing finite to compare."""
        differences = readings.difference_l2 if self.source == "successive" else readings.independent_l2
        seen = ~np.isnan(differences)
        if not readings.finite or not seen.any():
            return False
        fresh = np.stack([differences[seen] ** 2 / 2, readings.l2[seen] ** 2, np.ones(seen.sum())])
        self._sums[:, seen] = self.beta * self._sums[:, seen] + (1 - self.beta) * fresh
        return True

    @property
    def ratios(self) -> Array:
        """SNR of each layer ``[L]``; 0 where no signal stands out, NaN before the first update or without noise."""
        variance, square, _ = self._sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(variance > 0, np.maximum(square - variance, 0) / variance, np.nan)

    @property
    def noise_scale(self) -> float:
        """B_simple in multiples of the batch; infinite where no signal stands out, NaN before the first update."""
        return noise_scale([self])

    def totals(self) -> Array:
        """Variance and squared length of the gradients of all layers that have been seen ``[2]``."""
        known = self._sums[2] > 0
        return np.asarray((self._sums[:2, known] / self._sums[2, known]).sum(1))

    def state_dict(self) -> dict[str, Any]:
        """Averages by layer name."""
        return {name: sums.tolist() for name, sums in zip(self.names, self._sums.T, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved averages; a layer that was not saved starts anew."""
        for index, name in enumerate(self.names):
            self._sums[:, index] = state.get(name, [0.0, 0.0, 0.0])


def noise_scale(estimators: Sequence[SignalToNoise]) -> float:
    """B_simple of several sets of layers together, in multiples of the batch; see :class:`SignalToNoise`."""
    variance, square = np.sum([estimator.totals() for estimator in estimators], axis=0)
    if square == 0:
        return float("nan")
    return float(variance / (square - variance)) if square > variance else float("inf")
