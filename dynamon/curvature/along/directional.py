"""Curvature along a given direction: one product each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.distributed.mean_over_ranks import MeanOverRanks
from dynamon.curvature.operators.hessian import HessianOperator
from dynamon.curvature.operators.vector_space import VectorSpace, space_of, wide_inner
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels import widened

_SMALL = 2.0**-40  # lengths between this and its inverse are taken as they are
_MOST = 100  # powers of two, within the range of float32


@dataclass(frozen=True)
class DirectionalSharpness:
    r"""Curvature of the loss along a step d.

    Attributes:
        sharpness: :math:`d^\top H d / \|d\|_2^2`.
        slope: :math:`g^\top d`, negative where the step leads downhill.
        curvature: :math:`d^\top H d`.
        product: ``H d``, flat ``[n]``.
    """

    sharpness: float
    slope: float
    curvature: float
    product: Tensor

    @property
    def best_multiple(self) -> float:
        r"""The multiple of d that minimises the quadratic model from here, :math:`-g^\top d / d^\top H d`.

        Infinite where the loss curves downwards along d.
        """
        return -self.slope / self.curvature if self.curvature > 0 else float("inf")

    @property
    def best_multiple_of_last_step(self) -> float:
        """The same for a step d that was just taken; 1 would have been the best length, 2 is where the loss rises."""
        return 1 + self.best_multiple


@full_precision()
def directional_sharpness(hessian: Any, direction: Tensor, gradient: Tensor | None = None) -> DirectionalSharpness:
    """Curvature and slope of the loss along a direction, and with them the best step along it.

    Args:
        hessian: A :class:`HessianOperator`, or any operator if ``gradient`` is given.
        direction: Flat ``[n]``, say an optimizer's update with its rate.
        gradient: Flat ``[n]``; that of the operator if None.

    Raises:
        ValueError: For a zero direction.

    Cost: one product, two host reads. Reference: Pan and Li, "Toward understanding why Adam converges faster than
    SGD", 2023; Roulet et al., "Stepping on the edge", arXiv 2407.06183 for the greedy rate.
    """
    gradient = hessian.gradient if gradient is None else gradient
    space = space_of(hessian)
    size = _power_of_two(float(space.norm(direction)))
    unit = direction if size == 1 else direction / size
    product = hessian @ unit
    pairs = [(unit, unit), (gradient, unit), (unit, product)]
    squared, slope, curvature = space.total(torch.stack([wide_inner(a, b) for a, b in pairs])).tolist()
    if squared == 0:
        raise ValueError("the direction is zero, so there is no curvature along it.")
    product = product if size == 1 else product * size
    return DirectionalSharpness(curvature / squared, slope * size, curvature * size**2, product)


def _power_of_two(length: float) -> float:
    """What a direction is divided by, without rounding, lest its product leave float32; 1 where it does not."""
    if not 0 < length < math.inf or _SMALL < length < 1 / _SMALL:
        return 1.0
    return 2.0 ** max(-_MOST, min(_MOST, math.frexp(length)[1]))


@dataclass(frozen=True)
class NormSharpness:
    """Directional sharpness in the norms of the layers.

    Attributes:
        sharpness: Curvature along the step over the square of its norm, the largest of the layers' norms.
        norm: That norm.
        layers: ``{name: sharpness}`` of each layer alone, with the part of the product that belongs to it.
    """

    sharpness: float
    norm: float
    layers: dict[str, float]


@full_precision()
def norm_sharpness(
    product: Tensor,
    direction: Sequence[Tensor],
    norms: Mapping[str, Callable[[Tensor], Tensor]],
    space: VectorSpace | None = None,
) -> NormSharpness:
    r"""Sharpness along a step in the norm the optimizer works in: :math:`d^\top H d / \|d\|^2`.

    :math:`\|d\| = \max_l \mathrm{primal}_l(d_l)` is the norm whose steepest descent moves all layers at once: with
    l-infinity the one of sign methods, with the RMS->RMS operator norm Muon's. Such a method, with steps of size lr
    times the dual norm of the gradient, is at the edge of stability where this is 2 / lr.

    Args:
        product: ``H d``, flat ``[n]``, as :func:`directional_sharpness` returns it.
        direction: The step, one tensor a layer, in the order of the flat vector.
        norms: Each layer's primal norm by name, in the same order.
        space: Where the numbers of product and step lie, if not all here: they are those of each layer that are.

    Raises:
        ValueError: If lengths do not fit, or the step is zero.

    Reference: Islamov et al., "Non-Euclidean gradient descent operates at the edge of stability", arXiv 2603.05002.
    """
    sizes = [d.numel() for d in direction]
    if sum(sizes) != product.numel() or len(norms) != len(direction):
        raise ValueError(f"{len(norms)} norms and {sum(sizes)} numbers do not fit a product of {product.numel()}.")
    whole = direction if space is None else [space.piece(d, place) for place, d in enumerate(direction)]
    lengths = torch.stack([widened(norm(d)) for norm, d in zip(norms.values(), whole, strict=True)])
    pieces = zip(direction, product.split(sizes), strict=True)
    curvatures = torch.stack([wide_inner(d.reshape(-1), part) for d, part in pieces])
    curvatures = curvatures if space is None else space.total(curvatures)
    table = torch.stack([lengths, curvatures]).cpu().double()
    lengths, curvatures = table[0], table[1]
    longest = float(lengths.max())
    if longest == 0:
        raise ValueError("the step is zero, so there is no curvature along it.")
    alone = (curvatures / lengths.square()).tolist()
    return NormSharpness(float(curvatures.sum()) / longest**2, longest, dict(zip(norms, alone, strict=True)))


def batch_sharpness(hessians: Sequence[HessianOperator | MeanOverRanks]) -> float:
    r"""Sharpness that mini-batches see: :math:`E_B[g_B^\top H_B g_B / \|g_B\|^2]`.

    Each Hessian is that of one training batch's own loss. Under SGD this settles at 2 / lr, while the largest
    eigenvalue of the full loss stays below.

    Args:
        hessians: One operator a batch (a mean over ranks, where a batch is spread over processes); a single one gives
            an unbiased, noisy estimate.

    Raises:
        ValueError: Without an operator, or where a gradient is zero.

    Cost: one product a batch. Reference: Andreyev and Beneventano, "Edge of stochastic stability", arXiv 2412.20553.
    """
    if not hessians:
        raise ValueError("batch_sharpness needs the Hessian of at least one batch.")
    return sum(directional_sharpness(h, h.gradient).sharpness for h in hessians) / len(hessians)
