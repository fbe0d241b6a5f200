"""The one abstraction of this folder: a symmetric linear operator with ``@``."""

from collections.abc import Callable
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import Tensor


class LinearOperator:
    """A symmetric operator on flat vectors, known by its products.

    Args:
        size: Length n of the vectors.
        dtype: Dtype of the vectors.
        device: Device of the vectors.

    Subclasses implement :meth:`_product` on one vector ``[n]``. Operators combine:
    ``2 * A + B`` is an operator, ``A @ v`` takes ``[n]`` or ``[n, k]``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Remember what vectors look like."""
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    def _product(self, vector: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must implement _product.")

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector ``[n]`` or the columns of ``[n, k]``.

        Raises:
            ValueError: If the first dimension is not n.
        """
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[1]:
            raise ValueError(f"expected [{self.shape[1]}] or [{self.shape[1]}, k], got {tuple(vectors.shape)}.")
        if vectors.ndim == 1:
            return self._product(vectors)
        if vectors.shape[1] == 0:
            return torch.zeros_like(vectors)
        return torch.stack([self._product(column) for column in vectors.unbind(1)], dim=1)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        """The operator ``v -> A v + B v``."""
        if self.shape != other.shape:
            raise ValueError(f"cannot add operators of shapes {self.shape} and {other.shape}.")
        return _Combined(self, lambda v: self._product(v) + other._product(v))

    def __mul__(self, factor: float) -> "LinearOperator":
        """The operator ``v -> factor * A v``."""
        return _Combined(self, lambda v: factor * self._product(v))

    __rmul__ = __mul__

    def scaled(self, scale: Tensor) -> "LinearOperator":
        """The operator ``S A S`` with ``S = diag(scale)``, ``scale`` of shape ``[n]``."""
        if scale.shape != self.shape[:1]:
            raise ValueError(f"scale must have shape [{self.shape[0]}], got {tuple(scale.shape)}.")
        return _Combined(self, lambda v: scale * self._product(scale * v))

    def to_scipy(self) -> ScipyOperator:
        """The same operator for SciPy, in float64 on the host (one transfer a product)."""

        def matvec(vector: Any) -> Any:
            flat = torch.as_tensor(vector.reshape(-1)).to(self.device, self.dtype)
            return (self @ flat).double().cpu().numpy()

        return ScipyOperator(shape=self.shape, matvec=matvec, rmatvec=matvec, dtype="float64")


class _Combined(LinearOperator):
    """An operator made from another one's products."""

    def __init__(self, like: LinearOperator, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.shape[0], like.dtype, like.device)
        self._combined = product

    def _product(self, vector: Tensor) -> Tensor:
        return self._combined(vector)
