"""Rules that map per-layer readings to learning-rate ratios. A rule knows no optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from dynamon.gradients import Array, GradientReadings
from dynamon.layers import Layer
from dynamon.noise import NoiseEstimator
from dynamon.norms import Norm, iid_dual_norm

_SILENT = 1e-6  # of the group's median H: a thousandth of its noise


class Rule(ABC):
    """What turns readings into a ratio a layer; :class:`dynamon.optim.LayerwiseRates` applies it.

    A subclass implements :meth:`ratios`, and where it follows the run :meth:`start`, :meth:`update` and the
    state.

    Attributes:
        needs_gradients: Whether :meth:`update` wants readings; without, no gradient is read.
        noise: The estimator a panel can show, or None.
    """

    needs_gradients = False
    noise: NoiseEstimator | None = None

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError where the rule does not fit a model's layers, those of other optimizers included."""

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Learn which layers the optimizer holds, and the update norm of each."""
        self.layers = list(layers)

    def update(self, readings: GradientReadings) -> None:
        """Take in the readings of one step."""

    @abstractmethod
    def ratios(self) -> Array:
        """The factor on the learning rate of each layer, ``[L]``."""

    def bounded(self) -> int:
        """How many layers sit at a bound of the rule."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers by parameter name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


class FixedRates(Rule):
    """Constant ratios by layer name, role or glob.

    Args:
        ratios: Ratio by parameter name, glob on names (``"blocks.*.attn.*"``) or ``"role:embedding"``; the
            first key that matches a layer counts, layers that none matches keep 1.

    Raises:
        ValueError: If a ratio is not a positive finite number, or, when steering begins, if a key matches no layer.
    """

    def __init__(self, ratios: Mapping[str, float]) -> None:
        """Check the ratios."""
        for key, ratio in ratios.items():
            if not (0 < ratio < float("inf")):
                raise ValueError(f"the ratio for {key!r} must be positive and finite, got {ratio}.")
        self._by_key = dict(ratios)

    def check(self, layers: Sequence[Layer]) -> None:
        """Every key must match a layer of the model."""
        for key in self._by_key:
            if not any(_matches(layer, key) for layer in layers):
                raise ValueError(f"FixedRates: {key!r} matches no layer; print(describe_layers(model)) lists them.")

    def ratios(self) -> Array:
        """The matched ratios."""
        return np.array(
            [next((r for key, r in self._by_key.items() if _matches(layer, key)), 1.0) for layer in self.layers]
        )


