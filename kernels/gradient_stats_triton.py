"""Triton twin of :func:`dynamon.kernels.gradient_stats`: two launches for a list of gradients."""

from __future__ import annotations  # `tl` is None where Triton is missing

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dynamon.kernels._triton import can_run, require, tl
from dynamon.kernels.gradient_stats import GradientStats, Scale, check_lists, no_stats
from dynamon.kernels.gradient_stats_triton_kernels import chunk_stats, tensor_stats

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 16384  # of one list that a program takes: four times 16 a thread
_WARPS = 8
_LANES = 1024  # entries at a time where they cannot be taken 16 bytes at a time
_WIDTH = 1024  # partial results that the second kernel takes at a time
_ROWS = 6  # of partial results, in the order of GradientStats
_UP, _DOWN = 90, 75  # powers of two on entries whose squares leave float32; 2^13 of the largest still add up
_FEW = 2.0**-90  # a sum of squares above this has lost nothing to entries whose squares vanish
_MOST_PLANS = 8  # of lists that are read in turns

_Kind = tuple[torch.dtype, torch.dtype]  # of gradients and of stored ones
_log = logging.getLogger("dynamon")
_runs: dict[tuple[object, ...], bool] = {}  # whether the kernels compile and run, by what is compiled
_plans: dict[tuple[object, ...], _Plan] = {}
_told: set[str] = set()


def triton_gradient_stats(
    gradients: Sequence[Tensor],
    previous: Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    scale: Scale = 1.0,
) -> GradientStats:
    """Compute norms of every gradient and of its change in one pass that refreshes the stored gradient.

    Takes and gives what :func:`dynamon.kernels.gradient_stats` does, except for float64. Each entry is read once from
    either list and written once. Sums are float32 within a chunk of 16 KiB and float64 across chunks, always in the
    same order. A chunk stays in registers, where it is summed up once more, scaled, if its squares leave float32.

    Args:
        gradients: T dense tensors on one GPU in float32, bfloat16 or float16; none may be empty.
        previous: Storage of the same shapes in one of these dtypes, or None.
        dtype: Dtype of the sums: float32, or float64, which holds the squares of entries of any size.
        scale: Factor on the gradients: a number, or a tensor of one entry on their device.

    Returns:
        A :class:`GradientStats` in ``dtype`` on the gradients' device.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the lists differ in length or shape, a tensor is empty, or dtype or device do not fit.

    Cost: two reads and one write per entry (one read without ``previous``), one launch per pair of dtypes and one that
    adds up the chunks, a check of each tensor on the host, and a copy of each tensor whose memory layout differs from
    its partner's. Addresses, 16 bytes per tensor, are copied where they differ from those of the last call. No host
    synchronisation.
    """
    check_lists(gradients, previous)
    if not gradients:
        return no_stats(dtype, previous is not None)
    device = gradients[0].device
    require(device, "triton_gradient_stats")
    for tensor_dtype, place in {(t.dtype, t.device) for t in (*gradients, *(previous or ()))}:
        if tensor_dtype not in SUPPORTED or place != device:
            raise ValueError(
                f"triton_gradient_stats needs {', '.join(map(str, SUPPORTED))} on one device, "
                f"got {tensor_dtype} on {place} beside {device}."
            )
    return _stats(gradients, previous, dtype, scale)


def attempt(
    gradients: Sequence[Tensor], previous: Sequence[Tensor] | None, dtype: torch.dtype, scale: Scale
) -> GradientStats | None:
    """Compute :func:`triton_gradient_stats` of checked lists, or return None where it cannot run."""
    if not supported(gradients, previous):
        return None
    device = gradients[0].device
    if not all([runs(device, *kind, dtype, previous is not None) for kind in set(_kinds(gradients, previous))]):
        return None
    return _stats(gradients, previous, dtype, scale)


