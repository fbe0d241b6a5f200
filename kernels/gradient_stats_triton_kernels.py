"""Device code of :mod:`dynamon.kernels.gradient_stats_triton`: the sums of each chunk, then those of each tensor."""

from __future__ import annotations  # `tl` is None where Triton is missing

from dynamon.kernels._triton import jit, tl


@jit(do_not_specialize=["tensors", "chunks", "begin"])  # type: ignore[untyped-decorator]
def chunk_stats(  # type: ignore[no-untyped-def]  # the types are Triton's
    table,
    owner,
    layout,
    scale,
    partials,
    tensors,
    chunks,
    begin,
    GRADIENT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    COMPARE: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    LANES: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FEW: tl.constexpr,
):
    """Reduce one chunk of one tensor per program: four times ``EACH`` entries per thread, 16 bytes at a time.

    Tables: addresses in both lists, ``[2, T]``; entries and first chunk of each tensor, ``[3, T]``; the tensor of each
    chunk, ``[C]``. Partial results ``[6, C]``.
    """
    chunk = begin + tl.program_id(0)
    tensor = tl.load(owner + chunk)
    address, stored = tl.load(table + tensor), tl.load(table + tensors + tensor)
    offset = (chunk - tl.load(layout + tensors + tensor)) * (4 * THREADS * EACH)
    count = tl.minimum(tl.load(layout + tensor) - offset, 4 * THREADS * EACH).to(tl.int32)
    factor, row = tl.load(scale), partials + chunk
    gradient, previous = address.to(tl.pointer_type(GRADIENT)), stored.to(tl.pointer_type(PREVIOUS))
    # An address out of a table tells the compiler nothing, and it would load entry by entry; so would a mask.
    if (count == 4 * THREADS * EACH) & ((address | stored) % 16 == 0):
        offset = tl.multiple_of(offset, 4 * THREADS * EACH)
        gradient, previous = tl.multiple_of(gradient, 16) + offset, tl.multiple_of(previous, 16) + offset
        _aligned_chunk(
            *(row, chunks, gradient, previous, factor, count),
            *(PREVIOUS, COMPARE, THREADS, EACH, LANES, UP, DOWN, FEW),
        )
    else:
        gradient, previous = gradient + offset, previous + offset
        _other_chunk(*(row, chunks, gradient, previous, factor, count), *(PREVIOUS, COMPARE, LANES, UP, DOWN, FEW))


@jit
def _aligned_chunk(  # type: ignore[no-untyped-def]
    row,
    chunks,
    gradient,
    previous,
    factor,
    count,
    PREVIOUS: tl.constexpr,
    COMPARE: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    LANES: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FEW: tl.constexpr,
):
    """Read a whole chunk 16 bytes at a time, store its sums and refresh the stored gradient."""
    # All loads are under way before anything waits for one; then each thread adds up by itself, part by part.
    places = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    g0, g1 = tl.load(gradient + places), tl.load(gradient + THREADS * EACH + places)
    g2, g3 = tl.load(gradient + 2 * THREADS * EACH + places), tl.load(gradient + 3 * THREADS * EACH + places)
    if COMPARE:
        p0, p1 = tl.load(previous + places), tl.load(previous + THREADS * EACH + places)
        p2, p3 = tl.load(previous + 2 * THREADS * EACH + places), tl.load(previous + 3 * THREADS * EACH + places)
    else:
        p0, p1, p2, p3 = g0, g1, g2, g3
    none = tl.zeros((THREADS,), dtype=tl.float32)
    part = _added(none, none, none, none, none, none, g0, p0, factor, COMPARE)
    part = _added(part[0], part[1], part[2], part[3], part[4], part[5], g1, p1, factor, COMPARE)
    part = _added(part[0], part[1], part[2], part[3], part[4], part[5], g2, p2, factor, COMPARE)
    part = _added(part[0], part[1], part[2], part[3], part[4], part[5], g3, p3, factor, COMPARE)
    _settle(
        *(row, chunks, gradient, previous, factor, count),
        *(part[0], part[1], part[2], part[3], part[4], part[5]),
        *(COMPARE, LANES, UP, DOWN, FEW),
    )
    if COMPARE:
        # Once more out of a cache: registers are what limits how much is under way.
        g0, g1 = tl.load(gradient + places), tl.load(gradient + THREADS * EACH + places)
        g2, g3 = tl.load(gradient + 2 * THREADS * EACH + places), tl.load(gradient + 3 * THREADS * EACH + places)
        tl.store(previous + places, (g0.to(tl.float32) * factor).to(PREVIOUS))
        tl.store(previous + THREADS * EACH + places, (g1.to(tl.float32) * factor).to(PREVIOUS))
        tl.store(previous + 2 * THREADS * EACH + places, (g2.to(tl.float32) * factor).to(PREVIOUS))
        tl.store(previous + 3 * THREADS * EACH + places, (g3.to(tl.float32) * factor).to(PREVIOUS))


