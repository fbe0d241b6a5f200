"""Symmetric linear operators with ``@``, the abstraction that all solvers take."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import Tensor

from dynamon.curvature.operators.vector_space import VectorSpace


class LinearOperator:
    """A symmetric operator on flat vectors, defined by its products.

    Args:
        size: Length n of the vectors.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        space: The space of the vectors; None where all entries are on this process.

    Attributes:
        shape: ``(n, n)``.
        space: The space of the vectors.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        backend: How products are computed.
        rounding: Relative rounding of products beyond that of ``dtype``, where a part is computed in half precision.

    Subclasses implement ``_product`` on one vector ``[n]``. Operators combine:
    ``2 * A + B`` is an operator, ``A @ v`` takes ``[n]`` or ``[n, k]``.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal
        >>> operator = 2 * Diagonal(torch.tensor([1.0, 3.0])) - Diagonal(torch.ones(2))
        >>> operator @ torch.ones(2)
        tensor([1., 5.])
        >>> operator
        Combined(2 x 2, float32 on cpu, exact)
    """

    backend = "exact"
    rounding = 0.0

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, space: VectorSpace | None = None) -> None:
        """Store the size, dtype, device and space of the vectors."""
        self.space = VectorSpace(size) if space is None else space
        self.shape = (self.space.size, self.space.size)
        self.dtype = dtype
        self.device = device

    def _product(self, vector: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _product.")

    def product_error(self, vector: Tensor) -> float:
        """Estimate the relative error of the product with ``vector``, beyond rounding; 0 for exact products."""
        return 0.0

    def initial_direction(self) -> Tensor | None:
        """Return a vector ``[n]`` rich in the top eigenvectors for cold starts, or None where none is known."""
        return None

    @contextmanager
    def one_sided(self) -> Iterator[bool]:
        """Take products by one-sided differences of gradients inside, where the operator can; yield whether it does."""
        yield False

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector ``[n]`` or the columns of ``[n, k]``.

        Raises:
            TypeError: If it is not a tensor.
            ValueError: If the first dimension is not n.
        """
        if not isinstance(vectors, Tensor):
            raise TypeError(f"expected a tensor, got {type(vectors).__name__}; to_scipy() is for NumPy arrays.")
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.space.length:
            length = self.space.length
            raise ValueError(f"expected [{length}] or [{length}, k], got {tuple(vectors.shape)}.")
        if vectors.ndim == 1:
            return self._product(vectors)
        if vectors.shape[1] == 0:
            return torch.zeros_like(vectors)
        return torch.stack([self._product(column) for column in vectors.unbind(1)], dim=1)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """Return the operator ``v -> A v + B v``."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot add operators of shapes {self.shape} and {other.shape}.")
        return _Combined([self, other], lambda v: self._product(v) + other._product(v))

    def __mul__(self, factor: float) -> "LinearOperator":
        """Return the operator ``v -> factor * A v``."""
        if isinstance(factor, LinearOperator):
            return NotImplemented
        return _Combined([self], lambda v: factor * self._product(v))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "LinearOperator":
        """Return the operator ``v -> A v / divisor``."""
        return self * (1 / divisor)

    def __neg__(self) -> "LinearOperator":
        """Return the operator ``v -> -A v``, whose largest eigenvalue is minus the smallest of A."""
        return self * -1.0

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        """Return the operator ``v -> A v - B v``."""
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def scaled(self, scale: Tensor) -> "LinearOperator":
        """Return the operator ``S A S`` with ``S = diag(scale)``, ``scale`` of shape ``[n]``."""
        if scale.shape != (self.space.length,):
            raise ValueError(f"scale must have shape [{self.space.length}], got {tuple(scale.shape)}.")
        return _Combined([self], lambda v: scale * self._product(scale * v), lambda v: scale * v)

    def __repr__(self) -> str:
        """Return the kind of operator, its size, dtype, device and backend."""
        backend = getattr(self, "backend", None)
        how = f", {backend}" if backend else ""
        dtype = str(self.dtype).removeprefix("torch.")
        name = type(self).__name__.lstrip("_")
        return f"{name}({self.shape[0]} x {self.shape[1]}, {dtype} on {self.device}{how})"

    def to_scipy(self) -> ScipyOperator:
        """Return the operator for SciPy, in float64 on the host (one transfer per product)."""

        def matvec(vector: Any) -> Any:
            flat = torch.from_numpy(np.array(vector).reshape(-1)).to(self.device, self.dtype)
            return (self @ flat).cpu().double().numpy()

        return ScipyOperator(shape=self.shape, matvec=matvec, rmatvec=matvec, dtype="float64")


class Diagonal(LinearOperator):
    """Multiplication by a vector ``[n]``, entry by entry; ``space`` says where its entries lie, if not all here."""

    def __init__(self, diagonal: Tensor, space: VectorSpace | None = None) -> None:
        """Store the vector."""
        super().__init__(diagonal.numel(), diagonal.dtype, diagonal.device, space)
        self._diagonal = diagonal

    def _product(self, vector: Tensor) -> Tensor:
        return self._diagonal * vector


class _Combined(LinearOperator):
    """An operator composed of the products of others."""

    def __init__(
        self,
        parts: Sequence[LinearOperator],
        product: Callable[[Tensor], Tensor],
        argument: Callable[[Tensor], Tensor] = lambda vector: vector,
    ) -> None:
        super().__init__(parts[0].shape[0], parts[0].dtype, parts[0].device, parts[0].space)
        self._parts, self._combined, self._argument = parts, product, argument
        names = dict.fromkeys(part.backend for part in parts if not isinstance(part, Diagonal))
        self.backend = " + ".join(names) or "exact"
        self.rounding = max(part.rounding for part in parts)

    def _product(self, vector: Tensor) -> Tensor:
        return self._combined(vector)

    def product_error(self, vector: Tensor) -> float:
        """Return the largest error among the parts, each at the vector it receives."""
        argument = self._argument(vector)
        return max(part.product_error(argument) for part in self._parts)

    def initial_direction(self) -> Tensor | None:
        """Return the direction of the first part that knows one, scaled as vectors are."""
        known = next((d for d in (part.initial_direction() for part in self._parts) if d is not None), None)
        return None if known is None else self._argument(known)

    @contextmanager
    def one_sided(self) -> Iterator[bool]:
        """Have the parts do so; yield whether any does."""
        with ExitStack() as stack:
            yield any([stack.enter_context(part.one_sided()) for part in self._parts])
