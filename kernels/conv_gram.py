"""Two-sided bounds on the largest singular value of a convolution."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamon.kernels.arguments import check_count, check_tensor
from dynamon.kernels.constants import to_device
from dynamon.kernels.gram import gram_iteration
from dynamon.kernels.precision import convolution_rounding, own_dtype, product_allowance

_SUP_GRID = 32  # frequencies a dimension for the supremum over sizes; finer than 8 a degree anyway
_POWER_STEPS = 12
_CHUNK = 2**20  # numbers in the matrices of the frequencies that are worked on at once
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Size = int | Sequence[int]


def conv_gram_iteration(
    kernel: Tensor,
    input_size: Size | None = None,
    *,
    padding: Size = 0,
    padding_mode: str = "zeros",
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    steps: int = 6,
) -> tuple[Tensor, Tensor]:
    r"""Bound the largest singular value of a convolution, as the linear map from inputs to outputs.

    A circular convolution is block-diagonal in the Fourier basis, with one ``[out, in]`` matrix per frequency, and Gram
    iteration bounds each. For zero padding the upper bound is that of the circular convolution on
    :math:`n + \min(p, d(k-1))` positions, of which the padded one is a submatrix; on n positions it would not be a
    bound. A stride s is decomposed into :math:`s^D` phases of the input (polyphase), groups become a batch. The lower
    bound is a Rayleigh quotient after power steps with the convolution itself, padding and stride included.

    Without ``input_size`` the bounds hold for the supremum over all input sizes, which is the supremum of the matrix
    over all frequencies. From below it is bounded by the maximum over a grid of N frequencies per dimension, from above
    by that maximum divided by :math:`\cos(\pi \delta / N)` per dimension, with :math:`\delta = \lfloor k/2 \rfloor`,
    which covers frequencies between grid points (Duffin and Schaeffer). For circular padding the upper bound is that of
    stride one, times the root of how often outputs can repeat.

    Args:
        kernel: ``[out, in / groups, *k]`` with one to three spatial dimensions.
        input_size: Spatial size of the input, one number for all dimensions or one per dimension, or None for any.
        padding: Positions added at each end.
        padding_mode: ``"zeros"`` or ``"circular"``.
        stride: Step between outputs.
        dilation: Step between the kernel's taps.
        groups: Number of independent groups of channels.
        steps: Number of Gram products, see :func:`gram_iteration`.

    Returns:
        ``(lower, upper)``, 0-d tensors in float32 (float64 for float64), with an allowance for rounding, also of
        products and convolutions in TensorFloat-32 (0.4 to 0.8 %). GPUs use it for convolutions unless
        ``torch.backends.cudnn.conv.fp32_precision`` is ``"ieee"``, and for products where they are set to. NaN where
        the kernel contains NaN or infinity. Differentiable; with ``input_size`` the gradient of the lower bound treats
        the direction found by the power steps as constant.

    Raises:
        TypeError: If ``kernel`` is not a tensor or ``steps`` not an int.
        ValueError: On shapes and arguments that no convolution has, or another padding mode.

    Cost: ``steps`` products of the smaller channel side for about half of the frequencies, and 12 convolutions forward
    and back on one input. Memory: frequencies are processed in chunks; without a graph about eight copies of the
    kernel, at least 50 MB. Reference: Delattre et al., arXiv 2305.16173; the padding and supremum bounds are dynamon's
    own, checked against the explicit operator.

    Examples:
        >>> import torch
        >>> from dynamon.kernels import conv_gram_iteration
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> lower, upper = conv_gram_iteration(blur, 32, padding=1)
        >>> bool(0.97 < lower <= upper < 1.01)
        True
    """
    plan = _Plan(kernel, input_size, padding, padding_mode, stride, dilation, groups)
    check_count("steps", steps)
    work = kernel if kernel.dtype == torch.float64 else kernel.float()
    finite = torch.isfinite(work.detach()).all()
    scale = work.detach().abs().amax()
    scale = torch.where(finite & (scale > 0), scale, torch.ones_like(scale))
    work = torch.where(finite, work, torch.zeros_like(work)) / scale
    with own_dtype(work):
        return _bounds(kernel, work, plan, steps, torch.where(finite, 1.0, torch.nan).to(work) * scale)


def _bounds(kernel: Tensor, work: Tensor, plan: "_Plan", steps: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bound a finite kernel whose largest entry is one, and multiply the bounds by a scale."""
    lower, upper = _over_frequencies(plan.polyphase(work), plan.grid, steps)
    if plan.size is None:
        if plan.circular and max(plan.stride) > 1:  # circles that the stride does not divide: drop no outputs
            plan = plan.with_stride_one(kernel)
            upper = _over_frequencies(plan.polyphase(work), plan.grid, steps)[1]
        upper = upper * plan.between_frequencies * plan.repeats
    else:
        upper = upper * plan.repeats
        lower = _rayleigh(work, plan)
        allowance = torch.finfo(work.dtype).eps * (8 + 2 * work[0].numel() ** 0.5) + 4 * convolution_rounding(work)
        lower = lower * (1 - allowance)
    return torch.minimum(lower, upper) * scale, upper * scale