def supported(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None = None) -> bool:
    """Return whether :func:`triton_gradient_stats` can take these lists and their device runs it."""
    if not gradients or not can_run(gradients[0].device):
        return False
    device = gradients[0].device
    tensors = gradients if previous is None else [*gradients, *previous]
    return (
        {type(t) for t in tensors} == {Tensor}  # no DTensor, whose memory is elsewhere
        and {t.dtype for t in tensors} <= set(SUPPORTED)
        and {t.device for t in tensors} == {device}
        and not torch.compiler.is_compiling()
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def runs(device: torch.device, gradient: torch.dtype, previous: torch.dtype, dtype: torch.dtype, compare: bool) -> bool:
    """Return whether the kernels compile and run there, tried once; where not, a warning is logged.

    Args:
        device: A device with Triton.
        gradient: Dtype of the gradients.
        previous: Dtype of the stored gradients.
        dtype: Dtype of the sums.
        compare: True where there are stored gradients.

    Cost: at the first call for these dtypes a compilation of a second or two, or a look-up in Triton's own cache.
    """
    key = device, gradient, previous, dtype, compare
    if key not in _runs:
        try:
            stored = [torch.zeros(3, dtype=previous, device=device)] if compare else None
            _stats([torch.ones(3, dtype=gradient, device=device)], stored, dtype, 1.0)
            _runs[key] = True
        except Exception as error:  # no compiler, a driver that is too old: whatever it is, there is another way
            _runs[key] = False
            _say(error)
    return _runs[key]


def _say(error: Exception) -> None:
    """Log once why the twin is not used."""
    if "compile" not in _told:
        _told.add("compile")
        lines = str(error).strip().splitlines() or [""]
        _log.warning(
            "Triton cannot run dynamon's gradient kernel here (%s: %s): gradients are read by PyTorch's own kernels, "
            "which changes no number and takes about ten times as long.",
            type(error).__name__,
            lines[0],
        )


def _stats(
    gradients: Sequence[Tensor], previous: Sequence[Tensor] | None, dtype: torch.dtype, scale: Scale
) -> GradientStats:
    """Compute the statistics of checked lists."""
    stored, device = previous, gradients[0].device
    both = gradients if previous is None else [*gradients, *previous]
    if not all([t.is_contiguous() for t in both]):
        gradients, previous = _in_one_order(gradients, previous)
        both = gradients if previous is None else [*gradients, *previous]
    addresses = [t.data_ptr() for t in both]
    with torch.cuda.device(device) if _is_elsewhere(device) else nullcontext():
        plan = _plan(gradients, previous, device)
        out = plan.launch(addresses if previous is not None else addresses * 2, previous is not None, dtype, scale)
    for kept, filled in zip(stored or (), previous or (), strict=True):
        if kept is not filled:
            kept.detach().copy_(filled)
    return GradientStats(*out.unbind())


def _in_one_order(
    gradients: Sequence[Tensor], previous: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Copy those tensors of a pair that do not lie in memory in one order without gaps."""
    if previous is None:
        return [g if _is_dense(g.shape, g.stride()) else g.detach().contiguous() for g in gradients], None
    pairs = list(zip(gradients, previous, strict=True))
    fits = [g.stride() == p.stride() and _is_dense(g.shape, g.stride()) for g, p in pairs]
    chosen = [(g, p) if fit else (_contiguous(g), _contiguous(p)) for (g, p), fit in zip(pairs, fits, strict=True)]
    return [g for g, _ in chosen], [p for _, p in chosen]


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


@lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the entries fill a contiguous stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_elsewhere(device: torch.device) -> bool:
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def _kinds(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None) -> tuple[_Kind, ...]:
    """Return the dtypes of each pair, or one pair where all are alike."""
    own = [t.dtype for t in gradients]
    other = own if previous is None else [t.dtype for t in previous]
    alike = len(set(own)) == len(set(other)) == 1
    return ((own[0], other[0]),) if alike else tuple(zip(own, other, strict=True))


class _Plan:
    """Assignment of chunks to tensors, kept on the device for all lists of these sizes.

    A table has one row per tensor, and each chunk only stores its tensor's index: between calls nothing is allocated or
    copied that has not changed.

    Args:
        sizes: Number of entries of each tensor.
        kinds: Dtypes of each pair, or of all pairs.
        device: Their device. The plan's memory belongs to the device's current stream.
    """

    def __init__(self, sizes: tuple[int, ...], kinds: tuple[_Kind, ...], device: torch.device) -> None:
        """Copy the constant tables to the device."""
        self.device, self.count = device, len(sizes)
        entries = np.array(sizes, dtype=np.int64)
        first, chunks = np.zeros_like(entries), np.zeros_like(entries)
        members: dict[_Kind, list[int]] = {}
        for t in range(len(sizes)):
            members.setdefault(kinds[t if len(kinds) > 1 else 0], []).append(t)
        self.launches, owners, begin = [], [], 0  # a launch for each kind; a model mostly has a single one
        for kind, chosen in members.items():
            block = _BYTES // max(dtype.itemsize for dtype in kind)
            chunks[chosen] = -(-entries[chosen] // block)
            first[chosen] = begin + np.cumsum(chunks[chosen]) - chunks[chosen]
            owners.append(np.repeat(np.array(chosen, dtype=np.int32), chunks[chosen]))
            self.launches.append((kind, block, begin, len(owners[-1])))
            begin += len(owners[-1])
        self.chunks = begin
        self.owner = _sent(np.concatenate(owners), device)
        self.layout = _sent(np.stack([entries, first, chunks]), device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self._table: tuple[list[int], Tensor] = ([], self.layout)

    def launch(self, addresses: list[int], compare: bool, dtype: torch.dtype, scale: Scale) -> Tensor:
        """Compute the sums of each tensor, ``[6, T]``, or ``[3, T]`` without a comparison."""
        if addresses != self._table[0]:
            self._table = addresses, _sent(np.array(addresses, dtype=np.int64), self.device)
        if isinstance(scale, Tensor):
            factor = scale.detach().to(self.device, torch.float32)
        else:
            factor = self.one if scale == 1.0 else torch.full_like(self.one, scale)
        rows = _ROWS if compare else _ROWS // 2
        partials = torch.empty((rows, self.chunks), dtype=torch.float64, device=self.device)
        out = torch.empty((rows, self.count), dtype=dtype, device=self.device)
        for (gradient, previous), block, begin, count in self.launches:
            chunk_stats[(count,)](
                self._table[1],
                self.owner,
                self.layout,
                factor,
                partials,
                self.count,
                self.chunks,
                begin,
                GRADIENT=_triton_dtype(gradient),
                PREVIOUS=_triton_dtype(previous),
                COMPARE=compare,
                THREADS=32 * _WARPS,
                EACH=block // (4 * 32 * _WARPS),
                LANES=_LANES,
                UP=2.0**_UP,
                DOWN=2.0**-_DOWN,
                FEW=_FEW,
                num_warps=_WARPS,
            )
        tensor_stats[(self.count, rows)](partials, self.layout, out, self.count, self.chunks, WIDTH=_WIDTH)
        return out


def _plan(gradients: Sequence[Tensor], previous: Sequence[Tensor] | None, device: torch.device) -> _Plan:
    sizes, kinds = tuple([t.numel() for t in gradients]), _kinds(gradients, previous)
    # What a plan holds was filled on one stream, and is given back to the memory of that one.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = device, stream, kinds, sizes
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _Plan(sizes, kinds, device)
    return plan


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers to the device, from pinned memory where that avoids a wait."""
    here = torch.from_numpy(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def _triton_dtype(dtype: torch.dtype) -> object:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
