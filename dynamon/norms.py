r"""Norms by layer role, their duals and linear minimisation oracles.

A weight is ``[out, in]``. For a norm :math:`\|W\|` the dual is :math:`\|G\|_* = \max_{\|W\| \le 1} \langle G,
W \rangle`, and the oracle :math:`\mathrm{lmo}(G) = \arg\min_{\|W\| \le 1} \langle G, W \rangle`, so that
:math:`\langle G, \mathrm{lmo}(G) \rangle = -\|G\|_*`.

========================  ==========================================  ========================================
name                      primal                                      dual
========================  ==========================================  ========================================
``rms_to_rms``            sqrt(in/out) * sigma_max                    sqrt(out/in) * sum of singular values
``spectral``              sigma_max                                   sum of singular values
``one_to_rms``            max over columns of l2 / sqrt(out)          sqrt(out) * sum over columns of l2
``rms_to_inf``            sqrt(in) * max over rows of l2              sum over rows of l2 / sqrt(in)
``one_to_inf``            max of entries                              sum of entries (l1)
``rms``                   l2 / sqrt(size)                             sqrt(size) * l2
``frobenius``             l2                                          l2
========================  ==========================================  ========================================

All act on the last two dimensions (on all, where there are fewer) and are batched over the others.
:func:`fitted` gives them for a tensor as a layer stores it. References: Bernstein and Newhouse, arXiv 2409.20325;
Pethick et al. (Scion), arXiv 2502.07529.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.geometry import FAMILIES
from dynamon.geometry import optimizer_family as optimizer_family
from dynamon.kernels import decomposable, l2_along, nuclear_norm
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer


@dataclass(frozen=True)
class Norm:
    """A norm on weight tensors with its dual and its linear minimisation oracle.

    Norms are in float32 (float64 for float64), the oracle in the dtype of its argument, all computed in at
    least float32, on its device, without waiting for it. ``primal(lmo(g)) == 1`` for ``g != 0``; ``lmo(0) == 0``.

    Attributes:
        name: The norm's name, as :func:`get_norm` takes it.
        primal: Norm of a weight.
        dual: Dual norm of a gradient.
        lmo: The unit-ball minimiser of ``<g, .>``.
    """

    name: str
    primal: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    lmo: Callable[[Tensor], Tensor]


def get_norm(name: str) -> Norm:
    """Look a norm up by the name in the table of this module.

    Args:
        name: One of the seven names.

    Raises:
        ValueError: On any other name; the message lists them.
    """
    if name not in _NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(sorted(_NORMS))}.")
    return _NORMS[name]


def fitted(name: str, layer: Layer) -> Norm:
    r"""The named norm for tensors as a layer stores them.

    A layer of several blocks (:class:`dynamon.layers.Layer`) has the largest of their norms, whose dual is the sum
    of their duals. For convolutions ``rms_to_rms`` is multiplied by ``sqrt(prod(k))``, which gives
    :math:`\mathrm{prod}(k) \sqrt{in/out}\, \sigma_{max}` of the flattening, the norm whose unit ball Scion's
    convolution update fills. Its dual is divided by it. What a convolution does to a whole input is another norm,
    without a closed dual: :func:`dynamon.convolution.convolution_bounds`. The entrywise norms and ``rms`` and
    ``frobenius`` see all entries at once.

    Args:
        name: As for :func:`get_norm`.
        layer: The layer.

    Returns:
        A :class:`Norm` whose ``primal`` and ``dual`` are 0-d.

    Raises:
        ValueError: On an unknown name, and on a norm of matrices for a vector.
    """
    norm = get_norm(name)
    if name in _ON_MATRICES and layer.role == "vector":
        raise ValueError(
            f"{name} is a norm of matrices and {layer.name} is a vector: choose one_to_inf, rms or frobenius."
        )
    if name not in _ON_MATRICES:
        return Norm(
            name,
            lambda w: norm.primal(w.reshape(-1)),
            lambda g: norm.dual(g.reshape(-1)),
            lambda g: norm.lmo(g.reshape(-1)).view_as(g),
        )
    factor = _window(layer) if name == "rms_to_rms" else 1.0
    return Norm(
        name,
        lambda w: norm.primal(layer.matrices(w)).amax() * factor,
        lambda g: norm.dual(layer.matrices(g)).sum() / factor,
        lambda g: layer.from_matrices(norm.lmo(layer.matrices(g))) / factor,
    )


def operator_norm(layer: Layer) -> Norm:
    """The norm that fits what the layer does with its input.

    Hidden weights act between RMS-normalised activations (``rms_to_rms``), an embedding picks a column
    (``one_to_rms``), the head's outputs count one by one (``rms_to_inf``), vectors have an RMS size.
    """
    by_role = {"embedding": "one_to_rms", "head": "rms_to_inf", "vector": "rms"}
    return fitted(by_role.get(layer.role, "rms_to_rms"), layer)


def sigma_factor(layer: Layer) -> float | None:
    """What multiplies sigma_max to give :func:`operator_norm`, or None where that is not a spectral norm."""
    return rms_factor(layer) if layer.role in ("hidden", "conv") else None


def rms_factor(layer: Layer) -> float:
    """What multiplies the sigma_max of any layer that is a matrix to give its RMS-to-RMS norm."""
    outputs, inputs = layer.matrix_shape[-2:]
    return math.sqrt(inputs / outputs) * _window(layer)


def rms_factors(layers: Sequence[Layer]) -> list[float]:
    """:func:`rms_factor` of L layers, NaN for vectors."""
    return [math.nan if layer.role == "vector" else rms_factor(layer) for layer in layers]


def update_norm(layer: Layer, family: str) -> Norm:
    """The norm in which the optimizer takes steepest-descent steps; its dual is the one for gradient noise.

    ============  ==============  =============  ==============
    role          ``sign``        ``euclidean``  ``spectral``
    ============  ==============  =============  ==============
    hidden, conv  one_to_inf      frobenius      rms_to_rms
    embedding     one_to_inf      frobenius      one_to_inf
    head          one_to_inf      frobenius      one_to_inf
    vector        one_to_inf      frobenius      rms
    ============  ==============  =============  ==============

    Args:
        layer: The layer.
        family: What :func:`dynamon.geometry.optimizer_family` returns: ``"sign"`` (Adam, Lion and others),
            ``"euclidean"`` (SGD) or ``"spectral"`` (Muon, Scion, Lanton).

    Raises:
        ValueError: On an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be 'sign', 'euclidean' or 'spectral', got {family!r}.")
    if family == "euclidean":
        return fitted("frobenius", layer)
    by_role = {"hidden": "rms_to_rms", "conv": "rms_to_rms", "vector": "rms"}
    return fitted(by_role.get(layer.role, "one_to_inf") if family == "spectral" else "one_to_inf", layer)


