"""Curvature as symmetric linear operators: products with vectors, and what they are made of."""
