"""The norms, one record each, and which of them fits a role and an optimizer.

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

A new norm is an entry of ``NORMS``; a role takes it by its line in ``OPERATOR_NORMS`` or ``UPDATE_NORMS``.
"""

import math

import torch

from dynamon.kernels import l2_along, nuclear_norm
from dynamon.layers import ROLES
from dynamon.norms.forms import (
    aspect,
    dims_of,
    each_dual,
    each_primal,
    euclidean_norms,
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
from dynamon.norms.records import Norm


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


def get_norm(name: str) -> Norm:
    """Return the norm of a name in the table of :mod:`dynamon.norms.table`.

    Args:
        name: One of the names in that table.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.

    Example:
        >>> import torch
        >>> from dynamon.norms import get_norm
        >>> norm, gradient = get_norm("rms_to_rms"), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> norm.dual(gradient).item()
        7.0
        >>> step = norm.lmo(gradient)
        >>> (gradient * step).sum().item(), norm.primal(step).item()
        (-7.0, 1.0)
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(sorted(NORMS))}.")
    return NORMS[name]
