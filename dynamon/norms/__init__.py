"""Norms by layer role, their duals and linear minimisation oracles."""

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
from dynamon.norms.records import Norm, rms_factor
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
    "rms_factor",
    "rms_factors",
    "sigma_factor",
    "update_norm",
]
