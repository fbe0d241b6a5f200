"""Layers of a model: one weight tensor each, with its name and its role."""

from dynamon.layers.roles import (
    ROLES,
    ConvGeometry,
    Layer,
    describe_layers,
    is_measurable,
    is_steerable,
    known_layers,
    layer_table,
    measurable_layers,
    select,
)

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
