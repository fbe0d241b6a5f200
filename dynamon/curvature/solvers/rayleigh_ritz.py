"""Follow the top eigenvalue of an operator that changes slowly, where it stands clear of the others."""

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
MOST_VECTORS = 2 * ROOM + 2 * TRACKED
_SEARCH_AT = 3  # products before the one that looks for a new top; the minimum is one more
_CLEAR = 0.75  # of the top that no other Ritz value may reach, its residual added, for so few products
_NOISE = 0.3  # share of noise in the vector that looks for a new top
_LEAST = 5  # products that Lanczos needs at least


def tracked_eigenpair(operator: Any, tol: float, max_matvecs: int, known: Tensor, seed: int) -> Eigenpairs:
    r"""Compute the largest eigenvalue from what the last measurement left; see :func:`top_eigenvalues`.

    Rayleigh-Ritz on the old top vector, two residuals of the best Ritz vector, and one vector that looks for a new top:
    the other tracked ones, the gradient where the operator has one, and noise. That is the result where the error is
    within tolerance, the search changed nothing, and every other Ritz value stays below three quarters of the top, its
    residual added. Near a crossing it is not: there thick-restart Lanczos starts from the Ritz vectors.

    The matrix of inner products with the basis is not symmetric where products are not exact; what it lacks counts as
    their error.

    Args:
        operator: A symmetric operator of a larger dimension than ``ROOM``.
        tol: Relative tolerance of the value.
        max_matvecs: Upper limit on matvecs.
        known: ``[n, 3]``, ``vectors`` of the last measurement.
        seed: Seed of the noise.

    Memory: 16 vectors: a basis of 5, their products, 3 residuals, and 3 while they or the result are computed; where
    Lanczos takes over, 3 beside its own.
    """
    space = _Subspace(operator, known, seed)
    space.add(known[:, 0])
    ritz, before = space.ritz(), np.inf
    while space.matvecs < min(ROOM, max_matvecs):
        before = float(ritz.values[0])
        space.add(_search(operator, known, seed) if space.matvecs == _SEARCH_AT else ritz.remainders[0])
        ritz = space.ritz()
        if space.matvecs > _SEARCH_AT and (ritz.has_settled(before, tol) or not ritz.is_clear()):
            break
    found = space.eigenpairs(ritz, ritz.is_clear() and space.matvecs > _SEARCH_AT and ritz.has_settled(before, tol))
    left = max_matvecs - space.matvecs
    if found.converged or left < _LEAST:
        return found
    del space, ritz  # their memory is Lanczos's
    further = lanczos_eigenpairs(operator, 1, tol, left, found.vectors, False, seed)
    smallest, matvecs = min(found.smallest, further.smallest), found.matvecs + further.matvecs
    return replace(further, smallest=smallest, matvecs=matvecs, product_error=found.product_error)


def _search(operator: Any, known: Tensor, seed: int) -> Tensor:
    """Mix what could hold a new top: the tracked vectors, in equal parts the gradient, and noise."""
    noise = random_start(operator, None, seed)
    vector = known[:, 1:].sum(1).to(noise) + _NOISE * noise
    likely = initial_direction(operator, noise)
    return vector if likely is None else vector + likely


@dataclass
class _Ritz:
    """Eigen-decomposition of the projected matrix, largest first."""

    values: np.ndarray  # [m]
    rotation: np.ndarray  # [m, m], columns
    remainders: Tensor  # [at most 3, n], A x - value x
    residuals: np.ndarray  # their lengths
    asymmetry: float  # of the projected matrix, relative to its largest value

    @property
    def error(self) -> float:
        """Return the bound on the error of the largest value."""
        return value_error(self.values[: len(self.residuals)], self.residuals)

    def is_clear(self) -> bool:
        """Return whether the largest value is positive and no other tracked one comes near it."""
        others = self.values[1 : len(self.residuals)] + self.residuals[1:]
        return bool(self.values[0] > 0 and (others <= _CLEAR * self.values[0]).all())

    def has_settled(self, before: float, tol: float) -> bool:
        """Return whether error and change of the largest value are within tolerance."""
        scale = tol * float(np.abs(self.values).max())
        return self.error <= scale and abs(float(self.values[0]) - before) <= scale


