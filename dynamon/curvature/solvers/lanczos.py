"""Thick-restart Lanczos."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import brentq
from torch import Tensor

from dynamon.curvature.operators.vector_space import space_of
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, on_host, value_error
from dynamon.kernels import widest_dtype
from dynamon.kernels.devices import reads_are_free

_TRACKED = 2  # Ritz vectors returned beyond the wanted ones: with them a warm start sees what is about to overtake
_MINIMUM = {0: 8, 1: 16, 2: 12}  # products before a run may stop, by the number of warm start vectors
_MINIMUM_TRACKED = 5  # ... with three and more
_USUAL_TOLERANCE = 1e-2  # for which these numbers are; twice as many digits take twice as many
_LOOK = 6  # products from a fresh vector at least, after which copies of repeated eigenvalues would show
_BURST = 2  # products between two looks at the projected matrix after that, where a look waits for the device
_CERTIFY_MATVECS = 20  # an unrestarted run this long gives an upper bound worth showing
_GROWTH = 8  # vectors that a certified run, which may not restart, adds at a time
_CONFIDENCE = 0.99
_NOISE = 0.3  # share of fresh noise in a warm start; without any, a run cannot find a new direction


def basis_vectors(k: int, certify: bool = False) -> int:
    """Return how many vectors :func:`lanczos_eigenpairs` holds; certified runs add one per further product."""
    return (_CERTIFY_MATVECS if certify else _basis_size(k)) + 1


def _basis_size(k: int) -> int:
    return 2 * k + 6


def lanczos_eigenpairs(
    operator: Any,
    k: int,
    tol: float,
    max_matvecs: int,
    warm_start: Tensor | None,
    certify: bool,
    seed: int,
    least: int = 0,
) -> Eigenpairs:
    """Compute the k largest eigenvalues by ``least`` products or more; see :func:`top_eigenvalues`."""
    size = operator.shape[0]
    budget = max(max_matvecs, _CERTIFY_MATVECS) if certify else max_matvecs
    warm_start = None if certify else warm_start
    # A small operator is not worth a restart: a full basis is exact.
    basis_size = min(_CERTIFY_MATVECS, size) if certify else size if size <= budget else min(_basis_size(k), size)
    start = random_start(operator, warm_start, seed)
    if warm_start is None and not certify:  # the upper bound is a statement about a random start
        start = _turned(start, operator)
    tracked = 0 if warm_start is None else 1 if warm_start.ndim == 1 else warm_start.shape[1]
    minimum = max(least, _CERTIFY_MATVECS if certify else _minimum(tracked, k, tol))
    state = Lanczos(operator, start, basis_size)
    # A warm start contains hardly anything of a direction that has just overtaken: its gap would look perfect.
    solve = _Solve(state, k, tol, budget, minimum, certify, seed, by_gap=not tracked)
    ritz, residuals, converged = solve.settle()
    values = ritz.values[:k]
    allowance = 16 * state.rounding(float(np.abs(ritz.values).max()))
    return Eigenpairs(
        values=on_host(values),
        vectors=state.vectors(ritz, k + _TRACKED),
        residuals=on_host(residuals),
        errors=on_host(_errors(ritz, residuals)),
        lower=float(values[0]) - allowance,
        upper=_upper_bound(ritz, size) + allowance if certify else None,
        smallest=float(ritz.values[-1]),
        matvecs=state.matvecs,
        converged=converged and len(values) == k,
        product_error=state.asymmetry if tracked and k == 1 and not getattr(operator, "rounding", 0.0) else 0.0,
        next_value=float(ritz.values[k]) if len(ritz.values) > k else math.nan,
    )


def _minimum(tracked: int, k: int, tol: float) -> int:
    """Return the products before a run may stop: for one value from a cold start in proportion to its digits.

    The error of a value that is not the largest one falls as fast as that of the largest, so that a small error alone
    would let a run of any tolerance stop at the same few products.
    """
    least = _MINIMUM.get(tracked, _MINIMUM_TRACKED)
    digits = math.log(tol) / math.log(_USUAL_TOLERANCE)
    return math.ceil(least * max(1.0, digits)) if k == 1 and not tracked else least


_Outcome = tuple["Ritz", np.ndarray, bool]


class _Solve:
    """One solve: extend the space until the wanted pairs have settled or the matvecs are spent.

    A Krylov space contains one vector of each eigenspace. For k > 1 the run therefore restarts from a fresh vector
    orthogonal to what it has found, until that yields nothing new. Restarting from a fresh vector discards the Lanczos
    residual, so that residual norms then cost one matvec each.
    """

    def __init__(
        self, state: "Lanczos", k: int, tol: float, budget: int, minimum: int, certify: bool, seed: int, by_gap: bool
    ) -> None:
        self._state, self._k, self._tol, self._budget, self._seed = state, k, tol, budget, seed
        self._minimum, self._may_restart, self._by_gap = min(minimum, budget), not certify, by_gap
        self._look = 0  # products that a fresh vector gets: as many as the first one took
        self._before: Ritz | None = None  # what had settled before the last look outside

    def settle(self) -> _Outcome:
        """Return the Ritz pairs, the residuals of the wanted ones, and whether they have converged."""
        while True:
            ritz = self._extend()
            outcome = self._judge(ritz) if self._has_settled(ritz) else None
            if outcome is not None:
                return outcome
            if self._state.matvecs >= self._budget:
                return ritz, ritz.residuals[: self._k], False
            self._make_room()

    def _extend(self) -> "Ritz":
        state = self._state
        missing = self._minimum - state.matvecs
        burst = 1 if reads_are_free(state.basis.device) else _BURST
        state.extend(min(missing if missing > 0 else burst, self._budget - state.matvecs))
        ritz = state.ritz(self._k)
        while ritz.exhausted and len(ritz.values) < self._k and state.matvecs < self._budget:
            state.widen(len(ritz.values), self._noise())
            state.extend(1)
            ritz = state.ritz(self._k)
        return ritz

    def _has_settled(self, ritz: "Ritz") -> bool:
        return ritz.exhausted or self._state.matvecs >= self._minimum and _agrees(ritz, self._tol, self._by_gap)

    def _judge(self, ritz: "Ritz") -> _Outcome | None:
        """Return the outcome if what has settled is final, else prepare the space for a further search."""
        own, whole = ritz.residuals[: self._k], self._before is None and len(ritz.values) == self._state.space.size
        if self._k == 1 or not self._may_restart or whole:
            return ritz, own, True
        fresh = self._noise()
        if self._before is not None:
            if self._state.matvecs + self._k > self._budget:
                return ritz, own, False
            own, worst = self._state.residuals(ritz, self._k)
            limit = self._tol * float(np.abs(ritz.values).max())
            if (ritz.values[: self._k] - self._before.values[: self._k] <= limit).all():
                if (own <= limit).all():
                    return ritz, own, True
                fresh = worst  # nothing new, but not sharp enough yet
        if self._state.matvecs >= self._budget:
            return ritz, own, False
        self._look_outside(ritz, fresh)
        return None

    def _look_outside(self, ritz: "Ritz", fresh: Tensor) -> None:
        self._look = self._look or max(_LOOK, self._state.matvecs)
        self._before = ritz
        self._state.look_outside(ritz, self._k + 3, fresh)
        self._minimum = min(self._state.matvecs + self._look, self._budget)

    def _make_room(self) -> None:
        state = self._state
        if state.full and self._may_restart:
            state.restart(self._k + 3)
        elif state.full:
            state.grow(min(_GROWTH, state.space.size - state.size))

    def _noise(self) -> Tensor:
        return random_start(self._state.operator, None, self._seed + 1 + self._state.matvecs)


@dataclass
class Ritz:
    """Eigen-decomposition of the projected matrix, largest first, on the host."""

    values: np.ndarray  # [m]
    rotation: np.ndarray  # [m, m], columns
    residuals: np.ndarray  # [m]
    previous: np.ndarray  # the top values one product earlier
    couplings: np.ndarray  # [m], norms of the residual vectors
    exhausted: bool  # the Krylov space is invariant: the values are exact


class Lanczos:
    """A Krylov basis with its projected matrix, and the rules to extend and restart it.

    The basis stays on the device. The projected matrix is assembled there too and read once per burst, so that products
    are queued without waiting for the host.
    """

    def __init__(self, operator: Any, start: Tensor, basis_size: int) -> None:
        self.operator, self.space = operator, space_of(operator)
        self.dtype = getattr(operator, "dtype", start.dtype)  # half precision operators have a float32 basis
        self.capacity = basis_size
        self.basis = start.new_zeros(basis_size + 1, start.shape[0])
        self.basis[0] = start / self.space.norm(start)
        self.projected = start.new_zeros(basis_size + 1, basis_size, dtype=widest_dtype(start.device))
        self.size = 0
        self.kept = 0  # leading columns that came through a restart
        self.matvecs = 0
        self.asymmetry = 0.0  # of the projected matrix, relative to its largest value; for one wanted value

    def rounding(self, size: float) -> float:
        """Return the rounding of a number in the basis's dtype, constant below the smallest normal number."""
        dtype = torch.finfo(self.basis.dtype)
        return dtype.eps * max(size, dtype.tiny)

    @property
    def full(self) -> bool:
        """True where there is no room for a further product."""
        return self.size == self.capacity

    def grow(self, count: int) -> None:
        """Make room for more vectors."""
        self.basis = torch.cat([self.basis, self.basis.new_zeros(count, self.basis.shape[1])])
        wider = self.projected.new_zeros(self.capacity + count + 1, self.capacity + count)
        wider[: self.capacity + 1, : self.capacity] = self.projected
        self.projected, self.capacity = wider, self.capacity + count

    def extend(self, count: int) -> None:
        """Take ``count`` products, or as many as the basis has room for."""
        for _ in range(min(count, self.capacity - self.size)):
            j = self.size
            product = (self.operator @ self.basis[j].to(self.dtype)).to(self.basis)
            # A symmetric operator couples a vector to the one before it alone, after a restart to all that were kept.
            near, known = self.basis[max(j - 1, 0) if j > self.kept else 0 : j + 1], self.basis[: j + 1]
            coefficients = self.space.inner(near, product)
            product = product - near.mT @ coefficients
            correction = self.space.inner(known, product)
            product = product - known.mT @ correction
            norm = self.space.norm(product)
            self.projected[: j + 1, j] = correction
            self.projected[j + 1 - len(near) : j + 1, j] += coefficients
            self.projected[j + 1, j] = norm
            self.basis[j + 1] = product / torch.where(norm > 0, norm, torch.ones_like(norm))
            self.size += 1
            self.matvecs += 1

    def ritz(self, k: int) -> Ritz:
        """Read the projected matrix and decompose it: the only host synchronisation of a burst."""
        read = self.space.agreed(self.projected[: self.size + 1, : self.size]).cpu().double().numpy()
        if not np.isfinite(read).all():
            raise FloatingPointError("the operator returned NaN or infinity; the loss or the weights diverged.")
        size, exhausted = self._invariant(read)
        matrix, coupling = read[:size, :size], read[size, size - 1]
        decompose = _decompose if self.kept else _decompose_tridiagonal
        values, rotation = decompose(matrix)
        largest = float(np.abs(values).max())
        if largest > 0:
            self.asymmetry = max(self.asymmetry, float(np.abs(matrix - matrix.T).max()) / largest)
        previous = decompose(matrix[:-1, :-1])[0][:k] if size > 1 else np.full(k, np.inf)
        return Ritz(
            values=values,
            rotation=rotation,
            residuals=np.abs(coupling * rotation[-1]),
            previous=previous,
            couplings=np.diagonal(read, -1)[:size].copy(),  # on a CPU the read shares memory with the matrix
            exhausted=exhausted,
        )

    def _invariant(self, read: np.ndarray) -> tuple[int, bool]:
        """Return the basis length up to the first vanishing residual vector, beyond which it holds rounding."""
        floor = 16 * self.rounding(float(np.abs(read).max()))
        for j in range(self.kept, self.size):  # kept columns couple through the arrow instead
            if abs(read[j + 1, j]) <= floor:
                return j + 1, True
        return self.size, self.size == self.space.size

    def restart(self, keep: int) -> None:
        """Shrink the basis to the top Ritz vectors, the bottom one and the residual vector (thick restart)."""
        ritz = self.ritz(1)
        chosen = np.r_[np.arange(keep - 1), len(ritz.values) - 1]  # the top ones and the bottom one
        rotation = on_host(ritz.rotation[:, chosen]).to(self.basis)
        kept = rotation.mT @ self.basis[: self.size]
        self.basis[keep] = self.basis[self.size].clone()
        self.basis[:keep] = kept
        self.projected.zero_()
        self.projected[range(keep), range(keep)] = on_host(ritz.values[chosen]).to(self.projected)
        # The coupling of kept Ritz vectors to the residual vector: the arrow of the projected matrix.
        last = ritz.couplings[-1] * ritz.rotation[-1, chosen]
        self.projected[keep, :keep] = on_host(last).to(self.projected)
        self.size = self.kept = keep

    def widen(self, size: int, fresh: Tensor) -> None:
        """Continue outside the invariant space of the first vectors, where repeated eigenvalues show again."""
        known = self.basis[:size]
        for _ in range(2):
            fresh = fresh - known.mT @ self.space.inner(known, fresh)
        self.basis[size] = fresh / self.space.norm(fresh)
        self.projected[size:] = 0
        self.projected[:, size:] = 0
        self.size = self.kept = size

    def look_outside(self, ritz: Ritz, keep: int, fresh: Tensor) -> None:
        """Keep the best Ritz vectors and continue from a vector orthogonal to them, not from the residual vector."""
        keep = min(keep, len(ritz.values), self.capacity - 1)
        rotation = on_host(ritz.rotation[:, :keep]).to(self.basis)
        self.basis[:keep] = rotation.mT @ self.basis[: len(ritz.values)]
        self.projected.zero_()
        self.projected[range(keep), range(keep)] = on_host(ritz.values[:keep]).to(self.projected)
        self.size = keep
        self.widen(keep, fresh)

    def residuals(self, ritz: Ritz, k: int) -> tuple[np.ndarray, Tensor]:
        """Compute residuals of the k leading pairs, one product each, and the residual vector of the worst."""
        lengths, vectors = [], []
        for x, value in zip(self.vectors(ritz, k).mT, ritz.values, strict=False):
            product = (self.operator @ x.to(self.dtype)).to(x)
            self.matvecs += 1
            vectors.append(product - value * x)
            lengths.append(self.space.norm(vectors[-1]))
        found = self.space.agreed(torch.stack(lengths)).cpu().double().numpy()
        return found, vectors[int(np.argmax(found))]

    def vectors(self, ritz: Ritz, count: int) -> Tensor:
        """Return the leading Ritz vectors as columns ``[n, m]``."""
        size = len(ritz.values)
        rotation = on_host(ritz.rotation[:, : min(count, size)]).to(self.basis)
        return (rotation.mT @ self.basis[:size]).mT


