"""Power iteration, shifted until the largest algebraic eigenvalue dominates."""

from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.operators.vector_space import space_of
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, on_host
from dynamon.curvature.solvers.lanczos import random_start

_MINIMUM = 8  # products before a run may stop, and before the shift is chosen
_POSITIVE = 0.9  # Rayleigh quotient over length of the product, from which on the dominant eigenvalue is positive
_STUCK = 0.97  # ... and below which a share that no longer changes means an eigenvalue of the other sign
_MOST_SHIFTS = 3
_NEGATIVE = 0.5  # ... and below which negative eigenvalues are in the way


def power_eigenpairs(
    operator: Any, k: int, tol: float, max_matvecs: int, warm_start: Tensor | None, seed: int
) -> Eigenpairs:
    """Compute the k largest eigenvalues one by one; see :func:`dynamon.curvature.top_eigenvalues`.

    Each is orthogonal to those before. Where negative eigenvalues are about as large as the largest, the iteration
    continues with ``A + s I``, s the length of a product, whose dominant eigenvalue is the largest algebraic one.
    """
    start = random_start(operator, None, seed)
    known = start.new_zeros(start.shape[0], 0)
    warm = None if warm_start is None else warm_start.reshape(warm_start.shape[0], -1)
    values: list[float] = []
    residuals: list[float] = []
    shift, spent, converged, smallest = 0.0, 0, True, float("inf")
    for index in range(k):
        begin = random_start(operator, None, seed + index)
        if warm is not None and index < warm.shape[1]:
            begin = random_start(operator, warm[:, index], seed + index)
        solve = _Solve(operator, known, shift, max(map(abs, values), default=0.0), begin, seed + index)
        solve.iterate(tol, max(2, max_matvecs // k))
        values.append(solve.value)
        residuals.append(solve.residual)
        shift, spent, converged = solve.shift, spent + solve.matvecs, converged and solve.converged
        smallest = min(smallest, solve.smallest)
        known = torch.cat([known, solve.vector[:, None]], dim=1)
    order = on_host(values).argsort(descending=True)
    found = on_host(values)[order]
    allowance = 16 * torch.finfo(start.dtype).eps * max(abs(float(found[0])), abs(shift))
    return Eigenpairs(
        values=found,
        vectors=known[:, order.to(known.device)],
        residuals=on_host(residuals)[order],
        errors=on_host(residuals)[order],
        lower=float(found[0]) - allowance,
        upper=None,
        smallest=smallest,
        matvecs=spent,
        converged=converged,
    )


class _Solve:
    """Power iteration for one eigenvalue, orthogonal to known vectors."""

    def __init__(self, operator: Any, known: Tensor, shift: float, scale: float, start: Tensor, seed: int) -> None:
        self._operator, self._known, self.shift, self._scale, self._seed = operator, known, shift, scale, seed
        self._space = space_of(operator)
        self.vector = self._unit(start)
        self.value, self.residual, self.smallest = 0.0, float("inf"), float("inf")
        self.matvecs, self.converged = 0, False
        self._share, self._shifts = float("inf"), 0

    def iterate(self, tol: float, max_matvecs: int) -> None:
        """Multiply until residual and change are small, or the matvecs are spent."""
        for _ in range(max_matvecs):
            product = self._product()
            quotient, moved = self._space.inner(self.vector, product), product - self.shift * self.vector
            rest = product - quotient * self.vector
            lengths = map(self._space.norm, (moved, rest, self._outside(rest)))
            value, length, self.residual, error = self._space.agreed(torch.stack([quotient, *lengths])).tolist()
            scale = tol * max(abs(value), abs(self.shift), self._scale)
            steady = error <= scale and abs(value - self.value) <= scale
            self.value, self.smallest = value, min(self.smallest, value)
            share = (value - self.shift) / length if length else 1.0
            if steady and self.matvecs >= _MINIMUM and share >= _POSITIVE:
                self.converged = True
                return
            if self.matvecs % _MINIMUM == 0 and self._is_blocked(share):
                # Negative eigenvalues are about as large: move them to zero, and look for the rest once more.
                self.shift -= length
                fresh = random_start(self._operator, None, self._seed + self.matvecs)
                self.vector = self._unit(self.vector + 0.5 * fresh)
            elif length > 0:
                self.vector = self._unit(moved)

    def _is_blocked(self, share: float) -> bool:
        """Return whether negative eigenvalues dominate, or alternate with positive ones of the same size."""
        stuck, self._share = share < _STUCK and abs(share - self._share) < 1e-3, share
        self._shifts += share < _NEGATIVE or stuck
        return self._shifts <= _MOST_SHIFTS and (share < _NEGATIVE or stuck)

    def _product(self) -> Tensor:
        dtype = getattr(self._operator, "dtype", self.vector.dtype)
        product = (self._operator @ self.vector.to(dtype)).to(self.vector)
        self.matvecs += 1
        if not torch.isfinite(product).all():
            raise FloatingPointError("the operator returned NaN or infinity; the loss or the weights diverged.")
        return product

    def _outside(self, vector: Tensor) -> Tensor:
        """Return the part of a vector that is orthogonal to the known ones."""
        for _ in range(2):
            vector = vector - self._known @ self._space.inner(self._known.mT, vector)
        return vector

    def _unit(self, vector: Tensor) -> Tensor:
        vector = self._outside(vector)
        norm = self._space.norm(vector)
        return vector / torch.where(norm > 0, norm, torch.ones_like(norm))
