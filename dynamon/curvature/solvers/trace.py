"""The trace of an operator."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from dynamon.curvature.operators.parameters import checked_once
from dynamon.curvature.operators.vector_space import space_of, wide_inner
from dynamon.isolation.evaluations import full_precision
from dynamon.kernels.arguments import check_count, renamed_arguments


@dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace with its standard error.

    Attributes:
        value: The estimate, unbiased.
        standard_error: Its standard error, from the spread over the vectors; NaN with one vector.
        matvecs: Number of matvecs taken.
    """

    value: float
    standard_error: float
    matvecs: int


@renamed_arguments(samples="num_vectors")
@checked_once()
@full_precision()
def trace(operator: Any, *, num_vectors: int = 16, seed: int = 0) -> TraceEstimate:
    r"""Estimate the trace of a symmetric operator by Hutchinson's method.

    :math:`\mathrm{tr} A = E[z^\top A z]` for vectors z of independent random signs; the variance for one vector is
    twice the sum of the squared off-diagonal entries.

    Args:
        operator: Anything with ``.shape`` ``(n, n)`` and ``@`` on flat tensors ``[n]``.
        num_vectors: Number of sign vectors.
        seed: Their seed; global random state is not touched.

    Returns:
        :class:`TraceEstimate`.

    Raises:
        TypeError: If ``num_vectors`` is not an int.
        ValueError: If it is below one.

    Cost: ``num_vectors`` matvecs, one host read, memory of two vectors. Reference: Hutchinson, 1990.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal, trace
        >>> trace(Diagonal(torch.tensor([1.0, 2.0, 3.0])), num_vectors=4)
        TraceEstimate(value=6.0, standard_error=0.0, matvecs=4)
    """
    check_count("num_vectors", num_vectors)
    device = getattr(operator, "device", torch.device("cpu"))
    dtype = getattr(operator, "dtype", torch.float32)
    space = space_of(operator)
    generator = space.generator(seed, device)
    found = []
    for _ in range(num_vectors):
        signs = torch.randint(2, (space.length,), generator=generator, device=device).to(dtype).mul_(2).sub_(1)
        found.append(space.total(wide_inner(signs, operator @ signs)))
    values = torch.stack(found).cpu().double()
    error = float(values.std() / math.sqrt(num_vectors)) if num_vectors > 1 else math.nan
    return TraceEstimate(float(values.mean()), error, num_vectors)
