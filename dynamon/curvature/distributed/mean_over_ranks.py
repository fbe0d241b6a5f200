"""Curvature of a loss whose samples are spread over processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.curvature.operators.vector_space import CommonSpace
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widened, widest_dtype


class MeanOverRanks(LinearOperator):
    """Weighted mean of one operator per process: the Hessian on the samples of all processes.

    Every process must take the same products in the same order. :func:`top_eigenvalues` does: the numbers of the first
    process decide. It can replace a :class:`HessianOperator` or :class:`GGNOperator` everywhere.

    Args:
        operator: This process's operator, on its own samples.
        weight: Its weight, such as the number of its samples.
        ranks: The processes, inside their :meth:`dynamon.distributed.ranks.Ranks.collective_section`, so that one whose
            product fails does not leave the others waiting; all if None.

    Attributes:
        doubt: Why products may miss a part, on any of the processes; else None.
        is_coarse: True where products are differences in half precision on any of them.
        loss: The weighted mean of the losses, where the operator has one.
        gradient: The weighted mean of the gradients, likewise.

    Cost: one all-reduce of n numbers per product, one for the gradient at construction, and one of a few numbers
    wherever a solver decides how to go on.
    """

    parameters: FlatParameters
    gradient: Tensor
    loss: Tensor

    def __init__(self, operator: LinearOperator, weight: float = 1.0, ranks: Ranks | None = None) -> None:
        """Sum the weights over the processes and average loss and gradient."""
        own: Any = operator
        self._operator, self._ranks = own, ranks or Ranks(operator.device)
        space = CommonSpace(operator.space, self._ranks)
        super().__init__(operator.shape[0], operator.dtype, operator.device, space)
        total = self._ranks.sum(torch.tensor(weight, dtype=widest_dtype(operator.device), device=operator.device))
        self._share = weight / float(total)
        self.backend, self.reason = operator.backend, getattr(operator, "reason", None)
        self.rounding = operator.rounding
        self.doubt = self._doubt(getattr(operator, "doubt", None))
        self.is_coarse = self._any(getattr(operator, "is_coarse", False))
        if hasattr(operator, "parameters"):
            self.parameters = own.parameters
        if isinstance(getattr(operator, "gradient", None), Tensor):
            self.gradient = self._mean(own.gradient)
            self.loss = self._mean(widened(own.loss)).to(own.loss.dtype)

    def _doubt(self, own: str | None) -> str | None:
        """Return why products may miss a part, on this process or another."""
        doubts = self._any(own is not None)
        return own or ("products may miss a part on another process." if doubts else None)

    def _any(self, own: bool) -> bool:
        """Return whether a flag is set on any of the processes."""
        return bool(self._ranks.sum(torch.tensor(float(own), dtype=widest_dtype(self.device), device=self.device)))

    def _mean(self, own: Tensor) -> Tensor:
        return self._ranks.sum(self._share * own)

    def _product(self, vector: Tensor) -> Tensor:
        return self._mean(self._operator._product(vector))

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``H_bb v`` for the parameters at some positions, where the operators have blocks."""
        return self._mean(self._operator.block_product(vector, block))

    def initial_direction(self) -> Tensor | None:
        """Return the weighted mean of the processes' initial directions."""
        if hasattr(self, "gradient"):
            return self.gradient
        known = self._operator.initial_direction()
        return None if known is None else self._mean(known)

    def product_error(self, vector: Tensor) -> float:
        """Return the largest error among the processes."""
        error = torch.tensor(self._operator.product_error(vector), dtype=widest_dtype(self.device), device=self.device)
        return float(self._ranks.maximum(error))
