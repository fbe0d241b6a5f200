"""Products with the generalised Gauss-Newton matrix."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynamon.curvature.operators.backends import (
    NoSecondDerivativeError,
    check_scalar_loss,
    refuse_nodes,
    second_derivatives,
    twice_differentiable,
)
from dynamon.curvature.operators.base import LinearOperator
from dynamon.curvature.operators.blocks import BlockOperator
from dynamon.curvature.operators.custom import CustomFunctions
from dynamon.curvature.operators.graphs import rounding_behind
from dynamon.curvature.operators.parameters import FlatParameters, Parameters
from dynamon.curvature.operators.scaling import LOWER, is_whole, length_scale, loss_scale, relative
from dynamon.isolation.evaluations import Evaluations, full_precision
from dynamon.kernels import widened

Outputs = Tensor | Sequence[Tensor]
_TRANSPOSED = 1e-2  # relative disagreement of the Jacobian with its transpose that is not rounding


class GGNOperator(LinearOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = J^\top H_L J` as an operator.

    J is the Jacobian of the outputs in the parameters and :math:`H_L` the Hessian of the loss in the outputs. For a
    loss that is convex in the outputs (cross-entropy, squared error) G is positive semidefinite: it is the Hessian
    without the curvature of the network itself, and the Fisher matrix for cross-entropy and Gaussian likelihoods.

    :math:`Jv` is computed by differentiating :math:`J^\top u` in u, which is exact through every layer that can be
    differentiated twice. Forward-mode differentiation is not used: it is wrong through some layers.

    Args:
        output_fn: Called once; returns the network's outputs, a tensor or a sequence of tensors of which none depends
            on another.
        loss_fn: Called once with the result of ``output_fn``; returns the scalar loss as a function of the outputs.
        params: The parameters, or a mapping from their names.

    Attributes:
        loss: The value of the loss, without graph.
        rows: Number of entries in the outputs (samples times outputs), an upper bound on the rank of G.
        backend: ``"double_backward"``.

    Raises:
        TypeError: On outputs or a loss that are not tensors.
        ValueError: On no parameters, outputs without a graph, or a loss that is not a scalar or does not depend on the
            outputs.
        NoSecondDerivativeError: (a RuntimeError) where an operation cannot be differentiated twice.
        RuntimeError: In a product where a parameter changed after construction.

    Cost: about that of a Hessian product. Memory: the graph of one forward and backward pass.
    Reference: Schraudolph, "Fast curvature matrix-vector products", 2002.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import GGNOperator, top_eigenvalues
        >>> model, inputs = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> ggn = GGNOperator(lambda: model(inputs), lambda z: z.square().sum() / 2, model.parameters())
        >>> round(float(top_eigenvalues(ggn).values[0]), 3)  # |x|^2
        5.0
    """

    backend = "double_backward"

    def __init__(
        self, output_fn: Callable[[], Outputs], loss_fn: Callable[..., Tensor], params: Parameters | FlatParameters
    ) -> None:
        """Evaluate outputs and loss and keep the graphs of both."""
        self.parameters = FlatParameters.of(params)
        device = self.parameters.tensors[0].device
        super().__init__(self.parameters.size, self.parameters.dtype, device, self.parameters.space)
        evaluations = Evaluations()
        with evaluations.first(), twice_differentiable(self.parameters):
            given = output_fn()
            self._outputs = _as_tensors(given)
            loss = loss_fn(given)
            check_scalar_loss(loss)
            refuse_nodes([loss])
            self._as_after_loss = evaluations.mark()
            self._scale, self.rounding = loss_scale([loss]), rounding_behind([loss])
            self._differentiate_loss(loss)
            self._directions = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
            with second_derivatives():
                pulled = self.parameters.differentiate(self._outputs, self._directions, create_graph=True)
            self.loss = loss.detach()
        if all(g is None for g in pulled):
            raise ValueError("the outputs do not depend on any of the parameters.")
        refuse_nodes([g for g in pulled if g is not None])
        # Parameters in which the outputs are linear with no graph of their own, a bias say, still depend on the u.
        self._pulled = [g if g is not None and g.requires_grad else None for g in pulled]
        self.rows = sum(z.numel() for z in self._outputs)
        self.parameters.mark_unchanged()
        self._check_transposed()

    def _check_transposed(self) -> None:
        """Check ``<u, J v> = <J^T u, v>``, which fails where a custom function's backward builds no graph."""
        if not CustomFunctions(self._outputs):
            return
        generator = torch.Generator(self.device).manual_seed(0)
        v = torch.randn(self.shape[0], generator=generator, device=self.device, dtype=self.dtype)
        u = self.split_rows(torch.randn(self.rows, generator=generator, device=self.device, dtype=self.dtype))
        ahead = [widened((a * b).sum()) for a, b in zip(u, self.push(v), strict=True)]
        back = widened(self.pull(u)) @ widened(v)
        size = widened(torch.linalg.vector_norm(self.pull(u))) * widened(torch.linalg.vector_norm(v))
        if float((sum(ahead) - back).abs()) > _TRANSPOSED * float(size):
            raise NoSecondDerivativeError("a custom autograd function drops out of the Jacobian's products.")

    def _differentiate_loss(self, loss: Tensor) -> None:
        """Compute the loss's gradient in the outputs with its graph, at the largest scale that does not overflow."""
        custom = CustomFunctions([loss], self._outputs)
        while True:
            weight = None if self._scale == 1 else torch.full_like(loss, self._scale)
            with full_precision(), custom.watched():
                slopes = torch.autograd.grad(loss, self._outputs, weight, create_graph=True, allow_unused=True)
            if all(g is None for g in slopes):
                raise ValueError("the loss does not depend on the outputs.")
            if self._scale == 1 or all(is_whole(g) for g in slopes if g is not None) or not is_whole(loss):
                break
            self._scale /= LOWER
        if custom.silent:  # other terms of the loss may have curvature, which is then a part of it only
            names = ", ".join(custom.silent)
            raise NoSecondDerivativeError(f"a custom autograd function ({names}) hides the curvature of the loss.")
        self._slopes = [g if g is not None and g.requires_grad else None for g in slopes]

    def _product(self, vector: Tensor) -> Tensor:
        return self.block_product(vector)

    def block_product(self, vector: Tensor, block: Sequence[int] | None = None) -> Tensor:
        """Compute ``G_bb v`` for the parameters at some positions; see :meth:`block`."""
        if self._scale == 1:
            return self.pull(self._curve(self._push(vector, block)), block)
        length = length_scale(vector)
        product = self.pull(self._curve(self._push(vector * length, block)), block)
        for _ in range(8):  # as many times as it takes to lower the length to nothing
            if is_whole(product):
                break
            length = length / LOWER
            product = self.pull(self._curve(self._push(vector * length, block)), block)
        return product / (self._scale * length)

    def push(self, vector: Tensor, block: Sequence[int] | None = None) -> list[Tensor]:
        """Compute ``J v``, the change of the outputs along a flat vector (of a block, where one is given)."""
        if self._scale == 1:
            return self._push(vector, block)
        length = length_scale(vector)
        return [u.float() / length for u in self._push(vector * length, block)]

    def _push(self, vector: Tensor, block: Sequence[int] | None) -> list[Tensor]:
        self.parameters.check_unchanged()
        part = self.parameters if block is None else self.parameters.subset(block)
        pulled = self._pulled if block is None else [self._pulled[i] for i in block]
        pairs = [(g, v.to(g.dtype)) for g, v in zip(pulled, part.split(vector), strict=True) if g is not None]
        if not pairs:
            return [torch.zeros_like(z) for z in self._outputs]
        gradients, vectors = zip(*pairs, strict=True)
        self._as_after_loss()
        with twice_differentiable(self.parameters), second_derivatives(), full_precision():
            pushed = torch.autograd.grad(gradients, self._directions, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(z) if u is None else u for u, z in zip(pushed, self._outputs, strict=True)]

    def curve(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """Compute ``H_L u``, the Hessian of the loss in the outputs times a change of the outputs."""
        curved = self._curve(directions)
        return curved if self._scale == 1 else [c.float() / self._scale for c in curved]

    def _curve(self, directions: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(g, u.to(g.dtype)) for g, u in zip(self._slopes, directions, strict=True) if g is not None]
        if not pairs:  # a loss that is linear in the outputs
            return [torch.zeros_like(z) for z in self._outputs]
        slopes, vectors = zip(*pairs, strict=True)
        with twice_differentiable(self.parameters), second_derivatives(), full_precision():
            curved = torch.autograd.grad(slopes, self._outputs, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(z) if u is None else u for u, z in zip(curved, self._outputs, strict=True)]

    def pull(self, directions: Sequence[Tensor], block: Sequence[int] | None = None) -> Tensor:
        """Compute ``J^T u``, a change of the outputs carried back to the parameters, flat."""
        self.parameters.check_unchanged()
        part = self.parameters if block is None else self.parameters.subset(block)
        self._as_after_loss()
        with twice_differentiable(self.parameters):
            weights = [u.to(z.dtype) for u, z in zip(directions, self._outputs, strict=True)]
            products = part.differentiate(self._outputs, weights)
        return part.flatten(products)

    def initial_direction(self) -> Tensor:
        """Return the gradient of the loss through the outputs."""
        slopes = [
            torch.zeros_like(z) if g is None else g.detach() for g, z in zip(self._slopes, self._outputs, strict=True)
        ]
        return self.pull(slopes) / self._scale

    def share_beside(self, loss: Tensor) -> float:
        """Compute the share of a loss's gradient that bypasses the outputs, through another head or a penalty.

        Args:
            loss: The loss that contains the outputs, with the graph of its evaluation.

        Returns:
            The distance of :meth:`initial_direction` from the gradient of the loss, over the gradient's length.
        """
        with twice_differentiable(self.parameters):  # a checkpoint computes its part again, in the kernels of before
            found = self.parameters.differentiate(loss, torch.full_like(loss, self._scale))
        gradient = self.parameters.flatten(found) / self._scale
        norm = self.parameters.space.norm
        return relative(norm(gradient - self.initial_direction()), norm(gradient))

    def split_rows(self, vector: Tensor) -> list[Tensor]:
        """Split a flat vector ``[rows]`` into the shapes of the outputs."""
        pieces = vector.split([z.numel() for z in self._outputs])
        return [piece.view_as(z).to(z.dtype) for piece, z in zip(pieces, self._outputs, strict=True)]

    def block(self, chosen: str | Sequence[str] | Sequence[Tensor]) -> BlockOperator:
        """Return the diagonal block of some parameters on the same graph, as in :class:`HessianOperator`."""
        return BlockOperator(self, self.parameters.block(chosen))


def _as_tensors(outputs: object) -> list[Tensor]:
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs) if isinstance(outputs, list | tuple) else []
    message = "output_fn must return a tensor, or a list of tensors, that depend on the parameters."
    if not found or not all(isinstance(z, Tensor) for z in found):
        raise TypeError(message)
    if not all(z.requires_grad for z in found):
        raise ValueError(message)
    return found
