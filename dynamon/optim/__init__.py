"""Optimizers, and the steering that applies layerwise rates to them."""

from dynamon.optim.lanton import Lanton
from dynamon.optim.layerwise import LayerwiseRates
from dynamon.optim.spike_arguments import unguarded_reason
from dynamon.optim.spike_clipper import SpikeClipper
from dynamon.optim.steering import steerable_layers, steering_of
from dynamon.optim.unsupported import several_devices_reason, unsupported_reason

__all__ = [
    "Lanton",
    "LayerwiseRates",
    "SpikeClipper",
    "several_devices_reason",
    "steerable_layers",
    "steering_of",
    "unguarded_reason",
    "unsupported_reason",
]
