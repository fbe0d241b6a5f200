"""Statistics of a list of gradients in one launch: the Triton twin of :func:`dynamon.kernels.gradient_stats`."""

from __future__ import annotations  # `tl` is None where Triton is missing

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynamon.kernels._triton import can_run, jit, require, tl
from dynamon.kernels.gradient_stats import GradientStats, check_lists, no_stats

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 16384  # entries a program walks through; a multiple of 16 bytes in every dtype
_BLOCK = 1024  # entries it takes at a time: eight a thread
_WARPS = 4
# Rows of partial results, which the kernel lists: counts, largest magnitudes, two sums of magnitudes as they are and
# scaled down, three sums of squares and products as they are, scaled up, and scaled down.
_ROWS = (2, 2, 2 * 2, 3 * 3)
_UP, _DOWN = 90, 75  # powers of two on entries whose squares leave float32; 2^14 of the largest still add up
_FEW, _MANY = 2.0**-45, 2.0**45  # largest magnitudes of a chunk between which its squares are fine as they are


def triton_gradient_stats(
    gradients: Sequence[Tensor], previous: Sequence[Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> GradientStats:
    """Norms of every gradient and of its change, refreshing the stored gradient, in one pass over memory.

    Takes and gives what :func:`dynamon.kernels.gradient_stats` does, except for float64 and for ``axes``: a chunk knows
    no rows. Each entry is read once from either list and written once. Sums are float32 within a chunk of 16,384
    entries and float64 across chunks; squares and products are summed at three scales at once, of which each chunk
    takes the one that holds them.

    Args:
        gradients: T dense tensors on one GPU in float32, bfloat16 or float16; none may be empty.
        previous: Storage of the same shapes in one of these dtypes, or None.
        dtype: Of the sums: float32, or float64, which holds the squares of entries of any size.

    Returns:
        A :class:`GradientStats` in ``dtype`` on the gradients' device, without sums of rows and columns.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the lists differ in length or shape, a tensor is empty, or dtype or device do not fit.

    Cost: two reads and one write an entry (one read without ``previous``), a table of 32 bytes a chunk that is sent
    ahead, one launch for each combination of dtypes and alignment, some small ones to add up the chunks, and a copy
    of each tensor whose entries lie in another order than its partner's. No host synchronisation.
    """
    gradients = [g.detach() for g in gradients]
    stored = None if previous is None else list(previous)
    check_lists(gradients, stored)
    if not gradients:
        return no_stats(dtype, stored is not None)
    device = gradients[0].device
    require(device, "triton_gradient_stats")
    for tensor in (*gradients, *(stored or ())):
        if tensor.dtype not in SUPPORTED or tensor.device != device:
            raise ValueError(
                f"triton_gradient_stats needs {', '.join(map(str, SUPPORTED))} on one device, "
                f"got {tensor.dtype} on {tensor.device} beside {device}."
            )

    # Both tensors of a pair must lie in memory in the same order without gaps; those that do not are copied.
    work, work_stored = gradients, stored
    if stored is None:
        work = [g if _dense(g) else g.contiguous() for g in gradients]
    else:
        fits = [g.stride() == p.stride() and _dense(g) for g, p in zip(gradients, stored, strict=True)]
        work = [g if fit else g.contiguous() for g, fit in zip(gradients, fits, strict=True)]
        work_stored = [p if fit else p.contiguous() for p, fit in zip(stored, fits, strict=True)]
    partials, owner = _launch(work, work_stored, device)
    if stored is not None and work_stored is not None:
        for kept, filled in zip(stored, work_stored, strict=True):
            if kept.data_ptr() != filled.data_ptr():
                kept.copy_(filled)
    return _collect(partials, owner, len(gradients), stored is not None, dtype)


def supported(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None = None) -> bool:
    """Whether :func:`triton_gradient_stats` can take these lists, and they lie on a GPU."""
    tensors = (*gradients, *(previous or ()))
    return (
        bool(tensors)
        and can_run(tensors[0].device)
        and all(type(t) is Tensor for t in tensors)  # no DTensor, whose memory is elsewhere
        and all(t.is_cuda and t.dtype in SUPPORTED and t.device == tensors[0].device for t in tensors)
        and not torch.compiler.is_compiling()
    )


def _dense(tensor: Tensor) -> bool:
    """Whether the entries fill their stretch of memory once, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _launch(gradients: list[Tensor], previous: list[Tensor] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial results ``[17, chunks]`` and the tensor that each chunk belongs to."""
    # One launch for each kind; a model mostly has a single one.
    stored = gradients if previous is None else previous
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for t, (g, p) in enumerate(zip(gradients, stored, strict=True)):
        aligned = g.data_ptr() % 16 == 0 and p.data_ptr() % 16 == 0
        kinds.setdefault((g.dtype, p.dtype, aligned), []).append(t)

    order = np.array([t for members in kinds.values() for t in members])
    entries = np.array([g.numel() for g in gradients])
    chunks = -(-entries // _CHUNK)
    owner = np.repeat(order, chunks[order])
    first = np.repeat(np.cumsum(chunks[order]) - chunks[order], chunks[order])
    offset = (np.arange(len(owner)) - first) * _CHUNK
    addresses = [
        np.array([x.data_ptr() for x in tensors])[owner] + offset * np.array([x.itemsize for x in tensors])[owner]
        for tensors in (gradients, stored)
    ]
    table = torch.from_numpy(np.stack([*addresses, np.minimum(entries[owner] - offset, _CHUNK), owner]))
    if device.type == "cuda":  # from pinned memory the copy does not hold up the host
        table = table.pin_memory().to(device, non_blocking=True)

    partials = torch.zeros(sum(_ROWS), len(owner), device=device)
    begin = 0
    with torch.cuda.device_of(table):
        for (gradient_dtype, previous_dtype, aligned), members in kinds.items():
            count = int(chunks[members].sum())
            _chunk_stats[(count,)](
                table,
                partials,
                len(owner),
                begin,
                GRADIENT=_triton_dtype(gradient_dtype),
                PREVIOUS=_triton_dtype(previous_dtype),
                COMPARE=previous is not None,
                ALIGNED=aligned,
                BLOCK=_BLOCK,
                UP=2.0**_UP,
                DOWN=2.0**-_DOWN,
                num_warps=_WARPS,
            )
            begin += count
    return partials, table[3]


def _collect(partials: Tensor, owner: Tensor, count: int, compare: bool, dtype: torch.dtype) -> GradientStats:
    """Add up the chunks of each tensor. In float64 the order in which they arrive does not show in float32."""
    counts, maxima, magnitudes, squares = partials.split(_ROWS)
    rows = torch.cat([counts.double(), *_unscaled(magnitudes.view(2, 2, -1), squares.view(3, 3, -1), maxima)])
    sums = rows.new_zeros(len(rows), count).index_add_(1, owner, rows)
    nonfinite, change_nonfinite, l1, change_l1, squares, change_squares, inner = sums.to(dtype)
    largest = partials.new_zeros(len(maxima), count).scatter_reduce_(1, owner.expand(len(maxima), -1), maxima, "amax")
    # A maximum on a GPU passes over NaN, a sum does not.
    largest = torch.where(torch.stack([l1, change_l1]).isnan(), torch.nan, largest.to(dtype))
    if not compare:
        return GradientStats(l1, squares, largest[0], nonfinite)
    difference = (change_l1, change_squares, largest[1], change_nonfinite)
    return GradientStats(l1, squares, largest[0], nonfinite, *difference, inner)


def _unscaled(magnitudes: Tensor, squares: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of magnitudes ``[2, chunks]``, of squares and products ``[3, chunks]``, each from a scale that holds it."""
    peaks = torch.cat([maxima, maxima.sum(0, keepdim=True)])  # no entry before is larger than both together
    plain, down = magnitudes.double()
    l1 = torch.where(maxima > _MANY, down * 2.0**_DOWN, plain)
    plain, up, down = squares.double()
    found = torch.where(peaks < _FEW, up * 2.0 ** (-2 * _UP), plain)
    return l1, torch.where(peaks > _MANY, down * 2.0 ** (2 * _DOWN), found)


def _triton_dtype(dtype: torch.dtype) -> object:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@jit
def _chunk_stats(  # type: ignore[no-untyped-def]  # the types are Triton's
    table,
    partials,
    chunks,
    begin,
    GRADIENT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    COMPARE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
):
    """One chunk of one tensor a program. Table: addresses in either list, number of entries, tensor."""
    chunk = begin + tl.program_id(0)
    gradient = tl.load(table + chunk).to(tl.pointer_type(GRADIENT))
    previous = tl.load(table + chunks + chunk).to(tl.pointer_type(PREVIOUS))
    count = tl.load(table + 2 * chunks + chunk).to(tl.int32)
    if ALIGNED:  # an address out of a table tells the compiler nothing, and it would load entry by entry
        gradient = tl.multiple_of(gradient, 16)
        previous = tl.multiple_of(previous, 16)

    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dtype=tl.float32)
    nonfinite, largest, change_nonfinite, change_largest = zeros, zeros, zeros, zeros
    l1, change_l1, l1_down, change_l1_down = zeros, zeros, zeros, zeros
    squares, change_squares, inner = zeros, zeros, zeros
    squares_up, change_squares_up, inner_up = zeros, zeros, zeros
    squares_down, change_squares_down, inner_down = zeros, zeros, zeros
    # Whole blocks without a mask, which would split the loads into single entries; then the rest under one.
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        g = tl.load(gradient + start + lanes)
        x = g.to(tl.float32)
        size = tl.abs(x)
        l1 += size
        l1_down += size * DOWN
        squares += x * x
        squares_up += (x * UP) * (x * UP)
        squares_down += (x * DOWN) * (x * DOWN)
        nonfinite += tl.where(size < float("inf"), 0.0, 1.0)  # NaN compares as false
        largest = tl.maximum(largest, size)
        if COMPARE:
            y = tl.load(previous + start + lanes).to(tl.float32)
            tl.store(previous + start + lanes, g.to(PREVIOUS))
            change = x - y
            distance = tl.abs(change)
            change_l1 += distance
            change_l1_down += distance * DOWN
            change_squares += change * change
            change_squares_up += (change * UP) * (change * UP)
            change_squares_down += (change * DOWN) * (change * DOWN)
            change_nonfinite += tl.where(distance < float("inf"), 0.0, 1.0)
            inner += x * y
            inner_up += (x * UP) * (y * UP)
            inner_down += (x * DOWN) * (y * DOWN)
            change_largest = tl.maximum(change_largest, distance)

    inside = whole + lanes < count
    g = tl.load(gradient + whole + lanes, mask=inside, other=0.0)
    x = g.to(tl.float32)
    size = tl.abs(x)
    nonfinite += tl.where(size < float("inf"), 0.0, 1.0)
    tl.store(partials + chunk, tl.sum(nonfinite))
    tl.store(partials + 2 * chunks + chunk, tl.max(tl.maximum(largest, size)))
    tl.store(partials + 4 * chunks + chunk, tl.sum(l1 + size))
    tl.store(partials + 6 * chunks + chunk, tl.sum(l1_down + size * DOWN))
    tl.store(partials + 8 * chunks + chunk, tl.sum(squares + x * x))
    tl.store(partials + 11 * chunks + chunk, tl.sum(squares_up + (x * UP) * (x * UP)))
    tl.store(partials + 14 * chunks + chunk, tl.sum(squares_down + (x * DOWN) * (x * DOWN)))
    if COMPARE:
        y = tl.load(previous + whole + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(previous + whole + lanes, g.to(PREVIOUS), mask=inside)
        change = x - y
        distance = tl.abs(change)
        change_nonfinite += tl.where(distance < float("inf"), 0.0, 1.0)
        tl.store(partials + chunks + chunk, tl.sum(change_nonfinite))
        tl.store(partials + 3 * chunks + chunk, tl.max(tl.maximum(change_largest, distance)))
        tl.store(partials + 5 * chunks + chunk, tl.sum(change_l1 + distance))
        tl.store(partials + 7 * chunks + chunk, tl.sum(change_l1_down + distance * DOWN))
        tl.store(partials + 9 * chunks + chunk, tl.sum(change_squares + change * change))
        tl.store(partials + 12 * chunks + chunk, tl.sum(change_squares_up + (change * UP) * (change * UP)))
        tl.store(partials + 15 * chunks + chunk, tl.sum(change_squares_down + (change * DOWN) * (change * DOWN)))
        tl.store(partials + 10 * chunks + chunk, tl.sum(inner + x * y))
        tl.store(partials + 13 * chunks + chunk, tl.sum(inner_up + (x * UP) * (y * UP)))
        tl.store(partials + 16 * chunks + chunk, tl.sum(inner_down + (x * DOWN) * (y * DOWN)))
