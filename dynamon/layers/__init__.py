"""Layers of a model: one weight tensor each, with its name and role."""

from dynamon.layers.layer import ROLES, ConvGeometry, Layer, is_measurable, is_steerable, layer_table, select
from dynamon.layers.roles import describe_layers, known_layers, measurable_layers

__all__ = [
    "ROLES",
    "ConvGeometry",
    "Layer",
    "describe_layers",
    "is_measurable",
    "is_steerable",
    "known_layers",
    "layer_table",
    "measurable_layers",
    "select",
]
