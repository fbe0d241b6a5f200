"""Solvers that take any symmetric linear operator: eigenvalues, traces, densities."""
