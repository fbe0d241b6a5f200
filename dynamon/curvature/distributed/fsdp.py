"""FSDP2 while a loss is evaluated beside training: whole parameters for a while, and passes that leave no trace."""

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
    """Why :func:`unsharded` does not make all of some parameters whole on every process; None where it does."""
    if any(type(group.offload_policy).__name__ == "CPUOffloadPolicy" for group in _groups(module)):
        return "parameters are kept on the host and brought to the device for each pass"
    managed = {id(p.sharded_param) for group in _groups(module) for p in group.fsdp_params if not p.is_dtensor}
    sharded = [p for p in params if is_sharded(p)]
    if any(id(p) not in managed or p.device_mesh.size() != processes for p in sharded):  # type: ignore[attr-defined]
        return "parameters are split by something else than FSDP2 over all processes (tensor parallelism, say)"
    return None


def is_rounded(module: nn.Module) -> bool:
    """Whether a mixed precision policy has FSDP2 compute in another dtype than that of the parameters."""
    policies = [group.mp_policy for group in _groups(module)]
    return any(p.param_dtype is not None and p.param_dtype.itemsize < torch.float32.itemsize for p in policies)


def compute_dtypes(module: nn.Module) -> set[torch.dtype]:
    """The dtypes in which policies of FSDP2 have a module compute."""
    return {group.mp_policy.param_dtype for group in _groups(module)} - {None}


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Inside of :func:`unsharded`, the parameters by the names that :func:`dynamon.describe_layers` gives them."""
    return {plain_name(name): p for name, p in module.named_parameters()}


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Whole parameters on every process, so that the loss of an FSDP2 module can be differentiated twice.

    Inside, ``module.parameters()`` are plain tensors, gradients are neither scattered nor summed, and nothing is
    resharded; take the parameters and build the operator there. At exit the shards, the gradients that were being
    accumulated and the flags of every ``FSDPModule`` are what they were, also where what happens inside fails in the
    middle of a pass. A module without FSDP2 is left alone.

    Args:
        module: A module, or part of it, that ``fully_shard`` was applied to.

    Memory: all parameters of the module on each process while inside, in the dtype of FSDP2's mixed precision policy.
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
    """Inside of :func:`at_rest`: each backward pass reduces its gradients at once, to their mean over the processes."""
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
    """Passes through an FSDP2 module that begin from its shards and leave no trace on its machinery, even if they fail.

    Puts back at exit: shards in the place of whole parameters, flags, gradients that wait to be reduced, and the
    states that hooks keep between the forward and the backward pass.
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
    """Gradients of a whole parameter that have not been scattered yet."""
    return getattr(getattr(p, "_unsharded_param", None), "grad", None), p.unsharded_accumulated_grad


def _set_waiting(p: Any, gradients: tuple[Tensor | None, Tensor | None]) -> None:
    if hasattr(p, "_unsharded_param"):
        p._unsharded_param.grad = gradients[0]
    p.unsharded_accumulated_grad = gradients[1]


def _come_to_rest(state: Any) -> None:
    """What FSDP2 itself does after a pass; one that failed in the middle would leave the next one without its hooks."""
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
    """Every module that ``fully_shard`` was applied to, outer ones first."""
    if "torch.distributed.fsdp" not in sys.modules:  # half a second, and not in every build of torch
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _groups(module: nn.Module) -> list[Any]:
    states = {id(state): state for state in (part._get_fsdp_state() for part in _parts(module))}
    return [group for state in states.values() for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    """The internal groups of an FSDP module: several in torch 2.13, one or none before."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
