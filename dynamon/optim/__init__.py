"""What applies rates to optimizers."""

from dynamon.optim.layerwise import LayerwiseRates, refusal

__all__ = ["LayerwiseRates", "refusal"]
