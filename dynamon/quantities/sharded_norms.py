"""Primal norms of tensors that several processes hold in parts: which follow from the parts, and which do not."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dynamon.distributed.dtensor import has_whole_rows, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.distributed.reduction import ShardReduction
from dynamon.distributed.work_sharing import measure_gathered
from dynamon.kernels import l2_norms, widest_dtype
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.norms import Norm
from dynamon.quantities.updates import primal_norms


def follows_from_squares(norm: Norm) -> bool:
    """Whether a primal norm is a multiple of the Euclidean one."""
    return norm.reduces == "sum"


def is_maximum(layer: Layer, norm: Norm) -> bool:
    """Whether a primal norm is the largest of those of the parts: over entries, or over rows that are not cut."""
    if norm.reduces == "max over entries":
        return True
    stored_as_rows = "max over columns" if layer.rows_are_tokens or layer.inputs_first else "max over rows"
    plain = layer.parameter.ndim == 2 and layer.blocks == 1
    return norm.reduces == stored_as_rows and plain and has_whole_rows(layer.parameter)


def needs_whole(layer: Layer, norm: Norm) -> bool:
    """Whether a primal norm takes the whole tensor."""
    return not follows_from_squares(norm) and not is_maximum(layer, norm)


def largest_here(layers: Sequence[Layer], norms: Sequence[Norm], parts: Sequence[Tensor]) -> Tensor:
    """The norms of the parts ``[T]`` where the norm of the whole is the largest of them; 0 elsewhere.

    Args:
        layers: T layers.
        norms: The norm of each.
        parts: What this process holds of a tensor of each.
    """
    device = parts[0].device if parts else torch.device("cpu")
    found = torch.zeros(len(layers), dtype=widest_dtype(device), device=device)
    for i, (layer, norm, part) in enumerate(zip(layers, norms, parts, strict=True)):
        if part.numel() and is_maximum(layer, norm):
            found[i] = norm.primal(part).amax()
    return found


def squares_here(parts: Sequence[Tensor]) -> Tensor:
    """Sums of squares of the entries of T parts ``[T]``, in float64."""
    return l2_norms(parts).square()


def primal(layers: Sequence[Layer], norms: Sequence[Norm], squares: Tensor, largest: Tensor, whole: Tensor) -> Tensor:
    """Primal norms ``[T]`` from what all processes have found.

    Args:
        layers: T layers.
        norms: The norm of each.
        squares: Sums of squares ``[T]``.
        largest: Largest norms of the parts, where that is what counts.
        whole: Norms of the whole tensors, where those are needed.
    """
    # The dual of a multiple of l2 is l2 over that multiple.
    over = [
        norm.dual_factor(1, la.size) if follows_from_squares(norm) else 1.0
        for la, norm in zip(layers, norms, strict=True)
    ]
    by_squares = squares.sqrt() / torch.tensor(over, dtype=squares.dtype, device=squares.device)
    kinds = [
        0 if follows_from_squares(norm) else 1 if is_maximum(layer, norm) else 2
        for layer, norm in zip(layers, norms, strict=True)
    ]
    chosen = torch.tensor(kinds, dtype=torch.int64, device=squares.device)
    return torch.stack([by_squares, largest, whole]).gather(0, chosen[None])[0]


class StepParts:
    """How far layers have moved, as far as this process sees it: to be brought together later.

    Args:
        layers: L layers.
        norms: The norm of each in which its step is measured.
        steps: What this process holds of the step of each; None where it is not known.
    """

    def __init__(self, layers: Sequence[Layer], norms: Sequence[Norm], steps: Sequence[Tensor | None]) -> None:
        """Measure the parts; whole ones are kept where the norm needs them."""
        self.layers, self.norms = list(layers), list(norms)
        own = [as_real(to_local(layer.parameter.detach())) for layer in layers]
        given = [torch.zeros_like(w) if step is None else step for w, step in zip(own, steps, strict=True)]
        self.squares, self.largest = squares_here(given), largest_here(layers, norms, given)
        self.known = [float(step is not None) for step in steps]
        self.kept = {i: given[i] for i, layer in enumerate(layers) if needs_whole(layer, norms[i])}


def steps_and_lengths(moved: Sequence[StepParts], squares: Tensor, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
    """Norms of the steps of several sets of layers, and the Euclidean norms of their gradients.

    Every process must call this, inside of :meth:`dynamon.distributed.ranks.Ranks.collective_section`.

    Args:
        moved: The sets of layers.
        squares: Sums of squares of what this process holds of the gradient of each layer.
        ranks: The processes.

    Returns:
        The norm of each gradient, and the norms of the steps of each set, NaN where a step is not known; the same
        on every process, in float64.

    Cost: one all-reduce of ``(5 + R) L`` numbers; a gather of each step that has a spectral norm.
    """
    layers, norms = [la for part in moved for la in part.layers], [norm for part in moved for norm in part.norms]
    totals = ShardReduction([layer.parameter for layer in layers], ranks, sums=2, maxima=1, owned=2)
    found = totals.empty()
    found.sums[0] = squares
    found.sums[1] = torch.cat([part.squares for part in moved])
    found.maxima[0] = torch.cat([part.largest for part in moved])
    found.owned[0] = torch.tensor([known for part in moved for known in part.known]).to(found.owned)
    found.owned[1] = _whole_norms(moved, layers, norms, ranks).to(found.owned)
    found = totals.reduce(found)
    steps = primal(layers, norms, found.sums[1], found.maxima[0], found.owned[1])
    steps = torch.where(found.owned[0] == ranks.size, steps, torch.nan)
    return found.sums[0].sqrt(), list(steps.split([len(part.layers) for part in moved]))


def _whole_norms(moved: Sequence[StepParts], layers: Sequence[Layer], norms: Sequence[Norm], ranks: Ranks) -> Tensor:
    """Norms ``[L]`` of the steps that are gathered on this process, zeros for the others."""
    offsets = [0, *accumulate(len(part.layers) for part in moved)]
    kept = {first + i: step for first, part in zip(offsets, moved, strict=False) for i, step in part.kept.items()}
    row = torch.zeros(len(layers), dtype=torch.float64)
    if not kept:
        return row
    places = list(kept)

    def measure(chosen: list[int], wholes: list[list[Tensor]]) -> Tensor:
        own = [places[i] for i in chosen]
        tensors = [found[0] for found in wholes]
        return primal_norms([layers[i] for i in own], [norms[i] for i in own], tensors)[None]

    likes = [layers[i].parameter for i in places]
    costs = [layers[i].parameter.numel() * min(layers[i].matrix_shape[1:]) for i in places]
    table = measure_gathered(measure, [[kept[i]] for i in places], likes, costs, 1, ranks)
    return row.to(table.device).index_copy(0, torch.tensor(places, device=table.device), table[0])
