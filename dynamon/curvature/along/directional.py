"""Curvature along a given direction, one matrix-vector product each."""

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
    r"""Curvature and slope of the loss along a step d.

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
        r"""Multiple of d that minimises the quadratic model, :math:`-g^\top d / d^\top H d`.

        Infinite where the loss curves downwards along d.
        """
        return -self.slope / self.curvature if self.curvature > 0 else float("inf")

    @property
    def best_multiple_of_last_step(self) -> float:
        """The same for a step d that was just taken: 1 was the best length, the loss rises below 1/2."""
        return 1 + self.best_multiple


@full_precision()
def directional_sharpness(hessian: Any, direction: Tensor, gradient: Tensor | None = None) -> DirectionalSharpness:
    """Compute curvature and slope of the loss along a direction, and the best step length along it.

    Args:
        hessian: A :class:`HessianOperator`, or any operator if ``gradient`` is given.
        direction: Flat ``[n]``, such as an optimizer's update with its rate.
        gradient: Flat ``[n]``; the operator's own if None.

    Raises:
        ValueError: For a zero direction.

    Cost: one matvec, two host reads. Reference: Pan and Li, "Toward understanding why Adam converges faster than SGD",
    2023; Roulet et al., "Stepping on the edge", arXiv 2407.06183, for the best step length.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import HessianOperator, directional_sharpness
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianOperator(lambda: (w * torch.tensor([1.0, 3.0]) * w).sum() / 2, [w])
        >>> found = directional_sharpness(hessian, torch.tensor([0.0, -1.0]))
        >>> found.sharpness, found.slope, found.best_multiple
        (3.0, -6.0, 2.0)
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
    """Return the power of two to divide a direction by so that its product stays within float32; usually 1."""
    if not 0 < length < math.inf or _SMALL < length < 1 / _SMALL:
        return 1.0
    return 2.0 ** max(-_MOST, min(_MOST, math.frexp(length)[1]))


@dataclass(frozen=True)
class NormSharpness:
    """Directional sharpness measured in the norms of the layers.

    Attributes:
        sharpness: Curvature along the step over the square of its norm, the largest of the layers' norms.
        norm: That norm.
        layers: ``{name: sharpness}`` of each layer alone, from its part of the product.
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
    r"""Compute sharpness along a step in the norm of the optimizer: :math:`d^\top H d / \|d\|^2`.

    :math:`\|d\| = \max_l \mathrm{primal}_l(d_l)` is the norm in which steepest descent moves all layers at once: with
    l-infinity norms that is sign descent, with the RMS-to-RMS operator norm it is Muon. Such a method, with steps of
    size lr times the dual norm of the gradient, is at the edge of stability where this sharpness is 2 / lr.

    Args:
        product: ``H d``, flat ``[n]``, as :func:`directional_sharpness` returns it.
        direction: The step, one tensor per layer, in the order of the flat vector.
        norms: Primal norm of each layer by name, in the same order.
        space: The space of product and step where they are sharded; both then hold the local part of each layer.

    Raises:
        ValueError: If lengths do not fit, or the step is zero.

    Cost: one norm per layer and one host read. Reference: Islamov et al., "Non-Euclidean gradient descent operates at
    the edge of stability", arXiv 2603.05002.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import norm_sharpness
        >>> step, product = torch.tensor([1.0, -2.0]), torch.tensor([3.0, -1.0])
        >>> norm_sharpness(product, [step], {"weight": lambda d: d.abs().max()}).sharpness
        1.25
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
    r"""Average the sharpness along each batch's own gradient: :math:`E_B[g_B^\top H_B g_B / \|g_B\|^2]`.

    Each Hessian belongs to the loss of one training batch. Under SGD this mean settles at 2 / lr, while the largest
    eigenvalue of the full loss stays below.

    Args:
        hessians: One operator per batch (a :class:`MeanOverRanks` where a batch is spread over processes); a single one
            gives an unbiased but noisy estimate.

    Raises:
        ValueError: Without an operator, or where a gradient is zero.

    Cost: one matvec per batch. Reference: Andreyev and Beneventano, "Edge of stochastic stability", arXiv 2412.20553.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import HessianOperator, batch_sharpness
        >>> w = torch.ones(2, requires_grad=True)
        >>> batches = torch.tensor([[2.0, 2.0], [4.0, 4.0]])
        >>> batch_sharpness([HessianOperator(lambda b=b: (w * b * w).sum() / 2, [w]) for b in batches])
        3.0
    """
    if not hessians:
        raise ValueError("batch_sharpness needs the Hessian of at least one batch.")
    return sum(directional_sharpness(h, h.gradient).sharpness for h in hessians) / len(hessians)
