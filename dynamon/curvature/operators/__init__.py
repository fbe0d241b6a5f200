"""Curvature matrices as symmetric linear operators, and the parts they are built from."""
