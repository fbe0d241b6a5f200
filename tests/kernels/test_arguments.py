"""Arguments of a wrong type raise TypeError and name themselves; wrong values raise ValueError."""

import numpy as np
import pytest
import torch

from dynamon.kernels import conv_gram_iteration, gram_iteration, nuclear_norm, polar_factor, top_singular
from dynamon.spectra import spectral_extremes, weight_spectra, weight_spectrum

TAKES_MATRICES = {
    "gram_iteration": (gram_iteration, "weight"),
    "polar_factor": (polar_factor, "matrix"),
    "nuclear_norm": (nuclear_norm, "matrix"),
    "top_singular": (top_singular, "matrix"),
    "conv_gram_iteration": (conv_gram_iteration, "kernel"),
    "weight_spectrum": (weight_spectrum, "weight"),
    "spectral_extremes": (spectral_extremes, "weight"),
}


@pytest.mark.parametrize(("function", "name"), TAKES_MATRICES.values(), ids=TAKES_MATRICES)
def test_an_array_is_no_tensor(function, name):
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor \[.*got ndarray; torch.as_tensor\(\) converts"):
        function(np.ones((3, 3), dtype=np.float32))


@pytest.mark.parametrize("function", [gram_iteration, polar_factor, top_singular])
@pytest.mark.parametrize("steps", [2.0, "2", True, None])
def test_steps_are_whole_numbers(function, steps):
    with pytest.raises(TypeError, match="steps must be an int, got"):
        function(torch.eye(3), steps=steps)
    with pytest.raises(ValueError, match="steps must be at least"):
        function(torch.eye(3), steps=-1)


def test_each_of_several_matrices_must_be_a_tensor():
    with pytest.raises(TypeError, match="weights must be a tensor .* got list"):
        weight_spectra([torch.eye(2), [1.0, 2.0]])
