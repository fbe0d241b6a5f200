"""Quantities of a weight that follow from sums over its entries, of whole weights and of those in shards alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.kernels import widened, widest_dtype
from dynamon.layers import Layer
from dynamon.pairs import as_real
from dynamon.quantities.registry import Entrywise, Quantity
from dynamon.ranks import Ranks
from dynamon.shards import local
from dynamon.totals import Totals

_PIECE = {"cpu": 2**16}  # entries taken at a time: in float64 they stay in a processor's cache
_LARGE_PIECE = 2**24  # elsewhere, where each operation has its price


def entrywise_readings(layers: Sequence[Layer], quantities: Sequence[Quantity], ranks: Ranks | None = None) -> Tensor:
    """Measure the quantities that have :attr:`dynamon.quantities.Quantity.entrywise`: sum here, reduce, finish.

    Args:
        layers: L layers, on one device. Of a complex weight real and imaginary parts are entries.
        quantities: Q quantities.
        ranks: The processes that hold the weights in parts and call this together, inside of
            :meth:`dynamon.ranks.Ranks.measurement`; None where weights are whole.

    Returns:
        ``[Q, L]`` in float32 on the weights' device; NaN where a quantity has no meaning.

    Cost: one pass over the weights, a piece at a time in float64 (float32 on devices without it). No host
    synchronisation. In shards one all-reduce of ``(S + 1) L`` numbers for S sums.
    """
    device = layers[0].parameter.device
    if not quantities:
        return torch.zeros(0, len(layers), device=device)
    rules = [one.entrywise for one in quantities if one.entrywise is not None]
    sums = torch.stack([_sums(as_real(local(la.parameter.detach())), rules) for la in layers], 1)
    if ranks is not None:
        totals = Totals([layer.parameter for layer in layers], ranks, sums=len(sums))
        found = totals.empty()
        found.sums[:] = sums
        sums = totals.of(found).sums
    counts = [la.parameter.numel() * (2 if la.parameter.is_complex() else 1) for la in layers]
    sizes = torch.tensor(counts, dtype=sums.dtype, device=device)
    own = iter(sums)
    return torch.stack([rule.finish(sizes, *(next(own) for _ in range(rule.count))) for rule in rules]).float()


def _sums(weight: Tensor, rules: Sequence[Entrywise]) -> Tensor:
    """The sums of all rules over the entries of one weight, or of the part of it that is here, ``[S]``."""
    total = torch.zeros(sum(rule.count for rule in rules), dtype=widest_dtype(weight.device), device=weight.device)
    for piece in weight.reshape(-1).split(_PIECE.get(weight.device.type, _LARGE_PIECE)):
        total += torch.stack([one for rule in rules for one in rule.sums(widened(piece))])
    return total
