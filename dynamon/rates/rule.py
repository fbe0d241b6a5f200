"""The base class of rules, and the simplest rule: fixed ratios."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.norms import Norm
from dynamon.quantities.noise import NoiseEstimator
from dynamon.quantities.progress import Couplings, StepReading
from dynamon.quantities.readings import GradientReadings

GROUPINGS = ("role", "role_and_shape", "all")


class Rule(ABC):
    """Turns readings into one learning-rate ratio per layer, which :class:`dynamon.optim.LayerwiseRates` applies.

    A subclass implements :meth:`ratios`. If it follows the run, it also implements :meth:`start`, :meth:`begin_step`
    (for weights) or :meth:`update` (for gradients), and the state.

    Attributes:
        needs_gradients: Whether :meth:`update` needs readings; otherwise no gradient is read.
        noise: The noise estimator, for display, or None.
        exact: Whether each layer gets exactly its ratio, however many parameter groups a step then has. Otherwise
            :class:`dynamon.optim.LayerwiseRates` merges similar ratios.
        bounds: Ratios that are never merged, besides 1.
        needs_probe: Whether the rule follows what steps do to the loss of the next batch; see :meth:`asks_for`.
        steps: Steps so far, counted by a rule with ``needs_probe``.
        places: The number of each layer's group in the optimizer, ``[L]``; set before :meth:`start`.
        layers: The layers, with the current weights in ``layers[i].parameter``.

    Example:
        >>> import numpy as np
        >>> from dynamon.rates import Rule
        >>> class SlowEmbeddings(Rule):
        ...     def ratios(self):
        ...         return np.array([0.5 if layer.role == "embedding" else 1.0 for layer in self.layers])
    """

    needs_gradients = False
    noise: NoiseEstimator | None = None
    exact = False
    bounds: tuple[float, ...] = ()
    needs_probe = False
    steps = 0
    places: Sequence[int] | None = None

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError if the rule does not fit a model's layers, those of other optimizers included."""

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Receive the layers that the optimizer holds, and the update norm of each."""
        self.layers = list(layers)

    def begin_step(self) -> None:
        """Prepare for an optimizer step from the weights in :attr:`layers`; called once per step."""

    def update(self, readings: GradientReadings) -> None:
        """Process the readings of one step."""

    @property
    def verdict(self) -> str:
        """What the rule has found out and does from now on, in one sentence to be told once; empty before."""
        return ""

    @property
    def probe_groups(self) -> Mapping[str, Sequence[str]]:
        """The groups whose couplings the rule wants: layer names by label."""
        return {}

    def asks_for(self) -> str | None:
        """Return what is to be measured of the coming step on the next batch: ``"step"``, ``"couplings"`` or None."""
        return None

    def learn(self, reading: StepReading) -> None:
        """Process what a step did to the loss of the next batch."""

    def learn_couplings(self, couplings: Couplings) -> None:
        """Process how the groups' parts of a step interact."""

    @abstractmethod
    def ratios(self) -> NDArray[Any]:
        """Return the factor on the learning rate of each layer, ``[L]``."""

    def bounded(self) -> int:
        """Return how many layers sit at a bound of the rule."""
        return 0

    def __repr__(self) -> str:
        """Show the arguments that differ from their defaults."""
        known = inspect.signature(type(self)).parameters.values()
        given = [(p.name, getattr(self, p.name)) for p in known if p.name in vars(self)]
        defaults = {p.name: p.default for p in known}
        shown = ", ".join(f"{name}={value!r}" for name, value in given if value != defaults[name])
        return f"{type(self).__name__}({shown})"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers by parameter name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""


class FixedRates(Rule):
    """Constant ratios by layer name, role or glob, never merged.

    Args:
        ratios: Ratio by parameter name, glob on names (``"blocks.*.attn.*"``) or ``"role:embedding"``. The first key
            that matches a layer counts. Layers that no key matches have ratio 1.

    Raises:
        TypeError: If ``ratios`` is not a mapping.
        ValueError: If a ratio is not positive and finite, or, when steering begins, if a key matches no layer.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates
        >>> from dynamon.rates import FixedRates
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> LayerwiseRates(optimizer, FixedRates({"role:embedding": 0.1, "*.bias": 2.0}), model).ratios
        {'0.weight': 0.1, '1.weight': 1.0, '1.bias': 2.0}
    """

    exact = True

    def __init__(self, ratios: Mapping[str, float]) -> None:
        """Check the ratios."""
        if not isinstance(ratios, Mapping):
            raise TypeError(f"ratios must be a mapping from names to numbers, got {type(ratios).__name__}.")
        for key, ratio in ratios.items():
            if not (0 < ratio < float("inf")):
                raise ValueError(f"the ratio for {key!r} must be positive and finite, got {ratio}.")
        self._by_key = dict(ratios)

    def __repr__(self) -> str:
        """Show the ratios by key."""
        return f"FixedRates({self._by_key})"

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError if a key matches no layer of the model."""
        for key in self._by_key:
            if not any(matches_key(layer, key) for layer in layers):
                raise ValueError(f"FixedRates: {key!r} matches no layer; print(describe_layers(model)) lists them.")

    def start(self, layers: Sequence[Layer], norms: Sequence[Norm]) -> None:
        """Match the keys."""
        super().start(layers, norms)
        self._ratios = np.array(
            [next((r for key, r in self._by_key.items() if matches_key(layer, key)), 1.0) for layer in layers]
        )

    def ratios(self) -> NDArray[Any]:
        """Return the matched ratios."""
        return self._ratios


def group_indices(layers: Sequence[Layer], norms: Sequence[Norm], group_by: str) -> list[NDArray[Any]]:
    """Group the layers that are compared with each other, and return the indices of each group.

    Args:
        layers: L layers.
        norms: The update norm of each. By role, layers with different norms are not compared.
        group_by: One of ``GROUPINGS``.
    """
    keys = [_group_key(layer, norm, group_by) for layer, norm in zip(layers, norms, strict=True)]
    return [np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)]


def check_grouping(group_by: str) -> None:
    """Raise ValueError for an unknown grouping."""
    if group_by not in GROUPINGS:
        raise ValueError(f"group_by must be one of {GROUPINGS}, got {group_by!r}.")


def _group_key(layer: Layer, norm: Norm, group_by: str) -> tuple[object, ...]:
    if group_by == "all":
        return ()
    shape = tuple(layer.parameter.shape) if group_by == "role_and_shape" else ()
    return (layer.role, norm.name, *shape)


def matches_key(layer: Layer, key: str) -> bool:
    """Return whether a key of :class:`FixedRates` (a name, a glob or ``"role:..."``) matches a layer."""
    if key.startswith("role:"):
        return layer.role == key.removeprefix("role:")
    return any(fnmatchcase(name, key) for name in (layer.name, *layer.aliases))
