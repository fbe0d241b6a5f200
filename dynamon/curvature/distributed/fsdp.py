"""Evaluate a loss on an FSDP2 module outside of training: gather its parameters, restore its state afterwards."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynamon.distributed.dtensor import is_sharded
from dynamon.quantities.names import plain_name

_FLAGS = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")
_HELD = ("_partial_reduce_output", "gradient_divide_factor")


def unsupported_reason(module: nn.Module, params: Sequence[Tensor], processes: int) -> str | None:
    """Return why :func:`unsharded` cannot gather all of some parameters, or None where it can."""
    if any(type(group.offload_policy).__name__ == "CPUOffloadPolicy" for group in _groups(module)):
        return "parameters are kept on the host and brought to the device for each pass"
    managed = {id(p.sharded_param) for group in _groups(module) for p in group.fsdp_params if not p.is_dtensor}
    sharded = [p for p in params if is_sharded(p)]
    if any(id(p) not in managed or p.device_mesh.size() != processes for p in sharded):  # type: ignore[attr-defined]
        return "parameters are split by something else than FSDP2 over all processes (tensor parallelism, say)"
    return None


def is_rounded(module: nn.Module) -> bool:
    """Return whether a mixed precision policy makes FSDP2 compute in a narrower dtype than the parameters have."""
    policies = [group.mp_policy for group in _groups(module)]
    return any(p.param_dtype is not None and p.param_dtype.itemsize < torch.float32.itemsize for p in policies)


def compute_dtypes(module: nn.Module) -> set[torch.dtype]:
    """Return the dtypes in which FSDP2's mixed precision policies make a module compute."""
    return {group.mp_policy.param_dtype for group in _groups(module)} - {None}


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the gathered parameters by their :func:`dynamon.describe_layers` names; for use in :func:`unsharded`."""
    return {plain_name(name): p for name, p in module.named_parameters()}


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather all parameters on every process, so that the loss of an FSDP2 module can be differentiated twice.

    Inside, ``module.parameters()`` are plain tensors, gradients are neither scattered nor summed, and nothing is
    resharded; build the operator from these parameters there. At exit the shards, accumulated gradients and the flags
    of every ``FSDPModule`` are restored, also after an error in the middle of a pass. A module without FSDP2 is
    unchanged.

    Args:
        module: A module, or part of it, that ``fully_shard`` was applied to.

    Memory: all parameters of the module on each process, in the dtype of FSDP2's mixed precision policy.
    """
    parts = _parts(module)
    with at_rest(module):
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.set_requires_gradient_sync(False, recurse=False)
            part.unshard()
        yield


@contextmanager
def full_gradients(module: nn.Module) -> Iterator[None]:
    """Make each backward pass inside of :func:`at_rest` reduce gradients at once, to the mean over processes."""
    for part in _parts(module):
        part.set_requires_gradient_sync(True, recurse=False)
        part.set_reshard_after_backward(True, recurse=False)
    contexts = [part._get_fsdp_state()._state_ctx for part in _parts(module)]
    kept = [context.is_last_backward for context in contexts]
    for context in contexts:
        context.is_last_backward = True
    try:
        yield
    finally:
        for context, flag in zip(contexts, kept, strict=True):
            context.is_last_backward = flag


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Let passes through an FSDP2 module start from its shards and restore its state, also where they fail.

    Restored at exit: shards in place of whole parameters, flags, gradients that wait to be reduced, and the states that
    hooks keep between forward and backward pass.
    """
    parts, groups = _parts(module), _groups(module)
    states = [part._get_fsdp_state() for part in parts]
    flags = [{name: getattr(group, name) for name in (*_FLAGS, *_HELD) if hasattr(group, name)} for group in groups]
    automatic = [(state._auto_reshard_after_forward, state._is_root) for state in states]
    waiting = [(p, _waiting(p)) for group in groups for p in group.fsdp_params]
    for group in groups:
        for name in _HELD:
            setattr(group, name, None)
    for p, _ in waiting:
        _set_waiting(p, (None, None))
    for part in parts:  # a pass without gradients leaves an outermost module whole, at weights of before
        part.reshard()
    try:
        yield
    finally:
        for state in states:
            _come_to_rest(state)
        for part in parts:
            part.reshard()
        for p, kept in waiting:
            _set_waiting(p, kept)
        for group, values in zip(groups, flags, strict=True):
            for name, value in values.items():
                setattr(group, name, value)
        for state, (flag, was_root) in zip(states, automatic, strict=True):
            state._auto_reshard_after_forward = flag
            if was_root is None and state._is_root and flag:  # what FSDP2 does in a root's first pass
                for group in _groups_of(state):
                    group.post_forward_mesh_info = None


def _waiting(p: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of a gathered parameter that have not been scattered yet."""
    return getattr(getattr(p, "_unsharded_param", None), "grad", None), p.unsharded_accumulated_grad


def _set_waiting(p: Any, gradients: tuple[Tensor | None, Tensor | None]) -> None:
    if hasattr(p, "_unsharded_param"):
        p._unsharded_param.grad = gradients[0]
    p.unsharded_accumulated_grad = gradients[1]


def _come_to_rest(state: Any) -> None:
    """Reset what FSDP2 itself resets after a pass: one that failed half-way would leave the next without its hooks."""
    idle = type(state._training_state).IDLE
    state._training_state = idle
    getattr(state, "_modules_to_run_forward", set()).clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    getattr(state._comm_ctx, "post_forward_order", []).clear()  # made in the first pass
    for group in _groups_of(state):
        group._training_state = idle
        group._post_forward_indices.clear()


def _parts(module: nn.Module) -> list[Any]:
    """Return every module that ``fully_shard`` was applied to, outer ones first."""
    if "torch.distributed.fsdp" not in sys.modules:  # half a second, and not in every build of torch
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _groups(module: nn.Module) -> list[Any]:
    states = {id(state): state for state in (part._get_fsdp_state() for part in _parts(module))}
    return [group for state in states.values() for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    """Return the internal groups of an FSDP module: several in torch 2.13, one or none before."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
