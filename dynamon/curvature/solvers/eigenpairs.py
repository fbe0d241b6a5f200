"""The result of an eigenvalue solver."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamon.curvature.operators.scaling import relative


@dataclass(frozen=True)
class Eigenpairs:
    """Result of :func:`top_eigenvalues` with the evidence that is needed to trust it.

    Attributes:
        values: ``[k]`` float64 on the host, largest first.
        vectors: ``[n, m]`` with m >= k, orthonormal as far as products are symmetric, on the operator's device: the k
            eigenvectors, and further vectors for the next warm start.
        residuals: ``[k]`` float64, ``||A x - value x||``. Some eigenvalue lies within this distance.
        errors: ``[k]`` float64, bounds on the distance of each value to an eigenvalue. For k = 1 by Lanczos that is the
            smaller of the residual and its square over the gap (``value_error``), by which runs stop that start
            cold or have a clear top; else the residual. Never less than the error of the products. The gap is an
            estimate: errors can come out somewhat larger.
        lower: A lower bound on the largest eigenvalue (Rayleigh-Ritz, less a rounding allowance).
        upper: A 99 % upper bound on the largest eigenvalue, or None where the run was not certified.
        smallest: The smallest Ritz value: an upper bound on the smallest eigenvalue (the mean eigenvalue for
            method ``"gram"``, the smallest Rayleigh quotient for ``"power"``).
        matvecs: Number of matvecs taken.
        converged: True where errors, successive values and the error of products, rounding included, met the tolerance.
        backend: Backend of the operator.
        product_error: Estimated relative error of the product with the top vector: for exact products 0, or what the
            projected matrix lacks in symmetry; for finite differences the relative difference between two step sizes;
            for one-sided ones what they differed from exact products. Where it exceeds the tolerance, ``converged`` is
            False and there are no bounds.
        next_value: The first Ritz value below the k largest: a lower bound on that eigenvalue. NaN where there is none.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    errors: Tensor
    lower: float
    upper: float | None
    smallest: float
    matvecs: int
    converged: bool
    backend: str = "exact"
    product_error: float = 0.0
    next_value: float = math.nan

    def __repr__(self) -> str:
        """Return the values with their residuals and bounds, without the vectors."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        values = ", ".join(f"{value:.6g} (residual {residual:.2g})" for value, residual in pairs)
        upper = "" if self.upper is None else f", upper {self.upper:.6g}"
        end = "converged" if self.converged else "not converged"
        return f"Eigenpairs({values}; lower {self.lower:.6g}{upper}; {self.matvecs} matvecs, {end}, {self.backend})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the vectors as plain numbers and lists, fit for JSON.

        Examples:
            >>> import torch
            >>> from dynamon.curvature import top_eigenvalues
            >>> found = top_eigenvalues(torch.diag(torch.tensor([3.0, 1.0]))).to_dict()
            >>> round(found["values"][0], 4), found["upper"], found["converged"]
            (3.0, None, True)
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "vectors"}
        return plain | {name: getattr(self, name).tolist() for name in ("values", "residuals", "errors")}

    def readings(self, tag: str) -> dict[str, float]:
        """Return the numbers by tag; a value that did not converge goes under ``{tag}_unconverged``.

        Args:
            tag: Tag of the largest eigenvalue; ``{tag}_residual``, relative to the value, and, for a certified run,
                ``{tag}_upper`` are added.
        """
        key, value, residual = tag if self.converged else f"{tag}_unconverged", self.values[0], self.residuals[0]
        readings = {key: float(value), f"{tag}_residual": relative(residual, value.abs())}
        return readings if self.upper is None else {**readings, f"{tag}_upper": self.upper}

    def scaled(self, factor: float) -> "Eigenpairs":
        """Return the eigenpairs of ``factor * A``, for ``factor > 0``."""
        return replace(
            self,
            values=self.values * factor,
            residuals=self.residuals * factor,
            errors=self.errors * factor,
            lower=self.lower * factor,
            upper=None if self.upper is None else self.upper * factor,
            smallest=self.smallest * factor,
            next_value=self.next_value * factor,
        )


def value_error(values: np.ndarray, residuals: np.ndarray) -> float:
    r"""Bound the distance of the largest Ritz value to an eigenvalue by the residual and the gap below it.

    :math:`\min(\rho, \rho^2 / \gamma)` with :math:`\gamma = \theta_1 - (\theta_j + \rho_j)`, where
    :math:`\theta_j` is the first Ritz value outside of the cluster of those within their residuals of
    :math:`\theta_1`. :math:`\rho` in the quotient is the residual of the whole cluster. Without a gap
    (:math:`\gamma \le 0`) the residual alone counts. An eigenvector that the space does not contain leaves no trace in
    either.

    Args:
        values: ``[m]`` Ritz values, largest first.
        residuals: ``[m]`` norms of their residual vectors.

    Reference: Parlett, "The symmetric eigenvalue problem", section 11.7.

    Examples:
        >>> import numpy as np
        >>> from dynamon.curvature.solvers.eigenpairs import value_error
        >>> value_error(np.array([10.0, 1.0]), np.array([0.3, 0.0]))  # 0.3^2 / 9
        0.01
    """
    inside = 1
    while inside < len(values) and values[0] - values[inside] <= residuals[inside]:
        inside += 1
    own = float(residuals[0])
    gap = float(values[0] - values[inside] - residuals[inside]) if inside < len(values) else 0.0
    return min(own, float(np.square(residuals[:inside]).sum()) / gap) if gap > 0 else own


def on_host(numbers: Any) -> Tensor:
    """Convert numbers to a float64 tensor on the host, whatever ``torch.set_default_device`` says."""
    return torch.from_numpy(np.array(numbers, dtype=np.float64))


def with_product_check(found: Eigenpairs, operator: Any, tol: float) -> Eigenpairs:
    """Add backend and product error; where products are not trusted nothing has converged."""
    own = operator.product_error(found.vectors[:, 0]) if hasattr(operator, "product_error") else 0.0
    error = max(own, found.product_error)
    backend = getattr(operator, "backend", "exact")
    rounding = max(getattr(operator, "rounding", 0.0), torch.finfo(found.vectors.dtype).eps)
    largest = max(abs(float(found.values[0])), abs(found.smallest))
    found = replace(found, errors=found.errors.clamp_min(max(error, rounding) * largest))
    if _is_lost(found, largest, tol):
        return replace(found, backend=backend, product_error=error, converged=False, lower=-math.inf, upper=None)
    # Smaller errors than that of the products are not seen: by the gap a run in float32 can meet any tolerance.
    converged = found.converged and max(error, rounding) <= tol
    found = replace(found, backend=backend, product_error=error, converged=converged)
    # Bounds are statements about the operator that was multiplied with; where that is not the one meant, none hold.
    if error > tol:
        return replace(found, lower=-math.inf, upper=None)
    allowance = (getattr(operator, "rounding", 0.0) + error) * abs(float(found.values[0]))
    upper = None if found.upper is None else found.upper + allowance
    return replace(found, lower=found.lower - allowance, upper=upper) if allowance else found


def _is_lost(found: Eigenpairs, largest: float, tol: float) -> bool:
    """Return whether values are so far below the smallest normal number that rounding exceeds the tolerance."""
    dtype = torch.finfo(found.vectors.dtype)
    return 0 < largest < dtype.tiny and 16 * dtype.eps * dtype.tiny > tol * largest
