"""Optimizers, and what applies rates to them."""

from dynamon.optim.lanton import Lanton
from dynamon.optim.layerwise import LayerwiseRates, steerable_layers, steering_of
from dynamon.optim.refusals import refusal, spread_reason

__all__ = ["Lanton", "LayerwiseRates", "refusal", "spread_reason", "steerable_layers", "steering_of"]
