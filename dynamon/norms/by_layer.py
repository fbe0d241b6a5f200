"""Norms of tensors as layers store them, by the layer's role and the optimizer's geometry."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dynamon.layers import Layer
from dynamon.norms.forms import group_by_function, spectral_norms
from dynamon.norms.geometry import FAMILIES
from dynamon.norms.records import Norm
from dynamon.norms.table import NORMS, OPERATOR_NORMS, UPDATE_NORMS, get_norm


def norm_for_layer(name: str, layer: Layer) -> Norm:
    r"""Return the named norm for tensors stored as a layer's weight.

    A layer of several blocks (:class:`dynamon.layers.Layer`) has the largest of their norms; its dual is the sum of
    their duals. For convolutions ``rms_to_rms`` is multiplied by ``sqrt(prod(k))``, which gives
    :math:`\mathrm{prod}(k) \sqrt{in/out}\, \sigma_{max}` of the flattening, the norm whose unit ball is filled by
    Scion's convolution update. Its dual is divided by the same factor. The norm of a convolution on a whole input is
    another one, without a closed-form dual: :func:`dynamon.spectra.convolution.convolution_bounds`. The entrywise
    norms, ``rms`` and ``frobenius`` take all entries together.

    Args:
        name: As for :func:`get_norm`.
        layer: The layer.

    Returns:
        A :class:`Norm` whose ``primal`` and ``dual`` are 0-d.

    Raises:
        ValueError: If the name is unknown, or the norm is one of matrices and the layer a vector.
    """
    norm = get_norm(name)
    if not norm.on_matrices:
        return replace(
            norm,
            primal=lambda w: norm.primal(w.reshape(-1)),
            dual=lambda g: norm.dual(g.reshape(-1)),
            lmo=lambda g: norm.lmo(g.reshape(-1)).view_as(g),
        )
    if layer.role == "vector":
        *others, last = [known.name for known in NORMS.values() if not known.on_matrices]
        fitting = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} is a norm of matrices and {layer.name} is a vector: choose {fitting}.")
    factor = norm.window(layer)
    return replace(
        norm,
        primal=lambda w: norm.primal(layer.matrices(w)).amax() * factor,
        dual=lambda g: norm.dual(layer.matrices(g)).sum() / factor,
        lmo=lambda g: layer.from_matrices(norm.lmo(layer.matrices(g))) / factor,
    )


def operator_norm(layer: Layer) -> Norm:
    """Return the norm that fits the layer's map.

    Hidden weights act between RMS-normalised activations (``rms_to_rms``), an embedding selects a column
    (``one_to_rms``), the head's outputs count one by one (``rms_to_inf``), vectors have an RMS size.
    """
    return norm_for_layer(OPERATOR_NORMS[layer.role], layer)


def sigma_factor(layer: Layer) -> float | None:
    """Return the factor from sigma_max to :func:`operator_norm`, or None if that is not a spectral norm."""
    norm = get_norm(OPERATOR_NORMS[layer.role])
    return _primal_factor(norm, layer) if norm.batched_primal is spectral_norms else None


def _primal_factor(norm: Norm, layer: Layer) -> float:
    return norm.primal_factor(*layer.matrix_shape[-2:]) * norm.window(layer)


def rms_factors(layers: Sequence[Layer]) -> list[float]:
    """Return each layer's factor from sigma_max to its RMS-to-RMS norm; NaN for vectors."""
    norm = get_norm("rms_to_rms")
    return [math.nan if layer.role == "vector" else _primal_factor(norm, layer) for layer in layers]


def update_norm(layer: Layer, family: str) -> Norm:
    """Return the norm in which the optimizer takes steepest-descent steps; its dual measures gradient noise.

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
        family: From :func:`dynamon.norms.geometry.optimizer_family`: ``"sign"`` (Adam, Lion and others),
            ``"euclidean"`` (SGD) or ``"spectral"`` (Muon, Scion, Lanton).

    Raises:
        ValueError: If the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be 'sign', 'euclidean' or 'spectral', got {family!r}.")
    return norm_for_layer(UPDATE_NORMS[family][layer.role], layer)


def dual_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Compute the dual norm of one tensor per layer, for readings.

    Nuclear norms of matrices of one shape, or its transpose, are one batch. They are those of
    :func:`dynamon.kernels.nuclear_norm` with ``"estimate"``: within 0.6 % on GPUs with bfloat16 units
    (:mod:`dynamon.kernels.thresholds`), exact on a CPU, within 3e-4 elsewhere.

    Args:
        layers: L layers.
        norms: The norm of each, from :func:`norm_for_layer`.
        tensors: One per layer, stored as its weight is; those of one shape on one device.

    Returns:
        L numbers, 0-d.
    """
    found: dict[int, Tensor] = {}
    for measure, own in group_by_function([norm.batched_dual for norm in norms]):
        values = measure([layers[i] for i in own], [norms[i] for i in own], [tensors[i] for i in own])
        found.update(zip(own, values, strict=True))
    return [found[i] for i in range(len(layers))]


def iid_dual_norm(norm: Norm, layer: Layer) -> float:
    r"""Return the dual norm of noise with i.i.d. entries of mean square one, to leading order in the size.

    This is the part of a layer's dual-norm noise that its shape alone causes. For the spectral duals, all singular
    values of an ``[m, n]`` matrix with i.i.d. entries are taken to be :math:`\sqrt{\max(m, n)}`; the others are closed
    forms.

    Args:
        norm: The norm, from :func:`norm_for_layer`.
        layer: The layer; the duals of its blocks are added.
    """
    if not norm.on_matrices:
        return norm.iid_dual(1, 1, layer.size)
    return norm.iid_dual(*layer.matrix_shape) / norm.window(layer)
