"""Reduce learning rates where gradients are noisier."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm, iid_dual_norm
from dynamon.quantities.noise import SOURCES, NoiseEstimator
from dynamon.quantities.readings import GradientReadings
from dynamon.rates.ramp import Ramp
from dynamon.rates.rule import Rule, check_grouping, group_indices

_SILENT = 1e-6  # of the group's median H: a thousandth of its noise
_REFERENCES = ("quietest", "mean")


class NoiseAdaptiveRates(Rule):
    r"""LANTON-style rates: layers with noisier gradients take smaller steps.

    With H the noise of a layer (:class:`dynamon.quantities.noise.NoiseEstimator`), divided by that of i.i.d. noise of
    its shape, within each group of layers

    .. math:: r_l = \left(\frac{a^2 + H_{min}}{a^2 + H_l}\right)^{1/4}, \qquad
              a^2 = \alpha^2\, \mathrm{median}(H), \qquad r_l \ge \mathrm{floor}.

    The quietest layer of a group keeps the base rate, the others get less: for :math:`H \gg a^2` this is
    :math:`\sqrt{\sigma_{min} / \sigma_l}` in the noise :math:`\sigma = \sqrt H`, 0.32 at ten times the noise and 0.1 at
    a hundred times. A layer with less than a thousandth of the group's median noise (a bias before BatchNorm) keeps the
    base rate and is not a reference for the others. So does one without a reading, one that is alone in its group, and
    one whose differences are not noise (:attr:`dynamon.quantities.noise.NoiseEstimator.is_noise`): rounding, or,
    between successive gradients, a drift or oscillation because the weights move, as in full-batch training. At the
    first update the latter cannot be detected.

    Args:
        alpha: Noise floor relative to the group's median noise, so that ratios do not depend on the scale of the loss;
            the paper's is absolute. Larger values pull ratios to 1.
        beta2: Decay of the noise average.
        group_by: ``"role"``: layers of one role are compared with each other, as the paper does by norm;
            ``"role_and_shape"``: only layers of one shape; ``"all"``: everything with everything.
        normalize_shape: Divide the noise by the dual norm of i.i.d. noise of the layer's shape. The paper does not say.
            Without it, a matrix of four times the entries gets half the rate from its shape alone.
        floor: Smallest ratio, in (0, 1].
        warmup: Noise updates before steering begins; ratios then move from 1 to the rule's in as many updates.
        exponent: Power of the ratio of two H, 1/4 as published: the square root of the ratio of two noises
            :math:`\sigma`. 1/2 makes the rate inversely proportional to :math:`\sigma`.
        relative_to: ``"quietest"`` as published, or ``"mean"``: the geometric mean of :math:`a^2 + H` in the group
            replaces :math:`a^2 + H_{min}`, so that the geometric mean of the group's ratios is 1, unless floor or cap
            limit one. About half of the layers then exceed the base rate.
        cap: Largest ratio, at least 1; only reachable with ``relative_to="mean"``.
        dead_band: Relative change of a ratio that is ignored: the ratio in force stays, bitwise, until the rule's
            differs by more. So rates do not follow the jitter of the noise, and a layer within this of 1 keeps the base
            rate exactly.
        refresh: Noise updates between two changes of the ratios in force. Above 1, a change is spread linearly over the
            first half of that interval.
        source: Which gradients are subtracted: ``"successive"`` ones, as published in practice, which count the change
            of the mean gradient as noise, or ``"independent"`` ones (the paper's second option): those of the processes
            under DDP, or two parts of one accumulation window. Outside Lightning, call
            :meth:`dynamon.optim.LayerwiseRates.watch_ranks` before each step's first backward pass, or
            :meth:`dynamon.optim.LayerwiseRates.observe_part` in each window. Without either, ratios stay 1.
        bias_correction: Divide the noise average by its total weight. That cancels in the ratios of layers that have
            been read equally often, because the noise floor is relative. Without it, a layer that joined late or has
            few gradients appears quiet.

    Raises:
        ValueError: Naming the argument that is out of range.

    Cost: nothing on the device beyond the readings; for L layers a few operations on arrays ``[L]`` per step.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates
        >>> from dynamon.rates import NoiseAdaptiveRates
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rates = LayerwiseRates(optimizer, NoiseAdaptiveRates(floor=0.2, warmup=2, group_by="all"), model)
        >>> for step in range(6):
        ...     optimizer.zero_grad()
        ...     inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        ...     model(inputs).square().mean().backward()
        ...     optimizer.step()
        >>> max(rates.ratios.values()), min(rates.ratios.values()) >= 0.2
        (1.0, True)

    Reference: Hao et al., arXiv 2510.14009. Its code is not public; the exponents are inferred from secondary sources
    and a related paper (2509.15399). ``relative_to``, cap, dead band and refresh are additions.
    """

    needs_gradients = True

    def __init__(
        self,
        alpha: float = 0.1,
        beta2: float = 0.98,
        group_by: str = "role",
        normalize_shape: bool = True,
        floor: float = 0.1,
        warmup: int = 20,
        *,
        exponent: float = 0.25,
        relative_to: str = "quietest",
        cap: float = 10.0,
        dead_band: float = 0.0,
        refresh: int = 1,
        source: str = "successive",
        bias_correction: bool = True,
    ) -> None:
        """Check the arguments."""
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha must be zero or positive, got {alpha}.")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {beta2}.")
        check_grouping(group_by)
        if not 0 < floor <= 1:
            raise ValueError(f"floor must lie in (0, 1], got {floor}.")
        if warmup < 0:
            raise ValueError(f"warmup must be zero or more updates, got {warmup}.")
        if not 0 < exponent < float("inf"):
            raise ValueError(f"exponent must be positive and finite (1/4 as published), got {exponent}.")
        if relative_to not in _REFERENCES:
            raise ValueError(f"relative_to must be one of {_REFERENCES}, got {relative_to!r}.")
        if not 1 <= cap < float("inf"):
            raise ValueError(f"cap must be a finite number of at least 1, got {cap}.")
        if not 0 <= dead_band < 1:
            raise ValueError(f"dead_band must lie in [0, 1), got {dead_band}.")
        if refresh < 1:
            raise ValueError(f"refresh must be one or more updates, got {refresh}.")
        self.alpha, self.beta2, self.group_by = alpha, beta2, group_by
        self.normalize_shape, self.floor, self.warmup = normalize_shape, floor, warmup
        self.bounds = (floor, cap)
        self.exponent, self.relative_to, self.cap = exponent, relative_to, cap
        self.dead_band, self.refresh, self.bias_correction = dead_band, refresh, bias_correction
        if source not in SOURCES:
            raise ValueError(f"source must be one of {SOURCES}, got {source!r}.")
        self.source, self.updates = source, 0

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups and compute the shape factors."""
        super().start(layers, norms)
        names = [layer.name for layer in layers]
        self.noise = NoiseEstimator(names, self.beta2, self.source)
        self._ramp = Ramp(names, self.refresh // 2, self.dead_band)
        self._groups = group_indices(layers, norms, self.group_by)
        self._shape_factor = np.array(
            [
                iid_dual_norm(norm, layer) if self.normalize_shape else 1.0
                for layer, norm in zip(layers, norms, strict=True)
            ]
        )
        self._target = np.ones(len(layers))

    def update(self, readings: GradientReadings) -> None:
        """Update the noise, and from it the ratios; readings that are not finite change neither."""
        assert self.noise is not None
        if not self.noise.update(readings):
            return
        self.updates += 1
        self._set_target()
        self._ramp.advance()
        if self.updates % self.refresh == 0:
            self._ramp.aim(self._target)

    def _set_target(self) -> None:
        assert self.noise is not None
        noise = self._squared() / self._shape_factor**2
        there = (noise > 0) & self.noise.is_noise
        self._target = np.ones(len(self.layers))
        for group in self._groups:
            # A layer without a gradient, or with rounding only (a bias before BatchNorm), keeps the base rate and is
            # not a reference for the others.
            known = group[there[group]]
            if len(known):
                known = known[noise[known] > _SILENT * _median(noise[known])]
            if len(known):
                own = noise[known]
                floor = self.alpha**2 * _median(own)
                ratio = (self._reference(floor, own) / (floor + own)) ** self.exponent
                self._target[known] = ratio.clip(self.floor, self.cap)

    def _squared(self) -> NDArray[Any]:
        """Return the noise average of each layer, not positive where there is none."""
        assert self.noise is not None
        if self.bias_correction:
            return self.noise.squared
        return self.noise.mean

    def _reference(self, floor: float, noise: NDArray[Any]) -> float:
        """Return what a layer's noise is compared with."""
        if self.relative_to == "quietest":
            return floor + float(noise.min())
        middle = _median(floor + noise)  # equal layers, or a single one, then get exactly 1
        return middle * float(np.exp(np.log((floor + noise) / middle).mean()))

    def ratios(self) -> NDArray[Any]:
        """Return the ratios in force: ones during warm-up, then a geometric transition to the rule's."""
        share = (self.updates - self.warmup) / max(self.warmup, 1)
        return np.asarray(self._ramp.ratios() ** float(np.clip(share if self.warmup else 1.0, 0.0, 1.0)))

    def bounded(self) -> int:
        """Return how many layers sit at floor or cap."""
        at_floor = (self._target <= self.floor) & (self.floor < 1)
        return int((at_floor | (self._target >= self.cap) & (self.cap > 1)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return noise averages, the ratios in force and the number of updates."""
        assert self.noise is not None
        return {"noise": self.noise.state_dict(), "updates": self.updates, "ramp": self._ramp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        assert self.noise is not None
        self.noise.load_state_dict(state["noise"])
        self.updates = int(state["updates"])
        self._set_target()
        if "ramp" in state and (self.refresh > 1 or self.dead_band > 0):
            self._ramp.load_state_dict(state["ramp"], self.floor, self.cap)
        else:  # the noise determines all
            self._ramp.aim(self._target)


def _median(values: NDArray[Any]) -> float:
    """Compute the median of a few finite numbers, faster than numpy: there are many short arrays."""
    line = np.sort(values)
    middle = len(line) // 2
    return float(line[middle] if len(line) % 2 else (line[middle - 1] + line[middle]) / 2)
