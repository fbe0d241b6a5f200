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

The first four act on the last two dimensions and are batched over the others; the last three act on the whole
tensor. References: Bernstein and Newhouse, arXiv 2409.20325; Pethick et al. (Scion), arXiv 2502.07529.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.kernels import nuclear_norm
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

    def transposed(self) -> "Norm":
        """The same norm for weights stored ``[in, out]``, as embeddings ``[tokens, d]`` are."""
        return Norm(
            self.name,
            lambda w: self.primal(w.mT),
            lambda g: self.dual(g.mT),
            lambda g: self.lmo(g.mT).mT,
        )

    def flattened(self) -> "Norm":
        """The same norm for convolution kernels ``[out, in, *k]``.

        The kernel enters as the matrix ``[out, in * prod(k)]``; ``rms_to_rms`` is multiplied by
        ``sqrt(prod(k))``, which gives ``prod(k) sqrt(in/out) sigma_max``, the norm whose unit ball Scion's
        convolution update fills.
        """

        def factor(w: Tensor) -> float:
            return math.sqrt(math.prod(w.shape[2:])) if self.name == "rms_to_rms" else 1.0

        return Norm(
            self.name,
            lambda w: self.primal(w.flatten(1)) * factor(w),
            lambda g: self.dual(g.flatten(1)) / factor(g),
            lambda g: self.lmo(g.flatten(1)).view_as(g) / factor(g),
        )


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


def operator_norm(layer: Layer) -> Norm:
    """The norm that fits what the layer does with its input.

    Hidden weights act between RMS-normalised activations (``rms_to_rms``), an embedding picks a column
    (``one_to_rms``), the head's outputs count one by one (``rms_to_inf``), vectors have an RMS size.
    """
    return _shaped(layer, {"hidden": "rms_to_rms", "conv": "rms_to_rms", "embedding": "one_to_rms",
                           "head": "rms_to_inf", "vector": "rms"}[layer.role])  # fmt: skip


def sigma_factor(layer: Layer) -> float | None:
    """What multiplies sigma_max to give :func:`operator_norm`, or None where that is not a spectral norm."""
    if layer.role not in ("hidden", "conv"):
        return None
    shape = layer.parameter.shape
    if layer.role == "conv":
        return math.prod(shape[2:]) * math.sqrt(shape[1] / shape[0])
    return math.sqrt(shape[-1] / shape[-2])


def update_norm(layer: Layer, family: str) -> Norm:
    """The norm in which the optimizer takes steepest-descent steps; its dual is the one for gradient noise.

    Args:
        layer: The layer.
        family: What :func:`optimizer_family` returns: ``"sign"`` (Adam, Lion and others) is entrywise,
            ``"euclidean"`` (SGD) is Frobenius, ``"spectral"`` (Muon, Scion) is by role: rms_to_rms for
            hidden and conv, one_to_inf for embedding and head, rms for vectors.

    Raises:
        ValueError: On an unknown family.
    """
    if family == "sign":
        return get_norm("one_to_inf")
    if family == "euclidean":
        return get_norm("frobenius")
    if family != "spectral":
        raise ValueError(f"family must be 'sign', 'euclidean' or 'spectral', got {family!r}.")
    by_role = {"hidden": "rms_to_rms", "conv": "rms_to_rms", "vector": "rms"}
    return _shaped(layer, by_role.get(layer.role, "one_to_inf"))


def optimizer_family(optimizer: Optimizer) -> str:
    """Which geometry the optimizer descends in, told from the name of its class or a base class.

    Returns:
        ``"sign"`` for optimizers that divide by the gradient's own size entry by entry or take its sign,
        ``"spectral"`` for those that orthogonalise, ``"euclidean"`` for SGD and whatever is not known.
    """
    for cls in type(optimizer).__mro__:
        name = cls.__name__.lower()
        if any(word in name for word in ("muon", "scion", "lanton")):
            return "spectral"
        if any(word in name for word in ("adam", "lion", "sign", "rmsprop", "rprop", "adagrad", "adadelta", "lamb")):
            return "sign"
    return "euclidean"


