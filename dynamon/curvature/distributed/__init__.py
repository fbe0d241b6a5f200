"""Curvature where samples or parameters are spread over processes."""
