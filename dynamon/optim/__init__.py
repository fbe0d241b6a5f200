"""Optimizers, and what applies rates to them."""

from dynamon.optim.lanton import Lanton
from dynamon.optim.layerwise import LayerwiseRates, refusal, steering_of

__all__ = ["Lanton", "LayerwiseRates", "refusal", "steering_of"]
