"""Statistics of a list of gradients and of their changes, in one pass."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels.devices import reads_are_free, widest_dtype
from dynamon.kernels.lengths import L2_SAFE, l2_norms, l2_on_host

_SMALL = 2.0**-40  # from here downwards products of entries lose digits in float32
_BYTES = 2**28  # of temporaries that are made at a time, where a single tensor is not larger

Scale = float | Tensor


@dataclass(frozen=True)
class GradientStats:
    r"""Sums over each of T gradients :math:`g`, and over its difference :math:`d = g - g'` to the previous one.

    Fields have shape ``[T]``.

    Attributes:
        l1: :math:`\sum_i |g_i|`.
        sum_squares: :math:`\sum_i g_i^2`.
        nonfinite: Number of entries that are NaN or infinite.
        difference_l1: :math:`\sum_i |d_i|`, or None.
        difference_sum_squares: :math:`\sum_i d_i^2`, or None.
        inner: :math:`\langle g, g' \rangle`, or None.
    """

    l1: Tensor
    sum_squares: Tensor
    nonfinite: Tensor
    difference_l1: Tensor | None = None
    difference_sum_squares: Tensor | None = None
    inner: Tensor | None = None


def gradient_stats(
    gradients: Sequence[Tensor],
    previous: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    *,
    scale: Scale = 1.0,
) -> GradientStats:
    """Compute norms of every gradient and of its change, in one pass that refreshes the stored gradient.

    On CUDA it is two launches of a Triton kernel (``dynamon.kernels.gradient_stats_triton``) where that takes the
    lists, else PyTorch's operators on lists.

    Args:
        gradients: T dense tensors on one device, in float64, float32, bfloat16 or float16; none may be empty.
        previous: Storage of the same shapes in any of these dtypes, or None. The difference is taken in float32
            (float64 where a gradient is float64); then ``previous`` is overwritten with ``gradients`` in its own dtype.
        dtype: Dtype of the sums: float32 by default (float64 where a gradient is float64), which cannot hold the
            squares of entries above 1.8e19 or below 1e-22; float64 can.
        scale: Factor on the gradients, which are not changed: a number, or a tensor of one entry on their device.
            Statistics and ``previous`` are those of the product.

    Returns:
        A :class:`GradientStats` in ``dtype``, on the gradients' device. NaN and infinity propagate to the sums of their
        tensor.

    Raises:
        ValueError: If the two lists differ in length or shape, or a tensor is empty or not floating point.

    Cost: with Triton two reads and one write per entry. Otherwise several passes over the tensors, in about 70 calls
    for GPT-2 124M, with temporaries of 256 MiB or of the size of the largest tensor (of all of them where dtypes
    differ). No host synchronisation on a GPU. A CPU processes one tensor at a time, while it is in the cache, and again
    where its squares leave float32.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import gradient_stats
        >>> stored = [torch.tensor([1.0, 1.0])]
        >>> found = gradient_stats([torch.tensor([3.0, -4.0])], stored)
        >>> found.l1, found.sum_squares, found.difference_l1, stored[0]
        (tensor([7.]), tensor([25.]), tensor([7.]), tensor([ 3., -4.]))
    """
    check_lists(gradients, previous)
    work = torch.float64 if torch.float64 in [g.dtype for g in gradients] else torch.float32
    dtype = work if dtype is None else dtype
    if not gradients:
        return no_stats(dtype, previous is not None)
    if _may_have_triton(gradients[0].device):
        from dynamon.kernels.gradient_stats_triton import attempt  # Triton itself takes a while to import

        found = attempt(gradients, previous, dtype, scale)
        if found is not None:
            return found
    compute = _one_by_one if reads_are_free(gradients[0].device) else _composed
    return compute(gradients, previous, work, dtype, scale)


def warm_up(device: torch.device, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    """Compile what :func:`gradient_stats` launches, so that no step and no budget pays for it.

    Args:
        device: Device of the gradients; without Triton for it nothing happens.
        dtypes: Dtypes of gradients and stored gradients.

    Cost: some seconds on a machine that has not compiled it yet, else below a second. Two launches on three entries.
    """
    if not _may_have_triton(device):
        return
    from dynamon.kernels import gradient_stats_triton as twin

    for dtype in dict.fromkeys(dtypes):
        probe = torch.empty(1, dtype=dtype, device=device)
        if twin.supported([probe]):
            for compare in (True, False):
                twin.runs(probe.device, dtype, dtype, widest_dtype(device), compare)  # a device with its number


def _may_have_triton(device: torch.device) -> bool:
    return device.type == "cuda"


def check_lists(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None) -> None:
    """Raise an error where the lists do not fit each other or hold empty or non-float tensors."""
    if 0 in [g.numel() for g in gradients]:
        raise ValueError("gradient_stats cannot take an empty tensor; leave it out.")
    if previous is not None and [g.shape for g in gradients] != [p.shape for p in previous]:
        raise ValueError("gradients and previous must hold the same shapes in the same order.")
    for dtype in {t.dtype for t in gradients} | {t.dtype for t in previous or ()}:
        if not dtype.is_floating_point:
            raise ValueError(f"gradient_stats needs floating point tensors, got {dtype}.")


def no_stats(dtype: torch.dtype, compare: bool) -> GradientStats:
    """Return the statistics of an empty list."""
    nothing = torch.zeros(0, dtype=dtype)
    change = nothing if compare else None
    return GradientStats(nothing, nothing, nothing, change, change, change)


def _composed(
    given: Sequence[Tensor], previous: Sequence[Tensor] | None, work: torch.dtype, dtype: torch.dtype, scale: Scale
) -> GradientStats:
    """Compute the statistics by PyTorch's operators on lists."""
    gradients = [g.detach() for g in given]
    factor = scale.detach().reshape(()) if isinstance(scale, Tensor) else scale
    if previous is None:
        return GradientStats(*_scaled(_own(gradients, dtype), factor))
    stored = [p.detach() for p in previous]
    if _is_scaled(factor) and any([p.dtype != g.dtype for p, g in zip(stored, gradients, strict=True)]):
        gradients, factor = list(torch._foreach_mul(_in_dtype(gradients, work), factor)), 1.0
    own = _own(gradients, dtype)
    current = _in_dtype(gradients, work)
    change = _in_dtype(stored, work)  # the storage itself where the dtypes agree: it is refilled below
    inner = _times(_inner(current, change, dtype), factor)
    if isinstance(factor, Tensor):  # g' / s - g, times s: no copy of the gradients, and exact for powers of two
        torch._foreach_mul_(change, 1 / factor)
        torch._foreach_sub_(change, current)
        l1, squares = _norms(change, dtype)
        l1, squares = _times(l1, factor), _times(_times(squares, factor), factor)
    else:
        torch._foreach_sub_(change, current, alpha=factor)
        l1, squares = _norms(change, dtype)
    torch._foreach_copy_(stored, gradients)
    if _is_scaled(factor):
        torch._foreach_mul_(stored, factor)
    return GradientStats(*_scaled(own, factor), l1, squares, inner)


