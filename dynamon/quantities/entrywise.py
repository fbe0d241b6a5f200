"""Measure quantities of weights that follow from sums over their entries, whole or sharded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import holders_section, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import PartialStats, ShardReduction
from dynamon.kernels import widened
from dynamon.kernels.constants import on_device
from dynamon.kernels.devices import reads_are_free
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.quantities.registry import Entrywise, Quantity
from dynamon.quantities.updates import in_dtypes

_PIECE = 2**16  # entries at a time on a CPU, which fit into its cache in float64


def entrywise_readings(layers: Sequence[Layer], quantities: Sequence[Quantity], ranks: Ranks | None = None) -> Tensor:
    """Measure the quantities that have :attr:`dynamon.quantities.Quantity.entrywise`: sum, reduce, finish.

    Args:
        layers: L layers, on one device. Of a complex weight real and imaginary parts are entries.
        quantities: Q quantities.
        ranks: As for :func:`dynamon.quantities.weights.weight_readings`.

    Returns:
        ``[Q, L]`` in float32 on the weights' device; NaN where a quantity is undefined.

    Cost: one pass over the weights, in float64 on a CPU, in pieces; elsewhere a copy of weights in half precision, and
    the quantity's own calls. No host synchronisation. For shards one all-reduce of
    ``(S + 1) L`` numbers for S sums.
    """
    device = layers[0].parameter.device
    rules = [one.entrywise for one in quantities if one.entrywise is not None]
    if not rules:
        return torch.zeros(0, len(layers), device=device)
    likes = [layer.parameter for layer in layers]
    with holders_section(likes, ranks) as holding:
        weights = [as_real(to_local(like)) for like in likes]
        free = reads_are_free(device)
        sums = torch.stack([_in_pieces(w, rules) for w in weights], 1) if free else _sums(weights, rules)
        stats = ShardReduction(likes, holding, sums=len(sums)).reduce(PartialStats(sums=sums))
    counts = [la.parameter.numel() * (2 if la.parameter.is_complex() else 1) for la in layers]
    sizes = on_device(counts, device, stats.sums.dtype)
    own = iter(stats.sums)
    return torch.stack([rule.finish(sizes, *(next(own) for _ in range(rule.count))) for rule in rules]).float()


def _sums(weights: Sequence[Tensor], rules: Sequence[Entrywise]) -> Tensor:
    """Return all sums over the entries of each weight, ``[S, L]``."""
    wide = in_dtypes(weights, [torch.promote_types(weight.dtype, torch.float32) for weight in weights])
    return widened(torch.stack([row for rule in rules for row in rule.sums(wide)]))


def _in_pieces(weight: Tensor, rules: Sequence[Entrywise]) -> Tensor:
    """Return the sums of one weight on a CPU, ``[S]``, in float64."""
    total = torch.zeros(sum(rule.count for rule in rules), dtype=torch.float64, device=weight.device)
    for piece in weight.reshape(-1).split(_PIECE):
        total += torch.cat([row for rule in rules for row in rule.sums([piece.double()])])
    return total