class _Subspace:
    """An orthonormal basis, the products with it, and the matrix of the operator in it."""

    def __init__(self, operator: Any, like: Tensor, seed: int) -> None:
        self.operator, self.space, self.seed = operator, space_of(operator), seed
        dtype, device = getattr(operator, "dtype", like.dtype), getattr(operator, "device", like.device)
        self.dtype = dtype
        self.basis = torch.zeros(
            ROOM, self.space.length, dtype=torch.promote_types(dtype, torch.float32), device=device
        )
        self.products = torch.zeros_like(self.basis)
        self.projected = self.basis.new_zeros(ROOM, ROOM, dtype=widest_dtype(device))
        self.matvecs = 0

    def add(self, vector: Tensor) -> None:
        """Extend the basis by a vector, and take its product."""
        j, vector = self.matvecs, self._outside(vector.to(self.basis))
        if not float(self.space.agreed(self.space.norm(vector))) > 0:  # an exact eigenvector has no residual
            vector = self._outside(random_start(self.operator, None, self.seed + j).to(self.basis))
        self.basis[j] = vector
        self.products[j] = (self.operator @ vector.to(self.dtype)).to(self.basis)
        self.projected[: j + 1, j] = self.space.inner(self.basis[: j + 1], self.products[j]).to(self.projected)
        if j:
            self.projected[j, :j] = self.space.inner(self.products[:j], vector).to(self.projected)
        self.matvecs += 1

    def _outside(self, vector: Tensor) -> Tensor:
        """Return the part of a vector that is orthogonal to the basis, with unit length."""
        known, vector = self.basis[: self.matvecs], self._unit(vector)
        for _ in range(2 if len(known) else 0):
            vector = self._unit(vector - known.mT @ self.space.inner(known, vector))
        return vector

    def _unit(self, vector: Tensor) -> Tensor:
        return vector / self.space.norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)

    def ritz(self) -> _Ritz:
        """Decompose the projected matrix on the host, and compute the remainders of the leading pairs."""
        m = self.matvecs
        read = self.space.agreed(self.projected[:m, :m]).cpu().double().numpy()
        if not np.isfinite(read).all():
            raise FloatingPointError("the operator returned NaN or infinity; the loss or the weights diverged.")
        values, rotation = np.linalg.eigh((read + read.T) / 2)
        values, rotation = values[::-1].copy(), rotation[:, ::-1].copy()
        leading = on_host(rotation[:, :TRACKED].T).to(self.basis)
        sizes = on_host(values[:TRACKED, None]).to(self.basis)
        remainders = (leading @ self.products[:m]).addmm_(sizes * leading, self.basis[:m], alpha=-1)
        lengths = self.space.agreed(torch.stack([self.space.norm(row) for row in remainders]))
        largest = float(np.abs(values).max())
        lack = float(np.abs(read - read.T).max()) / largest if largest > 0 else 0.0
        return _Ritz(values, rotation, remainders, lengths.cpu().double().numpy(), lack)

    def eigenpairs(self, ritz: _Ritz, converged: bool) -> Eigenpairs:
        """Return the result; its last vector is one step of the power method ahead, at no product."""
        value, smallest = float(ritz.values[0]), float(ritz.values[-1])
        vectors = on_host(ritz.rotation[:, :TRACKED].T).to(self.basis) @ self.basis[: self.matvecs]
        if len(vectors) == TRACKED:
            ahead = ritz.remainders[-1] + (float(ritz.values[TRACKED - 1]) - smallest) * vectors[-1]
            vectors[-1] = self._unit(ahead)
        allowance = 16 * torch.finfo(self.basis.dtype).eps * max(abs(value), abs(smallest))
        return Eigenpairs(
            values=on_host([value]),
            vectors=vectors.mT.contiguous(),
            residuals=on_host(ritz.residuals[:1]),
            errors=on_host([ritz.error]),
            lower=value - allowance,
            upper=None,
            smallest=smallest,
            matvecs=self.matvecs,
            converged=converged,
            product_error=ritz.asymmetry,
        )
