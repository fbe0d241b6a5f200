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
    r"""The named norm for tensors as a layer stores them.

    A layer of several blocks (:class:`dynamon.layers.Layer`) has the largest of their norms, whose dual is the sum
    of their duals. For convolutions ``rms_to_rms`` is multiplied by ``sqrt(prod(k))``, which gives
    :math:`\mathrm{prod}(k) \sqrt{in/out}\, \sigma_{max}` of the flattening, the norm whose unit ball Scion's
    convolution update fills. Its dual is divided by it. What a convolution does to a whole input is another norm,
    without a closed dual: :func:`dynamon.spectra.convolution.convolution_bounds`. The entrywise norms and ``rms`` and
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
    """The norm that fits what the layer does with its input.

    Hidden weights act between RMS-normalised activations (``rms_to_rms``), an embedding picks a column
    (``one_to_rms``), the head's outputs count one by one (``rms_to_inf``), vectors have an RMS size.
    """
    return norm_for_layer(OPERATOR_NORMS[layer.role], layer)


def sigma_factor(layer: Layer) -> float | None:
    """What multiplies sigma_max to give :func:`operator_norm`, or None where that is not a spectral norm."""
    norm = get_norm(OPERATOR_NORMS[layer.role])
    return _primal_factor(norm, layer) if norm.batched_primal is spectral_norms else None


def _primal_factor(norm: Norm, layer: Layer) -> float:
    return norm.primal_factor(*layer.matrix_shape[-2:]) * norm.window(layer)


def rms_factors(layers: Sequence[Layer]) -> list[float]:
    """Return what multiplies each layer's sigma_max to give its RMS-to-RMS norm; NaN for vectors."""
    norm = get_norm("rms_to_rms")
    return [math.nan if layer.role == "vector" else _primal_factor(norm, layer) for layer in layers]


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
        family: What :func:`dynamon.norms.geometry.optimizer_family` returns: ``"sign"`` (Adam, Lion and others),
            ``"euclidean"`` (SGD) or ``"spectral"`` (Muon, Scion, Lanton).

    Raises:
        ValueError: On an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be 'sign', 'euclidean' or 'spectral', got {family!r}.")
    return norm_for_layer(UPDATE_NORMS[family][layer.role], layer)


def dual_norms(layers: Sequence[Layer], norms: Sequence[Norm], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The dual norm of one tensor a layer, for readings.

    Nuclear norms of matrices of one shape, or its transpose, are one batch. They are those of
    :func:`dynamon.kernels.nuclear_norm` with ``"estimate"``: within 0.6 % on GPUs with units for bfloat16
    (:mod:`dynamon.kernels.thresholds`), exact on a CPU, 3e-4 elsewhere.

    Args:
        layers: L layers.
        norms: The norm of each, as :func:`norm_for_layer` gives it.
        tensors: One a layer, stored as its weight is; those of one shape on one device.

    Returns:
        L numbers, 0-d.
    """
    found: dict[int, Tensor] = {}
    for measure, own in group_by_function([norm.batched_dual for norm in norms]):
        values = measure([layers[i] for i in own], [norms[i] for i in own], [tensors[i] for i in own])
        found.update(zip(own, values, strict=True))
    return [found[i] for i in range(len(layers))]


def iid_dual_norm(norm: Norm, layer: Layer) -> float:
    r"""Dual norm of noise with i.i.d. entries of mean square one, to leading order in the size.

    What a layer's dual-norm noise owes to its shape alone. For the spectral duals the singular values of an
    ``[m, n]`` matrix with i.i.d. entries are taken at :math:`\sqrt{\max(m, n)}`; the rest are closed forms.

    Args:
        norm: The norm, fitted to the layer.
        layer: The layer; the duals of its blocks add up.
    """
    if not norm.on_matrices:
        return norm.iid_dual(1, 1, layer.size)
    return norm.iid_dual(*layer.matrix_shape) / norm.window(layer)
