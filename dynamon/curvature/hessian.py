"""Hessian products by double backward on a retained graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamon.curvature.operators import LinearOperator

_BACKENDS = ("auto", "double_backward")


class HessianOperator(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2_\theta L(\theta)` of a scalar loss, as products :math:`H v`.

    The loss is evaluated once, at construction, and its gradient's graph is kept:
    :math:`H v = \nabla_\theta \langle \nabla_\theta L, v \rangle` then costs about two gradients a product
    instead of three and a half. Attention runs through the math kernel, because the fused ones have no
    second derivative. ``.grad`` is neither read nor written.

    Args:
        loss_fn: Called once without arguments; returns the scalar loss, differentiable in ``params``.
        params: The parameters to differentiate in, in the order of the flat vectors. Those that do not
            take part in the loss get zero rows.
        backend: ``"auto"`` or ``"double_backward"``, which today are the same.

    Attributes:
        loss: The value of the loss, a 0-d tensor without graph.
        gradient: The flat gradient ``[n]`` without graph.
        backend: How the products are made.

    Raises:
        ValueError: On an unknown backend, no parameters, a loss that is not a scalar tensor or does not
            depend on any of the parameters, or parameters on several devices or in several dtypes.
        RuntimeError: Where an operation in the graph has no second derivative (at construction if it is marked
            ``once_differentiable``, else in a product), and in a product where a parameter changed after
            construction.

    Memory: the graph of one forward and backward pass at the size of the batch in ``loss_fn``.
    """

    def __init__(self, loss_fn: Callable[[], Tensor], params: Sequence[Tensor], *, backend: str = "auto") -> None:
        """Evaluate the loss and keep the graph of its gradient."""
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}.")
        self._params = list(params)
        _check_params(self._params)
        first = self._params[0]
        super().__init__(sum(p.numel() for p in self._params), first.dtype, first.device)
        self.backend = "double_backward"
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _hooks_off(self._params):
            loss = loss_fn()
            check_scalar_loss(loss)
            _refuse_nodes([loss])
            gradients = torch.autograd.grad(loss, self._params, create_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError("the loss does not depend on any of the parameters.")
        _refuse_nodes([g for g in gradients if g is not None])
        self.loss = loss.detach()
        self.gradient = _flatten([g.detach() if g is not None else None for g in gradients], self._params)
        # A gradient that is constant in the parameters (a linear layer's last bias, say) has no graph.
        self._curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        self._versions = [p._version for p in self._params]

    def _product(self, vector: Tensor) -> Tensor:
        if [p._version for p in self._params] != self._versions:
            raise RuntimeError(
                "a parameter changed after this HessianOperator was made; its graph belongs to the old "
                "weights. Make a new operator after each optimizer step."
            )
        if not self._curved:
            return torch.zeros_like(vector)
        pieces = [
            piece.view_as(p)
            for piece, p in zip(vector.split([p.numel() for p in self._params]), self._params, strict=True)
        ]
        with sdpa_kernel(SDPBackend.MATH), _hooks_off(self._params):
            products = torch.autograd.grad(
                [g for _, g in self._curved],
                self._params,
                [pieces[i].to(g.dtype) for i, g in self._curved],
                retain_graph=True,
                allow_unused=True,
            )
        return _flatten(list(products), self._params)


def check_scalar_loss(loss: object) -> None:
    """Say in one sentence what is wrong with a loss that cannot be differentiated.

    Raises:
        ValueError: If ``loss`` is not a tensor, not a scalar, or carries no graph.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss must be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar tensor, got shape {tuple(loss.shape)}; reduce it first.")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter (it carries no graph).")


def _check_params(params: Sequence[Tensor]) -> None:
    if not params:
        raise ValueError("params is empty: there is nothing to differentiate in.")
    if len({(p.device, p.dtype) for p in params}) > 1:
        kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
        raise ValueError(f"all parameters must share one dtype and device, got {', '.join(kinds)}.")


_REFUSED = {
    "torch::autograd::Error": "the loss uses an operation marked once_differentiable, which has no second derivative.",
    "CheckpointFunctionBackward": "the loss uses reentrant activation checkpointing, which has no second derivative; "
    "use checkpoint(..., use_reentrant=False).",
}


def _refuse_nodes(tensors: Sequence[Tensor]) -> None:
    """Refuse operations whose part of a product would silently be zero."""
    seen, waiting = set(), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() in _REFUSED:
            raise RuntimeError(_REFUSED[node.name()])
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def _hooks_off(params: Sequence[Tensor]) -> Iterator[None]:
    """Parameter hooks (clamping, logging) are meant for gradients of training, not for products."""
    hooked = [(p._backward_hooks, dict(p._backward_hooks)) for p in params if p._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in hooked:
            hooks.update(own)


def _flatten(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """One flat vector; zeros stand in for a tensor that is not there."""
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t).reshape(-1).to(p.dtype)
            for t, p in zip(tensors, params, strict=True)
        ]
    )
