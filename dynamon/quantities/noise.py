"""Gradient noise, layer by layer, in the dual norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.quantities.readings import GradientReadings
from dynamon.quantities.windows import UsualLength

SOURCES = ("successive", "independent")
_HALF, _GOES_ON, _SWINGS = 0.5, 0.5, -0.8
_SHORTEST = 10  # readings that a layer may miss before it is forgotten, however short the average


class _Averages:
    """Keeps running means by layer over readings of windows of one length; drops a layer without gradients."""

    rows: int  # quantities that are averaged

    def __init__(self, names: Sequence[str], decay: float, argument: str, source: str) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"{argument} must lie in [0, 1), got {decay}.")
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}.")
        self.names, self.source = list(names), source
        self._decay, self._longest = decay, max(_SHORTEST, round(1 / (1 - decay)))
        self._usual = UsualLength()
        self._begin()

    def _begin(self) -> None:
        self._sums = np.zeros((self.rows, len(self.names)))
        self._weight = np.zeros(len(self.names))  # 1 - decay^k, kept by the same recursion
        self._missed = np.zeros(len(self.names))  # consecutive readings without the layer

    def _differences(self, readings: GradientReadings) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return dual and Euclidean norms of the differences of this source."""
        if self.source == "successive":
            return readings.difference_dual, readings.difference_l2
        return readings.independent_dual, readings.independent_l2

    def seen(self, readings: GradientReadings) -> NDArray[Any]:
        """Return which layers have two gradients to compare in these readings, not both zero."""
        return self._seen(readings) if readings.finite else np.zeros(len(self.names), bool)

    def _seen(self, readings: GradientReadings) -> NDArray[Any]:
        dual, l2 = self._differences(readings)
        seen = ~np.isnan(dual) & ~((l2 == 0) & (readings.l2 == 0))
        return seen if readings.frozen is None else seen & ~readings.frozen

    def _take(self, readings: GradientReadings, fresh: NDArray[Any]) -> bool:
        """Average a reading ``[rows, L]``; False where nothing could be compared, or only over unusual windows."""
        if not readings.finite:
            return False
        seen = self._seen(readings)
        if readings.frozen is not None and readings.frozen.any():
            self._forget(readings.frozen)
        if not seen.any():
            return False
        taken, anew = self._usual.admit(readings.window)
        if not taken:
            return False
        if anew:
            self._begin()
        decay = self._decay
        self._sums = np.where(seen, decay * self._sums + (1 - decay) * fresh, self._sums)
        self._weight = np.where(seen, decay * self._weight + (1 - decay), self._weight)
        self._missed = np.where(seen, 0, self._missed + 1)
        forgotten = self._missed > self._longest
        if forgotten.any():
            self._forget(forgotten)
        return True

    def _forget(self, layers: NDArray[Any]) -> None:
        self._sums[:, layers] = 0
        self._weight[layers] = self._missed[layers] = 0

    def shown(self, readings: GradientReadings, values: NDArray[Any]) -> NDArray[Any]:
        """Return values by layer where this reading is one of those averaged, NaN elsewhere."""
        current = self.seen(readings) & self._usual.matches(readings.window)
        return np.where(current, values, np.nan)

    @property
    def means(self) -> NDArray[Any]:
        """The running means ``[rows, L]``, NaN before a layer's first reading."""
        found = np.full(self._sums.shape, np.nan)
        return np.divide(self._sums, self._weight, out=found, where=self._weight > 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by layer name, each with the length of its windows."""
        table = np.vstack([self._sums, self._weight, self._missed]).T.tolist()
        usual = self._usual.state()
        return {name: [*sums, *usual] for name, sums in zip(self.names, table, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load saved averages; a layer that was not saved starts afresh."""
        self._begin()
        self._usual = UsualLength()
        size = self.rows + 2
        for index, name in enumerate(self.names):
            if len(state.get(name, ())) < size:
                continue  # not saved, or by a version that kept less
            numbers = state[name]
            self._sums[:, index] = numbers[: self.rows]
            self._weight[index], self._missed[index] = numbers[self.rows : size]
            self._usual.load(numbers[size:])


class NoiseEstimator(_Averages):
    r"""Running mean of the squared dual norm of the difference of two gradients.

    .. math:: H \leftarrow \beta_2 H + (1 - \beta_2) \|G_t - \tilde G_t\|_*^2, \qquad
              \hat H = H / (1 - \beta_2^k) \text{ after } k \text{ updates.}

    The unit is that of :math:`E\|G - \tilde G\|_*^2` for two independent gradients of the full batch. Panels show
    :math:`\sqrt{\hat H}`. With ``source="successive"`` :math:`\tilde G_t = G_{t-1}`: the two share no data but sit at
    neighbouring weights, so the change of the mean gradient (curvature times step) is in the number too. With
    ``"independent"`` they are taken at the same weights, so the gap between the two estimates is curvature: from two
    parts of one accumulation window (:meth:`dynamon.quantities.gradient_reader.GradientReader.store_part`), or from the
    processes of a DDP run (:meth:`dynamon.quantities.gradient_reader.GradientReader.watch_ranks`), where :math:`\|G -
    \tilde G\|_*^2` is the mean over R processes of :math:`\tfrac{2}{R-1}\|g_r - G\|_*^2`.

    Averages are over windows of one length (:class:`dynamon.quantities.windows.Window`): readings of others are passed
    over, and where the length changes for good, the average begins anew. A layer that is not trained, or had nothing to
    compare at ``max(10, 1 / (1 - beta2))`` readings in a row, is forgotten: NaN, until it begins anew.

    Args:
        names: Layer names, which key the saved state.
        beta2: Decay of the running mean, in [0, 1).
        source: ``"successive"`` or ``"independent"``.

    Raises:
        ValueError: If ``beta2`` is outside [0, 1), or on an unknown source.

    Reference: LANTON, arXiv 2510.14009, options I and II.
    """

    rows = 3  # H, how often a difference is more than rounding, its cosine with the one before

    def __init__(self, names: Sequence[str], beta2: float = 0.98, source: str = "successive") -> None:
        """Start with no updates."""
        super().__init__(names, beta2, "beta2", source)
        self.beta2 = beta2

    def update(self, readings: GradientReadings) -> bool:
        """Average one step's readings.

        Returns:
            Whether anything was averaged: False where a gradient, now or one step before, was not finite
            (then no layer is updated), no layer had two gradients to compare, or they are over windows of another
            length than those before.
        """
        dual, l2 = self._differences(readings)
        trend = readings.trend if self.source == "successive" else np.zeros(len(self.names))
        return self._take(readings, np.stack([dual**2, l2 > readings.rounding * readings.l2, trend]))

    @property
    def is_noise(self) -> NDArray[Any]:
        """Whether a layer's differences are noise ``[L]``: above rounding, and neither continuing nor oscillating.

        Successive differences of noise have a cosine of -1/2, those that are further apart of 0.
        """
        _, loud, trend = self.means
        return np.asarray((loud > _HALF) & ~(trend >= _GOES_ON) & ~(trend <= _SWINGS))

    @property
    def squared(self) -> NDArray[Any]:
        """The estimate of H for each layer, NaN before its first update."""
        return self.means[0]

    @property
    def mean(self) -> NDArray[Any]:
        """The running mean that starts at zero, not corrected for its start."""
        return self._sums[0]

    @property
    def values(self) -> NDArray[Any]:
        """The square root of H, in the unit of the dual norm."""
        return np.sqrt(self.squared)


class SignalToNoise(_Averages):
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

    rows = 2  # variance, squared length

    def __init__(self, names: Sequence[str], beta: float = 0.98, source: str = "successive") -> None:
        """Start with no updates."""
        super().__init__(names, beta, "beta", source)
        self.beta = beta

    def update(self, readings: GradientReadings) -> bool:
        """Average one step's readings; False as for :class:`NoiseEstimator`."""
        _, l2 = self._differences(readings)
        return self._take(readings, np.stack([l2**2 / 2, readings.l2**2]))

    @property
    def ratios(self) -> NDArray[Any]:
        """SNR of each layer ``[L]``; 0 where no signal stands out, NaN before the first update or without noise."""
        variance, square = self._sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(variance > 0, np.maximum(square - variance, 0) / variance, np.nan)

    @property
    def noise_scale(self) -> float:
        """B_simple in multiples of the batch; infinite where no signal stands out, NaN before the first update."""
        return noise_scale([self])

    def totals(self) -> NDArray[Any]:
        """Variance and squared length of the gradients of all layers that have been seen ``[2]``."""
        known = self._weight > 0
        return np.asarray(self.means[:, known].sum(1))


def noise_scale(estimators: Sequence[SignalToNoise]) -> float:
    """B_simple of several sets of layers together, in multiples of the batch; see :class:`SignalToNoise`."""
    variance, square = np.sum([estimator.totals() for estimator in estimators], axis=0)
    if square == 0:
        return float("nan")
    return float(variance / (square - variance)) if square > variance else float("inf")
