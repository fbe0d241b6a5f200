"""Norms by layer role, their duals and linear minimisation oracles."""

from dynamon.norms.geometry import optimizer_family
from dynamon.norms.records import (
    NORMS,
    UPDATE_NORMS,
    Norm,
    dual_norms,
    get_norm,
    iid_dual_norm,
    norm_for_layer,
    operator_norm,
    rms_factor,
    rms_factors,
    sigma_factor,
    update_norm,
)

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
