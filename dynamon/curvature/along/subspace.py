"""Shares and overlaps of the top eigenspace."""

import torch
from torch import Tensor

from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import in_double


@full_precision()
def eigenspace_share(vectors: Tensor, direction: Tensor, space: VectorSpace | None = None) -> float:
    r"""Compute the share of a vector's squared length in a subspace: :math:`\|V^\top d\|^2 / \|d\|^2`.

    Args:
        vectors: Orthonormal columns ``[n, k]``, such as the first k of :attr:`Eigenpairs.vectors`.
        direction: Flat ``[n]``: a gradient or an update.
        space: The space of the vectors where they are sharded.

    Returns:
        Between 0 and 1; NaN for a zero vector. A random vector has k / n.

    Cost: one product with k vectors, one host read. Reference: Gur-Ari et al., "Gradient descent happens in a tiny
    subspace", arXiv 1812.04754.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import eigenspace_share
        >>> round(eigenspace_share(torch.eye(3)[:, :2], torch.tensor([1.0, 0.0, 1.0])), 4)
        0.5
    """
    space = space or VectorSpace(len(direction))
    inside = in_double(torch.linalg.vector_norm(space.inner(vectors.mT, direction.to(vectors)))) ** 2
    return float(inside / in_double(space.norm(direction)) ** 2)


@full_precision()
def eigenspace_overlap(vectors: Tensor, others: Tensor, space: VectorSpace | None = None) -> float:
    r"""Compute the overlap of two subspaces: :math:`\|V^\top W\|_F^2 / k`, k the smaller dimension.

    Args:
        vectors: Orthonormal columns ``[n, k]``.
        others: Orthonormal columns ``[n, m]``.
        space: The space of the vectors where they are sharded.

    Returns:
        1 where one contains the other, 0 where they are orthogonal; random subspaces have about m / n.

    Cost: one product of k with m vectors, one host read. Reference: Gur-Ari et al., arXiv 1812.04754.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import eigenspace_overlap
        >>> eigenspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        0.5
    """
    smaller = min(vectors.shape[1], others.shape[1])
    space = space or VectorSpace(len(vectors))
    return float(in_double(space.inner(vectors.mT, others.to(vectors))).square().sum() / smaller)
