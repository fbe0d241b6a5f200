"""Critical sharpness: the step length at which the loss rises above its start, from forward passes only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dynamon.curvature.operators.parameters import FlatParameters, Parameters
from dynamon.isolation.evaluations import Evaluations
from dynamon.kernels import widened
from dynamon.kernels.arguments import check_count, check_tensor

_ROUNDING = 8  # units in the last place of the loss that are not a difference
_OTHER_ROUNDINGS = 2  # evaluations at weights that round another way, where a part is computed in half precision


@dataclass(frozen=True)
class CriticalSharpness:
    """Bracket of the multiple of a step at which the loss is back at its starting value.

    Attributes:
        multiple: Multiple of the step at which the loss is back at its starting value; beyond it the loss is higher. 0
            if the step leads uphill from the start, infinity if the loss is lower at the largest multiple tried, NaN
            if differences of the loss are lost in its rounding.
        lower: A multiple at which the loss is lower than at the start.
        upper: A multiple at which it is higher.
        rate: Learning rate of the step, if one was given.
        evaluations: Number of forward passes.
    """

    multiple: float
    lower: float
    upper: float
    rate: float | None
    evaluations: int

    @property
    def sharpness(self) -> float:
        """2 over the critical learning rate; NaN without a rate or a finite positive multiple."""
        if self.rate is None or not 0 < self.multiple < math.inf:
            return math.nan
        return 2 / (self.rate * self.multiple)


def critical_sharpness(
    loss_fn: Callable[[], Tensor],
    params: Parameters | FlatParameters,
    update: Tensor,
    *,
    rate: float | None = None,
    tol: float = 1 / 16,
    max_evaluations: int = 16,
) -> CriticalSharpness:
    r"""Find the largest multiple c of an update with :math:`L(\theta + c u) \le L(\theta)` by line search.

    The multiple is doubled, quartered or extrapolated until it is bracketed. The bracket is then narrowed by the root
    of the parabola through the start and the bracket's ends until that root changes by less than ``tol``. On a
    quadratic loss and a gradient step of rate lr, c lr = 2 / (directional sharpness), hence ``sharpness = 2 / (c lr)``.
    It needs neither gradients nor second derivatives, and memory for two copies of the weights.

    Args:
        loss_fn: Called at perturbed weights; returns the scalar loss. Random numbers are the same each time.
        params: The parameters, or a mapping from their names. They are restored bit for bit. Buffers change with each
            evaluation unless :func:`dynamon.isolation.preserve.preserve_state` is active, which restores them.
        update: Flat ``[n]``: the step from the present weights.
        rate: The learning rate contained in the update, if there is one.
        tol: Relative change of the multiple at which the search ends.
        max_evaluations: Upper limit on forward passes, 3 or more.

    Raises:
        TypeError: If the update is not a tensor.
        ValueError: If the update does not fit the parameters, is zero or not finite, or an argument is out of range.
        FloatingPointError: If the loss at the present weights is not finite.

    Cost: usually 5 to 7 forward passes with one host read each; 2 more where a part is computed in half precision, to
    measure its rounding. Reference: Kalra et al., arXiv 2601.16979.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import critical_sharpness
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> def loss_fn():
        ...     return (w * torch.tensor([4.0, 4.0]) * w).sum() / 2  # curvature 4 in each direction
        >>> found = critical_sharpness(loss_fn, [w], update=-0.1 * 4 * w.detach(), rate=0.1)
        >>> round(found.sharpness, 3), round(found.multiple, 3)
        (4.0, 5.0)
    """
    flat = FlatParameters.of(params)
    check_tensor("update", update, f"[{flat.size}]")
    check_count("max_evaluations", max_evaluations, least=3)
    if update.shape != (flat.size,):
        raise ValueError(f"update must have shape [{flat.size}], got {tuple(update.shape)}.")
    if not float(flat.space.total(widened(update.any()))):
        raise ValueError("the update is zero, so there is no critical multiple of it.")
    if float(flat.space.total(widened((~torch.isfinite(update)).any()))):
        raise ValueError("the update holds NaN or infinity, so there is no critical multiple of it.")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}.")
    evaluations, watch, count = Evaluations(), _Dtypes(), 0

    def value(step: Tensor) -> Tensor:
        nonlocal count
        count += 1
        with torch.no_grad(), flat.perturbed(step), evaluations.another():
            return loss_fn()

    with watch:
        first = value(torch.zeros_like(update))
    start = float(first)
    if not math.isfinite(start):
        raise FloatingPointError("the loss at the present weights is not finite.")
    eps = max(torch.finfo(dtype).eps for dtype in (first.dtype, flat.tensors[0].dtype))
    noise = _ROUNDING * eps * abs(start)
    coarsest = max(watch.eps, eps)
    if coarsest > torch.finfo(torch.float32).eps:
        # A loss in float32 of outputs in half precision has the rounding of these: see what it does.
        others = (value(_other_rounding(flat, coarsest, seed)) for seed in range(_OTHER_ROUNDINGS))
        noise = max(
            _ROUNDING * torch.finfo(first.dtype).eps * abs(start), 2 * max(abs(float(o) - start) for o in others)
        )
    search = _Search(lambda multiple: float(value(multiple * update)) - start, noise, tol, max_evaluations - count)
    multiple = search.run()
    return CriticalSharpness(multiple, search.lower, search.upper, rate, count)


class _Dtypes(TorchFunctionMode):
    """Record the coarsest floating point dtype in which anything was computed.

    Attributes:
        eps: Its spacing at 1.
    """

    eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and record the dtype of its result."""
        found = func(*args, **(kwargs or {}))
        for item in found if isinstance(found, tuple | list) else (found,):
            if isinstance(item, Tensor) and item.dtype.is_floating_point:
                self.eps = max(self.eps, torch.finfo(item.dtype).eps)
        return found


