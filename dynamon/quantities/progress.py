r"""Decrease, curvature cost and overshoot of each layer in a step. Needs no torch.

Let :math:`u_l` be the step of layer l and L the loss on a batch that the step has not seen, its probe. Two gradients,
at the weights w before the step and w' after it, give for every layer

.. math:: b_l = \langle \nabla_l L(w), u_l \rangle, \qquad a_l = \langle \nabla_l L(w'), u_l \rangle.

- The first-order decrease is :math:`-b_l`: what the step would take off the loss if its slope stayed.
- The curvature cost is :math:`c_l = a_l - b_l`, :math:`\langle u_l, (H u)_l \rangle` up to third order. It contains the
  terms that the layer has in common with all others.
- The decrease is :math:`-(a_l + b_l) / 2 = -b_l - c_l / 2`, the trapezoidal rule along the step. Its sum over layers is
  the decrease of the probe's loss up to third order: halving the step divides the difference by 8.
- The overshoot is :math:`c_l / -b_l`. For the whole step 1 means that it went to the minimum of the loss along it, 2
  that the loss is where it was. For one layer only comparisons between layers mean something. It is not defined where
  :math:`b_l \ge 0`, where the layer climbs.

Reference: Lan et al., "LCA: Loss Change Allocation", arXiv 1909.01440, for the sum over the path of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FEWEST = 4  # readings from which an error is told
_MOST_ALIKE = 0.95  # correlation of successive readings that is assumed at most
_WINDOW = 12  # readings over which the level of a run is a line
_FEWEST_FOR_LINE = 8  # of them to which one is fitted


def decrease(before: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
    """Return the decrease of the loss ``-(a + b) / 2``, in units of the loss."""
    return -(after + before) / 2


def curvature_cost(before: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
    """Return the curvature cost ``a - b``, in units of the loss."""
    return after - before


def overshoot(before: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
    """Return the overshoot ``(a - b) / -b``; NaN where ``b`` is not negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(before < 0, (after - before) / -before, np.nan)


def standard_error(values: NDArray[Any]) -> NDArray[Any]:
    r"""Estimate the standard error of the mean of successive readings, which may be correlated.

    :math:`\sqrt{s^2 f / T} \, (1 + 3 / T)` with :math:`f = (1 + \rho) / (1 - \rho)`, the factor of a first-order
    autoregressive series, the correlation :math:`\rho` of neighbours corrected for its bias :math:`-(1 + 3 \rho) / T`
    and kept between 0 and 0.95. The last factor covers the error of both estimates: for independent readings the mean
    is more than two standard errors off in 2 to 4 % of all cases, from 4 readings on.

    Args:
        values: ``[T, ...]``, T readings in order. NaN where one is unknown; such series have no error.

    Returns:
        ``[...]``; NaN for fewer than 4 readings.

    Reference: Marriott and Pope, "Bias in the estimation of autocorrelations", Biometrika 41, 1954.

    Example:
        >>> import numpy as np
        >>> from dynamon.quantities.progress import standard_error
        >>> draws = np.random.default_rng(0).standard_normal((400, 1000))
        >>> round(float(standard_error(draws).mean()), 3)  # that of the mean is 0.05
        0.051
    """
    return _error(np.asarray(values, np.float64), fitted=1)


def standard_error_over_trend(values: NDArray[Any]) -> NDArray[Any]:
    """Estimate the standard error of the mean of successive readings whose level changes over the run.

    A trend is no error of the mean: readings are cut into windows of 12 to 23, the line of least squares is taken off
    each window of 8 or more, and the errors of the windows' means (:func:`standard_error`, with the bias of a fitted
    line) are combined. Correlation over more than a window is taken for a trend.

    Args:
        values: ``[T, ...]``, T readings in order.

    Returns:
        ``[...]``; NaN for fewer than 4 readings.

    Example:
        >>> import numpy as np
        >>> from dynamon.quantities.progress import standard_error, standard_error_over_trend
        >>> falling = 0.9 ** np.arange(60) + 0.01 * np.random.default_rng(0).standard_normal(60)
        >>> round(float(standard_error(falling)), 4), round(float(standard_error_over_trend(falling)), 4)
        (0.2087, 0.0092)
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    parts = np.array_split(values, max(1, count // _WINDOW))
    variance: NDArray[Any] = sum(np.square(len(part) * _window_error(part)) for part in parts) / max(count, 1) ** 2
    return np.sqrt(variance)


def _window_error(values: NDArray[Any]) -> NDArray[Any]:
    """The error of one window's mean, the trend left out where there are enough readings to see one."""
    count = len(values)
    if count < _FEWEST_FOR_LINE:
        return _error(values, fitted=1)
    time = np.arange(count) - (count - 1) / 2
    slope = np.tensordot(time, values, 1) / np.square(time).sum()
    return _error(values - np.multiply.outer(time, slope), fitted=2)


def _error(values: NDArray[Any], fitted: int) -> NDArray[Any]:
    """The standard error of the mean, where so many coefficients were fitted to the readings, the mean included."""
    count = len(values)
    if count < _FEWEST:
        return np.full(values.shape[1:], np.nan)
    deviations = values - values.mean(0)
    squares = np.square(deviations).sum(0)
    with np.errstate(invalid="ignore"):
        neighbours = (deviations[1:] * deviations[:-1]).sum(0) / np.where(squares > 0, squares, 1.0)
        bias = (fitted + (2 + fitted) * neighbours) / count
        alike = np.clip(neighbours + bias, 0.0, _MOST_ALIKE)
    variance = squares / (count - fitted) * (1 + alike) / (1 - alike) / count
    return np.sqrt(variance) * (1 + 3 / count)


