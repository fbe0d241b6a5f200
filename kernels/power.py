"""The largest singular value by warm-started power steps."""

import torch
from torch import Tensor

from dynamon.kernels.arguments import check_count, check_tensor
from dynamon.kernels.constants import to_device
from dynamon.kernels.precision import own_dtype, product_allowance


def top_singular(matrix: Tensor, start: Tensor | None = None, steps: int = 2) -> tuple[Tensor, Tensor]:
    r"""Refresh the largest singular value of each matrix from the right singular vector of the last time.

    Each step is :math:`v \leftarrow W^\top W v / \|W^\top W v\|`; the value is :math:`\|W v\|`, a lower bound on
    :math:`\sigma_1` up to rounding (1e-6 in float32). Each step reduces its relative error by the factor
    :math:`(\sigma_2 / \sigma_1)^4`. Where products of float32 are taken in TensorFloat-32, the value is lowered by
    their rounding of 0.4 % to stay a bound. Autocast is off inside.

    Args:
        matrix: Matrices ``[..., m, n]``; half precision is computed in float32.
        start: Right vectors ``[..., n]`` of the last call, of any length; None starts from fixed noise.
        steps: Number of power steps, 0 or more.

    Returns:
        ``(value, vector)``: ``[...]`` and the new right vectors ``[..., n]``, in float32 (float64 for float64). Zero
        for a zero matrix, NaN where the matrix contains NaN or infinity.

    Raises:
        TypeError: If ``matrix`` is not a tensor or ``steps`` not an int.
        ValueError: If ``matrix`` is not floating point, is empty or has fewer than two dimensions, or ``start`` does
            not fit.

    Cost: ``4 m n steps + 2 m n`` FLOP: the matrix is read twice per step. No host synchronisation.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import top_singular
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0]))
        >>> _, vector = top_singular(matrix, steps=20)
        >>> value, _ = top_singular(1.01 * matrix, start=vector)
        >>> round(float(value), 3)
        3.03
    """
    check_tensor("matrix", matrix, "[..., m, n]")
    check_count("steps", steps, least=0)
    if not matrix.is_floating_point() or matrix.ndim < 2 or 0 in matrix.shape:
        raise ValueError(
            "top_singular needs floating point matrices [..., m, n] that are not empty, "
            f"got {matrix.dtype} {tuple(matrix.shape)}."
        )
    expected = (*matrix.shape[:-2], matrix.shape[-1])
    if start is not None and start.shape != expected:
        raise ValueError(f"start must have shape {list(expected)}, got {list(start.shape)}.")
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    vector = (_noise(work) if start is None else start.to(work)).unsqueeze(-1)
    vector, _ = _unit(vector)
    with own_dtype(work):
        for _ in range(steps):
            moved, _ = _unit(work @ vector)
            vector, _ = _unit(work.mT @ moved)
        _, value = _unit(work @ vector)
    spare = product_allowance(work)
    return (value * (1 - spare) if spare else value), vector.squeeze(-1)


def _noise(matrix: Tensor) -> Tensor:
    """Draw the same vectors ``[..., n]`` on any device, also where another one is torch's default."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(matrix.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
    return to_device(noise.to(matrix.dtype), matrix.device).expand(*matrix.shape[:-2], -1)


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors and lengths, dividing by the largest entry first so that squares of 1e-30 or 1e30 exist."""
    largest = vector.abs().amax(-2, keepdim=True)
    tiny = torch.finfo(vector.dtype).tiny
    vector = vector / largest.clamp_min(tiny)
    length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    return vector / length.clamp_min(tiny), (length * largest)[..., 0, 0]
