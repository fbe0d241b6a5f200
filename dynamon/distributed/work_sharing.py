"""Work that every process could do, dealt out over them and gathered once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynamon.distributed.dtensor import Gathering, gather_rounds, to_local
from dynamon.distributed.ranks import Ranks
from dynamon.kernels import widest_dtype


def share_work(
    measure: Callable[[list[int]], Tensor],
    costs: Sequence[float],
    rows: int,
    device: torch.device,
    group: Any = None,
) -> Tensor:
    """Measure T items, each on one process, and bring all results to all processes.

    Every process of the group must call this, with the same costs. Items go to the processes by cost, the largest first
    to whoever has least so far.

    Args:
        measure: From the positions of N items to their readings ``[rows, N]``.
        costs: What each of the T items costs, in any unit.
        rows: Readings an item.
        device: Where the reduction takes place.
        group: The processes; all if None. Given as :class:`Ranks`, one that failed before does not leave the others
            waiting.

    Returns:
        ``[rows, T]`` in float64, the same on every process.

    Raises:
        RuntimeError: On every process, if ``measure`` raised on one; it names how many did, and where it happened here
            the cause is attached.

    Cost: one all-reduce of ``rows * T + 1`` numbers.
    """
    ranks = group if isinstance(group, Ranks) else Ranks(device, group)
    own = assign_by_cost(costs, ranks.size)[ranks.rank]
    packed = torch.zeros(rows * len(costs) + 1, dtype=widest_dtype(device), device=device)
    table, failed = packed[:-1].view(rows, -1), packed[-1]
    cause: Exception | None = None
    try:
        if own:
            table[:, own] = measure(own).to(table)
    except Exception as error:  # the others are waiting in the reduction
        cause = error
        failed += 1
    if ranks is group:
        ranks.sum(packed)
    else:  # outside of a measurement there is nobody to check
        dist.all_reduce(packed, group=group)
    failures = int(failed)
    if failures:
        raise RuntimeError(f"the measurement failed on {failures} of {ranks.size} processes.") from cause
    return table


def measure_gathered(
    measure: Callable[[list[int], list[list[Tensor]]], Tensor],
    items: Sequence[Sequence[Tensor]],
    likes: Sequence[Tensor],
    costs: Sequence[float],
    rows: int,
    ranks: Ranks,
) -> Tensor:
    """Measure T items that every process holds in parts, each on the one process that it is gathered on.

    Every process must call this, inside of :meth:`dynamon.distributed.ranks.Ranks.collective_section`. Items are dealt
    out as by :func:`share_work` and gathered a few at a time (:func:`dynamon.distributed.dtensor.gather_rounds`).

    Args:
        measure: From the positions of N items and their tensors, whole, to their readings ``[rows, N]``.
        items: The parts here of the tensors of each item; the dtypes are the same on every process.
        likes: What the tensors of each item are laid out as.
        costs: What each costs, in any unit.
        rows: Readings an item.
        ranks: The processes.

    Returns:
        ``[rows, T]`` in float64 with zeros for items that went elsewhere; to be summed over the processes.

    Cost: each tensor goes to one process; a check for each round. Memory: those of one round, twice.
    """
    device = to_local(likes[0]).device if likes else torch.device("cpu")
    table = torch.zeros(rows, len(items), dtype=widest_dtype(device), device=device)
    sizes = [len(parts) * like.numel() for parts, like in zip(items, likes, strict=True)]
    for turn in gather_rounds(assign_by_cost(costs, ranks.size), sizes):
        flat = [(i, rank, part) for rank, own in enumerate(turn) for i in own for part in items[i]]
        owners, dtypes = [rank for _, rank, _ in flat], [part.dtype for *_, part in flat]
        gathering = Gathering([likes[i] for i, *_ in flat], owners, dtypes, ranks)
        ranks.check()
        wholes: dict[int, list[Tensor]] = {}
        for (i, *_), found in zip(flat, gathering.run([part for *_, part in flat]), strict=True):
            if found is not None:
                wholes.setdefault(i, []).append(found)
        if own := turn[ranks.rank]:
            table[:, own] = measure(own, [wholes[i] for i in own]).to(table)
    return table


def assign_by_cost(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which items each process takes: the most costly first, each to the process with the least so far."""
    totals, found = [0.0] * processes, [[] for _ in range(processes)]  # type: list[float], list[list[int]]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = totals.index(min(totals))
        totals[process] += costs[item]
        found[process].append(item)
    return [sorted(items) for items in found]
