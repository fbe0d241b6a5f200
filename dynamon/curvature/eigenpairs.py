"""What an eigenvalue solver returns."""

from dataclasses import dataclass, replace

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
        smallest: The smallest Ritz value: an upper bound on the smallest eigenvalue.
        matvecs: Products spent.
        converged: Whether residuals, the agreement of successive values and the products themselves met the
            tolerance.
        backend: How the operator made its products.
        product_error: Estimated relative error of the product with the top vector; 0 where products are exact,
            for finite differences the relative difference between two step sizes.
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