def dual_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The dual norm of one tensor a layer, for readings.

    Nuclear norms of matrices of one shape, or its transpose, are one batch. They are those of
    :func:`dynamon.kernels.nuclear_norm` with ``"estimate"``: within 0.5 % on GPUs with units for bfloat16
    (:mod:`dynamon.kernels.thresholds`), exact on a CPU, 1e-5 elsewhere.

    Args:
        layers: L layers.
        norms: The norm of each, as :func:`fitted` gives it.
        tensors: One a layer, stored as its weight is; those of one shape on one device.

    Returns:
        L numbers, 0-d.
    """
    found: list[Tensor | None] = [None] * len(layers)
    batches: dict[tuple[object, ...], list[int]] = {}
    matrices: dict[int, Tensor] = {}
    for i, (layer, norm, tensor) in enumerate(zip(layers, norms, tensors, strict=True)):
        if norm.name in _NUCLEAR:
            matrices[i] = layer.matrices(tensor)
            shape = sorted(matrices[i].shape[-2:])  # a matrix and its transpose have the same singular values
            batches.setdefault((*shape, tensor.dtype, tensor.device), []).append(i)
        else:
            found[i] = norm.dual(tensor)
    for members in [part for batch in batches.values() for part in _parts(batch, tensors)]:
        stacks = [matrices[i] for i in members]
        tall = [stack if stack.shape[-2] >= stack.shape[-1] else stack.mT for stack in stacks]
        sums = nuclear_norm(torch.cat(tall) if len(tall) > 1 else tall[0], "estimate")
        scales = [
            _aspect(stack) / _window(layers[i]) if norms[i].name == "rms_to_rms" else 1.0
            for i, stack in zip(members, stacks, strict=True)
            for _ in range(len(stack))
        ]
        parts = (sums * on_device(scales, sums.device, sums.dtype)).split([len(stack) for stack in stacks])
        for i, values in zip(members, parts, strict=True):
            found[i] = values[0] if len(values) == 1 else values.sum()
    return [value for value in found if value is not None]


def _parts(batch: list[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """A batch in parts whose copies a device has room for."""
    most = max(_MOST_ENTRIES // max(tensors[batch[0]].numel(), 1), 1)
    return [batch[begin : begin + most] for begin in range(0, len(batch), most)]


def iid_dual_norm(norm: Norm, layer: Layer) -> float:
    r"""Dual norm of noise with i.i.d. entries of mean square one, to leading order in the size.

    What a layer's dual-norm noise owes to its shape alone. For the spectral duals the singular values of an
    ``[m, n]`` matrix with i.i.d. entries are taken at :math:`\sqrt{\max(m, n)}`; the rest are closed forms.

    Args:
        norm: The norm, fitted to the layer.
        layer: The layer; the duals of its blocks add up.
    """
    size = layer.size
    if norm.name in ("one_to_inf", "rms"):
        return float(size)
    if norm.name == "frobenius":
        return math.sqrt(size)
    blocks, rows, columns = (1, 1, size) if layer.role == "vector" else layer.matrix_shape
    if norm.name == "one_to_rms":
        return float(size)
    if norm.name == "rms_to_inf":
        return float(blocks * rows)
    nuclear = blocks * min(rows, columns) * math.sqrt(max(rows, columns))
    return nuclear * math.sqrt(rows / columns) / _window(layer) if norm.name == "rms_to_rms" else nuclear


def _window(layer: Layer) -> float:
    """sqrt(prod(k)) for a convolution, else 1."""
    return math.sqrt(math.prod(layer.parameter.shape[2:])) if layer.role == "conv" else 1.0


def _sigma_max(w: Tensor) -> Tensor:
    clean, finite = _without_nonfinite(_wide(w))
    sigma = torch.linalg.matrix_norm(decomposable(clean), ord=2).to(w.device)
    return torch.where(finite, sigma, torch.full_like(sigma, torch.nan))


def _polar(g: Tensor) -> Tensor:
    clean, finite = _without_nonfinite(_wide(g))
    u, s, vh = torch.linalg.svd(decomposable(clean), full_matrices=False)
    keep = s > s[..., :1] * torch.finfo(s.dtype).eps * max(g.shape[-2:])
    factor = ((u * keep.to(u.dtype)[..., None, :]) @ vh).to(g.device)
    return torch.where(finite[..., None, None], factor, torch.full_like(factor, torch.nan))


def _without_nonfinite(x: Tensor) -> tuple[Tensor, Tensor]:
    """LAPACK raises on NaN; a diverging run must get NaN back, not an exception."""
    finite = torch.isfinite(x).all(-1).all(-1)
    return torch.where(finite[..., None, None], x, torch.zeros_like(x)), finite


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _aspect(x: Tensor) -> float:
    """sqrt(out / in)."""
    return math.sqrt(x.shape[-2] / x.shape[-1])


def _size(x: Tensor) -> int:
    """Entries of one member."""
    return math.prod(x.shape[-2:])


def _dims(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions a norm acts on: the last two."""
    return (-2, -1) if x.ndim > 2 else None