class NoiseAdaptiveRates(Rule):
    r"""LANTON-style rates: layers with noisier gradients take smaller steps.

    With H the noise of a layer (:class:`dynamon.noise.NoiseEstimator`), divided by what its shape alone would
    give, within each group of layers

    .. math:: r_l = \left(\frac{a^2 + H_{min}}{a^2 + H_l}\right)^{1/4}, \qquad
              a^2 = \alpha^2\, \mathrm{median}(H), \qquad r_l \ge \mathrm{floor}.

    The quietest layer of a group keeps the base rate, the others go below it: for :math:`H \gg a^2` this is
    :math:`\sqrt{\sigma_{min} / \sigma_l}` in the noise :math:`\sigma = \sqrt H`. A layer with less than a thousandth of
    the group's median noise (a bias before BatchNorm) keeps the base rate and is no yardstick for the others.

    Args:
        alpha: Noise floor relative to the group's median noise. The paper's is absolute; relative, ratios do
            not depend on the scale of the loss. Larger values pull ratios to 1.
        beta2: Decay of the noise average.
        group_by: ``"role"``: layers of one role are compared with each other, as the paper does by norm;
            ``"role_and_shape"``: only layers of one shape; ``"all"``: everything with everything.
        normalize_shape: Divide the noise by the dual norm of i.i.d. noise of the layer's shape. The paper does
            not say; without it a matrix of four times the entries gets half the rate from its shape alone.
        floor: Smallest ratio, in (0, 1].
        warmup: Noise updates before steering begins; ratios then go over from 1 in as many updates again.

    Raises:
        ValueError: Naming the argument that is out of range.

    Reference: Hao et al., arXiv 2510.14009. Its code is not public, and the exponents are put together from
    secondary sources and a sibling paper (2509.15399).
    """

    needs_gradients = True
    _GROUPINGS = ("role", "role_and_shape", "all")

    def __init__(
        self,
        alpha: float = 0.1,
        beta2: float = 0.98,
        group_by: str = "role",
        normalize_shape: bool = True,
        floor: float = 0.1,
        warmup: int = 20,
    ) -> None:
        """Check the arguments."""
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha must be zero or positive, got {alpha}.")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {beta2}.")
        if group_by not in self._GROUPINGS:
            raise ValueError(f"group_by must be one of {self._GROUPINGS}, got {group_by!r}.")
        if not 0 < floor <= 1:
            raise ValueError(f"floor must lie in (0, 1], got {floor}.")
        if warmup < 0:
            raise ValueError(f"warmup must be zero or more updates, got {warmup}.")
        self.alpha, self.beta2, self.group_by = alpha, beta2, group_by
        self.normalize_shape, self.floor, self.warmup = normalize_shape, floor, warmup
        self.updates = 0

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Form the groups and the shape factors."""
        super().start(layers, norms)
        self.noise = NoiseEstimator([layer.name for layer in layers], self.beta2)
        keys = [self._group_key(layer, norm) for layer, norm in zip(layers, norms, strict=True)]
        self._groups = [np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)]
        self._shape_factor = np.array(
            [
                iid_dual_norm(norm, layer.parameter) if self.normalize_shape else 1.0
                for layer, norm in zip(layers, norms, strict=True)
            ]
        )
        self._target = np.ones(len(layers))

    def _group_key(self, layer: Layer, norm: Norm) -> tuple[object, ...]:
        if self.group_by == "all":
            return ()
        shape = tuple(layer.parameter.shape) if self.group_by == "role_and_shape" else ()
        return (layer.role, norm.name, *shape)

    def update(self, readings: GradientReadings) -> None:
        """Update the noise, and from it the ratios; readings that are not finite change neither."""
        assert self.noise is not None
        if not self.noise.update(readings):
            return
        self.updates += 1
        self._set_target()

    def _set_target(self) -> None:
        assert self.noise is not None
        noise = self.noise.squared / self._shape_factor**2
        self._target = np.ones(len(self.layers))
        for group in self._groups:
            # A layer without a gradient, or with nothing but rounding in it (a bias before BatchNorm), has no noise
            # to be compared by: it keeps the base rate and is no yardstick for the others.
            known = group[np.nan_to_num(noise[group]) > 0]
            known = known[noise[known] > _SILENT * np.median(noise[known])] if len(known) else known
            if len(known):
                floor = self.alpha**2 * float(np.median(noise[known]))
                ratio = ((floor + noise[known].min()) / (floor + noise[known])) ** 0.25
                self._target[known] = np.maximum(ratio, self.floor)

    def ratios(self) -> Array:
        """The ratios in force: ones during warm-up, then a geometric transition to the rule's."""
        share = (self.updates - self.warmup) / max(self.warmup, 1)
        return np.asarray(self._target ** float(np.clip(share if self.warmup else 1.0, 0.0, 1.0)))

    def bounded(self) -> int:
        """How many layers sit at the floor."""
        return int((self._target <= self.floor).sum()) if self.floor < 1 else 0

    def state_dict(self) -> dict[str, Any]:
        """Noise averages and the number of updates."""
        assert self.noise is not None
        return {"noise": self.noise.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        assert self.noise is not None
        self.noise.load_state_dict(state["noise"])
        self.updates = int(state["updates"])
        self._set_target()


def _matches(layer: Layer, key: str) -> bool:
    if key.startswith("role:"):
        return layer.role == key.removeprefix("role:")
    return any(fnmatchcase(name, key) for name in (layer.name, *layer.aliases))
