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

from dynamon.norms.by_layer import (
    dual_norms,
    iid_dual_norm,
    norm_for_layer,
    operator_norm,
    rms_factors,
    sigma_factor,
    update_norm,
)
from dynamon.norms.geometry import optimizer_family
from dynamon.norms.records import Norm
from dynamon.norms.table import NORMS, UPDATE_NORMS, get_norm

__all__ = [
    "NORMS",
    "UPDATE_NORMS",
    "Norm",
    "dual_norms",
    "get_norm",
    "iid_dual_norm",
    "norm_for_layer",
    "operator_norm",
    "optimizer_family",
    "rms_factors",
    "sigma_factor",
    "update_norm",
]
