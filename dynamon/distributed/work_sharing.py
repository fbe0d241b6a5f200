"""Work that any process could do, shared out over them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import Gathering, any_sharded, gather_rounds, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widest_dtype


def share_work(
    measure: Callable[[list[int], list[Sequence[Tensor]]], Tensor],
    items: Sequence[Sequence[Tensor]],
    likes: Sequence[Tensor],
    costs: Sequence[float],
    rows: int,
    ranks: Ranks,
) -> Tensor:
    """Measure T items, each on one process, where the whole tensors that it takes are gathered.

    Every process must call this with the same costs, inside
    :meth:`dynamon.distributed.ranks.Ranks.collective_section`. Sharded tensors are gathered a few at a time
    (:func:`dynamon.distributed.dtensor.gather_rounds`).

    Args:
        measure: From the positions of N items and their whole tensors to their readings ``[rows, N]``.
        items: What this process holds of the tensors of each item; the dtypes are the same on every process.
        likes: What the tensors of each item are laid out as.
        costs: What each item costs, in any unit.
        rows: Readings per item.
        ranks: The processes. One alone measures everything at once.

    Returns:
        ``[rows, T]``, zero for items that were measured elsewhere: to be summed over the processes. In the widest dtype
        of the device; on a process alone as ``measure`` gives it.

    Cost: each sharded tensor goes to one process; a check for each round. Memory: the tensors of one round, twice.
    """
    if not ranks.is_distributed:
        return measure(list(range(len(items))), list(items))
    device = to_local(likes[0]).device if likes else torch.device("cpu")
    table = torch.zeros(rows, len(items), dtype=widest_dtype(device), device=device)
    shares = assign_by_cost(costs, ranks.size)
    sizes, sharded = [len(parts) * like.numel() for parts, like in zip(items, likes, strict=True)], any_sharded(likes)
    for turn in gather_rounds(shares, sizes) if sharded else [shares]:
        flat = [(i, rank, part) for rank, own in enumerate(turn) for i in own for part in items[i]]
        owners, dtypes = [rank for _, rank, _ in flat], [part.dtype for *_, part in flat]
        gathering = Gathering([likes[i] for i, *_ in flat], owners, dtypes, ranks)
        if sharded:
            ranks.check()
        wholes: dict[int, list[Tensor]] = {}
        for (i, *_), found in zip(flat, gathering.run([part for *_, part in flat]), strict=True):
            if found is not None:
                wholes.setdefault(i, []).append(found)
        if own := turn[ranks.rank]:
            table[:, own] = measure(own, [wholes[i] for i in own]).to(table)
    return table


def assign_by_cost(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Assign items to processes: the most expensive first, each to the process with the least work so far."""
    totals, found = [0.0] * processes, [[] for _ in range(processes)]  # type: list[float], list[list[int]]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = totals.index(min(totals))
        totals[process] += costs[item]
        found[process].append(item)
    return [sorted(items) for items in found]
