"""Curvature along directions and in subspaces."""
