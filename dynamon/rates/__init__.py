"""Rules that map per-layer readings to learning-rate ratios. A rule knows no optimizer."""

from dynamon.rates.balanced import BalancedRates
from dynamon.rates.groups import rate_groups
from dynamon.rates.noise import NoiseAdaptiveRates
from dynamon.rates.published import HeavyTailRates, disparity_rates
from dynamon.rates.rule import FixedRates, Rule
from dynamon.rates.spectral_tail import SpectralTailRates

__all__ = [
    "BalancedRates",
    "FixedRates",
    "HeavyTailRates",
    "NoiseAdaptiveRates",
    "Rule",
    "SpectralTailRates",
    "disparity_rates",
    "rate_groups",
]
