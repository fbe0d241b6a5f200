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
:func:`norm_for_layer` gives them for a tensor as a layer stores it. All that is known of a norm is its record,
:class:`Norm`; a new one is an entry of ``NORMS``, and a role takes it by its line in ``OPERATOR_NORMS`` or
``UPDATE_NORMS``.
References: Bernstein and Newhouse, arXiv 2409.20325; Pethick et al. (Scion), arXiv 2502.07529.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynamon.kernels import l2_along, nuclear_norm
from dynamon.layers import ROLES, Layer
from dynamon.norms.forms import (
    aspect,
    dims_of,
    each_dual,
    each_primal,
    euclidean_norms,
    group_by_function,
    l2,
    largest_entries,
    normalized,
    nuclear_norms,
    polar,
    reduce_magnitudes,
    sigma_max,
    size_of,
    spectral_norms,
)
from dynamon.norms.geometry import FAMILIES
from dynamon.norms.geometry import optimizer_family as optimizer_family

STATISTICS = ("l1", "l2", "matrix")
REDUCTIONS = ("sum", "max over entries", "max over rows", "max over columns", "whole")
ORACLES = ("polar", "sign", "own")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The record of a norm on weight tensors: all that is known of it, so that nothing else asks for its name.

    Norms are in float32 (float64 for float64), the oracle in the dtype of its argument, all computed in at
    least float32, on its device, without waiting for it. ``primal(lmo(g)) == 1`` for ``g != 0``; ``lmo(0) == 0``.

    No piece has a default. Below a norm of matrices sees one ``[m, n]``; any other sees all entries as ``[1, size]``.

    Attributes:
        name: The norm's name, as :func:`get_norm` takes it.
        primal: Norm of a weight.
        dual: Dual norm of a gradient.
        lmo: The unit-ball minimiser of ``<g, .>``.
        on_matrices: Whether it is one of matrices, of which a layer may hold several; it does not fit vectors.
        per_window: Whether a convolution's is multiplied by ``sqrt(prod(k))``, see :func:`norm_for_layer`.
        primal_factor: From m and n to what multiplies the statistic that ``batched_primal`` rests on, if any.
        dual_factor: The same for the statistic named by ``dual_of``.
        dual_of: The statistic that the dual is a multiple of: ``"l1"`` or ``"l2"`` of all entries; ``"matrix"`` where
            it takes the tensor itself.
        reduces: How the primal norm of a tensor follows from parts on several processes: ``"sum"`` of squares, of which
            it is the root over ``dual_factor``; the largest of those of the parts, however they are cut (``"max over
            entries"``), or where rows or columns of the map are not cut (``"max over rows"``, ``"max over columns"``);
            ``"whole"`` where the tensor is gathered.
        iid_dual: From blocks, m and n to the dual norm of noise with i.i.d. entries of mean square one, to leading
            order.
        oracle: The batched form of ``lmo``: minus a multiple of the ``"polar"`` factor, minus the ``"sign"``, or its
            ``"own"`` function of stacked matrices.
        batched_primal: From layers, their norms and tensors to primal norms ``[L]``: norms with the same function share
            its calls. ``each_primal`` where there is none.
        batched_dual: The same for dual norms, 0-d tensors. ``each_dual`` where there is none.

    Raises:
        TypeError: Where a piece is missing.
        ValueError: Where one is not what it should be, or two contradict each other.
    """

    name: str
    primal: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    lmo: Callable[[Tensor], Tensor]
    on_matrices: bool
    per_window: bool
    primal_factor: Callable[[int, int], float]
    dual_factor: Callable[[int, int], float]
    dual_of: str
    reduces: str
    iid_dual: Callable[[int, int, int], float]
    oracle: str
    batched_primal: Callable[[Sequence[Layer], Sequence["Norm"], Sequence[Tensor]], Tensor]
    batched_dual: Callable[[Sequence[Layer], Sequence["Norm"], Sequence[Tensor]], list[Tensor]]

    def __post_init__(self) -> None:
        """Refuse a record that lacks a piece."""
        for name in _FUNCTIONS:
            if not callable(getattr(self, name)):
                raise ValueError(f"the norm {self.name!r} lacks a piece: {name} must be a function.")
        for name, allowed in (("dual_of", STATISTICS), ("reduces", REDUCTIONS), ("oracle", ORACLES)):
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(
                    f"{name} of the norm {self.name!r} must be one of {', '.join(allowed)}, got {given!r}."
                )
        if (self.reduces == "sum") != (self.batched_primal is euclidean_norms):
            raise ValueError(f"the norm {self.name!r} must reduce by 'sum' if, and only if, it is a multiple of l2.")
        if self.reduces == "sum" and (
            self.dual_of != "l2" or not math.isclose(self.primal_factor(1, 6) * self.dual_factor(1, 6), 1)
        ):
            raise ValueError(f"the norm {self.name!r} is a multiple of l2, so its dual must be l2 over that multiple.")
        if not self.on_matrices and self.reduces not in ("sum", "max over entries"):
            raise ValueError(f"the norm {self.name!r} sees all entries: it must reduce by 'sum' or 'max over entries'.")
        if not self.on_matrices and self.per_window:
            raise ValueError(f"the norm {self.name!r} sees all entries: per_window must be False.")
        if self.on_matrices and not self.needs_matrix:
            raise ValueError(f"the norm {self.name!r} is one of matrices: dual_of must be 'matrix'.")

    @property
    def needs_matrix(self) -> bool:
        """Whether the dual norm takes the tensor itself, and not only sums over its entries."""
        return self.dual_of == "matrix"

    def dual_multiples(self, size: int) -> tuple[float, float]:
        """What multiplies l1 and l2 of so many entries to give the dual norm; zeros where that takes the tensor."""
        factor = 0.0 if self.needs_matrix else self.dual_factor(1, size)
        return (factor, 0.0) if self.dual_of == "l1" else (0.0, factor)

    def window(self, layer: Layer) -> float:
        """What a convolution's window multiplies the norm by: ``sqrt(prod(k))`` where it counts, else 1."""
        return math.sqrt(math.prod(layer.parameter.shape[2:])) if self.per_window and layer.role == "conv" else 1.0


_FUNCTIONS = (
    *("primal", "dual", "lmo", "primal_factor", "dual_factor"),
    *("iid_dual", "batched_primal", "batched_dual"),
)


def get_norm(name: str) -> Norm:
    """Look a norm up by the name in the table of this module.

    Args:
        name: One of the seven names.

    Raises:
        ValueError: On any other name; the message lists them.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(sorted(NORMS))}.")
    return NORMS[name]


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


def rms_factor(layer: Layer) -> float:
    """What multiplies the sigma_max of any layer that is a matrix to give its RMS-to-RMS norm."""
    return _primal_factor(get_norm("rms_to_rms"), layer)


def _primal_factor(norm: Norm, layer: Layer) -> float:
    return norm.primal_factor(*layer.matrix_shape[-2:]) * norm.window(layer)


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


def _one(m: int, n: int) -> float:
    return 1.0


def _nuclear_of_noise(blocks: int, m: int, n: int) -> float:
    return blocks * min(m, n) * math.sqrt(max(m, n))


NORMS = {
    norm.name: norm
    for norm in (
        Norm(
            name="rms_to_rms",
            primal=lambda w: sigma_max(w) / aspect(w),
            dual=lambda g: nuclear_norm(g) * aspect(g),
            lmo=lambda g: (-aspect(g) * polar(g)).to(g.dtype),
            on_matrices=True,
            per_window=True,
            primal_factor=lambda m, n: math.sqrt(n / m),
            dual_factor=lambda m, n: math.sqrt(m / n),
            dual_of="matrix",
            reduces="whole",
            iid_dual=lambda blocks, m, n: _nuclear_of_noise(blocks, m, n) * math.sqrt(m / n),
            oracle="polar",
            batched_primal=spectral_norms,
            batched_dual=nuclear_norms,
        ),
        Norm(
            name="spectral",
            primal=sigma_max,
            dual=nuclear_norm,
            lmo=lambda g: (-polar(g)).to(g.dtype),
            on_matrices=True,
            per_window=False,
            primal_factor=_one,
            dual_factor=_one,
            dual_of="matrix",
            reduces="whole",
            iid_dual=_nuclear_of_noise,
            oracle="polar",
            batched_primal=spectral_norms,
            batched_dual=nuclear_norms,
        ),
        Norm(
            name="one_to_rms",
            primal=lambda w: l2_along(w, -2).amax(-1) / math.sqrt(w.shape[-2]),
            dual=lambda g: l2_along(g, -2).sum(-1) * math.sqrt(g.shape[-2]),
            lmo=lambda g: (-math.sqrt(g.shape[-2]) * normalized(g, -2)).to(g.dtype),
            on_matrices=True,
            per_window=False,
            primal_factor=_one,
            dual_factor=_one,
            dual_of="matrix",
            reduces="max over columns",
            iid_dual=lambda blocks, m, n: float(blocks * m * n),
            oracle="own",
            batched_primal=each_primal,
            batched_dual=each_dual,
        ),
        Norm(
            name="rms_to_inf",
            primal=lambda w: l2_along(w, -1).amax(-1) * math.sqrt(w.shape[-1]),
            dual=lambda g: l2_along(g, -1).sum(-1) / math.sqrt(g.shape[-1]),
            lmo=lambda g: (-normalized(g, -1) / math.sqrt(g.shape[-1])).to(g.dtype),
            on_matrices=True,
            per_window=False,
            primal_factor=_one,
            dual_factor=_one,
            dual_of="matrix",
            reduces="max over rows",
            iid_dual=lambda blocks, m, n: float(blocks * m),
            oracle="own",
            batched_primal=each_primal,
            batched_dual=each_dual,
        ),
        Norm(
            name="one_to_inf",
            primal=lambda w: reduce_magnitudes(w, torch.amax),
            dual=lambda g: reduce_magnitudes(g, torch.sum),
            lmo=lambda g: torch.where(g.isnan(), g, -g.sign()),
            on_matrices=False,
            per_window=False,
            primal_factor=_one,
            dual_factor=_one,
            dual_of="l1",
            reduces="max over entries",
            iid_dual=lambda blocks, m, n: float(blocks * m * n),
            oracle="sign",
            batched_primal=largest_entries,
            batched_dual=each_dual,
        ),
        Norm(
            name="rms",
            primal=lambda w: l2(w) / math.sqrt(size_of(w)),
            dual=lambda g: l2(g) * math.sqrt(size_of(g)),
            lmo=lambda g: (-math.sqrt(size_of(g)) * normalized(g, dims_of(g))).to(g.dtype),
            on_matrices=False,
            per_window=False,
            primal_factor=lambda m, n: float((m * n) ** -0.5),
            dual_factor=lambda m, n: float((m * n) ** 0.5),
            dual_of="l2",
            reduces="sum",
            iid_dual=lambda blocks, m, n: float(blocks * m * n),
            oracle="own",
            batched_primal=euclidean_norms,
            batched_dual=each_dual,
        ),
        Norm(
            name="frobenius",
            primal=l2,
            dual=l2,
            lmo=lambda g: (-normalized(g, dims_of(g))).to(g.dtype),
            on_matrices=False,
            per_window=False,
            primal_factor=_one,
            dual_factor=_one,
            dual_of="l2",
            reduces="sum",
            iid_dual=lambda blocks, m, n: math.sqrt(blocks * m * n),
            oracle="own",
            batched_primal=euclidean_norms,
            batched_dual=each_dual,
        ),
    )
}

OPERATOR_NORMS = {
    "hidden": "rms_to_rms",
    "conv": "rms_to_rms",
    "embedding": "one_to_rms",
    "head": "rms_to_inf",
    "vector": "rms",
}
UPDATE_NORMS = {
    "sign": dict.fromkeys(ROLES, "one_to_inf"),
    "euclidean": dict.fromkeys(ROLES, "frobenius"),
    "spectral": {
        "hidden": "rms_to_rms",
        "conv": "rms_to_rms",
        "embedding": "one_to_inf",
        "head": "one_to_inf",
        "vector": "rms",
    },
}
