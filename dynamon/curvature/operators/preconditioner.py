r"""The diagonal preconditioner of adaptive optimizers, read from their state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.curvature import LinearOperator
from dynamon.curvature.operators.parameters import FlatParameters, Parameters, names_and_tensors
from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.distributed.dtensor import to_local
from dynamon.layers.complex_pairs import as_real, real_dtype, real_numel


class NoSecondMomentError(ValueError):
    """The optimizer has no second moment yet: it has taken no step, or a gradient scaler skipped all."""


def preconditioner(
    optimizer: Optimizer, params: Parameters | FlatParameters, space: VectorSpace | None = None
) -> Tensor:
    r"""Read the diagonal P by which an Adam-type optimizer divides its step from its state.

    * ``exp_avg_sq`` in the state (Adam, AdamW, NAdam and others of their kind; RAdam up to its rectification):
      :math:`(\sqrt{\hat v} + \epsilon)(1 - \beta_1^t)`, with ``max_exp_avg_sq`` for AMSGrad;
    * ``square_avg`` (RMSprop): :math:`\sqrt{v} + \epsilon`, the squared mean gradient taken off where centered;
    * ``exp_inf`` (Adamax): :math:`u (1 - \beta_1^t)`;
    * ``sum`` (Adagrad): :math:`\sqrt{s} + \epsilon`.

    Args:
        optimizer: Its groups and state are read, not changed.
        params: The parameters as the optimizer holds them, in the order of the flat vector, or a mapping from their
            names.
        space: The space of the flat vector where it is sharded.

    Returns:
        Flat ``[n]`` in the dtype of the parameters, float32 at least. NaN where the second moment is zero (a token
        never seen) or a parameter has no state yet.

    Raises:
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If a parameter is not in the optimizer, the optimizer has no such state, or has taken no step yet.

    Reference: Cohen et al., "Adaptive gradient methods at the edge of stability", arXiv 2207.14484.

    Examples:
        >>> import torch
        >>> from dynamon.curvature.operators.preconditioner import preconditioner
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = torch.optim.RMSprop([w], alpha=0.0, eps=0.0)
        >>> w.grad = torch.tensor([3.0, 0.0])
        >>> optimizer.step()
        >>> preconditioner(optimizer, [w])
        tensor([3., nan])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    _, params = names_and_tensors(params)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in group_of for p in params):
        raise ValueError("a parameter is not in the optimizer, so it has no preconditioner.")
    if not any(optimizer.state.get(p) for p in params):
        raise NoSecondMomentError("the optimizer has taken no step yet, so it has no preconditioner.")
    pieces = [second_moment_scale(optimizer.state.get(p), group_of[id(p)], p) for p in params]
    if all(piece is None for piece in pieces):
        raise ValueError(f"{type(optimizer).__name__} keeps no second moment, so it has no preconditioner.")
    missing = [torch.full((real_numel(to_local(p)),), torch.nan, dtype=_wide(p), device=p.device) for p in params]
    space = space or VectorSpace(sum(real_numel(p) for p in params))
    diagonal = space.join([m if piece is None else piece for piece, m in zip(pieces, missing, strict=True)])
    if not int(space.total((~diagonal.isnan()).sum())):
        raise NoSecondMomentError("the optimizer's second moments are all zero, so it has no preconditioner yet.")
    return diagonal


def has_second_moment(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's state holds something for :func:`preconditioner` to read."""
    return any(_MOMENTS & set(state) for state in optimizer.state.values())


def preconditioned(operator: LinearOperator, diagonal: Tensor) -> LinearOperator:
    r"""Return the operator :math:`P^{-1/2} A P^{-1/2}`; coordinates where P is NaN are excluded.

    Args:
        operator: The Hessian or Gauss-Newton matrix on the same flat coordinates.
        diagonal: P, from :func:`preconditioner`.
    """
    return operator.scaled(diagonal.rsqrt().nan_to_num(0.0, posinf=0.0))


def second_moment_scale(
    state: Mapping[str, Any] | None, group: Mapping[str, Any], p: Tensor, gradient: Tensor | None = None
) -> Tensor | None:
    """Compute P of a parameter's local part, flat; NaN where its second moment is zero, None without state.

    Args:
        state: The optimizer's state of the parameter.
        group: The optimizer's group of the parameter.
        p: The parameter.
        gradient: Its local part, flat, as the next step of Adam or RMSprop would take it, coupled decay included; P is
            then that of this step. None for the P of the last step.
    """
    if not state:
        return None
    if gradient is not None:
        state = _after_step(state, group, p, gradient.to(_wide(p)))
    eps = float(group.get("eps", 0.0))
    beta1, beta2 = (float(b) for b in group.get("betas", (0.0, 0.0)))
    step = float(state.get("step", 1))
    warming = 1 - float(state.get("mu_product", beta1**step))  # NAdam's momentum has a schedule of its own
    if "exp_avg_sq" in state:
        moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return _divisor(_flat(moment, p) / (1 - beta2**step), eps, warming)
    if "square_avg" in state:
        moment = _flat(state["square_avg"], p)
        return _divisor(moment - _flat(state["grad_avg"], p) ** 2 if group.get("centered") else moment, eps, 1.0)
    if "exp_inf" in state:  # torch adds eps before taking the maximum
        largest = _flat(state["exp_inf"], p)
        return _divisor(torch.where(largest > eps, largest, 0.0) ** 2, 0.0, warming)
    if "sum" in state:
        return _divisor(_flat(state["sum"], p), eps, 1.0)
    return None


def _after_step(state: Mapping[str, Any], group: Mapping[str, Any], p: Tensor, gradient: Tensor) -> dict[str, Any]:
    """Return the flat moments after one more step, zero where the second moment is zero now: these stay left out."""
    key, decay = ("exp_avg_sq", group["betas"][1]) if "exp_avg_sq" in state else ("square_avg", group["alpha"])
    decay = float(decay)
    before = _flat(state[key], p)
    after = decay * before + (1 - decay) * gradient**2
    if group.get("amsgrad"):
        key, before = "max_exp_avg_sq", _flat(state["max_exp_avg_sq"], p)
        after = torch.maximum(before, after)
    coming = {**state, "step": float(state.get("step", 0)) + 1, key: torch.where(before > 0, after, 0.0)}
    if group.get("centered"):
        coming["grad_avg"] = decay * _flat(state["grad_avg"], p) + (1 - decay) * gradient
    return coming


_MOMENTS = {"exp_avg_sq", "square_avg", "exp_inf", "sum"}


def _flat(moment: Tensor, p: Tensor) -> Tensor:
    """Flatten a moment; of complex parameters optimizers keep one for either part, as a complex number."""
    return as_real(to_local(moment)).reshape(-1).to(_wide(p))


def _wide(p: Tensor) -> torch.dtype:
    """Return the dtype of flat vectors."""
    return torch.promote_types(real_dtype(p), torch.float32)


def _divisor(squared: Tensor, eps: float, warming: float) -> Tensor:
    root = squared.sqrt()  # NaN where rounding has made a centered moment negative
    # Zero over itself is NaN; on a CPU that is several times faster than a mask.
    present = root / root
    return root.add_(eps).mul_(warming).mul_(present)
