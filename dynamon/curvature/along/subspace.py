"""The top eigenspace: how much of a vector lies in it, and how it turns."""

import torch
from torch import Tensor

from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import in_double


@full_precision()
def eigenspace_share(vectors: Tensor, direction: Tensor, space: VectorSpace | None = None) -> float:
    r"""Share of a vector's squared length that lies in a subspace: :math:`\|V^\top d\|^2 / \|d\|^2`.

    Args:
        vectors: Orthonormal columns ``[n, k]``, say the first k of :attr:`Eigenpairs.vectors`.
        direction: Flat ``[n]``: a gradient or an update.
        space: Where the numbers of vectors lie, if not all here.

    Returns:
        Between 0 and 1; NaN for a zero vector. A random vector has k / n.

    Cost: one product with k vectors, one host read. Reference: Gur-Ari et al., "Gradient descent happens in a tiny
    subspace", arXiv 1812.04754.
    """
    space = space or VectorSpace(len(direction))
    inside = in_double(torch.linalg.vector_norm(space.inner(vectors.mT, direction.to(vectors)))) ** 2
    return float(inside / in_double(space.norm(direction)) ** 2)


@full_precision()
def eigenspace_overlap(vectors: Tensor, others: Tensor, space: VectorSpace | None = None) -> float:
    r"""How much two subspaces have in common: :math:`\|V^\top W\|_F^2 / k`, k the smaller dimension.

    Args:
        vectors: Orthonormal columns ``[n, k]``.
        others: Orthonormal columns ``[n, m]``.
        space: Where the numbers of vectors lie, if not all here.

    Returns:
        1 where one contains the other, 0 where they are orthogonal; random ones have about m / n.

    Reference: Gur-Ari et al., arXiv 1812.04754.
    """
    smaller = min(vectors.shape[1], others.shape[1])
    space = space or VectorSpace(len(vectors))
    return float(in_double(space.inner(vectors.mT, others.to(vectors))).square().sum() / smaller)
