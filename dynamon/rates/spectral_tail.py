"""Increase learning rates where the spectrum of the weights has a lighter tail."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.quantities.weights import layer_spectra
from dynamon.rates.ramp import Ramp
from dynamon.rates.rule import Rule, check_grouping, group_indices


class SpectralTailRates(Rule):
    r"""Smaller steps for layers whose spectrum has a heavier tail.

    The tail of the eigenvalues of a layer's Gram matrix decays like :math:`\lambda^{-\alpha}`
    (:func:`dynamon.spectra.power_law.power_law`). The tail builds up during training: a small exponent, a heavy tail,
    is taken to mean a layer that has learned much, a large one a layer that lags behind and may take larger steps.
    Within a group

    .. math:: r_l = \mathrm{low} + (\mathrm{high} - \mathrm{low})
              \frac{\alpha_l - \alpha_{min}}{\alpha_{max} - \alpha_{min}}.

    Vectors, frozen layers, layers without a power law (those of a network just initialised have none) and groups in
    which fewer than two exponents differ keep the base rate. Only weights are read, never gradients.

    Args:
        low: Ratio at the smallest exponent of a group, positive. TempBalance uses 0.5, LLR 1.
        high: Ratio at the largest, at least ``low``. TempBalance uses 1.5, LLR 3 to 5.
        group_by: ``"all"`` as published: all matrices are compared; ``"role"``: those of one role;
            ``"role_and_shape"``: those of one role and shape.
        refresh: Steps between two readings of the spectra; the first is after as many steps.
        ramp: Steps over which ratios move linearly to new ones, at most ``refresh``.

    Attributes:
        exponents: The exponents of the last reading by layer name, where one was found.

    Raises:
        ValueError: Naming the argument that is out of range.

    Cost: every ``refresh`` steps the eigenvalues of one Gram matrix per layer, which wait for the device: as
    :func:`dynamon.spectra.weight_spectrum`.

    References: Zhou et al. (TempBalance), NeurIPS 2023, arXiv 2312.00359; LLR, arXiv 2605.22297, the source of
    these intervals. Both use a Hill estimate over a fixed part of the spectrum, which gives a number for every matrix;
    the fit here chooses where the tail begins, and reports where there is none. :class:`HeavyTailRates` is LLR as its
    authors publish it.
    """

    reads_at_once = False  # before the first step

    def __init__(
        self, low: float = 0.5, high: float = 1.5, group_by: str = "all", refresh: int = 100, ramp: int = 50
    ) -> None:
        """Check the arguments."""
        if not 0 < low < float("inf"):
            raise ValueError(f"low must be positive and finite, got {low}.")
        if not low <= high < float("inf"):
            raise ValueError(f"high must be finite and at least low = {low}, got {high}.")
        check_grouping(group_by)
        if refresh < 1:
            raise ValueError(f"refresh must be one or more steps, got {refresh}.")
        if not 0 <= ramp <= refresh:
            raise ValueError(f"ramp must lie between 0 and refresh = {refresh} steps, got {ramp}.")
        self.low, self.high, self.group_by, self.refresh, self.ramp = low, high, group_by, refresh, ramp
        self.bounds = (low, high)
        self.steps = 0
        self.exponents: dict[str, float] = {}

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups."""
        super().start(layers, norms)
        self._groups = group_indices(layers, norms, self.group_by)
        self._ramp = Ramp([layer.name for layer in layers], self.ramp)

    def begin_step(self) -> None:
        """Read the spectra when they are due, else move on towards the ratios of the last reading."""
        self._ramp.advance()
        if (self.steps or self.reads_at_once) and self.steps % self.refresh == 0:
            self.exponents = self._read()
            self._ramp.aim(self._goals())
        self.steps += 1

    def _read(self) -> dict[str, float]:
        """Return the exponents by layer name, where there are any."""
        names, spectra = layer_spectra([layer for layer in self.layers if layer.parameter.requires_grad])
        values = [] if spectra is None else spectra.tail_exponent.tolist()
        return {name: value for name, value in zip(names, values, strict=True) if np.isfinite(value)}

    def _goals(self) -> NDArray[Any]:
        exponents = np.array([self.exponents.get(layer.name, np.nan) for layer in self.layers])
        goals = np.ones(len(self.layers))
        for group in self._groups:
            known = group[np.isfinite(exponents[group])]
            if len(known) and exponents[known].min() < exponents[known].max():
                goals[known] = np.interp(
                    exponents[known], [exponents[known].min(), exponents[known].max()], [self.low, self.high]
                )
        return goals

    def ratios(self) -> NDArray[Any]:
        """Return the ratios in force, which move towards those of the last reading."""
        return self._ramp.ratios()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, the exponents and the ratios in force."""
        return {"steps": self.steps, "exponents": dict(self.exponents), "ramp": self._ramp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.steps, self.exponents = int(state["steps"]), dict(state["exponents"])
        self._ramp.load_state_dict(state["ramp"], min(self.low, 1.0), max(self.high, 1.0))
