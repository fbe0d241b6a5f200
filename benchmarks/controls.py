"""Rules that keep one part of another rule's ratios and take the rest away: controls for the study of adaptive rates.

What a noise rule does has three parts: the mean ratio moves in time, it differs between groups of layers, and within
a group between layers. Each control keeps some of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm, iid_dual_norm
from dynamon.quantities.noise import SignalToNoise
from dynamon.quantities.readings import GradientReadings
from dynamon.rates import NoiseAdaptiveRates, Rule


class Transformed(Rule):
    """The ratios of another rule after a function of them and of the groups of layers.

    Args:
        inner: The rule.
        transform: From ratios ``[L]`` and the indices of each group of one role to ratios ``[L]``.
    """

    needs_gradients = True

    def __init__(
        self, inner: NoiseAdaptiveRates, transform: Callable[[NDArray[Any], list[NDArray[Any]]], NDArray[Any]]
    ) -> None:
        """Wrap the rule."""
        self._inner, self._transform = inner, transform

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups."""
        super().start(layers, norms)
        self._inner.start(layers, norms)
        roles = [layer.role for layer in layers]
        self._groups = [np.flatnonzero([r == role for r in roles]) for role in dict.fromkeys(roles)]

    def update(self, readings: GradientReadings) -> None:
        """Hand the readings on."""
        self._inner.update(readings)

    def ratios(self) -> NDArray[Any]:
        """The transformed ratios."""
        return self._transform(self._inner.ratios(), self._groups)


def time_only(ratios: NDArray[Any], groups: list[NDArray[Any]]) -> NDArray[Any]:
    """Every layer takes the mean ratio of all: what is left is how it moves in time."""
    return np.full_like(ratios, np.exp(np.log(ratios).mean()))


def time_and_group(ratios: NDArray[Any], groups: list[NDArray[Any]]) -> NDArray[Any]:
    """Every layer takes the mean ratio of its group."""
    out = ratios.copy()
    for group in groups:
        out[group] = np.exp(np.log(ratios[group]).mean())
    return out


def layer_only(ratios: NDArray[Any], groups: list[NDArray[Any]]) -> NDArray[Any]:
    """Ratios over their group's mean: the groups keep the base rate, layers differ."""
    return ratios / time_and_group(ratios, groups)


def permuted(ratios: NDArray[Any], groups: list[NDArray[Any]]) -> NDArray[Any]:
    """The right ratios on the wrong layers: turned round within each group."""
    out = ratios.copy()
    for group in groups:
        out[group] = np.roll(ratios[group], len(group) // 2)
    return out


def inverted(ratios: NDArray[Any], groups: list[NDArray[Any]]) -> NDArray[Any]:
    """The noisiest layer of a group keeps the base rate and the quietest takes the smallest."""
    out = ratios.copy()
    for group in groups:
        out[group] = ratios[group].min() / ratios[group]
    return out


class ShapeOnly(Rule):
    """The ratios that i.i.d. noise of one size would give: what not normalising by shape comes to."""

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Work the ratios out once."""
        super().start(layers, norms)
        sizes = np.array([iid_dual_norm(norm, layer) for norm, layer in zip(norms, layers, strict=True)])
        roles = [layer.role for layer in layers]
        self._ratios = np.ones(len(layers))
        for role in set(roles):
            group = np.flatnonzero([r == role for r in roles])
            self._ratios[group] = np.sqrt(sizes[group].min() / sizes[group])

    def ratios(self) -> NDArray[Any]:
        """They stay."""
        return self._ratios


class SignalRates(Rule):
    """Signal to noise instead of noise: ``(snr / largest snr of the group) ** (1/4)``, with a floor and a warm-up."""

    needs_gradients = True

    def __init__(self, floor: float = 0.1, warmup: int = 20) -> None:
        """Remember them."""
        self._floor, self._warmup = floor, warmup

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Begin without readings."""
        super().start(layers, norms)
        self._signal, self._updates = SignalToNoise([layer.name for layer in layers]), 0
        roles = [layer.role for layer in layers]
        self._groups = [np.flatnonzero([r == role for r in roles]) for role in dict.fromkeys(roles)]

    def update(self, readings: GradientReadings) -> None:
        """Take in the readings of one step."""
        self._updates += self._signal.update(readings)

    def ratios(self) -> NDArray[Any]:
        """Ones during the warm-up."""
        out = np.ones(len(self.layers))
        if self._updates <= self._warmup:
            return out
        signal = np.nan_to_num(self._signal.ratios)
        for group in self._groups:
            if signal[group].max() > 0:
                out[group] = np.maximum((signal[group] / signal[group].max()) ** 0.25, self._floor)
        return out
