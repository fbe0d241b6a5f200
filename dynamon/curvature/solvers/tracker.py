"""Track the top eigenpairs of an operator that changes slowly."""

import math
from typing import Any

from torch import Tensor

from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.scaling import relative
from dynamon.curvature.operators.vector_space import space_of
from dynamon.curvature.solvers.eigenpairs import Eigenpairs
from dynamon.curvature.solvers.rayleigh_ritz import CHANGE, CLEAR, ROOM
from dynamon.curvature.solvers.top import top_eigenvalues
from dynamon.kernels.arguments import check_count

_COLD_EVERY = 10  # a cold run now and then finds what tracking could have lost
_COLD_AT = 5  # ... away from the first one, which is cold anyway
COMPARED = 3  # products that a comparison takes, or gradients, which cost less
_SHARE = 0.25  # of the tolerance that the error of one-sided differences may take


class EigenTracker:
    """Repeated :func:`top_eigenvalues`, each warm-started from the one before.

    It holds the vectors of the last measurement. Measurements start cold the first time, after the operator's size has
    changed, and every tenth time, when the run can also give the 99 % upper bound. Where the last measurement found
    another eigenvalue above three quarters of the top, or the top had changed by more than 30 %, Lanczos starts from
    the vectors and noise; elsewhere a few products are tried first (:func:`top_eigenvalues`).

    Warm measurements can take one-sided differences of gradients, at one gradient a product, where these were compared
    with exact products at the last cold measurement (:meth:`compare`). ``backend`` says which operator the next
    measurement is to be given.

    Args:
        k: Number of eigenvalues to track.
        certify: Give the cold runs after the first an upper bound.
        tol: Relative tolerance, as in :func:`top_eigenvalues`.
        max_matvecs: Upper limit on matvecs per measurement.
        seed: Seed of the start vectors; each measurement has its own.

    Attributes:
        k: Number of eigenvalues that are tracked.
        taken: Number of measurements so far.
        vectors: Start vectors of the next warm start, or None.
        value: The last value of the largest eigenvalue, or None.
        difference_error: Relative error of one-sided differences along the top direction of the last cold measurement;
            infinity where it is not known.
        is_clear: Whether the last measurement says that a few products may be enough.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal, EigenTracker
        >>> tracker, bulk = EigenTracker(), torch.linspace(0, 1, 200)
        >>> sizes = [tracker.update(Diagonal(bulk + top * (bulk == 1))).matvecs for top in (1.0, 1.01, 1.02)]
        >>> sizes[0] > sizes[1] >= sizes[2]
        True
        >>> tracker
        EigenTracker(k=1, 3 measurements, the next one warm)
    """

    def __init__(
        self,
        k: int = 1,
        *,
        certify: bool = False,
        tol: float = 1e-2,
        max_matvecs: int = 40,
        seed: int = 0,
    ) -> None:
        """Start without vectors."""
        check_count("k", k)
        check_count("max_matvecs", max_matvecs, least=max(2, k))
        if not 0 < tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
        self.k, self._certify = k, certify
        self._tol, self._max_matvecs, self._seed = tol, max_matvecs, seed
        self.taken = 0
        self.vectors: Tensor | None = None
        self.value: float | None = None
        self.difference_error = math.inf
        self.is_clear = True

    def __repr__(self) -> str:
        """Return k, the number of measurements, and whether the next one is cold."""
        taken = f"{self.taken} measurement{'' if self.taken == 1 else 's'}"
        return f"EigenTracker(k={self.k}, {taken}, the next one {'cold' if self.next_is_cold else 'warm'})"

    @property
    def next_is_cold(self) -> bool:
        """True where the next measurement starts from noise."""
        return self.vectors is None or self.taken % _COLD_EVERY == _COLD_AT

    @property
    def next_is_certified(self) -> bool:
        """True where the next measurement brings an upper bound."""
        return self._certify and self.taken % _COLD_EVERY == _COLD_AT

    @property
    def backend(self) -> str:
        """Backend of the Hessian for the next measurement: one-sided differences where they are good enough."""
        is_good = self.difference_error <= _SHARE * self._tol
        return "forward_difference" if is_good and self.k == 1 and not self.next_is_cold else "auto"

    def update(self, operator: Any, most: int | None = None) -> Eigenpairs:
        """Measure the operator at its present weights.

        Args:
            operator: As in :func:`top_eigenvalues`.
            most: Upper limit on products of this measurement, where it is below that of all; an upper bound is then
                left out.
        """
        limit = self._max_matvecs if most is None else max(min(most, self._max_matvecs), 2, self.k)
        is_cold = self.next_is_cold or self.vectors is None or self.vectors.shape[0] != space_of(operator).length
        known = None if is_cold else self.vectors
        last = self.value if known is not None and self.is_clear else None
        found = top_eigenvalues(
            operator,
            self.k,
            tol=self._tol,
            max_matvecs=limit,
            warm_start=known,
            last=last,
            certify=self.next_is_certified and limit == self._max_matvecs,
            seed=self._seed + self.taken,
        )
        self.taken += 1
        self.is_clear = self._is_clear(found, last is not None)
        self.vectors, self.value = found.vectors, float(found.values[0])
        if is_cold or found.product_error > _SHARE * self._tol:
            self.difference_error = math.inf
        return found

    def _is_clear(self, found: Eigenpairs, is_tracked: bool) -> bool:
        """Return whether a few products were enough, or would have been as far as a run of Lanczos can tell."""
        if is_tracked:
            return found.matvecs <= ROOM
        top, change = float(found.values[0]), 0.0 if self.value is None else float(found.values[0]) - self.value
        return top > 0 and not found.next_value > CLEAR * top and not abs(change) > CHANGE * abs(self.value or 0.0)

    def compare(self, operator: Any) -> int:
        """Compare one-sided differences with exact products along the top direction, after a cold measurement.

        Elsewhere, and where the operator has no such differences, it does nothing.

        Args:
            operator: That of the measurement.

        Returns:
            The number of products taken, gradients included.

        Cost: one product and two gradients.
        """
        is_known = self.vectors is None or self.k > 1 or not math.isinf(self.difference_error)
        if is_known or not isinstance(operator, LinearOperator):
            return 0
        assert self.vectors is not None
        top = self.vectors[:, 0].to(operator.dtype)
        with operator.one_sided() as is_possible:
            if not is_possible:
                return 0
            product = operator @ top
        exact = operator @ top
        self.difference_error = relative(operator.space.norm(product - exact), operator.space.norm(exact))
        return COMPARED

    def state_dict(self, most: int | None = None) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue identically.

        Args:
            most: Leave out vectors with more entries than this; the next measurement is then cold.
        """
        small = self.vectors is not None and (most is None or self.vectors.numel() <= most)
        numbers = {"k": self.k, "taken": self.taken, "value": self.value, "difference_error": self.difference_error}
        return numbers | {"is_clear": self.is_clear, "vectors": self.vectors if small else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.k, self.taken, self.vectors = int(state["k"]), int(state["taken"]), state["vectors"]
        self.value = state.get("value")  # earlier versions had none of these
        self.is_clear = bool(state.get("is_clear", True))
        self.difference_error = float(state.get("difference_error", math.inf))
