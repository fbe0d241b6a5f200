"""The spectral density of an operator: bulk and outliers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.curvature.operators.parameters import checked_once
from dynamon.curvature.solvers.lanczos import Lanczos, random_start
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels.arguments import check_count, renamed_arguments

Array = NDArray[np.float64]
_RESOLVED = 0.1  # residual over the distance to the next Ritz value, below which an eigenvalue stands alone
_APART = 0.25  # gap below the last outlier, relative to where the bulk ends, both seen from the median eigenvalue
_OFFSET = 0.2  # share of the spectrum's height added to where the bulk ends: gaps next to the median are not wide


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    r"""Stochastic Lanczos quadrature of a spectrum.

    Each of the R random starts gives m nodes :math:`\theta_i` (Ritz values) with weights :math:`\tau_i^2` that sum to
    one; averaged, they stand for the density :math:`\frac1n \sum_j \delta(x - \lambda_j)` of the n eigenvalues.

    Attributes:
        nodes: ``[R, m]`` Ritz values, largest first.
        weights: ``[R, m]``, each row sums to one.
        residuals: ``[R, m]``; some eigenvalue lies within that distance of each node.
        size: Number of eigenvalues n of the operator.
        matvecs: Number of matvecs taken.
        backend: Backend of the operator.
    """

    nodes: Array
    weights: Array
    residuals: Array
    size: int
    matvecs: int
    backend: str

    def __repr__(self) -> str:
        """Return the range of the spectrum, the number of outliers and the bulk edge, without the nodes."""
        low, high, count = float(self.nodes.min()), float(self.nodes.max()), len(self.outliers)
        return (
            f"SpectralDensity({self.size} eigenvalues from {low:.6g} to {high:.6g}, {count} outliers, "
            f"bulk edge {self.bulk_edge:.6g}; {self.matvecs} matvecs, {self.backend})"
        )

    @property
    def outliers(self) -> Array:
        """Eigenvalues separated from the bulk above it, largest first.

        The widest relative gap separates them, by the eigenvalue-ratio criterion: each gap is divided by the distance
        of the value below it from the median eigenvalue, plus a fifth of that distance for the largest value. There are
        no outliers where the widest relative gap is below a quarter. Only resolved gaps count, up to which the residual
        of each Ritz value is at most a tenth of its distance to the next, and at most a third of the Ritz values are
        outliers. The count is the median over the random starts. More steps resolve more gaps, but create none. In a
        spectrum that decays evenly the count is zero or small; of outliers on very different scales only the upper
        group is found.

        Reference: Ahn and Horenstein, "Eigenvalue ratio test for the number of factors", 2013.
        """
        middle = self._median
        runs = [_apart(nodes, residuals, middle) for nodes, residuals in zip(self.nodes, self.residuals, strict=True)]
        count = int(np.median([len(run) for run in runs]))
        agreed = [run[:count] for run in runs if len(run) >= count]
        return np.median(agreed, axis=0) if count else np.empty(0)

    @property
    def bulk_edge(self) -> float:
        """Upper end of the bulk: the largest Ritz value below the outliers, median over the starts."""
        count = len(self.outliers)
        return float(np.median(self.nodes[:, min(count, self.nodes.shape[1] - 1)]))

    @property
    def mean(self) -> float:
        """Mean eigenvalue, the trace over n."""
        return float((self.nodes * self.weights).sum(1).mean())

    def density(self, points: Array, width: float | None = None) -> Array:
        """Evaluate the density at some points, each node smoothed by a Gaussian.

        Args:
            points: ``[p]`` points of evaluation.
            width: Standard deviation of the Gaussians; None takes a hundredth of the spectrum's range.
        """
        width = width or max(float(np.ptp(self.nodes)) / 100, 1e-12)
        distances = (np.asarray(points)[:, None] - self.nodes.reshape(-1)) / width
        heights = np.exp(-0.5 * distances**2) / (width * math.sqrt(2 * math.pi))
        return heights @ self.weights.reshape(-1) / len(self.nodes)

    def share_above(self, threshold: float) -> float:
        """Return the share of the eigenvalues above a value."""
        return float((self.weights * (self.nodes > threshold)).sum(1).mean())

    def plot(self, axes: Any = None) -> Any:
        """Draw the density on a logarithmic axis and mark each outlier.

        Args:
            axes: Matplotlib axes; None creates a figure.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib, which ``pip install "lightning-dynamon[demo]"`` brings.
        """
        axes = _new_axes() if axes is None else axes
        low, high = float(self.nodes.min()), float(self.nodes.max())
        points = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 1000)
        heights = self.density(points)
        axes.fill_between(points, heights, color="#4477aa", alpha=0.6, linewidth=0, label="density")
        outliers = self.outliers
        if len(outliers):
            floor = 1 / (self.size * max(high - low, 1e-12))
            axes.plot(outliers, np.full(len(outliers), floor), "v", color="#cc3311", label=f"{len(outliers)} outliers")
        axes.axvline(
            self.bulk_edge, color="#222222", linestyle="--", linewidth=1, label=f"bulk ends {self.bulk_edge:.3g}"
        )
        axes.set_yscale("log")
        axes.set_ylim(max(heights.max() * 1e-7, 1e-12), heights.max() * 10)
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        axes.legend(frameon=False)
        return axes

    @property
    def _median(self) -> float:
        order = np.argsort(self.nodes, axis=None)
        below = self.weights.reshape(-1)[order].cumsum()
        return float(self.nodes.reshape(-1)[order][np.searchsorted(below, below[-1] / 2)])


def _apart(nodes: Array, residuals: Array, middle: float) -> Array:
    """Return the Ritz values of one start above the widest relative gap."""
    gaps = nodes[:-1] - nodes[1:]
    alone = residuals[:-1] <= _RESOLVED * gaps
    resolved = len(alone) if alone.all() else int(np.argmin(alone))
    height, count = nodes[0] - middle, min(resolved, len(nodes) // 3)
    if count == 0 or height <= 0:
        return nodes[:0]
    relative = gaps[:count] / (np.maximum(nodes[1 : count + 1] - middle, 0.0) + _OFFSET * height)
    widest = int(relative.argmax())
    return nodes[: widest + 1 if relative[widest] >= _APART else 0]


@renamed_arguments(probes="num_vectors")
@checked_once()
@full_precision()
def spectral_density(operator: Any, *, steps: int = 80, num_vectors: int = 4, seed: int = 0) -> SpectralDensity:
    """Estimate the eigenvalue density of a symmetric operator by stochastic Lanczos quadrature.

    Args:
        operator: Anything with ``.shape`` ``(n, n)`` and ``@`` on flat tensors ``[n]``.
        steps: Matvecs per random start, the number of nodes; at most n are taken.
        num_vectors: Number of random starts.
        seed: Seed of the starts; global random state is not touched.

    Returns:
        :class:`SpectralDensity`.

    Raises:
        TypeError: If ``steps`` or ``num_vectors`` is not an int.
        ValueError: If ``steps`` or ``num_vectors`` is below one.
        FloatingPointError: If the operator returns NaN or infinity.

    Cost: ``steps * num_vectors`` matvecs; memory of ``steps + 1`` vectors of length n. Reference: Ubaru, Chen, Saad,
    "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017; Ghorbani et al., arXiv 1901.10159.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal, spectral_density
        >>> bulk, outliers = torch.linspace(-1, 1, 198), torch.tensor([8.0, 9.0])
        >>> found = spectral_density(Diagonal(torch.cat([bulk, outliers])), steps=40)
        >>> found.outliers.round(2), round(found.mean, 1)
        (array([9., 8.]), 0.1)
    """
    check_count("steps", steps)
    check_count("num_vectors", num_vectors)
    size = operator.shape[0]
    steps = min(steps, size)
    nodes, weights, residuals = np.zeros((3, num_vectors, steps))
    spent = 0
    for run in range(num_vectors):
        state = Lanczos(operator, random_start(operator, None, seed + run), steps)
        state.extend(steps)
        ritz = state.ritz(1)
        found = len(ritz.values)  # fewer than steps where the Krylov space ended before
        spent += state.matvecs
        nodes[run], weights[run] = ritz.values[-1], 0.0
        nodes[run, :found], residuals[run, :found] = ritz.values, ritz.residuals
        weights[run, :found] = ritz.rotation[0] ** 2
        del state  # its vectors make room for those of the next start
    return SpectralDensity(nodes, weights, residuals, size, spent, getattr(operator, "backend", "exact"))


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "lightning-dynamon[demo]"') from error
    return Figure(figsize=(7, 4), layout="constrained").subplots()
