"""Statistics of the singular values of weight matrices and convolutions."""

from dynamon.spectra.singular_values import (
    SpectralExtremes,
    WeightSpectrum,
    batched_by_shape,
    extremes_of,
    largest_per_stack,
    largest_singular_values,
    reduce_blocks,
    spectral_extremes,
    weight_spectra,
    weight_spectrum,
)

__all__ = [
    "SpectralExtremes",
    "WeightSpectrum",
    "batched_by_shape",
    "extremes_of",
    "largest_per_stack",
    "largest_singular_values",
    "reduce_blocks",
    "spectral_extremes",
    "weight_spectra",
    "weight_spectrum",
]
