"""What an eigenvalue solver returns."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """What a run of :func:`top_eigenvalues` found, with what is needed to trust it.

    Attributes:
        values: ``[k]`` float64 on the host, largest first.
        vectors: ``[n, m]`` with m >= k, orthonormal, on the operator's device: the k eigenvectors and
            further Ritz vectors that make the next warm start safe.
        residuals: ``[k]`` float64, ``||A x - value x||``. Some eigenvalue lies within this distance.
        lower: A lower bound on the largest eigenvalue (Rayleigh-Ritz, less a rounding allowance).
        upper: A 99 % upper bound on the largest eigenvalue, or None where the run was not certified.
        smallest: The smallest Ritz value: an upper bound on the smallest eigenvalue (the mean eigenvalue for
            method ``"gram"``, the smallest Rayleigh quotient for ``"power"``).
        matvecs: Products spent.
        converged: Whether residuals, the agreement of successive values and the products themselves met the
            tolerance.
        backend: How the operator made its products.
        product_error: Estimated relative error of the product with the top vector; 0 where products are exact,
            for finite differences the relative difference between two step sizes. Where it exceeds the tolerance
            nothing has converged and there are no bounds.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    lower: float
    upper: float | None
    smallest: float
    matvecs: int
    converged: bool
    backend: str = "exact"
    product_error: float = 0.0

    def __repr__(self) -> str:
        """The values with their residuals and bounds; not the vectors."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        values = ", ".join(f"{value:.6g} (residual {residual:.2g})" for value, residual in pairs)
        upper = "" if self.upper is None else f", upper {self.upper:.6g}"
        end = "converged" if self.converged else "not converged"
        return f"Eigenpairs({values}; lower {self.lower:.6g}{upper}; {self.matvecs} products, {end}, {self.backend})"

    def readings(self, tag: str) -> dict[str, float]:
        """Numbers by tag; a value that did not converge goes under ``{tag}_unconverged``, not under the plain one.

        Args:
            tag: That of the largest eigenvalue; ``{tag}_residual`` and, where there is one, ``{tag}_upper`` go with it.
        """
        value = tag if self.converged else f"{tag}_unconverged"
        readings = {value: float(self.values[0]), f"{tag}_residual": float(self.residuals[0])}
        return readings if self.upper is None else {**readings, f"{tag}_upper": self.upper}

    def scaled(self, factor: float) -> "Eigenpairs":
        """The eigenpairs of ``factor * A``, for ``factor > 0``."""
        return replace(
            self,
            values=self.values * factor,
            residuals=self.residuals * factor,
            lower=self.lower * factor,
            upper=None if self.upper is None else self.upper * factor,
            smallest=self.smallest * factor,
        )


def on_host(numbers: Any) -> Tensor:
    """Numbers of the host as a float64 tensor there, whatever ``torch.set_default_device`` says."""
    return torch.from_numpy(np.array(numbers, dtype=np.float64))


def with_product_check(found: Eigenpairs, operator: Any, tol: float) -> Eigenpairs:
    """Add what the operator says of itself; products that are not trusted have not converged."""
    error = operator.product_error(found.vectors[:, 0]) if hasattr(operator, "product_error") else 0.0
    backend = getattr(operator, "backend", "exact")
    if _is_lost(found, tol):
        return replace(found, backend=backend, product_error=error, converged=False, lower=-math.inf, upper=None)
    found = replace(found, backend=backend, product_error=error, converged=found.converged and error <= tol)
    # Bounds are statements about the operator that was multiplied with; where that is not the one meant, none hold.
    if error > tol:
        return replace(found, lower=-math.inf, upper=None)
    allowance = getattr(operator, "rounding", 0.0) * abs(float(found.values[0]))
    upper = None if found.upper is None else found.upper + allowance
    return replace(found, lower=found.lower - allowance, upper=upper) if allowance else found


def _is_lost(found: Eigenpairs, tol: float) -> bool:
    """Whether numbers are so far below the smallest normal one that their rounding exceeds the tolerance."""
    dtype = torch.finfo(found.vectors.dtype)
    largest = max(abs(float(found.values[0])), abs(found.smallest))
    return 0 < largest < dtype.tiny and 16 * dtype.eps * dtype.tiny > tol * largest
