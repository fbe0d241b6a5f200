r"""The stability ratio: how close a run is to the largest step that its curvature allows.

One number for every optimizer with a known stability condition, with threshold 1:
:math:`\lambda_{max}(D^{1/2} P^{-1/2} H P^{-1/2} D^{1/2})`. With mini-batches a value below one is normal. A value that
stays around one (the edge of stability) is normal training too, not a fault.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from dynamon.curvature import Diagonal, Eigenpairs, HessianOperator, LinearOperator, top_eigenvalues
from dynamon.curvature.operators.parameters import FlatParameters, Parameters, names_and_tensors
from dynamon.curvature.operators.preconditioner import NoSecondMomentError, second_moment_scale
from dynamon.curvature.operators.vector_space import VectorSpace
from dynamon.distributed.dtensor import to_local
from dynamon.layers.complex_pairs import as_real, real_dtype, real_numel
from dynamon.norms.geometry import optimizer_family
from dynamon.quantities.weight_decay import is_decoupled


@dataclass(frozen=True)
class StabilityScaling:
    r"""The diagonal scaling that turns a Hessian into a stability ratio.

    Attributes:
        scale: Flat ``[n]``, :math:`\sqrt{D/P}`; zero for excluded coordinates.
        decay: Flat ``[n]`` coupled weight decay to add to the Hessian's diagonal, or None.
        sign: -1 for ``maximize``.
        constant: The value of :math:`D/P` where all coordinates share it and nothing is added, so that the ratio is the
            Hessian's eigenvalue times this; else None.
        excluded: Number of coordinates whose second moment is zero (a token never seen): they have not moved.
    """

    scale: Tensor
    decay: Tensor | None
    sign: float
    constant: float | None
    excluded: int


def stability_ratio(
    loss_fn: Callable[[], Tensor],
    params: Parameters,
    optimizer: Optimizer,
    *,
    ratios: Sequence[float] | Mapping[str, float] | None = None,
    tol: float = 1e-2,
    max_matvecs: int = 40,
    warm_start: Tensor | None = None,
    certify: bool = False,
    seed: int = 0,
) -> Eigenpairs:
    r"""Compute the stability ratio: above 1, gradient descent with this optimizer oscillates and grows.

    :math:`\lambda_{max}(D^{1/2} P^{-1/2} H P^{-1/2} D^{1/2})` with, by optimizer,

    * SGD with momentum b: P = I, D = lr (1 - dampening) / (2 (1 + b)); Nesterov: D = lr (1 + 2 b) / (2 (1 + b));
    * Adam and AdamW: P = (sqrt(v_hat) + eps) (1 - b1^t), D = lr (1 - b1) / ((2 - lr wd) (1 + b1)), with
      ``max_exp_avg_sq`` for AMSGrad and wd the decoupled decay;
    * RMSprop with momentum b: P = sqrt(v) + eps, D = lr / (2 (1 + b)).

    Coupled decay adds wd I to H, ``maximize`` flips the sign of H.

    Args:
        loss_fn: Called once; returns the scalar loss.
        params: Parameters to differentiate in, all of them in ``optimizer``, or a mapping from their names.
        optimizer: Its groups and state are read, not changed.
        ratios: One factor on the learning rate per parameter, as layerwise steering applies it, or a mapping from the
            names of some parameters.
        tol: Relative tolerance, as in :func:`dynamon.curvature.top_eigenvalues`.
        max_matvecs: Upper limit on matvecs.
        warm_start: Vectors of the last measurement, in scaled coordinates.
        certify: Take a run with an upper bound.
        seed: Seed of the start vector.

    Returns:
        :class:`dynamon.curvature.Eigenpairs` of the scaled operator.

    Raises:
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If the optimizer has no known stability condition, has taken no step yet where its state is needed,
            or does not hold a parameter.

    Cost: one gradient graph and the matvecs of the solver. Reference: Cohen et al., "Adaptive gradient methods at the
    edge of stability", arXiv 2207.14484; the momentum forms are exact on quadratics.

    Examples:
        >>> import torch
        >>> from dynamon.stability import stability_ratio
        >>> w = torch.ones(3, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> found = stability_ratio(lambda: (w * torch.tensor([1.0, 5.0, 30.0]) * w).sum() / 2, [w], optimizer)
        >>> round(float(found.values[0]), 3)  # 30 of 2 / 0.1: gradient descent diverges
        1.5
    """
    flat = FlatParameters(params)
    scaling = stability_scaling(optimizer, flat, ratios)
    operator = stability_operator(HessianOperator(loss_fn, flat), scaling)
    return top_eigenvalues(
        operator, tol=tol, max_matvecs=max_matvecs, warm_start=warm_start, certify=certify, seed=seed
    )


def stability_operator(hessian: LinearOperator, scaling: StabilityScaling) -> LinearOperator:
    """Return the operator whose largest eigenvalue is the stability ratio.

    Args:
        hessian: The Hessian on the same flat coordinates.
        scaling: Result of :func:`stability_scaling`.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import Diagonal
        >>> from dynamon.stability import stability_operator, stability_scaling
        >>> w = torch.ones(2, requires_grad=True)
        >>> scaling = stability_scaling(torch.optim.SGD([w], lr=0.5), [w])
        >>> stability_operator(Diagonal(torch.tensor([1.0, 4.0])), scaling) @ torch.ones(2)
        tensor([0.2500, 1.0000])
    """
    signed = hessian if scaling.sign > 0 else scaling.sign * hessian
    if scaling.decay is not None:
        signed = signed + Diagonal(scaling.decay, hessian.space)
    return signed.scaled(scaling.scale)


def stability_scaling(
    optimizer: Optimizer,
    params: Parameters | FlatParameters,
    ratios: Sequence[float] | Mapping[str, float] | None = None,
    space: VectorSpace | None = None,
    gradient: Tensor | None = None,
) -> StabilityScaling:
    r"""Read the scaling of :func:`stability_ratio` from an optimizer's groups and state.

    With a ``gradient`` it is the scaling of the step that would be taken with it. The second moment then answers to
    this gradient, as Adam's does in its step: :math:`v' = \beta_2 v + (1 - \beta_2) g^2`, with bias correction,
    ``max_exp_avg_sq`` and the mean gradient of centered RMSprop carried on likewise. Coordinates whose second moment is
    zero now stay left out.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop of ``torch.optim`` (subclasses included).
        params: The parameters as the optimizer holds them, in the order of the flat coordinates, or a mapping from
            their names.
        ratios: One factor on the learning rate per parameter, a mapping from the names of some, or None for ones.
        space: The space of the flat coordinates where they are sharded.
        gradient: Flat ``[n]``, as the optimizer would receive it (clipped, not multiplied by a gradient scaler, without
            weight decay), or None for the scaling of the last step. SGD's does not depend on it.

    Raises:
        TypeError: As for :func:`stability_ratio`.
        ValueError: As for :func:`stability_ratio`.

    Examples:
        >>> import torch
        >>> from dynamon.stability import stability_scaling
        >>> w = torch.ones(2, requires_grad=True)
        >>> stability_scaling(torch.optim.SGD([w], lr=0.5), [w]).constant
        0.25
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if not has_stability_condition(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} has no known stability condition; "
            "it is known for SGD, Adam, AdamW and RMSprop."
        )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names, params = names_and_tensors(params)
    factors = _factors(names, len(params), ratios)
    space = space or VectorSpace(sum(real_numel(p) for p in params))
    pieces, decays = [], []
    sizes = [real_numel(to_local(p)) for p in params]
    gradients = [None] * len(params) if gradient is None or isinstance(optimizer, SGD) else gradient.split(sizes)
    for p, factor, g in zip(params, factors, gradients, strict=True):
        if id(p) not in group_of:
            raise ValueError("a parameter is not in the optimizer; its stability is not defined.")
        group = group_of[id(p)]
        decays.append(0.0 if is_decoupled(optimizer, group) else float(group.get("weight_decay", 0.0)))
        seen = None if g is None else _as_received(g, group, p, decays[-1])
        pieces.append(_squared_scale(optimizer, group, p, factor, seen))
    squared = space.join(pieces)
    excluded = int(space.total(torch.count_nonzero(squared.isnan())))
    if not isinstance(optimizer, SGD) and excluded == space.size:
        raise NoSecondMomentError("the optimizer has taken no step yet, so its stability ratio is not defined.")
    squared = squared.nan_to_num_(0.0, posinf=torch.inf, neginf=-torch.inf)
    signs = {-1.0 if group_of[id(p)].get("maximize", False) else 1.0 for p in params}
    if len(signs) > 1:
        raise ValueError("some groups maximize and some minimize: there is no single stability ratio.")
    decay = None
    if any(decays):
        decay = space.join([torch.full_like(s, d) for s, d in zip(pieces, decays, strict=True)])
    constant = None
    if decay is None and signs == {1.0} and isinstance(optimizer, SGD):
        rates = {_sgd_factor(group_of[id(p)]) * factor for p, factor in zip(params, factors, strict=True)}
        constant = float(torch.tensor(rates.pop(), dtype=squared.dtype, device="cpu")) if len(rates) == 1 else None
    return StabilityScaling(squared.sqrt_(), decay, signs.pop(), constant, excluded)


def _factors(
    names: Sequence[str] | None, count: int, ratios: Sequence[float] | Mapping[str, float] | None
) -> list[float]:
    """Return one factor per parameter."""
    if not isinstance(ratios, Mapping):
        factors = [1.0] * count if ratios is None else list(ratios)
        if len(factors) != count:
            raise ValueError(f"ratios must be one number for each of the {count} parameters, got {len(factors)}.")
        return factors
    if names is None:
        raise ValueError("ratios by name need params as a mapping, say dict(model.named_parameters()).")
    unknown = sorted(set(ratios) - set(names))
    if unknown:
        raise ValueError(f"ratios name {unknown[0]!r}, which is not among the parameters {list(names)}.")
    return [float(ratios.get(name, 1.0)) for name in names]


def has_stability_condition(optimizer: Optimizer) -> bool:
    """Return whether :func:`stability_ratio` knows the optimizer, by its class and its geometry.

    Examples:
        >>> import torch
        >>> from dynamon.stability import has_stability_condition
        >>> w = torch.ones(2, requires_grad=True)
        >>> has_stability_condition(torch.optim.AdamW([w])), has_stability_condition(torch.optim.NAdam([w]))
        (True, False)
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if not isinstance(optimizer, SGD | Adam | RMSprop) or names & {"NAdam", "RAdam"}:
        return False
    return optimizer_family(optimizer) == ("euclidean" if isinstance(optimizer, SGD) else "sign")


def stability_threshold(optimizer: Optimizer) -> float | None:
    """Return the sharpness at which plain gradient descent becomes unstable, where one number exists.

    Returns:
        2 / lr for SGD; with momentum b 2 (1 + b) / (lr (1 - dampening)), Nesterov 2 (1 + b) / (lr (1 + 2 b)),
        when all groups agree and there is no coupled decay. None otherwise (Adam's threshold depends on its state:
        use :func:`stability_ratio`).

    Examples:
        >>> import torch
        >>> from dynamon.stability import stability_threshold
        >>> w = torch.ones(2, requires_grad=True)
        >>> stability_threshold(torch.optim.SGD([w], lr=0.1)), stability_threshold(torch.optim.Adam([w]))
        (20.0, None)
    """
    if not isinstance(optimizer, SGD) or any(g["weight_decay"] or g["maximize"] for g in optimizer.param_groups):
        return None
    values = {_sgd_factor(group) for group in optimizer.param_groups}
    value = values.pop()
    return None if values or value <= 0 else 1 / value


def _sgd_factor(group: dict[str, object]) -> float:
    rate, momentum = float(group["lr"]), float(group["momentum"])  # type: ignore[arg-type]
    if group["nesterov"]:
        return rate * (1 + 2 * momentum) / (2 * (1 + momentum))
    dampening = float(group["dampening"]) if momentum else 0.0  # type: ignore[arg-type]
    return rate * (1 - dampening) / (2 * (1 + momentum))


def _as_received(gradient: Tensor, group: dict[str, Any], p: Tensor, decay: float) -> Tensor:
    """Return the gradient that enters the moments: turned round by ``maximize``, with coupled decay."""
    signed = -gradient if group.get("maximize", False) else gradient
    return signed + decay * as_real(to_local(p.detach())).reshape(-1).to(signed) if decay else signed


def _squared_scale(
    optimizer: Optimizer, group: dict[str, object], p: Tensor, ratio: float, gradient: Tensor | None = None
) -> Tensor:
    """Compute D / P of one parameter, flat; NaN where nothing moves: no second moment, or a second moment of zero."""
    wide = torch.promote_types(real_dtype(p), torch.float32)
    if isinstance(optimizer, SGD):
        value = _sgd_factor(group) * ratio
        return torch.full((real_numel(to_local(p)),), value, dtype=wide, device=p.device)
    divisor = second_moment_scale(optimizer.state.get(p), group, p, gradient)
    if divisor is None:
        return torch.full((real_numel(to_local(p)),), torch.nan, dtype=wide, device=p.device)
    return divisor.reciprocal_().mul_(_adaptive_factor(optimizer, group, ratio))


def _adaptive_factor(optimizer: Optimizer, group: dict[str, Any], ratio: float) -> float:
    rate = float(group["lr"]) * ratio
    if isinstance(optimizer, RMSprop):  # heavy ball on the preconditioned gradient
        return rate / (2 * (1 + float(group["momentum"])))
    beta1 = float(group["betas"][0])
    decay = float(group["weight_decay"]) if is_decoupled(optimizer, group) else 0.0
    if rate * decay >= 2:
        raise ValueError(f"lr * weight_decay is {rate * decay:.3g}: from 2 on the decay alone diverges.")
    return rate * (1 - beta1) / ((2 - rate * decay) * (1 + beta1))
