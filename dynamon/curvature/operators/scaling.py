"""Powers of two that keep float16 gradients from vanishing, and scale-free quotients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.curvature.operators.graphs import dtypes_behind

LARGEST = 2.0**16  # where torch's own gradient scaler begins
LOWER = 16.0  # by which a scale is lowered where something overflows
_MOST = 16  # powers of that for a small loss: what is below 1e-19 may be zero but for rounding


def loss_scale(losses: Sequence[Tensor]) -> float:
    """Return the factor for a loss before it is differentiated: 1 unless its graph computes in float16.

    A small loss, such as one divided by a large number, has gradients as small.
    """
    if torch.float16 not in dtypes_behind(losses):
        return 1.0
    size = max(abs(float(loss.detach().sum())) for loss in losses)
    steps = math.floor(math.log(1 / size, LOWER)) if 0 < size < 1 else 0
    return LARGEST * LOWER ** min(steps, _MOST)


def length_scale(vector: Tensor) -> Tensor:
    """Return the power of two that brings a vector's largest entry to between 1 and 2, as a 0-d tensor; 1 for zeros."""
    largest = torch.linalg.vector_norm(vector, float("inf"))
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = -torch.where(usable, largest, torch.ones_like(largest)).log2().floor()
    return torch.exp2(exponent.clamp(-100, 100))


def is_whole(tensor: Tensor) -> bool:
    """Return whether all entries are finite. Cost: one host read."""
    return bool(torch.isfinite(tensor).all())


def relative(difference: Tensor, size: Tensor) -> float:
    """Divide one length by another: 0 where both are zero, infinity over zero. Cost: host reads."""
    return float(difference / size) if size > 0 else math.inf if difference > 0 else 0.0
