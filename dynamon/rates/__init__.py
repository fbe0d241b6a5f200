"""Rules that map per-layer readings to learning-rate ratios. A rule knows no optimizer."""

from dynamon.rates.noise import NoiseAdaptiveRates
from dynamon.rates.rule import FixedRates, Rule
from dynamon.rates.spectral_tail import SpectralTailRates

__all__ = ["FixedRates", "NoiseAdaptiveRates", "Rule", "SpectralTailRates"]
