"""What a rule is, and the simplest one: ratios by hand."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.quantities.noise import NoiseEstimator
from dynamon.quantities.readings import GradientReadings

GROUPINGS = ("role", "role_and_shape", "all")


class Rule(ABC):
    """What turns readings into a ratio a layer; :class:`dynamon.optim.LayerwiseRates` applies it.

    A subclass implements :meth:`ratios`, and where it follows the run :meth:`start`, :meth:`begin_step` (for weights)
    or :meth:`update` (for gradients), and the state.

    Attributes:
        needs_gradients: Whether :meth:`update` wants readings; without, no gradient is read.
        noise: The estimator a panel can show, or None.
        exact: Whether each layer gets its ratio to the bit, however many groups of parameters that takes in a step.
            Otherwise :class:`dynamon.optim.LayerwiseRates` brings many different ratios down to few.
        bounds: Ratios that a layer keeps to the bit in any case, beside 1.
        layers: The layers, with the weights as they are now in ``layers[i].parameter``.
    """

    needs_gradients = False
    noise: NoiseEstimator | None = None
    exact = False
    bounds: tuple[float, ...] = ()

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError where the rule does not fit a model's layers, those of other optimizers included."""

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Learn which layers the optimizer holds, and the update norm of each."""
        self.layers = list(layers)

    def begin_step(self) -> None:
        """An optimizer step is about to be taken, from the weights in :attr:`layers`; called once a step."""

    def update(self, readings: GradientReadings) -> None:
        """Take in the readings of one step."""

    @abstractmethod
    def ratios(self) -> NDArray[Any]:
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
    """Constant ratios by layer name, role or glob, applied as they are given.

    Args:
        ratios: Ratio by parameter name, glob on names (``"blocks.*.attn.*"``) or ``"role:embedding"``; the
            first key that matches a layer counts, layers that none matches keep 1.

    Raises:
        ValueError: If a ratio is not a positive finite number, or, when steering begins, if a key matches no layer.
    """

    exact = True

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

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Match the keys, once."""
        super().start(layers, norms)
        self._ratios = np.array(
            [next((r for key, r in self._by_key.items() if _matches(layer, key)), 1.0) for layer in layers]
        )

    def ratios(self) -> NDArray[Any]:
        """The matched ratios."""
        return self._ratios


def group_indices(layers: Sequence[Layer], norms: Sequence[Norm], group_by: str) -> list[NDArray[Any]]:
    """Which layers are compared with each other: the indices of each group.

    Args:
        layers: L layers.
        norms: The update norm of each; layers of one role and different norms are not compared by role.
        group_by: One of ``GROUPINGS``.
    """
    keys = [_group_key(layer, norm, group_by) for layer, norm in zip(layers, norms, strict=True)]
    return [np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)]


def check_grouping(group_by: str) -> None:
    """Raise ValueError for a grouping that does not exist."""
    if group_by not in GROUPINGS:
        raise ValueError(f"group_by must be one of {GROUPINGS}, got {group_by!r}.")


def _group_key(layer: Layer, norm: Norm, group_by: str) -> tuple[object, ...]:
    if group_by == "all":
        return ()
    shape = tuple(layer.parameter.shape) if group_by == "role_and_shape" else ()
    return (layer.role, norm.name, *shape)


def _matches(layer: Layer, key: str) -> bool:
    if key.startswith("role:"):
        return layer.role == key.removeprefix("role:")
    return any(fnmatchcase(name, key) for name in (layer.name, *layer.aliases))
