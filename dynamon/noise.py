"""Gradient noise, layer by layer, in the dual norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamon.gradients import Array, GradientReadings


class NoiseEstimator:
    r"""Running mean of the squared dual norm of the change between successive gradients.

    .. math:: H \leftarrow \beta_2 H + (1 - \beta_2) \|G_t - G_{t-1}\|_*^2, \qquad
              \hat H = H / (1 - \beta_2^k) \text{ after } k \text{ updates.}

    The unit is that of :math:`E\|G - \tilde G\|_*^2` for two independent gradients of the full batch. Successive
    gradients share no data but sit at neighbouring weights, so the change of the mean gradient (curvature
    times step) is in the number too. Panels show :math:`\sqrt{\hat H}`.

    Args:
        names: Layer names, which key the saved state.
        beta2: Decay of the running mean, in [0, 1).

    Raises:
        ValueError: If ``beta2`` is outside [0, 1).

    Reference: LANTON, arXiv 2510.14009, option I.
    """

    def __init__(self, names: Sequence[str], beta2: float = 0.98) -> None:
        """Start with no updates."""
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {beta2}.")
        self.names = list(names)
        self.beta2 = beta2
        self._mean = np.zeros(len(self.names))
        self._weight = np.zeros(len(self.names))  # 1 - beta2^k, kept by the same recursion

    def update(self, readings: GradientReadings) -> bool:
        """Take in one step's readings.

        Returns:
            Whether anything was taken in: False where a gradient, now or one step before, was not finite
            (then no layer is updated) or no layer had a gradient to compare with.
        """
        if not readings.finite or not readings.compared.any():
            return False
        seen = readings.compared
        fresh = readings.difference_dual[seen] ** 2
        self._mean[seen] = self.beta2 * self._mean[seen] + (1 - self.beta2) * fresh
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