class _Plan:
    """Geometry of a convolution: sizes per dimension, and the circular convolution that contains it."""

    def __init__(
        self,
        kernel: Tensor,
        input_size: Size | None,
        padding: Size,
        padding_mode: str,
        stride: Size,
        dilation: Size,
        groups: int,
    ) -> None:
        check_tensor("kernel", kernel, "[out, in / groups, *k]")
        if not kernel.is_floating_point() or not 3 <= kernel.ndim <= 5 or kernel.numel() == 0:
            raise ValueError(
                "conv_gram_iteration needs a floating point kernel [out, in / groups, *k] with one to three spatial "
                f"dimensions and none empty, got {kernel.dtype} {tuple(kernel.shape)}."
            )
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}.")
        if groups < 1 or kernel.shape[0] % groups:
            raise ValueError(f"groups must divide the {kernel.shape[0]} outputs, got {groups}.")
        self.dimensions = kernel.ndim - 2
        self.padding = _each(padding, self.dimensions, 0, "padding")
        self.stride = _each(stride, self.dimensions, 1, "stride")
        self.dilation = _each(dilation, self.dimensions, 1, "dilation")
        self.circular, self.groups = padding_mode == "circular", groups
        self.extent = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel.shape[2:], strict=True)]
        self.size = None if input_size is None else _each(input_size, self.dimensions, 1, "input_size")
        self.outputs: list[int] = []
        if self.size is not None:
            axes = zip(self.size, self.padding, self.extent, self.stride, strict=True)
            self.outputs = [(n + 2 * p - e) // s + 1 for n, p, e, s in axes]
            if min(self.outputs) < 1:
                raise ValueError(f"an input of {self.size} is smaller than the kernel, which spans {self.extent}.")
            if self.circular and any(p > n for p, n in zip(self.padding, self.size, strict=True)):
                raise ValueError(f"circular padding {self.padding} is larger than the input {self.size}.")
        self.phase_stride = self._phase_stride()
        self.grid = self._grid()
        self._rest = padding, padding_mode, dilation, groups

    def with_stride_one(self, kernel: Tensor) -> "_Plan":
        """Return the same convolution at stride one, for inputs of any size."""
        padding, padding_mode, dilation, groups = self._rest
        return _Plan(kernel, None, padding, padding_mode, 1, dilation, groups)

    def _phase_stride(self) -> list[int]:
        """Return the stride to take apart; where it does not divide a circle, dropping outputs is bound enough."""
        if not self.circular or self.size is None:
            return self.stride
        return [s if n % s == 0 else 1 for s, n in zip(self.stride, self.size, strict=True)]

    def _grid(self) -> list[int]:
        """Return the number of frequencies per dimension."""
        lengths = [-(-e // s) for e, s in zip(self.extent, self.phase_stride, strict=True)]
        self.degrees = [length // 2 for length in lengths]
        if self.size is None:
            return [max(_SUP_GRID, 16 * degree) if degree else 1 for degree in self.degrees]
        if self.circular:
            return [n // s for n, s in zip(self.size, self.phase_stride, strict=True)]
        axes = zip(self.size, self.padding, self.extent, self.phase_stride, strict=True)
        return [-(-(n + min(p, e - 1)) // s) for n, p, e, s in axes]

    @property
    def between_frequencies(self) -> float:
        """Factor by which a polynomial of the kernel's degree can exceed its values on the grid."""
        return math.prod(1 / math.cos(math.pi * d / n) for d, n in zip(self.degrees, self.grid, strict=True))

    @property
    def repeats(self) -> float:
        """Root of the most often that circular padding beyond the kernel repeats an output."""
        if not self.circular:
            return 1.0
        smallest = [max(p, 1) for p in self.padding]  # where outputs are repeated most often
        axes = zip(self.size or smallest, self.padding, self.extent, strict=True)
        return math.sqrt(math.prod(max(1, -(-(n + 2 * p - e + 1) // n)) for n, p, e in axes))

    def polyphase(self, kernel: Tensor) -> Tensor:
        """Return the kernel ``[groups, out, in * phases, *taps]`` of the same map between phases of the input."""
        out, channels = kernel.shape[:2]
        spread = kernel.new_zeros(out, channels, *self.extent)
        taps: list[Any] = [slice(None, None, d) for d in self.dilation]
        spread[(..., *taps)] = kernel
        longest = [-(-e // s) for e, s in zip(self.extent, self.phase_stride, strict=True)]
        parts = []
        for offsets in product(*(range(s) for s in self.phase_stride)):
            taps = [slice(o, None, s) for o, s in zip(offsets, self.phase_stride, strict=True)]
            part = spread[(..., *taps)]
            short = [full - has for full, has in zip(longest, part.shape[2:], strict=True)]
            parts.append(F.pad(part, [amount for missing in reversed(short) for amount in (0, missing)]))
        phases = torch.cat(parts, dim=1)
        return phases.reshape(self.groups, out // self.groups, *phases.shape[1:])

    def convolve(self, kernel: Tensor, inputs: Tensor) -> Tensor:
        """Apply the convolution."""
        padding: list[int] | int = self.padding
        if self.circular and any(self.padding):
            inputs = F.pad(inputs, [p for p in reversed(self.padding) for _ in range(2)], mode="circular")
            padding = 0
        convolution = _CONV[self.dimensions]
        return convolution(inputs, kernel, None, self.stride, padding, self.dilation, self.groups)


def _each(value: Size, dimensions: int, least: int, name: str) -> list[int]:
    found = [value] * dimensions if isinstance(value, int) else list(value)
    if len(found) != dimensions or any(not isinstance(v, int) or v < least for v in found):
        raise ValueError(f"{name} must be a whole number of {least} or more, or {dimensions} of them, got {value!r}.")
    return found


def _over_frequencies(phases: Tensor, grid: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
    """Return the largest bounds over a grid of frequencies, taking conjugate frequencies once."""
    bounds = [gram_iteration(part, steps=steps) for part in _transformed(phases, grid)]
    lower, upper = (torch.stack([part.amax() for part in side]).amax() for side in zip(*bounds, strict=True))
    # Rounding of the transform, which is a product where frequencies are taken some at a time.
    eps = torch.finfo(phases.dtype).eps * (4 + math.log2(math.prod(grid) + 1)) + product_allowance(phases)
    return lower * (1 - eps), upper * (1 + eps)


def _transformed(phases: Tensor, grid: Sequence[int]) -> Iterator[Tensor]:
    """Yield the matrices ``[n, out, in]`` of the frequencies in chunks: all at once would be 500 kernels."""
    groups, out, channels, *taps = phases.shape
    frequencies = [*grid[:-1], grid[-1] // 2 + 1]
    count, entries = math.prod(frequencies), groups * out * channels
    chunk = max(_CHUNK // entries, 1)
    if count <= chunk:
        spectrum = torch.fft.rfftn(_folded(phases, grid), s=list(grid), dim=list(range(-len(grid), 0)))
        yield spectrum.movedim((1, 2), (-2, -1)).reshape(-1, out, channels)
        return
    kernel = phases.reshape(entries, -1)
    for first in range(0, count, chunk):
        waves = _waves(range(first, min(first + chunk, count)), frequencies, taps, grid, phases)
        parts = [(kernel @ wave).mT.reshape(-1, groups, out, channels).flatten(0, 1) for wave in waves]
        yield torch.complex(*parts)


def _waves(
    chosen: range, frequencies: Sequence[int], taps: Sequence[int], grid: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute cosine and negative sine ``[taps, n]`` of some frequencies at all taps."""
    turns = torch.zeros(math.prod(taps), len(chosen), dtype=torch.float64, device="cpu")
    places = torch.unravel_index(torch.arange(len(turns), device="cpu"), list(taps))
    points = torch.unravel_index(torch.arange(chosen.start, chosen.stop, device="cpu"), list(frequencies))
    for place, point, length in zip(places, points, grid, strict=True):
        turns += (place[:, None] * point % length) / length  # whole turns are nothing, and left out exactly
    angles = turns * (2 * math.pi)
    return to_device(angles.cos().to(like.dtype), like.device), to_device(
        angles.sin().neg().to(like.dtype), like.device
    )


def _folded(phases: Tensor, grid: Sequence[int]) -> Tensor:
    """Wrap taps beyond the circle's length around."""
    for axis, length in enumerate(grid, start=3):
        taps = phases.shape[axis]
        if taps > length:
            rounds = -(-taps // length)
            shape = [*phases.shape[:axis], rounds * length - taps, *phases.shape[axis + 1 :]]
            full = torch.cat([phases, phases.new_zeros(shape)], dim=axis)
            phases = full.unflatten(axis, (rounds, length)).sum(axis)
    return phases


def _rayleigh(kernel: Tensor, plan: _Plan) -> Tensor:
    """Compute ||A x|| / ||x|| after some power steps with the convolution and its adjoint."""
    assert plan.size is not None
    frozen = kernel.detach()
    generator = torch.Generator(kernel.device).manual_seed(0)
    shape = (1, kernel.shape[1] * plan.groups, *plan.size)
    x = torch.randn(shape, generator=generator, device=kernel.device, dtype=kernel.dtype)
    for _ in range(_POWER_STEPS):
        with torch.enable_grad():
            leaf = (x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)).requires_grad_()
            outputs = plan.convolve(frozen, leaf)
            (x,) = torch.autograd.grad(outputs, leaf, outputs.detach())
    x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.linalg.vector_norm(plan.convolve(kernel, x.detach()))
