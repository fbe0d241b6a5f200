"""Dual norms of gradients: from sums over entries where the norm allows it, else from the matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.distributed.ranks import Ranks
from dynamon.distributed.work_sharing import share_work
from dynamon.kernels import widest_dtype
from dynamon.kernels.constants import on_device
from dynamon.layers import Layer
from dynamon.norms import Norm, dual_norms

_MOST_SETS = 16  # of layers that have gradients, in turns


class DualNorms:
    """Takes the dual norms of tensors that are laid out as the parameters of some layers.

    Args:
        layers: L layers, on one device.
        norms: The norm of each.
        ranks: The processes that hold them: one alone where they are whole.
    """

    def __init__(self, layers: Sequence[Layer], norms: Sequence[Norm], ranks: Ranks) -> None:
        """Find the layers whose dual norm takes the matrix."""
        self._layers, self._norms, self._ranks = list(layers), list(norms), ranks
        self._need_matrix = {i for i, norm in enumerate(norms) if norm.needs_matrix}
        self._constants: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def places(self, indices: Sequence[int]) -> list[int]:
        """Return the positions among ``indices`` of the S layers whose dual norm takes the matrix."""
        return [place for place, i in enumerate(indices) if i in self._need_matrix]

    def of_matrices(self, indices: Sequence[int], tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        """Take the dual norms ``[T, S]`` of T tensors for each of the S layers among ``indices`` that take the matrix.

        Sharded ones are gathered, each layer's on one process, inside
        :meth:`dynamon.distributed.ranks.Ranks.collective_section`; what went elsewhere is zero.

        Args:
            indices: Positions of layers.
            tensors: T lists of S tensors.
        """
        own = [indices[place] for place in self.places(indices)]
        layers, norms = [self._layers[i] for i in own], [self._norms[i] for i in own]
        if not own or not tensors:
            device = self._layers[0].parameter.device
            return torch.empty(len(tensors), len(own), dtype=widest_dtype(device), device=device)

        def measure(chosen: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
            times = len(tensors)
            stacked = [items[row] for row in range(times) for items in wholes]
            found = dual_norms([layers[i] for i in chosen] * times, [norms[i] for i in chosen] * times, stacked)
            return torch.stack(found).view(times, len(chosen))

        likes = [layer.parameter for layer in layers]
        costs = [like.numel() * min(layer.matrix_shape[1:]) for like, layer in zip(likes, layers, strict=True)]
        return share_work(measure, list(zip(*tensors, strict=True)), likes, costs, len(tensors), self._ranks)

    def of(self, indices: Sequence[int], l1: Tensor, l2: Tensor, matrices: Tensor) -> Tensor:
        """Put dual norms ``[..., P]`` together.

        Args:
            indices: Positions of P layers.
            l1: Their sums of magnitudes ``[..., P]``.
            l2: Their Euclidean norms ``[..., P]``.
            matrices: Dual norms ``[..., S]`` of those that take the matrix.
        """
        of_l1, of_l2, where = self._of(tuple(indices), l1)
        duals = of_l1 * l1 + of_l2 * l2
        return duals.index_copy(-1, where, matrices.to(duals)) if len(where) else duals

    def _of(self, indices: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors on l1 and on l2, and the positions of the matrices; kept on the device."""
        if indices not in self._constants:
            if len(self._constants) >= _MOST_SETS:
                self._constants.clear()
            multiples = [self._norms[i].dual_multiples(self._layers[i].size) for i in indices]
            self._constants[indices] = (
                on_device([of_l1 for of_l1, _ in multiples], like.device, like.dtype),
                on_device([of_l2 for _, of_l2 in multiples], like.device, like.dtype),
                on_device(self.places(indices), like.device, torch.int64),
            )
        return self._constants[indices]
