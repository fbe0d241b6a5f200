r"""Layer normalisation whose second derivative takes few device calls.

torch writes that derivative out in some 80 elementwise operations; in a transformer these are more than half of a
Hessian product. With :math:`\hat x = (x - \mu) r` and the projection :math:`P u = u - \overline{u} - \hat x\,
\overline{\hat x u}`, means over the d numbers that are normalised, the gradient in x is :math:`r P (w g)`, and
:math:`r P` is the backward pass itself: one call. Everything below is made of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_OWN = (F.layer_norm, torch.layer_norm)


class FewerCalls(TorchFunctionMode):
    """Mode in which layer normalisation has its own second derivative; value and gradient stay torch's.

    Weight normalisation is written out, since torch's second derivative of it takes the norms for constants.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function or its replacement."""
        if func in _OWN and not _is_watched() and not _is_transformed():
            found = _normalised(*args, **(kwargs or {}))
            if found is not None:
                return found
        if func is torch._weight_norm:
            return _weight_normed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_watched() -> bool:
    """Return whether hooks handle saved tensors, as in a checkpoint, whose recomputation lacks this mode."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _is_transformed() -> bool:
    """Return whether ``torch.func`` or forward differentiation is active, which need more of a function."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active() or torch.autograd.forward_ad._current_level >= 0


def _weight_normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``g v / |v|``, with norms over all dimensions but one (over all where ``dim`` is -1)."""
    others = [d for d in range(v.ndim) if d != dim]  # none is left out for -1
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _is_batched(gradient: Tensor) -> bool:
    """Return whether a gradient stands for many, as in ``torch.autograd.grad(..., is_grads_batched=True)``."""
    asked = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return asked is not None and bool(asked(gradient))


def _normalised(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> Tensor | None:
    """Compute the value, or return None where this call is left to torch."""
    given = [t for t in (input, weight, bias) if t is not None]
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in given) or not input.numel():
        return None
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):  # which has this one in float32
        given = [t.float() if t.is_floating_point() and t.dtype != torch.float64 else t for t in given]
    if len({t.dtype for t in given}) > 1 or not given[0].is_floating_point() or not torch.is_grad_enabled():
        return None
    rest = iter(given)
    x, w, b = next(rest), None if weight is None else next(rest), None if bias is None else next(rest)
    return _LayerNorm.apply(x, w, b, list(normalized_shape), eps)  # type: ignore[no-untyped-call]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        value, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.rest = shape, eps, bias is not None
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        if _is_batched(gradient):  # many at once, as is_grads_batched has it, where a function of ours loses its graph
            shape, _, biased = ctx.rest
            dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
                gradient, x, shape, mean, scale, weight, None, [True, weight is not None, False]
            )
            return dx, dw, _over_rows(gradient, len(shape)) if biased else None, None, None
        found = _Backward.apply(gradient, x, weight, mean, scale, *ctx.rest)  # type: ignore[no-untyped-call]
        return *found, None, None


class _Backward(torch.autograd.Function):
    """The gradient, linear in the incoming one, so that its derivative is that of a matrix-vector product."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        shape: list[int],
        eps: float,
        biased: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, mean, scale)
        ctx.rest = shape, eps
        both = biased and weight is not None  # the weight stands in for the bias, of which only the form is looked at
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            g.contiguous(), x, shape, mean, scale, weight, weight if both else None, [True, weight is not None, both]
        )
        return dx, dw, db if both else _over_rows(g, len(shape)) if biased else None

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, weight, mean, scale = ctx.saved_tensors
        shape, eps = ctx.rest
        dims = list(range(-len(shape), 0))
        if torch.is_grad_enabled():  # a third derivative is wanted, which is not to take these for constants
            mean = x.mean(dims, keepdim=True)
            scale = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()

        def projected(u: Tensor) -> Tensor:
            return torch.ops.aten.native_layer_norm_backward(
                u.contiguous(), x, shape, mean.detach(), scale.detach(), None, None, [True, False, False]
            )[0]

        unit = (x - mean) * scale
        of_g: Tensor | None = None
        of_x: Tensor | None = None
        of_weight: Tensor | None = None
        if v is not None:
            u = g if weight is None else g * weight
            pu, pv = projected(u), projected(v)
            of_g = pv if weight is None else pv * weight
            of_weight = None if weight is None else _over_rows(g * pv, len(shape))
            of_x = unit * _along(v * pu, dims)
            of_x = of_x.addcmul_(pu, _along(v * unit, dims)).addcmul_(pv, _along(u * unit, dims))
            of_x = of_x.mul_(scale * (-1 / unit.shape[-len(shape) :].numel()))
        if vw is not None:
            of_g = unit * vw if of_g is None else of_g.addcmul(unit, vw)
            more = projected(g * vw)
            of_x = more if of_x is None else of_x.add_(more)
        if vb is not None:
            of_g = vb.expand_as(g) if of_g is None else of_g + vb
        return of_g, of_x, of_weight, None, None, None, None, None


def _along(tensor: Tensor, dims: list[int]) -> Tensor:
    """Sum over the last dimensions and keep them."""
    return tensor.sum(dims, keepdim=True)


def _over_rows(tensor: Tensor, count: int) -> Tensor:
    """Sum over the other dimensions."""
    return tensor.sum(list(range(tensor.ndim - count))) if tensor.ndim > count else tensor
