"""Curvature of a loss: Hessian products and the eigenvalues they give."""

from dynamon.curvature.hessian import HessianOperator
from dynamon.curvature.lanczos import Eigenpairs, top_eigenvalues
from dynamon.curvature.operators import LinearOperator

__all__ = ["Eigenpairs", "HessianOperator", "LinearOperator", "top_eigenvalues"]
