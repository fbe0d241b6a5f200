"""Solvers for any symmetric linear operator: eigenvalues, trace, spectral density."""
