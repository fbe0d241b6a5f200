"""Norms by layer role, their duals and linear minimisation oracles."""

from dynamon.norms.geometry import optimizer_family
from dynamon.norms.records import (
    NORMS,
    UPDATE_NORMS,
    Norm,
    dual_norms,
    fitted,
    get_norm,
    iid_dual_norm,
    operator_norm,
    rms_factor,
    rms_factors,
    sigma_factor,
    update_norm,
)

__all__ = [
    "NORMS",
    "Norm",
    "UPDATE_NORMS",
    "dual_norms",
    "fitted",
    "get_norm",
    "iid_dual_norm",
    "operator_norm",
    "optimizer_family",
    "rms_factor",
    "rms_factors",
    "sigma_factor",
    "update_norm",
]
