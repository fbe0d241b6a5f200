"""Weights: their sizes in the norm of each layer's role, and what decay makes of them."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dynamon.quantities.registry import Condition, Entrywise, Quantity, Scope

if TYPE_CHECKING:
    from torch import Tensor


def _squares_and_fourths(weights: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
    r"""Sums of :math:`w^2` and of :math:`w^4`; outside of a CPU for entries between 1e-19 and 1e19."""
    import torch  # the registry itself needs none

    from dynamon.quantities.updates import wide_lengths

    squares = torch._foreach_mul(list(weights), list(weights))
    return wide_lengths(weights).square(), wide_lengths(squares).square()


def _kurtosis(sizes: "Tensor", squares: "Tensor", fourths: "Tensor") -> "Tensor":
    """About zero, which weights are centred at; 1 to the number of entries, NaN where all are zero."""
    return sizes * fourths / squares.square()


_per_layer = partial(Quantity, cadence="weight", scope=Scope.PER_LAYER, scale="log")

WEIGHT = (
    _per_layer(
        "weight/operator",
        "norm by role: RMS->RMS, 1->RMS, RMS->inf or RMS",
        "none",
        words="weight, operator norm",
        chart="operator norm across layers",
        extremes=True,
        field="operator",
    ),
    _per_layer("weight/frobenius", "Euclidean norm", "weight", words="weight, Frobenius norm", field="frobenius"),
    _per_layer(
        "weight/rms",
        "Euclidean norm over the square root of the size",
        "weight",
        words="weight, root mean square",
        field="rms",
    ),
    _per_layer(
        "weight/kurtosis",
        "mean fourth power of the entries over their squared mean square: 3 for normal ones, 1 where all are as large",
        "none",
        words="weight, kurtosis of the entries",
        chart="kurtosis of the weights across layers",
        entrywise=Entrywise(2, _squares_and_fourths, _kurtosis),
    ),
    _per_layer(
        "weight/effective_rate",
        "learning rate over the squared Euclidean norm",
        "rate / weight²",
        words="rate / squared norm",
    ),
    _per_layer(
        "weight/constraint_usage",
        "rate x decay x norm by role over the step in it: 1 where decay balances the step",
        "none",
        condition=Condition.DECOUPLED_DECAY,
        words="decay x norm / step",
    ),
    _per_layer(
        "weight/initial_fraction",
        "what decay has left of the initial weights: product of 1 - rate x decay over all steps",
        "0 to 1",
        scale="linear",
        condition=Condition.DECOUPLED_DECAY,
        words="what decay has left of the initial weights",
        chart="what decay has left of the initial weights, across layers",
    ),
    Quantity(
        "weight/histogram",
        "the weights",
        "",
        scope=Scope.HISTOGRAMS,
        cadence="weight",
        every=10,
        condition=Condition.HISTOGRAMS,
    ),
)
