"""Evaluate the training loss once more without leaving a trace on the run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynamon.curvature import ShardedParameters, unsharded
from dynamon.curvature.distributed.fsdp import at_rest, is_rounded, unsupported_reason, whole_parameters
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.curvature.operators.vector_space import GatheredSpace, Shards
from dynamon.distributed.dtensor import is_sharded
from dynamon.distributed.ranks import Ranks
from dynamon.isolation.equality import find_changed
from dynamon.isolation.preserve import LossFn, preserve_state
from dynamon.isolation.random_streams import is_restorable
from dynamon.isolation.trackers import mute_trackers
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.run_context import RunContext

_SEED = 20_240_801


class Evaluated(Protocol):
    """Hold what is known of a run whose loss is evaluated."""

    @property
    def loop(self) -> Loop:
        """The training loop."""

    @property
    def module(self) -> nn.Module:
        """The module that it trains."""

    @property
    def ranks(self) -> Ranks:
        """The processes that measure together."""


def why_not_evaluated(run: Evaluated, trained: Sequence[Tensor], loss_fn: LossFn | None) -> str | None:
    """Return why the training loss cannot be evaluated again, in one sentence; None where it can.

    Args:
        run: The run.
        trained: The parameters that the optimizers move.
        loss_fn: The user's own loss function, or None for that of the loop.
    """
    modules = list(run.module.modules())
    if run.loop.world_size > 1 and not run.ranks.is_distributed:
        return f"of several processes it is measured under DDP and FSDP2 only, and this is {run.loop.strategy}."
    if (split := unsupported_reason(run.module, trained, run.ranks.size)) is not None:
        return f"{split}."
    if run.ranks.is_distributed and any(isinstance(m, nn.SyncBatchNorm) for m in modules):
        return "SyncBatchNorm has no second derivative and waits for other processes."
    own = any(type(m).__module__.split(".")[0] == "transformer_engine" for m in modules)
    if own or run.loop.precision.startswith("transformer-engine"):
        return (
            "Transformer Engine keeps the scales of its FP8 numbers outside of the module, where they cannot be put "
            "back after an evaluation."
        )
    if not is_restorable(run.loop.device):
        kind = run.loop.device.type
        return f"torch cannot put back the random numbers of {kind}, so that training would go on with others."
    return run.loop.no_loss_reason() if loss_fn is None else None


@contextmanager
def evaluation(
    run: Evaluated, owned: Mapping[str, Tensor], gathers: bool, moves: bool = False, draw: int = 0
) -> Iterator[FlatParameters]:
    """Evaluate the training loss again inside: nothing there leaves a trace on the run.

    All processes must enter it together, inside of a measurement.

    Args:
        run: The run.
        owned: The parameters that are meant, as the optimizers have them, by name.
        gathers: Whether those that are sharded are gathered.
        moves: Whether they are to be moved by as little as a step. Whole ones that are rounded for FSDP2's mixed
            precision would not notice, so these stay sharded.
        draw: Which random numbers the loss draws: others for each number, on every process.

    Yields:
        These parameters as the loss sees them. Their ``space`` makes flat vectors of what optimizers hold.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(at_rest(run.module))
        stack.enter_context(preserve_state(run.module, _SEED + draw * run.ranks.size + run.ranks.rank))
        stack.enter_context(_optimizers_untouched(run.loop))
        stack.enter_context(mute_trackers())
        stack.enter_context(run.loop.evaluation())
        if not any(is_sharded(p) for p in owned.values()):
            yield FlatParameters(owned)
        elif gathers and not (moves and is_rounded(run.module)):
            yield stack.enter_context(_made_whole(run, owned))
        else:
            yield ShardedParameters(run.module, owned, run.ranks)


@contextmanager
def _made_whole(run: Evaluated, owned: Mapping[str, Tensor]) -> Iterator[FlatParameters]:
    """Parameters that FSDP2 has dealt out come together for a while."""
    shards = Shards(list(owned.values()), run.ranks)
    # A process that runs out of memory between two messages would leave the others waiting: have it do so before.
    torch.empty(shards.size, dtype=next(iter(owned.values())).dtype, device=run.loop.device)
    run.ranks.check()
    with unsharded(run.module):
        whole = whole_parameters(run.module)
        yield FlatParameters({name: whole[name] for name in owned}, GatheredSpace(shards))


def trained_parameters(run: RunContext) -> dict[str, Tensor]:
    """The parameters that the optimizers move, by the names of their layers."""
    moving = {id(p) for o in run.loop.optimizers for group in o.param_groups for p in group["params"]}
    tensors = {layer.name: layer.parameter for layer in run.all_layers}
    return {name: p for name, p in tensors.items() if p.requires_grad and id(p) in moving}


@contextmanager
def _optimizers_untouched(loop: Loop) -> Iterator[None]:
    """Put back rates that the loss function sets, groups that it adds and schedulers that it steps."""
    dicts: list[dict[Any, Any]] = [vars(scheduler) for scheduler in loop.schedulers]
    lists: list[list[Any]] = [values for held in dicts for values in held.values() if isinstance(values, list)]
    for optimizer in loop.optimizers:
        groups = optimizer.param_groups
        dicts += groups
        lists += [groups, *(group["params"] for group in groups)]
    tensors = [value for held in dicts for value in held.values() if isinstance(value, Tensor)]
    saved = [(held, dict(held)) for held in dicts], [(held, list(held)) for held in lists]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for held, entries in saved[0]:
            if held.keys() != entries.keys() or any(held[key] is not entries[key] for key in entries):
                held.clear()
                held.update(entries)
        for held_list, items in saved[1]:
            held_list[:] = items
        with torch.no_grad():
            for (tensor, value), differs in zip(values, find_changed(values), strict=True):
                if differs:
                    tensor.copy_(value)