def is_significant(values: NDArray[Any], level: float = 2.0) -> NDArray[np.bool_]:
    """Return whether the mean of successive readings ``[T, ...]`` is more than some standard errors from zero."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return np.zeros(values.shape[1:], bool)
    with np.errstate(invalid="ignore"):
        return np.abs(values.mean(0)) > level * standard_error(values)


@dataclass(frozen=True)
class StepReading:
    """What a step did to the loss on its probe, layer by layer. All arrays are ``[L]``, float64, in units of the loss.

    The step is split: decoupled weight decay costs loss by design, and has rows of its own. In a layer that no
    optimizer stepped all rows are NaN.

    Attributes:
        names: The layers.
        before: ``b``, the slope along the optimizer's part of the step, at the weights before it.
        after: ``a``, the same at the weights after it.
        decay_before: The slope along the part of decoupled weight decay, at the weights before the step.
        decay_after: The same at the weights after it.
        loss_before: The probe's loss before the step.
        loss_after: The same after it.
        samples: Samples in the probe, NaN where their number is not known.

    Example:
        >>> import numpy as np
        >>> from dynamon.quantities.progress import StepReading
        >>> none = np.zeros(2)
        >>> reading = StepReading(("a", "b"), np.array([-3.0, -1.0]), np.array([-1.0, 2.0]), none, none, 5.0, 3.5)
        >>> reading.decrease, reading.overshoot, reading.total_decrease
        (array([ 2. , -0.5]), array([0.66666667, 3.        ]), 1.5)
    """

    names: tuple[str, ...]
    before: NDArray[Any]
    after: NDArray[Any]
    decay_before: NDArray[Any]
    decay_after: NDArray[Any]
    loss_before: float
    loss_after: float
    samples: float = float("nan")

    @property
    def decrease(self) -> NDArray[Any]:
        """Decrease of the loss by the optimizer's part of the step."""
        return decrease(self.before, self.after)

    @property
    def first_order(self) -> NDArray[Any]:
        """What that part would take off the loss if the slope stayed."""
        return -self.before

    @property
    def curvature_cost(self) -> NDArray[Any]:
        """How much the slope along that part has risen."""
        return curvature_cost(self.before, self.after)

    @property
    def overshoot(self) -> NDArray[Any]:
        """Curvature cost over first-order decrease; NaN where the layer climbs."""
        return overshoot(self.before, self.after)

    @property
    def decay_decrease(self) -> NDArray[Any]:
        """Decrease of the loss by decoupled weight decay, which is mostly negative."""
        return decrease(self.decay_before, self.decay_after)

    @property
    def total_decrease(self) -> float:
        """Decrease of the loss by the optimizer's part in all layers."""
        return float(np.nansum(self.decrease))

    @property
    def total_overshoot(self) -> float:
        """Overshoot of that part of the whole step."""
        return float(overshoot(np.nansum(self.before), np.nansum(self.after)))

    @property
    def total_decay_decrease(self) -> float:
        """Decrease of the loss by decoupled weight decay in all layers."""
        return float(np.nansum(self.decay_decrease))

    @property
    def discrepancy(self) -> float:
        """What all layers' decreases add up to, decay included, minus the decrease of the loss: the third order."""
        return self.total_decrease + self.total_decay_decrease - (self.loss_before - self.loss_after)

    def grouped(self, keys: Sequence[str]) -> "StepReading":
        """Return the sums over layers with the same key ``[L]``, in the order in which keys first appear.

        Layers that were not stepped are left out of a sum; a group of such layers alone is NaN.
        """
        names = tuple(dict.fromkeys(keys))
        places = [np.array([key == name for key in keys]) for name in names]
        rows = ("before", "after", "decay_before", "decay_after")
        sums: dict[str, Any] = {row: np.array([_sum(getattr(self, row)[place]) for place in places]) for row in rows}
        return replace(self, names=names, **sums)


def _sum(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.sum()) if len(known) else float("nan")


@dataclass(frozen=True)
class Couplings:
    r"""How the steps of G groups of layers bend the loss, alone and together.

    With :math:`u_g` the step of group g, :math:`C_{gm} = \langle \nabla L(w + u_g) - \nabla L(w), u_m \rangle`, which
    is :math:`u_g^\top H u_m` up to third order. So C is symmetric up to that order, and its columns add up to the
    curvature costs of the groups.

    Attributes:
        names: The groups.
        matrix: C, ``[G, G]``.
        slopes: ``b``, the slope along the step of each group, ``[G]``.
        loss: The probe's loss before the step.
    """

    names: tuple[str, ...]
    matrix: NDArray[Any]
    slopes: NDArray[Any]
    loss: float

    @property
    def symmetric(self) -> NDArray[Any]:
        """The symmetric part of C."""
        return (self.matrix + self.matrix.T) / 2

    @property
    def asymmetry(self) -> float:
        """Length of the antisymmetric part of C over that of the symmetric one: the share of the third order."""
        length = float(np.linalg.norm(self.symmetric))
        return float(np.linalg.norm(self.matrix - self.matrix.T)) / 2 / length if length > 0 else float("nan")
