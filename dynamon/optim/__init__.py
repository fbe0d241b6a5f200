"""What applies rates to optimizers."""

from dynamon.optim.layerwise import LayerwiseRates, refusal, steering_of

__all__ = ["LayerwiseRates", "refusal", "steering_of"]
