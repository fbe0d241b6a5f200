"""Gram iteration: two-sided bounds on the largest singular value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels.arguments import check_count, check_tensor
from dynamon.kernels.constants import on_device
from dynamon.kernels.gram_triton import supported, symmetric_gram
from dynamon.kernels.precision import own_dtype, product_allowance
from dynamon.kernels.thresholds import takes_gram_twin

_OWN_DTYPE = (torch.float64, torch.complex64, torch.complex128)  # everything else is computed in float32
_AT_ONCE = 2**27  # entries of matrices that share their products; beyond, a device is busy anyway and memory counts


@dataclass(frozen=True)
class Extremes:
    r"""Results of Gram iteration, each ``[T]``, relative to the largest entry of each matrix, which cannot overflow.

    Attributes:
        lower: Lower bound on :math:`\sigma_1`.
        upper: Upper bound on it.
        energy: :math:`\sum \sigma_i^2`.
        scale: The largest entry; zero for a zero matrix, NaN for one that holds NaN or infinity.
    """

    lower: Tensor
    upper: Tensor
    energy: Tensor
    scale: Tensor


def gram_iteration(weight: Tensor, steps: int = 6) -> tuple[Tensor, Tensor]:
    r"""Bound the largest singular value of each matrix from below and above.

    With :math:`G_0 = W` and :math:`G_{k+1} = G_k^T G_k` the upper bound is the Schatten norm

    .. math:: \|G_N\|_F^{2^{-N}} = \|W\|_{S_p} \ge \sigma_1(W), \qquad p = 2^{N+1},

    which exceeds :math:`\sigma_1` by at most a factor :math:`\mathrm{rank}^{1/p}`. The lower bound is the
    larger of two: :math:`(\|A\|_F^2 / \mathrm{tr} A)^{2^{-N}}` for :math:`A = G_N`, and the Rayleigh quotient
    :math:`\|W v\| / \|v\|` with :math:`v` the column of :math:`A` that has the largest diagonal entry. Every
    iterate is rescaled to Frobenius norm one, so entries of 1e-30 or 1e+30 are fine. Both bounds carry an
    allowance for rounding in the dtype of the computation, and where products of float32 are taken in TensorFloat-32
    for that: 0.4 % on each side. Autocast is off inside.

    Args:
        weight: Matrices of shape ``[..., m, n]``, real or complex. Half precision is computed in float32.
        steps: Number of Gram products. Six is within 1 % for ranks up to 64; each further step halves the logarithmic
            gap at worst, and squares the error where the top singular value is well separated.

    Returns:
        ``(lower, upper)``, each of shape ``[...]`` on the device of ``weight``, in float32 (float64 for
        float64). Zero for a zero matrix, NaN where the matrix contains NaN or infinity. Differentiable.

    Raises:
        TypeError: If ``weight`` is not a tensor or ``steps`` not an int.
        ValueError: If ``weight`` is not floating point, has fewer than two dimensions or an empty one, or
            ``steps`` is below one.

    Cost: ``steps`` products of the smaller side, ``2 m n s + 2 (steps - 1) s^3`` FLOP with ``s = min(m, n)``,
    and memory for two ``s x s`` matrices. No host synchronisation.

    Reference: Delattre et al., "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
    Iteration", arXiv 2305.16173; the lower bounds are dynamon's own.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import gram_iteration
        >>> lower, upper = gram_iteration(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> bool(lower <= 3 <= upper), round(float(upper / lower), 4)
        (True, 1.0)
    """
    _check(weight, steps)
    found = _of_one_side([[weight.reshape(-1, *weight.shape[-2:])]], steps)
    lower, upper = ((bound * found.scale).reshape(weight.shape[:-2]) for bound in (found.lower, found.upper))
    return lower, upper


def gram_extremes(stacks: Sequence[Tensor], steps: int, half: bool = False) -> Extremes:
    """Apply Gram iteration to many matrices in few calls, sharing products by shape and by smaller side.

    Args:
        stacks: S stacks ``[t, m, n]`` of matrices of any shapes, on one device; at least one.
        steps: Number of Gram products.
        half: Take products in bfloat16 with float32 sums. The results are then estimates, not bounds: rounding changes
            them by less than 0.3 %, in addition to the gap between the bounds.

    Returns:
        :class:`Extremes` of the T matrices of all stacks, in their order, in float32 (float64 where a stack is).

    Raises:
        ValueError: As :func:`gram_iteration`.

    Cost: that of :func:`gram_iteration`; about 60 calls per smaller side and 10 per shape, and a copy of the matrices.
    """
    for stack in stacks:
        _check(stack, steps)
    calls = _calls(stacks)
    found = [_of_one_side([[stacks[i] for i in shape] for shape in call], steps, half) for call in calls]
    if len(calls) == 1 and len(calls[0]) == 1:
        return found[0]
    starts = [sum(len(s) for s in stacks[:i]) for i in range(len(stacks) + 1)]
    order = [m for call in calls for shape in call for i in shape for m in range(starts[i], starts[i + 1])]
    places = sorted(range(len(order)), key=order.__getitem__)
    back = on_device(places, stacks[0].device, torch.int64)
    wide = torch.float64 if any(part.lower.dtype == torch.float64 for part in found) else torch.float32
    table = torch.cat([torch.stack(list(vars(part).values())).to(wide) for part in found], 1)
    return Extremes(*table.index_select(1, back).unbind())


def warm_up(device: torch.device, sides: Sequence[int]) -> None:
    """Compile the Triton kernel if products of matrices with these smaller sides take it, so that no reading waits.

    Args:
        device: Where the matrices are.
        sides: Their smaller sides.
    """
    for side in sides:
        like = torch.empty(0, side, side, device=device)
        if takes_gram_twin(like) and supported(like):
            symmetric_gram(torch.zeros(1, side, side, device=device))
            return


def _calls(stacks: Sequence[Tensor]) -> list[list[list[int]]]:
    """Divide stacks into calls by smaller side and dtype, up to a size, and within a call by shape."""
    open_calls: dict[tuple[object, ...], dict[tuple[object, ...], list[int]]] = {}
    found: list[list[list[int]]] = []
    for i, stack in enumerate(stacks):
        work = _work_dtype(stack)
        key = min(stack.shape[-2:]), work
        call = open_calls.setdefault(key, {})
        held = sum(stacks[j].numel() for shape in call.values() for j in shape)
        if call and held + stack.numel() > _AT_ONCE:
            found.append(list(call.values()))
            call = open_calls[key] = {}
        call.setdefault((*stack.shape[-2:], stack.dtype), []).append(i)
    return [*found, *(list(call.values()) for call in open_calls.values())]


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(list(stacks))


def _work_dtype(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.dtype in _OWN_DTYPE else torch.float32


def _of_one_side(shapes: Sequence[Sequence[Tensor]], steps: int, half: bool = False) -> Extremes:
    """Iterate on stacks ``[t, m, n]`` with equal smaller sides, those of one shape together."""
    with own_dtype(shapes[0][0]):
        matrices, scales = zip(*(_scaled(_joined(shape), half) for shape in shapes), strict=True)
        gram = _joined([_gram(matrix) for matrix in matrices])
        energy = _trace(gram)
        gram, log_scale = _squared(gram, steps - 1)
        root = 0.5**steps
        log_length = _above_zero(_length(gram)[..., 0, 0]).log()
        upper = torch.exp(root * (log_length + log_scale))
        schatten_lower = torch.exp(root * (2 * log_length - _above_zero(_trace(gram)).log() + log_scale))
        lower = schatten_lower if half else torch.maximum(schatten_lower, _rayleigh(matrices, gram))
    if half:
        return Extremes(lower, upper, energy, _joined(scales))
    if len(matrices) == 1:
        spare: float | Tensor = _allowance(matrices[0])
    else:
        spare = on_device([_allowance(m) for m in matrices for _ in range(len(m))], lower.device, lower.dtype)
    return Extremes(lower * (1 - spare), upper * (1 + spare), energy, _joined(scales))


def _allowance(matrix: Tensor) -> float:
    """Return the relative allowance for rounding of sums and of the entries that products round."""
    return torch.finfo(matrix.dtype).eps * (8 + 2 * max(matrix.shape[-2:]) ** 0.5) + product_allowance(matrix)


def _scaled(batch: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Return tall matrices over their largest entries, and these; zero for a zero matrix."""
    work = batch.to(_work_dtype(batch))
    work = work if work.shape[-2] >= work.shape[-1] else work.mH
    largest = torch.linalg.vector_norm(work.detach(), torch.inf, dim=(-2, -1), keepdim=True)
    scale = _above_zero(largest)
    scaled, scale = work / scale, (scale * largest.sign())[..., 0, 0]  # the sign of NaN is NaN
    return (scaled.bfloat16() if half else scaled), scale


def _gram(matrix: Tensor) -> Tensor:
    if takes_gram_twin(matrix) and supported(matrix):
        return symmetric_gram(matrix)
    return matrix.mH @ matrix


def _squared(gram: Tensor, steps: int) -> tuple[Tensor, Tensor | float]:
    """Square a Gram matrix repeatedly, with the logarithm ``[t]`` of the factor divided out."""
    norms = []
    for _ in range(steps):
        norms.append(_above_zero(_length(gram)))
        gram = gram / norms[-1] if gram.requires_grad else gram.div_(norms[-1])
        gram = _gram(gram)
    if not norms:
        return gram, 0.0
    shares = on_device([2.0 ** (steps - k) for k in range(steps)], gram.device, norms[0].dtype)
    return gram, (torch.cat(norms, -1)[:, 0].log() * shares).sum(-1)


def _rayleigh(matrices: Sequence[Tensor], gram: Tensor) -> Tensor:
    """Compute ||W v|| / ||v|| with v the column of the Gram matrix with the largest diagonal entry."""
    column = gram.diagonal(dim1=-2, dim2=-1).real.argmax(-1)[..., None, None]
    vector = gram.gather(-1, column.expand(*gram.shape[:-1], 1))
    vector = vector / _above_zero(_length(vector))
    parts = vector.split([len(matrix) for matrix in matrices])
    lengths = [_length(matrix @ part)[..., 0, 0] for matrix, part in zip(matrices, parts, strict=True)]
    return _joined(lengths)


def _sum_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype of norms and traces: real, and float32 for bfloat16."""
    return torch.float64 if matrix.dtype in (torch.float64, torch.complex128) else torch.float32


def _length(matrix: Tensor) -> Tensor:
    wide = torch.float32 if matrix.dtype == torch.bfloat16 else None
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=wide)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=_sum_dtype(gram))


def _above_zero(value: Tensor) -> Tensor:
    """Replace zeros by the smallest normal number, so that division and logarithm are safe."""
    return value.clamp_min(torch.finfo(value.dtype).tiny)


def _check(weight: Tensor, steps: int) -> None:
    check_tensor("weight", weight, "[..., m, n]")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise ValueError(f"gram_iteration needs a floating point or complex tensor, got {weight.dtype}.")
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ValueError(f"gram_iteration needs matrices [..., m, n], got shape {tuple(weight.shape)}.")
    check_count("steps", steps)