def iid_dual_norm(norm: Norm, like: Tensor) -> float:
    r"""Dual norm of noise with i.i.d. entries of mean square one, to leading order in the size.

    What a layer's dual-norm noise owes to its shape alone. For the spectral duals the singular values of an
    ``[m, n]`` matrix with i.i.d. entries are taken at :math:`\sqrt{\max(m, n)}`; the rest are closed forms.

    Args:
        norm: The norm.
        like: A tensor of the layer's shape, as stored. For a stack of matrices the members are added up.
    """
    size = like.numel()
    if norm.name == "one_to_inf":
        return float(size)
    if norm.name == "frobenius":
        return math.sqrt(size)
    if norm.name == "rms":
        return float(size)
    ones = norm.dual(torch.ones(1).expand(like.shape))  # one number, or one for each matrix of a stack
    if norm.name not in ("rms_to_rms", "spectral"):
        return float(ones.sum())  # sums of row or column lengths: noise has the same as the all-ones matrix
    rows, columns = like.shape[-2:] if ones.ndim else (like.shape[0], size // like.shape[0])
    # All-ones has the nuclear norm sqrt(m n), noise min(m, n) sqrt(max(m, n)), whatever scaling the dual applies.
    return float(ones.sum()) * math.sqrt(min(rows, columns))


def _shaped(layer: Layer, name: str) -> Norm:
    """The named norm, fitted to how the layer stores its weight."""
    norm = get_norm(name)
    if layer.role == "conv":
        return norm.flattened()
    return norm.transposed() if layer.rows_are_tokens and name in _ON_MATRICES else norm


def _sigma_max(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(_wide(w), ord=2)


def _polar(g: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(_wide(g), full_matrices=False)
    keep = s > s[..., :1] * torch.finfo(s.dtype).eps * max(g.shape[-2:])
    return (u * keep.to(u.dtype)[..., None, :]) @ vh


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _length(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(_wide(x), dim=dim)


def _unit(x: Tensor, length: Tensor) -> Tensor:
    return torch.where(length > 0, x / length, torch.zeros_like(x))


def _aspect(x: Tensor) -> float:
    """sqrt(out / in)."""
    return math.sqrt(x.shape[-2] / x.shape[-1])


def _l2(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_wide(x))


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
            lambda w: _length(w, -2).amax(-1) / math.sqrt(w.shape[-2]),
            lambda g: _length(g, -2).sum(-1) * math.sqrt(g.shape[-2]),
            lambda g: -math.sqrt(g.shape[-2]) * _unit(g, _length(g, -2)[..., None, :].to(g.dtype)),
        ),
        Norm(
            "rms_to_inf",
            lambda w: _length(w, -1).amax(-1) * math.sqrt(w.shape[-1]),
            lambda g: _length(g, -1).sum(-1) / math.sqrt(g.shape[-1]),
            lambda g: -_unit(g, _length(g, -1)[..., None].to(g.dtype)) / math.sqrt(g.shape[-1]),
        ),
        Norm("one_to_inf", lambda w: _wide(w.abs().amax()), lambda g: _wide(g).abs().sum(), lambda g: -g.sign()),
        Norm(
            "rms",
            lambda w: _l2(w) / math.sqrt(w.numel()),
            lambda g: _l2(g) * math.sqrt(g.numel()),
            lambda g: -math.sqrt(g.numel()) * _unit(g, _l2(g).to(g.dtype)),
        ),
        Norm("frobenius", _l2, _l2, lambda g: -_unit(g, _l2(g).to(g.dtype))),
    )
}
_ON_MATRICES = {"rms_to_rms", "spectral", "one_to_rms", "rms_to_inf"}
