"""Optimizers, and the steering that applies layerwise rates to them."""

from dynamon.optim.lanton import Lanton
from dynamon.optim.layerwise import LayerwiseRates
from dynamon.optim.steering import steerable_layers, steering_of
from dynamon.optim.unsupported import several_devices_reason, unsupported_reason

__all__ = [
    "Lanton",
    "LayerwiseRates",
    "several_devices_reason",
    "steerable_layers",
    "steering_of",
    "unsupported_reason",
]
