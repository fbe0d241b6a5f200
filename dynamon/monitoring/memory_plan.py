"""Decide from free memory which curvature measurements run, and whether sharded parameters are gathered."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamon.curvature.distributed.fsdp import is_rounded
from dynamon.curvature.memory import basis_memory, free_memory
from dynamon.distributed.dtensor import is_sharded, to_local
from dynamon.kernels import widest_dtype
from dynamon.layers.complex_pairs import real_dtype, real_numel
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.run_context import RunContext

_WHOLE = 4  # copies beside the solver's vectors: gathered parameters, their gradient with its graph, a product
_PRECISE = ("32-true", "64-true")  # precisions in which neighbouring weights are close enough for differences


@dataclass(frozen=True)
class CurvatureMemoryPlan:
    """Hold what fits, the same on all processes.

    Attributes:
        limit: Bytes that are allowed.
        needed: Bytes that the vectors of a solve take.
        density: Bytes that those of a density take.
        solves: Whether a solve fits.
        certifies: Whether one with an upper bound does.
        has_density: Whether a density does.
        gathers: Whether sharded parameters are gathered while they are measured.
        differences: Whether they stay sharded and products are differences of gradients.
    """

    limit: float
    needed: float
    density: float
    solves: bool
    certifies: bool
    has_density: bool
    gathers: bool
    differences: bool


def allowed_memory(run: RunContext, memory_limit: float | None) -> float:
    """Return the bytes that copies and vectors may take.

    Args:
        run: The run.
        memory_limit: GiB that are allowed; None for half of what is free: activations take the rest. Processes that
            share the memory of a host share that half.
    """
    shared = 1 if run.device.type != "cpu" else run.loop.processes_on_host
    return memory_limit * 2**30 if memory_limit else free_memory(run.device) / 2 / shared


def plan_memory(
    run: RunContext, trained: Sequence[Tensor], k: int, density_vectors: int, memory_limit: float | None
) -> CurvatureMemoryPlan:
    """Compare what vectors take with what is allowed, on all processes together.

    Args:
        run: The run.
        trained: The parameters as the optimizers have them.
        k: Eigenvalues of the largest solve.
        density_vectors: Vectors of a density.
        memory_limit: As in :func:`allowed_memory`.
    """
    device, limit = run.device, allowed_memory(run, memory_limit)
    gathers = not any(is_sharded(p) for p in trained) or _are_gathered(run, trained, k, limit)
    differences = not gathers and _why_no_differences(run, trained) is None
    tensors = [to_local(p) for p in trained] if differences else list(trained)
    needed = basis_memory(tensors, k)
    density = density_vectors * sum(real_numel(p) * max(real_dtype(p).itemsize, 4) for p in tensors)
    impossible = not gathers and not differences
    lacks = [impossible or size > limit for size in (needed, basis_memory(tensors, certify=True), density)]
    lacks = run.ranks.maximum(torch.tensor(lacks, dtype=widest_dtype(device), device=device)).bool().tolist()
    solves, certifies, has_density = (not lack for lack in lacks)
    return CurvatureMemoryPlan(limit, needed, density, solves, certifies, has_density, gathers, differences)


def _are_gathered(run: RunContext, trained: Sequence[Tensor], k: int, limit: float) -> bool:
    """Return whether whole parameters and vectors fit on every process; says so, or what happens instead."""
    needed = basis_memory(trained, k) + _WHOLE * sum(p.numel() * p.element_size() for p in trained)
    device = run.device
    too_much = torch.tensor(float(needed > limit), dtype=widest_dtype(device), device=device)
    fits = not bool(run.ranks.maximum(too_much))
    said = f"{needed / 2**30:.3g} GiB on each process, and {limit / 2**30:.3g} are allowed"
    if fits:
        after = "They are gathered while they are measured, and products are exact."
    elif (reason := _why_no_differences(run, trained)) is None:
        after = (
            "Parameters stay sharded, and products are differences of gradients, at two gradients a product. Raise "
            "memory_limit to have exact ones."
        )
    else:
        after = f"Differences of gradients, the only other way, are not possible: {reason}."
    rank_zero_info(f"sharpness: gathered parameters and the solver's vectors take {said}. {after}")
    return fits


def _why_no_differences(run: RunContext, trained: Sequence[Tensor]) -> str | None:
    """Return why sharded parameters cannot be moved a little for a difference of gradients; None where they can."""
    if run.loop.precision not in _PRECISE or is_rounded(run.module):
        return f"at precision {run.loop.precision} gradients are too coarse"
    whole = sum(not is_sharded(p) for p in trained)
    if whole:  # a vector's part here would hold them on every process
        return f"{whole} trained parameters are not sharded"
    return None
