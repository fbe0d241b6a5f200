"""The largest eigenvalues of an operator, by a choice of methods."""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from dynamon.curvature.operators.ggn import GGNOperator
from dynamon.curvature.operators.parameters import checked_once
from dynamon.curvature.operators.vector_space import space_of
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, with_product_check
from dynamon.curvature.solvers.gram import gram_eigenpairs
from dynamon.curvature.solvers.lanczos import lanczos_eigenpairs
from dynamon.curvature.solvers.power import power_eigenpairs
from dynamon.curvature.solvers.rayleigh_ritz import TRACKED, tracked_eigenpair
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels.arguments import check_count, check_tensor

METHODS = ("lanczos", "power", "gram")
_CERTIFIED = ("lanczos", "gram")  # those with an upper bound


@checked_once()
@full_precision()
def top_eigenvalues(
    operator: Any,
    k: int = 1,
    *,
    method: str = "lanczos",
    tol: float = 1e-2,
    max_matvecs: int = 40,
    warm_start: Tensor | None = None,
    last: float | None = None,
    certify: bool = False,
    seed: int = 0,
) -> Eigenpairs:
    r"""Compute the k largest algebraic eigenvalues of a symmetric operator, with bounds.

    ``"lanczos"`` is thick-restart Lanczos with full reorthogonalisation (classical Gram-Schmidt, twice). A warm start
    adds fresh noise to the given vectors, so that a direction that has overtaken the old one is found. A cold start is
    half noise and half the gradient, where the operator has one. The run stops when the error of every wanted value is
    at most ``tol`` times the largest Ritz value in magnitude **and** the last two Ritz values agree to ``tol``, but not
    before 8 matvecs from a cold start, 16 with one tracked vector, 12 with two, 5 with three or more. The error is
    bounded by the residual; for k = 1 from a cold start also by the residual's square over the gap
    (:attr:`Eigenpairs.errors`), and the 8 matvecs become more below ``tol`` = 1e-2, 16 at 1e-4. A run from the old top
    vector alone converges to an eigenvalue that is no longer the largest, and its residual and gap both look perfect:
    therefore the minimum, and no gap after a warm start. A Krylov space contains a repeated eigenvalue only once, so
    for k > 1 the run restarts from a fresh vector until that yields nothing new, which at least doubles the matvecs; a
    certified run, which may not restart, does not.

    With ``last``, a warm start from three vectors is Rayleigh-Ritz first: on the old top vector, one or two residuals
    of the best Ritz vector, and one vector that looks for a new top, of the other two and the gradient. Where the error
    by residual and gap is within tolerance, the last product changed nothing, every other Ritz value, its residual
    added, stays below three quarters of the top, and the top has changed by less than 30 %, these 3 or 4 matvecs (5 at
    most) are enough. Elsewhere Lanczos goes on from what was found and the two others, for 10 matvecs at least.

    ``"power"`` is power iteration with the spectrum shifted until the largest algebraic eigenvalue is also the largest
    in magnitude. It needs several times as many matvecs and serves for comparison.

    ``"gram"`` (:class:`GGNOperator` only) builds the Gram matrix :math:`H_L^{1/2} J J^\top H_L^{1/2}` of the outputs,
    which has the eigenvalues of the GGN, and bounds the largest from below and above by Gram iteration,
    deterministically. It costs two passes per row of the outputs.

    Args:
        operator: Anything with ``.shape`` ``(n, n)`` and ``@`` on flat tensors ``[n]``.
        k: Number of eigenvalues, 1 or more (``"gram"``: 1); all of them where the operator has fewer.
        method: ``"lanczos"``, ``"power"`` or ``"gram"``.
        tol: Relative tolerance of the values.
        max_matvecs: Upper limit on matvecs; a run that reaches it first has ``converged=False``.
        warm_start: ``[n]`` or ``[n, m]``, such as ``.vectors`` of the last run, or None for a cold start.
        last: The value of the last run, where ``warm_start`` holds its ``vectors`` for k = 1 and it was lately.
        certify: Take a cold, unrestarted run of at least 20 matvecs (Lanczos), which alone has a valid upper bound:
            with probability 0.99 over the random start the largest eigenvalue lies below the root of the Lanczos
            polynomial above the top Ritz value. ``warm_start`` is then not used.
        seed: Seed of the random start; global random state is not touched.

    Returns:
        :class:`Eigenpairs`.

    Raises:
        TypeError: If ``k`` or ``max_matvecs`` is not an int, or ``warm_start`` not a tensor.
        ValueError: On arguments outside the ranges above, and for ``"gram"`` on more than 4,096 rows.
        FloatingPointError: If the operator returns NaN or infinity.

    Cost: up to ``max_matvecs`` matvecs. Memory for k = 1: 9 vectors of length n (``max_matvecs + 1`` certified, 2k + 7
    for larger k, 15 with ``last``); one host read per 2 matvecs, on a CPU and with ``last`` per matvec.
    Power: k + 2 vectors. Gram: some matrices of rows x rows.

    Reference: Wu and Simon, "Thick-restart Lanczos", 2000; van Dorsselaer, Hochstenbach and van der Vorst,
    "Computing probabilistic bounds for extreme eigenvalues", 2000; Parlett, "The symmetric eigenvalue problem", 1998,
    for residuals and gaps; Delattre et al., arXiv 2305.16173.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal, top_eigenvalues
        >>> operator = Diagonal(torch.linspace(-1, 2, 100))
        >>> found = top_eigenvalues(operator, certify=True)
        >>> found.lower <= 2 <= found.upper, found.converged
        (True, True)
        >>> again = top_eigenvalues(operator, warm_start=found.vectors)
        >>> again.matvecs < found.matvecs
        True
    """
    _check(operator, k, method, tol, max_matvecs, warm_start)
    k = min(k, operator.shape[0])
    if certify and method not in _CERTIFIED:
        needed = " or ".join(map(repr, _CERTIFIED))
        raise ValueError(f"method {method!r} has no upper bound: certify=True needs {needed}.")
    if method == "gram":
        found = gram_eigenpairs(operator, tol)
    elif method == "power":
        found = power_eigenpairs(operator, k, tol, max_matvecs, warm_start, seed)
    elif last is not None and _is_tracked(warm_start) and not certify and k == 1 and operator.shape[0] > max_matvecs:
        found = tracked_eigenpair(operator, tol, max_matvecs, warm_start, last, seed)
    else:
        found = lanczos_eigenpairs(operator, k, tol, max_matvecs, warm_start, certify, seed)
    return with_product_check(found, operator, tol)


def _is_tracked(warm_start: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether a warm start holds the vectors that a run for one value leaves."""
    return warm_start is not None and warm_start.ndim == 2 and warm_start.shape[1] == TRACKED


def _check(operator: Any, k: int, method: str, tol: float, max_matvecs: int, warm_start: Tensor | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if method == "gram" and not (isinstance(operator, GGNOperator) and k == 1):
        raise ValueError("method 'gram' is for k=1 of a GGNOperator: it works on the Gram matrix of its outputs.")
    if isinstance(operator, Tensor) and not (
        operator.is_floating_point() and torch.allclose(operator, operator.mT, equal_nan=True)
    ):
        raise ValueError("a matrix must be real, floating point and symmetric.")
    check_count("k", k)
    if operator.shape[0] < 1:
        raise ValueError("the operator has no eigenvalues: its shape is (0, 0).")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
    check_count("max_matvecs", max_matvecs, least=max(2, min(k, operator.shape[0])))
    if warm_start is not None:
        check_tensor("warm_start", warm_start, "[n] or [n, m]")
        rows = space_of(operator).length
        if warm_start.shape[0] != rows:
            raise ValueError(
                f"warm_start must have {rows} rows, got {warm_start.shape[0]}: it belongs to another operator."
            )