def _other_rounding(params: FlatParameters, eps: float, seed: int) -> Tensor:
    """Return a step of half a unit in the last place per weight, with random signs, to probe half precision."""
    weights = params.flatten(params.tensors).detach().abs()
    generator = params.space.generator(seed, weights.device)
    signs = torch.rand(len(weights), generator=generator, device=weights.device) - 0.5
    return eps / 2 * torch.copysign(weights, signs.to(weights))


class _Search:
    """Bracket and narrow the multiple at which a function that starts downhill crosses zero."""

    def __init__(self, rise: Callable[[float], float], noise: float, tol: float, evaluations: int) -> None:
        self._rise, self._noise, self._tol, self._left = rise, noise, tol, evaluations
        self.lower, self.upper = 0.0, math.inf
        # The rise per multiple: a straight line where the loss is quadratic.
        self._slope_lower, self._slope_upper = math.nan, math.inf
        self._seen: list[tuple[float, float]] = []

    def run(self) -> float:
        """Return the crossing: 0 if the start leads uphill, infinity if no multiple does, NaN if rounding hides it."""
        guess = 1.0
        while self._left > 0:
            if not self._try(guess):  # the rise is lost in rounding
                if self.lower > 0:
                    return guess if self._is_deep else math.nan  # back at the start, as closely as can be told
                if self.upper < math.inf:
                    break
                guess *= 10
            elif self.upper == math.inf:
                guess = self._further()
            elif self.lower == 0:
                guess = self._nearer()
            else:
                last, guess = guess, self._crossing()
                if abs(guess - last) <= self._tol * guess:
                    return guess
        if self.lower == 0:
            return 0.0 if self._begins_uphill else math.nan
        return math.inf if self.upper == math.inf else self._crossing()

    def _try(self, multiple: float) -> bool:
        """Evaluate one multiple and return whether the loss differs from that at the start by more than rounding."""
        self._left -= 1
        rise = self._rise(multiple)
        if abs(rise) <= self._noise:
            return False
        self._seen.append((multiple, rise / multiple if math.isfinite(rise) else math.inf))
        if rise <= 0:
            self.lower, self._slope_lower = multiple, rise / multiple
        else:  # NaN is uphill too
            self.upper, self._slope_upper = multiple, rise / multiple if math.isfinite(rise) else math.inf
        return True

    @property
    def _is_deep(self) -> bool:
        """True where the loss falls far enough along the step for its return to be told from rounding."""
        return max(-multiple * slope for multiple, slope in self._seen) > 2 * self._noise

    @property
    def _begins_uphill(self) -> bool:
        """True where the rise per multiple, positive at every evaluation, extrapolates to a positive slope at zero.

        Only where it was seen at the whole update or less: what far multiples of it do says nothing about its start.
        """
        if len(self._seen) < 2 or self.upper > 1:
            return False
        root = self._extrapolated()
        return not 0 < root < self.upper

    def _further(self) -> float:
        """Return a multiple beyond the root of the parabola through two downhill points, or twice the last one."""
        root = self._extrapolated()
        return min(1.1 * root, 1000 * self.lower) if root > self.lower else 2 * self.lower

    def _nearer(self) -> float:
        """Return a multiple below the root of the parabola through two uphill points, or a quarter of the last one."""
        root = self._extrapolated()
        return max(0.9 * root, self.upper / 1000) if 0 < root < self.upper else self.upper / 4

    def _extrapolated(self) -> float:
        """Return the zero of the line through the last two slopes; NaN before there are two."""
        if len(self._seen) < 2:
            return math.nan
        (near, near_slope), (far, far_slope) = sorted(self._seen[-2:])
        rising = far_slope - near_slope
        return near - near_slope * (far - near) / rising if 0 < rising < math.inf else math.nan

    def _crossing(self) -> float:
        """Return the zero of the line through both slopes, or the midpoint where the upper end is not finite."""
        width = self.upper - self.lower
        if self._slope_upper == math.inf:
            return self.lower + width / 2
        share = -self._slope_lower / (self._slope_upper - self._slope_lower)
        return self.lower + width * share