def _is_scaled(scale: Scale) -> bool:
    return isinstance(scale, Tensor) or scale != 1.0


def _times(sums: Tensor, scale: Scale) -> Tensor:
    return sums * scale if _is_scaled(scale) else sums


def _scaled(own: tuple[Tensor, Tensor, Tensor], scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """Convert sums over gradients to sums over their multiples."""
    l1, squares, nonfinite = own
    return _times(l1, scale), _times(_times(squares, scale), scale), nonfinite


def _in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convert tensors to another dtype in one call; those that have it are returned as they are."""
    others = [t for t in tensors if t.dtype != dtype]
    if not others:
        return tensors
    made = [torch.empty_like(t, dtype=dtype) for t in others]
    torch._foreach_copy_(made, others)
    copies = iter(made)
    return [t if t.dtype == dtype else next(copies) for t in tensors]


def _own(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Compute l1 norm, sum of squares and non-finite count of every tensor, each stacked to ``[T]``."""
    l1, squares = _norms(tensors, dtype)
    return l1, squares, _nonfinite(tensors, l1)


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute l1 norm and sum of squares of every tensor, each stacked to ``[T]``."""
    return _l1(tensors, dtype), l2_norms(tensors).to(dtype).square()


def _l1(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 1, dtype=dtype))


def _nonfinite(tensors: list[Tensor], l1: Tensor) -> Tensor:
    """Count the entries of each tensor that are NaN or infinite."""
    groups = _groups(tensors, max([t.itemsize for t in tensors]))
    return torch.stack([count for group in groups for count in _nonfinite_norms(tensors[group], l1.dtype)])


def _nonfinite_norms(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    marks = torch._foreach_mul(tensors, 0.0)  # 0, or NaN
    torch._foreach_add_(marks, 1.0)
    torch._foreach_sign_(marks)  # of NaN it is 0
    torch._foreach_sub_(marks, 1.0)
    return list(torch._foreach_norm(marks, 1, dtype=dtype))


def _inner(current: list[Tensor], previous: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Compute inner products of pairs in a few calls: the sum of positive products less that of negative ones."""
    groups = _groups(current, dtype.itemsize)
    parts = [_inner_norms(current[group], previous[group], dtype) for group in groups]
    above, below = (torch.stack([norm for part in parts for norm in part[side]]) for side in (0, 1))
    return above - below


def _inner_norms(
    current: list[Tensor], previous: list[Tensor], dtype: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Compute l1 norms of the positive products of pairs of tensors, and of the negative ones."""
    products = torch._foreach_mul(_in_dtype(current, dtype), _in_dtype(previous, dtype))
    above = torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1)
    torch._foreach_clamp_max_(products, 0.0)
    return above, torch._foreach_norm(products, 1)


def _groups(tensors: Sequence[Tensor], itemsize: int) -> Iterator[slice]:
    """Group neighbours whose copies together, at so many bytes per entry, are not larger than allowed."""
    begin, size = 0, 0
    for i, tensor in enumerate(tensors):
        more = tensor.numel() * itemsize
        if i > begin and size + more > _BYTES:
            yield slice(begin, i)
            begin, size = i, 0
        size += more
    yield slice(begin, len(tensors))


def _one_by_one(
    given: Sequence[Tensor], previous: Sequence[Tensor] | None, work: torch.dtype, dtype: torch.dtype, scale: Scale
) -> GradientStats:
    """Compute the statistics tensor by tensor, for CPUs: there memory is slow, and reading a number is free."""
    gradients, factor = [g.detach() for g in given], float(scale)
    if previous is None:
        return GradientStats(*_scaled(_columns([_on_host(g, work, dtype) for g in gradients], dtype), factor))
    stored = [p.detach() for p in previous]
    if factor != 1.0 and any([p.dtype != g.dtype for p, g in zip(stored, gradients, strict=True)]):
        gradients, factor = [g.to(work) * factor for g in gradients], 1.0
    own, changes, inner = [], [], []
    norm, infinite = torch.linalg.vector_norm, math.inf
    for g, p in zip(gradients, stored, strict=True):  # at each step for every layer: helpers where something is unusual
        current, change = g.to(work), p.to(work)  # the storage itself where the dtypes agree: it is refilled below
        least = L2_SAFE[0] * math.sqrt(g.numel())
        l1, l2 = g.abs().sum(dtype=work).item(), norm(g, dtype=work).item()
        is_usual = l1 < infinite and least < l2 < L2_SAFE[1]
        own.append((l1, l2, 0) if is_usual else _on_host(g, work, dtype))
        product = torch.dot(current.flatten(), change.flatten()).item()
        is_usual = is_usual and -infinite < product < infinite and l2 > _SMALL * math.sqrt(g.numel())
        inner.append(product if is_usual else _host_inner(current, change, own[-1][1], dtype))
        change.sub_(current, alpha=factor)
        l1, l2 = change.abs().sum(dtype=work).item(), norm(change, dtype=work).item()
        is_usual = l1 < infinite and least < l2 < L2_SAFE[1]
        changes.append((l1, l2, 0) if is_usual else _on_host(change, work, dtype))
        p.copy_(g)
        if factor != 1.0:
            p.mul_(factor)
    change_l1, change_squares, _ = _columns(changes, dtype)
    products = _times(torch.tensor(inner, dtype=dtype, device="cpu"), factor)
    return GradientStats(*_scaled(_columns(own, dtype), factor), change_l1, change_squares, products)


def _columns(rows: list[tuple[float, float, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Convert the results of :func:`_on_host` to l1 norms, sums of squares and non-finite counts ``[T]``."""
    l1, l2, nonfinite = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    return l1.to(dtype), l2.to(dtype).square(), nonfinite.to(dtype)


def _on_host(tensor: Tensor, work: torch.dtype, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return l1 norm, l2 norm and non-finite count of a tensor."""
    l1 = tensor.abs().sum(dtype=work).item()  # the norm of order one is several times slower
    if l1 == math.inf and work != dtype:
        l1 = tensor.abs().sum(dtype=dtype).item()
    # A finite l1 norm has no entry that is not: that saves a pass.
    nonfinite = 0 if math.isfinite(l1) else tensor.numel() - int(torch.isfinite(tensor).sum())
    return l1, l2_on_host(tensor, work), nonfinite


def _host_inner(current: Tensor, previous: Tensor, length: float, dtype: torch.dtype) -> float:
    """Compute the inner product of two tensors, given the length of the first."""
    a, b = current.flatten(), previous.flatten()
    found = torch.dot(a, b).item()
    squares = length * length
    is_small = 0 < squares < _SMALL**2 * a.numel()
    if dtype == torch.float64 and (is_small or not math.isfinite(found) and math.isfinite(squares)):
        found = torch.dot(a.double(), b.double()).item()
    return float(found)
