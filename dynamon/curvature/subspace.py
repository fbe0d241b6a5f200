"""The top eigenspace: how much of a vector lies in it, and how it turns."""

import torch
from torch import Tensor


def eigenspace_share(vectors: Tensor, direction: Tensor) -> float:
    r"""Share of a vector's squared length that lies in a subspace: :math:`\|V^\top d\|^2 / \|d\|^2`.

    Args:
        vectors: Orthonormal columns ``[n, k]``, say the first k of :attr:`Eigenpairs.vectors`.
        direction: Flat ``[n]``: a gradient or an update.

    Returns:
        Between 0 and 1; NaN for a zero vector. A random vector has k / n.

    Cost: one product with k vectors, one host read. Reference: Gur-Ari et al., "Gradient descent happens in a tiny
    subspace", arXiv 1812.04754.
    """
    inside = torch.linalg.vector_norm(vectors.mT @ direction.to(vectors)).double() ** 2
    return float(inside / torch.linalg.vector_norm(direction).double() ** 2)


def eigenspace_overlap(vectors: Tensor, others: Tensor) -> float:
    r"""How much two subspaces have in common: :math:`\|V^\top W\|_F^2 / k`, k the smaller dimension.

    Args:
        vectors: Orthonormal columns ``[n, k]``.
        others: Orthonormal columns ``[n, m]``.

    Returns:
        1 where one contains the other, 0 where they are orthogonal; random ones have about m / n.

    Reference: Gur-Ari et al., arXiv 1812.04754.
    """
    smaller = min(vectors.shape[1], others.shape[1])
    return float((vectors.mT @ others.to(vectors)).double().square().sum() / smaller)
