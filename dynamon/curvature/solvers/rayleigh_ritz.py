"""Follow the top eigenvalue of an operator that changes slowly, where it stands clear of the others."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamon.curvature.operators.vector_space import space_of
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, on_host, value_error
from dynamon.curvature.solvers.lanczos import initial_direction, lanczos_eigenpairs, random_start
from dynamon.kernels import widest_dtype

TRACKED = 3  # vectors that a measurement leaves to the next
ROOM = 5  # products after which Lanczos takes over
MOST_VECTORS = 2 * ROOM + TRACKED + 2
_EARLY, _LATE = 2, 3  # products before the one that looks for a new top, with the error within tolerance and without
CLEAR = 0.75  # of the top that no other Ritz value may reach, its residual added, for so few products
CHANGE = 0.3  # of the top since the last measurement, likewise
_NOISE = 0.3  # share of noise in the vector that looks for a new top, without a gradient
_LEAST = 10  # products that Lanczos takes at least


def tracked_eigenpair(operator: Any, tol: float, max_matvecs: int, known: Tensor, last: float, seed: int) -> Eigenpairs:
    r"""Compute the largest eigenvalue from what the last measurement left; see :func:`top_eigenvalues`.

    Rayleigh-Ritz on the old top vector, one or two residuals of the best Ritz vector (the old second vector where there
    is nothing to improve), and one vector that looks for a new top: the other tracked ones and the gradient, or noise
    where the operator has none. That is the result where the error is within tolerance, the search changed nothing,
    every other Ritz value stays below three quarters of the top, its residual added, and the top has changed by less
    than 30 %. Elsewhere, near a crossing and after large changes, thick-restart Lanczos starts from what was found and
    the other tracked vectors, for 10 products at least.

    The matrix of inner products with the basis is not symmetric where products are not exact; what it lacks counts as
    their error, unless the operator says itself what it rounds.

    Args:
        operator: A symmetric operator of a larger dimension than ``max_matvecs``.
        tol: Relative tolerance of the value.
        max_matvecs: Upper limit on matvecs.
        known: ``[n, 3]``, ``vectors`` of the last measurement.
        last: The value that it found.
        seed: Seed of the noise.

    Memory: 15 vectors: a basis of 5, their products, 3 to return, and 2 while they are computed; where Lanczos takes
    over, 3 beside its own.
    """
    space = _Subspace(operator, known, seed)
    known = known.to(space.basis)  # a checkpoint brings vectors to the host
    space.add(known[:, 0])
    ritz, searched, settled = space.ritz(), False, False
    others = known[:, 1:]
    while space.matvecs < min(ROOM, max_matvecs) and not settled:
        if not searched and (space.matvecs == _LATE or space.matvecs >= _EARLY and ritz.is_within(tol)):
            vector, searched = space.search(others), True
        elif space.matvecs == 1 and ritz.is_within(tol):
            vector, others = others[:, 0], others[:, 1:]
        else:
            vector = space.remainder(ritz)
        before = float(ritz.values[0])
        space.add(vector)
        ritz = space.ritz()
        if searched and not (ritz.is_clear() and abs(ritz.values[0] - last) <= CHANGE * last):
            break
        settled = searched and ritz.is_within(tol) and bool(ritz.values[0] - before <= tol * ritz.scale)
    found = space.eigenpairs(ritz, settled)
    left = max_matvecs - space.matvecs
    if settled or left < 2:
        return found
    del space, vector  # their memory is Lanczos's
    # What was found, the gradient's share in it included, and the others as they were: the search has mixed them.
    start = torch.stack([found.vectors[:, 0], found.vectors[:, -1], known[:, 1], known[:, 2]], dim=1)
    smallest, matvecs, error = found.smallest, found.matvecs, found.product_error
    del found
    further = lanczos_eigenpairs(operator, 1, tol, left, start, False, seed, least=_LEAST)
    return replace(
        further,
        smallest=min(smallest, further.smallest),
        matvecs=matvecs + further.matvecs,
        product_error=max(error, further.product_error),
    )


@dataclass
class _Ritz:
    """Eigen-decomposition of the projected matrix, largest first."""

    values: np.ndarray  # [m]
    rotation: np.ndarray  # [m, m], columns
    residuals: np.ndarray  # [m]
    asymmetry: float  # of the projected matrix, relative to its largest value

    @property
    def scale(self) -> float:
        """Return the largest value in magnitude."""
        return float(np.abs(self.values).max())

    def is_within(self, tol: float) -> bool:
        """Return whether the error of the largest value is within tolerance."""
        return value_error(self.values, self.residuals) <= tol * self.scale

    def is_clear(self) -> bool:
        """Return whether the largest value is positive and none of the tracked others comes near it."""
        others = self.values[1:TRACKED] + self.residuals[1:TRACKED]
        return bool(self.values[0] > 0 and (others <= CLEAR * self.values[0]).all())


class _Subspace:
    """An orthonormal basis, the products with it, and their inner products.

    Vectors that are to extend the basis are computed in its next row.
    """

    def __init__(self, operator: Any, like: Tensor, seed: int) -> None:
        self.operator, self.space, self.seed = operator, space_of(operator), seed
        self.dtype, device = getattr(operator, "dtype", like.dtype), getattr(operator, "device", like.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        # Small blocks are found in memory that the process has; a CPU takes as long to map new memory as to read it.
        self.basis = torch.empty(TRACKED, self.space.length, dtype=wide, device=device)
        self.products = torch.empty_like(self.basis)
        # The operator in the basis, and the inner products of the products.
        self.inner = torch.zeros(2, ROOM, ROOM, dtype=widest_dtype(device), device=device)
        self.matvecs = 0

    def add(self, vector: Tensor) -> None:
        """Extend the basis by a vector, and take its product."""
        self._make_room()
        j, basis, products = self.matvecs, self.basis, self.products
        if not self._extend(vector):  # an exact eigenvector has no remainder
            self._extend(random_start(self.operator, None, self.seed + j).to(basis))
        products[j] = self.operator @ basis[j].to(self.dtype)
        self.inner[0, : j + 1, j] = self.space.inner(basis[: j + 1], products[j]).to(self.inner)
        self.inner[1, : j + 1, j] = self.space.inner(products[: j + 1], products[j]).to(self.inner)
        if j:
            self.inner[0, j, :j] = self.space.inner(products[:j], basis[j]).to(self.inner)
        self.matvecs += 1

    def _make_room(self) -> None:
        """Have a row that is free, up to ``ROOM``."""
        if self.matvecs == len(self.basis):
            self.basis, self.products = _longer(self.basis, ROOM), _longer(self.products, ROOM)

    def search(self, others: Tensor) -> Tensor:
        """Mix what could hold a new top: other tracked vectors, and the gradient, or noise where there is none."""
        self._make_room()
        vector = torch.mv(others, others.new_ones(others.shape[1]), out=self.basis[self.matvecs])
        likely = initial_direction(self.operator, vector)
        if likely is not None:
            return vector.add_(likely)
        return vector.add_(random_start(self.operator, None, self.seed), alpha=_NOISE)

    def _extend(self, vector: Tensor) -> bool:
        """Write the part of a vector that is orthogonal to the basis into its next row; return whether there is any."""
        known, row, left = self.basis[: self.matvecs], self.basis[self.matvecs], 1.0
        length = self._length(vector)
        while len(known) and length > 0:
            vector = torch.addmv(vector, known.mT, self.space.inner(known, vector), alpha=-1, out=row)
            before, length = length, self._length(vector)
            left *= length / before
            if length > 0.1 * before or left < torch.finfo(vector.dtype).eps:
                break  # else what is left is rounded too much to be orthogonal
        torch.mul(vector, 1 / length if length > 0 else 0.0, out=row)
        return length > 0 and left > torch.finfo(vector.dtype).eps

    def _length(self, vector: Tensor) -> float:
        return float(self.space.agreed(self.space.norm(vector)))

    def ritz(self) -> _Ritz:
        """Decompose the projected matrix on the host."""
        m = self.matvecs
        matrix, squares = self.space.agreed(self.inner[:, :m, :m]).cpu().double().numpy()
        if not np.isfinite(matrix).all():
            raise FloatingPointError("the operator returned NaN or infinity; the loss or the weights diverged.")
        values, rotation = np.linalg.eigh((matrix + matrix.T) / 2)
        values, rotation = values[::-1].copy(), rotation[:, ::-1].copy()
        squares = np.triu(squares) + np.triu(squares, 1).T
        lengths = np.einsum("ij,ik,kj->j", rotation, squares, rotation) - values**2
        largest = float(np.abs(values).max())
        lack = float(np.abs(matrix - matrix.T).max()) / largest if largest > 0 else 0.0
        return _Ritz(values, rotation, np.sqrt(np.maximum(lengths, 0)), lack)

    def remainder(self, ritz: _Ritz) -> Tensor:
        """Return ``A x - value x`` of the first Ritz vector, in the next row of the basis."""
        self._make_room()
        return self._shifted(ritz, 0, float(ritz.values[0]), self.basis[self.matvecs])

    def _shifted(self, ritz: _Ritz, place: int, shift: float, out: Tensor) -> Tensor:
        """Compute ``A x - shift x`` of a Ritz vector."""
        m, x = self.matvecs, on_host(ritz.rotation[:, place]).to(self.basis)
        torch.mv(self.products[:m].mT, x, out=out)
        return out.addmv_(self.basis[:m].mT, x, alpha=-shift)

    def eigenpairs(self, ritz: _Ritz, converged: bool) -> Eigenpairs:
        """Return the result; its last vector is one step of the power method ahead, at no product."""
        value, smallest = float(ritz.values[0]), float(ritz.values[-1])
        vectors = self.basis.new_empty(min(TRACKED, self.matvecs), self.space.length)
        rotated = vectors[: TRACKED - 1]
        torch.mm(on_host(ritz.rotation[:, : len(rotated)].T).to(rotated), self.basis[: self.matvecs], out=rotated)
        if len(vectors) == TRACKED:
            ahead = self._shifted(ritz, TRACKED - 1, smallest, vectors[-1])
            ahead.div_(self.space.norm(ahead).clamp_min(torch.finfo(ahead.dtype).tiny))
        allowance = 16 * torch.finfo(self.basis.dtype).eps * max(abs(value), abs(smallest))
        return Eigenpairs(
            values=on_host([value]),
            vectors=vectors.mT,
            residuals=on_host(ritz.residuals[:1]),
            errors=on_host([value_error(ritz.values, ritz.residuals)]),
            lower=value - allowance,
            upper=None,
            smallest=smallest,
            matvecs=self.matvecs,
            converged=converged,
            product_error=0.0 if getattr(self.operator, "rounding", 0.0) else ritz.asymmetry,
            next_value=float(ritz.values[1]) if len(ritz.values) > 1 else math.nan,
        )


def _longer(rows: Tensor, count: int) -> Tensor:
    """Copy rows into the first ones of a longer block."""
    longer = rows.new_empty(count, rows.shape[1])
    longer[: len(rows)] = rows
    return longer
