"""Building blocks of norms: closed forms on the last two dimensions, and batched forms over layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from dynamon.kernels import decomposable, l2_along, l2_norms, nuclear_norm
from dynamon.kernels.constants import on_device
from dynamon.kernels.devices import reads_are_free
from dynamon.layers import Layer
from dynamon.spectra import largest_per_stack

if TYPE_CHECKING:
    from dynamon.norms import Norm

_Function = TypeVar("_Function")
_MAX_ENTRIES = 2**26  # of matrices in one batch, unless a single one is larger


def sigma_max(w: Tensor) -> Tensor:
    """Compute the largest singular value; NaN if an entry is not finite."""
    clean, finite = _without_nonfinite(_wide(w))
    sigma = torch.linalg.matrix_norm(decomposable(clean), ord=2).to(w.device)
    return torch.where(finite, sigma, torch.full_like(sigma, torch.nan))


def polar(g: Tensor) -> Tensor:
    """Compute the polar factor of the singular values above rounding; NaN if an entry is not finite."""
    clean, finite = _without_nonfinite(_wide(g))
    u, s, vh = torch.linalg.svd(decomposable(clean), full_matrices=False)
    keep = s > s[..., :1] * torch.finfo(s.dtype).eps * max(g.shape[-2:])
    factor = ((u * keep.to(u.dtype)[..., None, :]) @ vh).to(g.device)
    return torch.where(finite[..., None, None], factor, torch.full_like(factor, torch.nan))


def _without_nonfinite(x: Tensor) -> tuple[Tensor, Tensor]:
    """Replace members that are not finite by zeros, on which LAPACK does not raise, and mark the others."""
    finite = torch.isfinite(x).all(-1).all(-1)
    return torch.where(finite[..., None, None], x, torch.zeros_like(x)), finite


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def aspect(x: Tensor) -> float:
    """Return sqrt(out / in)."""
    return math.sqrt(x.shape[-2] / x.shape[-1])


def size_of(x: Tensor) -> int:
    """Return the number of entries of one member."""
    return math.prod(x.shape[-2:])


def dims_of(x: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions that a norm acts on: the last two, None for all."""
    return (-2, -1) if x.ndim > 2 else None


def l2(x: Tensor) -> Tensor:
    """Compute the Euclidean norm of each member."""
    return l2_along(x, dims_of(x))


def normalized(x: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """Divide by the length along ``dim``, by the largest entry first, so that squares do not underflow; 0 for 0."""
    wide = _wide(x)
    largest = wide.abs().amax(() if dim is None else dim, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    return scaled / torch.where(length == 0, torch.ones_like(length), length)


def reduce_magnitudes(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce the magnitudes over the dimensions that a norm acts on."""
    dims = dims_of(x)
    return _wide(reduce(_wide(x).abs()) if dims is None else reduce(_wide(x).abs(), dims))


def spectral_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """Compute multiples of sigma_max, estimated within 1 %."""
    stacks = [layer.matrices(tensor) for layer, tensor in zip(layers, tensors, strict=True)]
    factors = [
        norm.primal_factor(*stack.shape[-2:]) * norm.window(layer)
        for layer, norm, stack in zip(layers, norms, stacks, strict=True)
    ]
    sigmas = largest_per_stack(stacks)
    return sigmas * on_device(factors, sigmas.device, sigmas.dtype)


def euclidean_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """Compute multiples of l2."""
    lengths = l2_norms(tensors)
    factors = [norm.primal_factor(1, t.numel()) for norm, t in zip(norms, tensors, strict=True)]
    return lengths * on_device(factors, lengths.device, lengths.dtype)


def largest_entries(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """Compute the largest magnitudes."""
    if reads_are_free(tensors[0].device):  # where calls cost nothing, norms of order infinity are slower than this
        return torch.stack(
            [tensor.abs().amax().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
        )
    return torch.stack(torch._foreach_norm(list(tensors), float("inf"), dtype=torch.float32))


def each_primal(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> Tensor:
    """Compute primal norms one by one."""
    return torch.stack([norm.primal(tensor).amax() for norm, tensor in zip(norms, tensors, strict=True)])


def each_dual(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Compute dual norms one by one."""
    return [norm.dual(tensor) for norm, tensor in zip(norms, tensors, strict=True)]


def nuclear_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Compute multiples of sums of singular values, as described at :func:`dynamon.norms.dual_norms`."""
    found: dict[int, Tensor] = {}
    batches: dict[tuple[object, ...], list[int]] = {}
    matrices = [layer.matrices(tensor) for layer, tensor in zip(layers, tensors, strict=True)]
    for i, (stack, tensor) in enumerate(zip(matrices, tensors, strict=True)):
        shape = sorted(stack.shape[-2:])  # a matrix and its transpose have the same singular values
        batches.setdefault((*shape, tensor.dtype, tensor.device), []).append(i)
    for members in [part for batch in batches.values() for part in _parts(batch, tensors)]:
        stacks = [matrices[i] for i in members]
        tall = [stack if stack.shape[-2] >= stack.shape[-1] else stack.mT for stack in stacks]
        sums = nuclear_norm(torch.cat(tall) if len(tall) > 1 else tall[0], "estimate")
        scales = [
            norms[i].dual_factor(*stack.shape[-2:]) / norms[i].window(layers[i])
            for i, stack in zip(members, stacks, strict=True)
            for _ in range(len(stack))
        ]
        parts = (sums * on_device(scales, sums.device, sums.dtype)).split([len(stack) for stack in stacks])
        for i, values in zip(members, parts, strict=True):
            found[i] = values[0] if len(values) == 1 else values.sum()
    return [found[i] for i in range(len(layers))]


def _parts(batch: list[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Split a batch into parts whose copies fit into device memory."""
    most = max(_MAX_ENTRIES // max(tensors[batch[0]].numel(), 1), 1)
    return [batch[begin : begin + most] for begin in range(0, len(batch), most)]


def group_by_function(functions: Sequence[_Function]) -> list[tuple[_Function, list[int]]]:
    """List each function once, with the positions at which it stands."""
    groups: dict[_Function, list[int]] = {}
    for i, function in enumerate(functions):
        groups.setdefault(function, []).append(i)
    return list(groups.items())
