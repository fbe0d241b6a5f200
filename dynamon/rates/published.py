"""Rules of other papers, as their authors publish them, to compare with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamon.layers import Layer
from dynamon.quantities.hill import hill_exponents
from dynamon.rates.rule import FixedRates, matches_key
from dynamon.rates.spectral_tail import SpectralTailRates

_FEWEST = 50  # eigenvalues: smaller matrices keep the base rate
_PINNED = ("embedding", "head")
# Ratios of blocks of a transformer: names that models give them, for the first that matches, and the published ratio.
_DISPARITY: tuple[tuple[tuple[str, ...], float], ...] = (
    (("role:embedding", "role:head"), 10.0),
    (("role:vector",), 1.0),
    (("*q_proj*", "*k_proj*", "*.query.*", "*.key.*", "*qkv*", "*c_attn*", "*in_proj*"), 8.0),
    (("*v_proj*", "*o_proj*", "*.value.*", "*out_proj*", "*attn.c_proj*", "*attention.output*", "*.projection.*"), 4.0),
)
_FEED_FORWARD = 6.0


class HeavyTailRates(SpectralTailRates):
    r"""Rates of LLR: the exponent of each weight's spectrum, mapped linearly to ratios from ``low`` to ``high``.

    The exponent is Hill's estimate over the upper half of the n eigenvalues of :math:`W^T W`, in ascending order and
    with :math:`k = n - \lfloor n / 2 \rfloor`,

    .. math:: \alpha = 1 + \frac{k}{\sum_{i > n - k} \ln (\lambda_i / \lambda_{n - k + 1})}.

    The smallest exponent of all matrices gets ``low``, the largest ``high``; embeddings and heads are pinned to
    ``high``. A bias takes the ratio of the weight in its module, other vectors and matrices with fewer than 50
    eigenvalues keep the base rate. A weight with queries, keys and values in one is one matrix, as in the authors'
    code. The spectra are read before the first step and then every ``refresh`` steps.

    Args:
        low: Ratio at the smallest exponent, positive.
        high: Ratio at the largest. The authors take 3 to 5.
        refresh: Steps between two readings of the spectra.
        ramp: Steps over which ratios move linearly to new ones, at most ``refresh``.

    Attributes:
        exponents: The exponents of the last reading by layer name.

    Raises:
        ValueError: Naming the argument that is out of range.

    Cost: every ``refresh`` steps the singular values of each weight, in float64; waits for the device.

    Reference: He et al., "One LR Doesn't Fit All", arXiv 2605.22297, and the code the authors publish.

    Example:
        >>> import torch
        >>> from dynamon.optim import LayerwiseRates
        >>> from dynamon.rates import HeavyTailRates
        >>> model = torch.nn.Sequential(torch.nn.Embedding(80, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 80))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> LayerwiseRates(optimizer, HeavyTailRates(), model)
        LayerwiseRates(HeavyTailRates on 5 layers of AdamW)
    """

    reads_at_once = True

    def __init__(self, low: float = 1.0, high: float = 3.0, refresh: int = 100, ramp: int = 50) -> None:
        """Check the arguments."""
        super().__init__(low, high, "all", refresh, ramp)

    def _read(self) -> dict[str, float]:
        layers = [layer for layer in self.layers if self._is_read(layer)]
        found = zip(layers, hill_exponents(layers), strict=True)
        return {layer.name: value for layer, value in found if np.isfinite(value)}

    @staticmethod
    def _is_read(layer: Layer) -> bool:
        weight = layer.parameter
        if layer.role in ("vector", *_PINNED) or not weight.requires_grad:
            return False
        return min(weight.shape[0], weight.shape[1:].numel()) >= _FEWEST

    def _goals(self) -> NDArray[Any]:
        goals = super()._goals()
        for index, layer in enumerate(self.layers):
            if layer.role in _PINNED:
                goals[index] = self.high
        by_name = {layer.name: goal for layer, goal in zip(self.layers, goals, strict=True)}
        for index, layer in enumerate(self.layers):
            if layer.name.endswith("bias"):
                goals[index] = by_name.get(layer.name.removesuffix("bias") + "weight", goals[index])
        return goals


def disparity_rates(layers: Sequence[Layer]) -> FixedRates:
    """Return the blockwise ratios of the sharpness disparity paper, by the names that transformers give their layers.

    Norms 1, values and outputs of attention 4, feed-forward 6, queries and keys 8, embeddings and head 10, all divided
    by 6, so that most weights keep the base rate. Queries, keys and values in one weight count as queries and keys.
    The paper's baseline has these ratios relative to norms: tune the base rate again.

    Args:
        layers: Of the model (:func:`dynamon.layers.describe_layers`). What no name tells apart counts as feed-forward.

    Returns:
        The rule.

    Reference: Wang et al., "The Sharpness Disparity Principle in Transformers", ICML 2025, arXiv 2502.19002.

    Example:
        >>> from dynamon.cli.language_model import GPT
        >>> from dynamon.layers import describe_layers
        >>> from dynamon.rates import disparity_rates
        >>> disparity_rates(describe_layers(GPT(depth=1)))._by_key["blocks.0.qkv.weight"]
        1.3333333333333333
    """
    return FixedRates({layer.name: _disparity(layer) / _FEED_FORWARD for layer in layers})


def _disparity(layer: Layer) -> float:
    for keys, ratio in _DISPARITY:
        if any(matches_key(layer, key) for key in keys):
            return ratio
    return _FEED_FORWARD
