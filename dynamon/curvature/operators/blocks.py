"""Diagonal blocks of a curvature operator: one layer, or any set of parameters."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.parameters import FlatParameters, checked_once
from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.curvature.solvers.eigenpairs import Eigenpairs, with_product_check
from dynamon.curvature.solvers.lanczos import lanczos_eigenpairs
from dynamon.isolation.evaluations import full_precision


class _HasBlocks(Protocol):
    parameters: FlatParameters
    space: VectorSpace
    backend: str

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor: ...

    def product_error(self, vector: Tensor) -> float: ...

    def initial_direction(self) -> Tensor | None: ...


class BlockOperator(LinearOperator):
    """The diagonal block ``A_bb`` of an operator: rows and columns of some of its parameters.

    Products differentiate in these parameters only, on the graph of the whole operator.

    Args:
        operator: A :class:`HessianOperator` or :class:`GGNOperator`.
        places: Positions of the parameters among the operator's.
    """

    def __init__(self, operator: _HasBlocks, places: Sequence[int]) -> None:
        """Store the operator and the positions of the block's parameters."""
        own = operator.parameters.subset(places)
        super().__init__(own.size, own.dtype, own.tensors[0].device, operator.space.like(own.space))
        self._operator, self._places = operator, list(places)

    @property
    def backend(self) -> str:  # type: ignore[override]
        """Backend of the whole operator's products."""
        return self._operator.backend

    def _product(self, vector: Tensor) -> Tensor:
        return self._operator.block_product(vector, self._places)

    def product_error(self, vector: Tensor) -> float:
        """Estimate the error on the whole operator, at the vector padded with zeros."""
        parameters = self._operator.parameters
        return self._operator.product_error(parameters.embed(vector, self._places))

    def initial_direction(self) -> Tensor | None:
        """Return the block's part of the whole operator's direction."""
        known = self._operator.initial_direction()
        return None if known is None else self._operator.parameters.extract(known, self._places)


@checked_once()
@full_precision()
def blockwise_sharpness(
    operator: _HasBlocks,
    blocks: Mapping[str, Sequence[Tensor] | str],
    *,
    tol: float = 5e-2,
    max_matvecs: int = 20,
    warm_starts: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Eigenpairs]:
    """Compute the largest eigenvalue of each diagonal block of a curvature matrix on one graph.

    The largest of them is a lower bound on the whole operator's eigenvalue and can lie far below it.

    Args:
        operator: A :class:`HessianOperator` or :class:`GGNOperator`.
        blocks: The parameters of each block, or a glob of names, by the block's name.
        tol: Relative tolerance, as in :func:`top_eigenvalues`.
        max_matvecs: Upper limit on matvecs per block.
        warm_starts: ``.vectors`` of an earlier run by block; those of another size are ignored.
        seed: Seed of the start vectors.

    Cost: the matvecs of a block differentiate in that block only; all share one graph. Reference: Wang et al., "The
    sharpness disparity principle in transformers", arXiv 2502.19002.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import HessianOperator, blockwise_sharpness
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> hessian = HessianOperator(lambda: (a * torch.tensor([1.0, 5.0]) * a).sum() / 2 + b.sum() ** 2, [a, b])
        >>> {name: round(float(pairs.values[0]), 3) for name, pairs in
        ...  blockwise_sharpness(hessian, {"a": [a], "b": [b]}).items()}
        {'a': 5.0, 'b': 2.0}
    """
    found = {}
    for name, chosen in blocks.items():
        block = BlockOperator(operator, operator.parameters.block(chosen))
        warm = (warm_starts or {}).get(name)
        warm = warm if warm is not None and warm.shape[0] == block.space.length else None
        found[name] = with_product_check(lanczos_eigenpairs(block, 1, tol, max_matvecs, warm, False, seed), block, tol)
    return found
