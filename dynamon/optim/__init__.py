"""Optimizers, and what applies rates to them."""

from dynamon.optim.lanton import Lanton
from dynamon.optim.layerwise import LayerwiseRates, refusal, steerable_layers, steering_of

__all__ = ["Lanton", "LayerwiseRates", "refusal", "steerable_layers", "steering_of"]