def _l2(x: Tensor) -> Tensor:
    return l2_along(x, _dims(x))


def _unit(x: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """Divide by the length along the dimensions, by the largest entry first, lest squares vanish; zero for zero."""
    wide = _wide(x)
    largest = wide.abs().amax(() if dim is None else dim, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    return scaled / torch.where(length == 0, torch.ones_like(length), length)


def _entries(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """A reduction of the magnitudes over the dimensions a norm acts on."""
    dims = _dims(x)
    return _wide(reduce(_wide(x).abs()) if dims is None else reduce(_wide(x).abs(), dims))


_NORMS = {
    norm.name: norm
    for norm in (
        Norm(
            "rms_to_rms",
            lambda w: _sigma_max(w) / _aspect(w),
            lambda g: nuclear_norm(g) * _aspect(g),
            lambda g: (-_aspect(g) * _polar(g)).to(g.dtype),
        ),
        Norm("spectral", _sigma_max, nuclear_norm, lambda g: (-_polar(g)).to(g.dtype)),
        Norm(
            "one_to_rms",
            lambda w: l2_along(w, -2).amax(-1) / math.sqrt(w.shape[-2]),
            lambda g: l2_along(g, -2).sum(-1) * math.sqrt(g.shape[-2]),
            lambda g: (-math.sqrt(g.shape[-2]) * _unit(g, -2)).to(g.dtype),
        ),
        Norm(
            "rms_to_inf",
            lambda w: l2_along(w, -1).amax(-1) * math.sqrt(w.shape[-1]),
            lambda g: l2_along(g, -1).sum(-1) / math.sqrt(g.shape[-1]),
            lambda g: (-_unit(g, -1) / math.sqrt(g.shape[-1])).to(g.dtype),
        ),
        Norm(
            "one_to_inf",
            lambda w: _entries(w, torch.amax),
            lambda g: _entries(g, torch.sum),
            lambda g: torch.where(g.isnan(), g, -g.sign()),
        ),
        Norm(
            "rms",
            lambda w: _l2(w) / math.sqrt(_size(w)),
            lambda g: _l2(g) * math.sqrt(_size(g)),
            lambda g: (-math.sqrt(_size(g)) * _unit(g, _dims(g))).to(g.dtype),
        ),
        Norm("frobenius", _l2, _l2, lambda g: (-_unit(g, _dims(g))).to(g.dtype)),
    )
}
_ON_MATRICES = {"rms_to_rms", "spectral", "one_to_rms", "rms_to_inf"}
_MOST_ENTRIES = 2**26  # of matrices that are iterated together, where a single one is not larger
_NUCLEAR = {"rms_to_rms", "spectral"}