@jit
def _other_chunk(  # type: ignore[no-untyped-def]
    row,
    chunks,
    gradient,
    previous,
    factor,
    count,
    PREVIOUS: tl.constexpr,
    COMPARE: tl.constexpr,
    LANES: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FEW: tl.constexpr,
):
    """Do the same for a chunk of any length at any address."""
    sums = _sums(gradient, previous, factor, count, 1.0, 1.0, 1.0, 1.0, 1.0, COMPARE, LANES)
    _settle(
        *(row, chunks, gradient, previous, factor, count),
        *(sums[0], sums[1], sums[3], sums[4], sums[5], sums[6]),
        *(COMPARE, LANES, UP, DOWN, FEW),
    )
    if COMPARE:
        lanes = tl.arange(0, LANES)
        for start in range(0, count, LANES):
            inside = start + lanes < count
            some = tl.load(gradient + start + lanes, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(previous + start + lanes, some.to(PREVIOUS), mask=inside)


@jit
def _added(l1, squares, change_l1, change_squares, inner, before, g, p, factor, COMPARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the sums of a part ``[THREADS, EACH]``, of which each thread holds a row, to sums ``[THREADS]``."""
    x = g.to(tl.float32) * factor
    l1 += tl.sum(tl.abs(x), 1)
    squares += tl.sum(x * x, 1)
    if COMPARE:
        y = p.to(tl.float32)
        change_l1 += tl.sum(tl.abs(x - y), 1)
        change_squares += tl.sum((x - y) * (x - y), 1)
        inner += tl.sum(x * y, 1)
        before += tl.sum(y * y, 1)
    return l1, squares, change_l1, change_squares, inner, before


@jit
def _settle(  # type: ignore[no-untyped-def]
    row,
    chunks,
    gradient,
    previous,
    factor,
    count,
    l1,
    squares,
    change_l1,
    change_squares,
    inner,
    before,
    COMPARE: tl.constexpr,
    LANES: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    FEW: tl.constexpr,
):
    """Store a chunk's sums, given per thread; where they have left float32, sum again with scaled entries."""
    l1, squares = tl.sum(l1), tl.sum(squares)
    is_sound = _holds(squares, l1, FEW)
    if COMPARE:
        change_l1, change_squares = tl.sum(change_l1), tl.sum(change_squares)
        inner, before = tl.sum(inner), tl.sum(before)
        # Where neither gradient nor change has an entry, neither has the gradient before.
        is_sound = is_sound & _holds(change_squares, change_l1, FEW) & _holds(before, l1 + change_l1, FEW)
    if is_sound:
        tl.store(row, l1.to(tl.float64))
        tl.store(row + chunks, squares.to(tl.float64))
        tl.store(row + 2 * chunks, 0.0)
        if COMPARE:
            tl.store(row + 3 * chunks, change_l1.to(tl.float64))
            tl.store(row + 4 * chunks, change_squares.to(tl.float64))
            tl.store(row + 5 * chunks, inner.to(tl.float64))
    else:
        own, of_l1 = _scale_for(squares, FEW, UP, DOWN), tl.where(l1 < float("inf"), 1.0, DOWN)
        if COMPARE:
            apart, of_change = _scale_for(change_squares, FEW, UP, DOWN), tl.where(change_l1 < float("inf"), 1.0, DOWN)
            other = _scale_for(before, FEW, UP, DOWN)
        else:
            apart, of_change, other = own, of_l1, own
        again = _sums(gradient, previous, factor, count, own, other, apart, of_l1, of_change, COMPARE, LANES)
        tl.store(row, _over(tl.sum(again[0]), of_l1))
        tl.store(row + chunks, _over(_over(tl.sum(again[1]), own), own))
        tl.store(row + 2 * chunks, tl.sum(again[2]).to(tl.float64))
        if COMPARE:
            tl.store(row + 3 * chunks, _over(tl.sum(again[3]), of_change))
            tl.store(row + 4 * chunks, _over(_over(tl.sum(again[4]), apart), apart))
            tl.store(row + 5 * chunks, _over(_over(tl.sum(again[5]), own), other))


@jit
def _sums(  # type: ignore[no-untyped-def]
    gradient,
    previous,
    factor,
    count,
    own,
    other,
    apart,
    of_l1,
    of_change,
    COMPARE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute sums ``[LANES]`` over any number of entries at any address, scaled by powers of two."""
    lanes = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), dtype=tl.float32)
    l1, squares, nonfinite, change_l1, change_squares, inner, before = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, count, LANES):
        inside = start + lanes < count
        x = tl.load(gradient + start + lanes, mask=inside, other=0.0).to(tl.float32) * factor
        l1 += tl.abs(x) * of_l1
        squares += (x * own) * (x * own)
        nonfinite += tl.where(tl.abs(x) < float("inf"), 0.0, 1.0)  # NaN compares as false
        if COMPARE:
            y = tl.load(previous + start + lanes, mask=inside, other=0.0).to(tl.float32)
            change_l1 += tl.abs(x - y) * of_change
            change_squares += ((x - y) * apart) * ((x - y) * apart)
            inner += (x * own) * (y * other)
            before += y * y
    return l1, squares, nonfinite, change_l1, change_squares, inner, before


@jit
def _holds(squares, l1, FEW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return whether no square has overflowed and none that counts has vanished."""
    return (squares < float("inf")) & ((squares > FEW) | (l1 == 0))


@jit
def _scale_for(squares, FEW: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a power of two that brings entries to where their squares are exact."""
    return tl.where(squares > FEW, tl.where(squares < float("inf"), 1.0, DOWN), UP)


@jit
def _over(total, scale):  # type: ignore[no-untyped-def]
    return total.to(tl.float64) / scale.to(tl.float64)


@jit(do_not_specialize=["tensors", "chunks"])  # type: ignore[untyped-decorator]
def tensor_stats(partials, layout, out, tensors, chunks, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the chunks of one sum of one tensor per program, in float64, always in the same order."""
    tensor, row = tl.program_id(0), tl.program_id(1)
    count = tl.load(layout + 2 * tensors + tensor).to(tl.int32)
    here = partials + row * chunks + tl.load(layout + tensors + tensor)
    lanes = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(0, count, WIDTH):
        total += tl.load(here + start + lanes, mask=start + lanes < count, other=0.0)
    tl.store(out + row * tensors + tensor, tl.sum(total))
