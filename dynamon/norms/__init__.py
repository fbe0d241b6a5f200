r"""Norms by layer role, their duals and linear minimisation oracles.

A weight is ``[out, in]``. For a norm :math:`\|W\|` the dual is :math:`\|G\|_* = \max_{\|W\| \le 1} \langle G,
W \rangle`, and the oracle :math:`\mathrm{lmo}(G) = \arg\min_{\|W\| \le 1} \langle G, W \rangle`, so that
:math:`\langle G, \mathrm{lmo}(G) \rangle = -\|G\|_*`.

All norms of :mod:`dynamon.norms.table` act on the last two dimensions (on all, where there are fewer) and are batched
over the others. :func:`norm_for_layer` gives them for a tensor as a layer stores it. All that is known of a norm is its
record, :class:`Norm`.
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
