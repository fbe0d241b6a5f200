"""Triton twin of ``matrix.mT @ matrix`` that computes half of the tiles."""

from __future__ import annotations  # `tl` is None where Triton is missing

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.kernels._triton import can_run, interpreted, jit, require, tl, triton


@dataclass(frozen=True)
class Tiling:
    """Launch parameters: side of a tile, depth of a step, warps and pipeline stages."""

    side: int
    depth: int
    warps: int
    stages: int


# Chosen from what the compiler says for Hopper: 96 KB of shared memory, so that two programs fit on a multiprocessor.
# With 8 warps the assembler of Triton 3.6 runs the half-precision tensor-core instructions one after another (C7515).
# `python -m benchmarks.kernels --sweep` compares them with their neighbours.
HALF = Tiling(side=128, depth=64, warps=4, stages=3)
FULL = Tiling(side=128, depth=32, warps=8, stages=3)
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)
PRECISIONS = ("ieee", "tf32x3", "tf32")
_BAND = 8  # rows of tiles that are walked together
_LARGEST_STRIDES = 2**24  # of rows and columns together: offsets within a tile of at most 128 x 128 have 32 bits


def symmetric_gram(matrix: Tensor, *, precision: str = "ieee", tiling: Tiling | None = None) -> Tensor:
    r"""Compute the Gram matrix of the smaller side: :math:`X^\top X` for tall, :math:`X X^\top` for wide matrices.

    Only tiles on and below the diagonal are computed; those above are their mirror image, so that the result is
    symmetric to the last bit.

    Args:
        matrix: Matrices ``[..., m, n]`` in bfloat16, float16 or float32, with any strides.
        precision: How float32 entries are multiplied: ``"ieee"`` exactly (no tensor cores), ``"tf32x3"`` from three
            products of 10-bit mantissas (close to float32), ``"tf32"`` from one (relative error 1e-3). Half
            precision is multiplied exactly whatever this says. Sums are float32 always.
        tiling: Launch parameters, for measurements; None takes those for the dtype.

    Returns:
        ``[..., s, s]`` in float32, ``s = min(m, n)``. NaN and infinity propagate as in a matrix product.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the dtype, the shape, the device or the precision does not fit, or a gradient is asked for.

    Cost: ``m n s`` FLOP and a little more on the diagonal, half of a full product. No host synchronisation.
    """
    require(matrix.device, "symmetric_gram")
    if matrix.dtype not in SUPPORTED or matrix.ndim < 2:
        raise ValueError(
            f"symmetric_gram needs matrices in {', '.join(map(str, SUPPORTED))}, "
            f"got {matrix.dtype} {tuple(matrix.shape)}."
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    if matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError("symmetric_gram has no derivative: detach the matrix, or multiply it by its transpose.")
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    batch, (length, side) = tall.shape[:-2], tall.shape[-2:]
    out = torch.empty(*batch, side, side, dtype=torch.float32, device=matrix.device)
    if out.numel() == 0:
        return out
    tall = tall.reshape(-1, length, side)
    if sum(tall.stride()[1:]) >= _LARGEST_STRIDES:
        raise ValueError(f"symmetric_gram needs strides below 2^24 together, got {tuple(tall.stride()[1:])}.")
    tiling = tiling or (FULL if matrix.dtype == torch.float32 else HALF)
    tiles = triton.cdiv(side, tiling.side)
    with torch.cuda.device_of(matrix):
        _lower_tiles[(tall.shape[0] * tiles * (tiles + 1) // 2,)](
            tall,
            out,
            length,
            side,
            *tall.stride(),
            tiles,
            PRECISION=precision,
            SIDE=tiling.side,
            DEPTH=tiling.depth,
            BAND=_BAND,
            WIDEN=interpreted() and matrix.dtype == torch.bfloat16,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return out


def supported(matrix: Tensor) -> bool:
    """Return whether :func:`symmetric_gram` can take this matrix; ``dynamon.kernels.thresholds`` says where it pays."""
    return (
        type(matrix) is Tensor  # no DTensor, whose memory is elsewhere
        and can_run(matrix.device)
        and matrix.is_cuda
        and matrix.ndim >= 2
        and matrix.dtype in SUPPORTED
        and sum(matrix.stride()[-2:]) < _LARGEST_STRIDES
        and not (matrix.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


@jit
def _row_of(index):  # type: ignore[no-untyped-def]  # the types are Triton's
    """Return the row of a lower triangle's entry counted row by row: the largest r with r (r + 1) / 2 <= index."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)  # the root is rounded: put right what that did
    return row + ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)


@jit
def _tile_of(index, tiles, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return row and column of a tile.

    The tiles are counted in bands of BAND rows, within a band column by column, so that programs that run at the same
    time share their columns in the cache. As many tiles lie above a band as in a triangle that ends there.
    """
    top = _row_of(index) // BAND * BAND
    height = tl.minimum(BAND, tiles - top)
    index -= top * (top + 1) // 2
    if index < top * height:  # left of the diagonal: a rectangle
        i = top + index % height
        j = index // height
    else:  # the last BAND columns: a small triangle
        index -= top * height
        row = _row_of(index)
        i = top + row
        j = top + index - row * (row + 1) // 2
    return i, j


@jit
def _lower_tiles(  # type: ignore[no-untyped-def]
    matrix,
    out,
    length,
    side,
    batch_stride,
    length_stride,
    side_stride,
    tiles,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Compute one tile of one Gram matrix per program and write it twice: as it is and mirrored."""
    lower = tiles * (tiles + 1) // 2
    member = (tl.program_id(0) // lower).to(tl.int64)
    index = tl.program_id(0) % lower

    i, j = _tile_of(index, tiles, BAND)

    # A tensor can have more entries than 32 bits count, a tile has not: 64 bits for where it begins, 32 within it,
    # as addresses of 64 bits for every entry would fill the registers.
    lanes = tl.arange(0, SIDE)
    depth = tl.arange(0, DEPTH)
    matrix += member * batch_stride
    within = depth[:, None] * length_stride + lanes[None, :] * side_stride
    left = matrix + (i * SIDE).to(tl.int64) * side_stride + within
    right = matrix + (j * SIDE).to(tl.int64) * side_stride + within
    rows_left, columns_left = side - i * SIDE, side - j * SIDE
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        inside = depth[:, None] < length - start
        # Zeros beyond the edge add nothing to the sums.
        a = tl.load(left, mask=inside & (lanes[None, :] < rows_left), other=0.0)
        b = tl.load(right, mask=inside & (lanes[None, :] < columns_left), other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        left += DEPTH * length_stride
        right += DEPTH * length_stride

    mirrored = tl.trans(total)  # in registers, so that neighbours in memory are written together
    if i == j:  # symmetric to the last bit, in whatever order the tensor cores add
        total = 0.5 * total + 0.5 * mirrored
        mirrored = total
    out += member * side * side
    here = out + (i * SIDE).to(tl.int64) * side + j * SIDE
    there = out + (j * SIDE).to(tl.int64) * side + i * SIDE
    within = lanes[:, None] * side + lanes[None, :]
    tl.store(here + within, total, mask=(lanes[:, None] < rows_left) & (lanes[None, :] < columns_left))
    tl.store(there + within, mirrored, mask=(lanes[:, None] < columns_left) & (lanes[None, :] < rows_left))