def _decompose(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute eigenvalues, largest first, and eigenvectors of the symmetric part of a projected matrix.

    The upper triangle holds the inner products of each new vector with the basis, the arrow of a restart
    included; what stands below the diagonal repeats it.
    """
    upper = np.triu(matrix)
    values, vectors = np.linalg.eigh(upper + np.triu(upper, 1).T)
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _decompose_tridiagonal(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do the same before the first restart, without threads, which on a busy machine wait for each other."""
    values, vectors = eigh_tridiagonal(matrix.diagonal(), matrix.diagonal(1), lapack_driver="stev")
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _agrees(ritz: Ritz, tol: float, by_gap: bool) -> bool:
    """Return whether errors, bounded with or without gaps, and successive values of all wanted pairs are small."""
    k = len(ritz.previous)
    if len(ritz.values) < k + 1:
        return False
    scale = tol * float(np.abs(ritz.values).max())
    steady = np.abs(ritz.values[:k] - ritz.previous) <= scale
    residuals = ritz.residuals[:k]
    errors = _errors(ritz, residuals) if by_gap else residuals
    return bool((errors <= scale).all() and steady.all())


def _errors(ritz: Ritz, residuals: np.ndarray) -> np.ndarray:
    """Bound the errors of the wanted values: by residuals for several, by residual and gap for the top one alone."""
    return np.array([value_error(ritz.values, ritz.residuals)]) if len(residuals) == 1 else residuals


def _upper_bound(ritz: Ritz, size: int) -> float:
    """Solve for the 99 % bound: the root above the top Ritz value of prod(x - theta_i) / prod(beta_i) = limit.

    q_{m+1} = p(A) q_1 has norm one, so |p(lambda_max)| <q_1, u_1> <= 1, and a random unit q_1 has
    |<q_1, u_1>| below d with probability about d sqrt(2 n / pi).
    """
    top = float(ritz.values[0])
    if ritz.exhausted or not ritz.couplings.all():  # a random vector's invariant space holds the top
        return top
    limit = 0.5 * math.log(2 * size / math.pi) - math.log(1 - _CONFIDENCE)
    log_couplings = float(np.log(ritz.couplings).sum())

    def excess(log_gap: float) -> float:
        gaps = top - ritz.values + math.exp(log_gap)
        return float(np.log(gaps).sum()) - log_couplings - limit

    spread = max(top - float(ritz.values[-1]), abs(top), 1e-300)
    low, high = math.log(spread) - 60.0, math.log(spread)
    while excess(high) < 0:
        high += 1.0
    return top if excess(low) > 0 else top + math.exp(brentq(excess, low, high, xtol=1e-6))


def random_start(operator: Any, warm_start: Tensor | None, seed: int) -> Tensor:
    """Draw a start vector on the operator's device: noise, or the sum of a warm start's vectors plus noise."""
    host = torch.device("cpu")
    device = getattr(operator, "device", host if warm_start is None else warm_start.device)
    dtype = getattr(operator, "dtype", torch.float32) if warm_start is None else warm_start.dtype
    space = space_of(operator)
    dtype = torch.promote_types(dtype, torch.float32)
    noise = torch.randn(space.length, generator=space.generator(seed, device), device=device, dtype=dtype)
    noise = noise / space.norm(noise)
    if warm_start is None:
        return noise
    # A checkpoint brings vectors to the host.
    mix = (warm_start if warm_start.ndim == 1 else warm_start.sum(1)).to(device, dtype)
    norm = space.norm(mix)
    return mix / norm.clamp_min(torch.finfo(dtype).tiny) + _NOISE * noise


def _turned(start: Tensor, operator: Any) -> Tensor:
    """Mix noise in equal parts with the operator's initial direction."""
    likely = initial_direction(operator, start)
    return start if likely is None or operator.shape[0] == 1 else start + likely  # in one dimension the two can cancel


def initial_direction(operator: Any, like: Tensor) -> Tensor | None:
    """Return the operator's initial direction with unit length, zeros where that has none; None where none is known."""
    likely = operator.initial_direction() if hasattr(operator, "initial_direction") else None
    if likely is None:
        return None
    likely = likely.to(like)
    length = space_of(operator).norm(likely)
    usable = torch.isfinite(length) & (length > 0)
    if reads_are_free(likely.device):
        return likely / length if usable else torch.zeros_like(likely)
    return torch.where(usable, likely / length, torch.zeros_like(likely))
