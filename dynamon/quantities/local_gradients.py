"""Compares the gradients of one process, before DDP averages them, with the mean."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dynamon.distributed.ranks import Ranks
from dynamon.layers import Layer
from dynamon.layers.complex_pairs import as_real
from dynamon.quantities.scales import Scale

Norms = Callable[[list[Tensor | None]], Tensor]


class LocalGradients:
    r"""Keeps what the backward passes of one optimizer step give on this process, and compares it with the mean.

    With :math:`g_r` the gradient of process r and :math:`G` the mean over R processes, which is what DDP leaves in
    ``.grad``,

    .. math:: \frac1R \sum_r \frac{2}{R-1} \|g_r - G\|_*^2

    has the unit of :class:`dynamon.quantities.noise.NoiseEstimator`: the mean square of the difference of two
    independent gradients of all processes' samples. All are taken at the same weights, so there is no curvature in it.

    Hooks on the parameters see ``.grad`` when it has been accumulated (under ``no_sync`` over several batches) and
    before DDP's reducer averages it. They are there between :meth:`open` and :meth:`compare` only and keep copies, so
    that training is bitwise what it is without them. Gradients that are not accumulated, of a penalty say, do not
    count.

    Args:
        layers: L layers, on one device.
        ranks: The processes.

    Attributes:
        is_open: Whether the backward passes are watched.

    Memory: one copy of the gradients while open. Cost: one all-reduce of 2 L + 3 numbers, without a host read.
    """

    def __init__(self, layers: Sequence[Layer], ranks: Ranks) -> None:
        """Begin closed."""
        self._layers, self._ranks = list(layers), ranks
        self._kept: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._error: Exception | None = None
        self.is_open = False

    def open(self) -> None:
        """Watch the backward passes from here on. An error is raised when the gradients are compared."""
        self._kept = {}  # of a step that was skipped
        if self.is_open:
            return
        self.is_open = True
        try:
            for index, layer in enumerate(self._layers):
                if layer.parameter.requires_grad:
                    self._handles.append(layer.parameter.register_post_accumulate_grad_hook(self._keeper(index)))
        except Exception as error:  # told at the reduction, where all processes hear of it
            self._error = error

    def close(self) -> None:
        """Stop watching and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept, self._error, self.is_open = [], {}, None, False

    def _keeper(self, index: int) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._kept[index] = as_real(parameter.grad.detach().clone())

        return keep

    def compare(
        self,
        means: Sequence[Tensor | None],
        norms: Norms,
        scale: Scale = 1.0,
        doubt: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Measure how far the gradients of the processes lie apart; all that are open call this, or :meth:`give_up`.

        Args:
            means: The gradient of each layer, averaged over the processes; None where there is none.
            norms: From L differences (None where there is no mean) to their dual and Euclidean norms ``[2, L]``.
            scale: Factor on the gradients that were kept, for those an AMP scaler has scaled.
            doubt: As for :func:`all_certain`.

        Returns:
            ``[2, L]``, the same on every process: the square root of the mean above, in the dual and in the Euclidean
            norm; NaN on all of them where one has failed. And what :func:`all_certain` returns.
        """

        def measure() -> Tensor:
            if self._error is not None:
                raise self._error
            squares = norms(self._differences(means, scale)).square()
            return torch.cat([squares.reshape(-1), squares.new_full((1,), float(doubt))])

        try:
            found = self._ranks.sum_or_nan(measure, self._count)
        finally:
            self.close()
        size = self._ranks.size
        return (found[:-1] * (2 / (size - 1) / size)).sqrt().view(2, -1), found[-1] == 0

    def give_up(self) -> None:
        """Take part in the reduction without a gradient, so that no other process waits for it."""
        if self.is_open:
            self.close()
            with suppress(_GaveUpError):
                self._ranks.sum_or_nan(_give_up, self._count)

    @property
    def _count(self) -> int:
        return 2 * len(self._layers) + 1

    def _differences(self, means: Sequence[Tensor | None], scale: Scale) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index, mean in enumerate(means):
            own = self._kept.get(index)
            if mean is None:
                found.append(None)
                continue
            wide = mean.to(torch.promote_types(mean.dtype, torch.float32))
            if own is None:  # a layer that took no part on this process
                found.append(-wide)
            else:
                found.append((own.to_dense() if own.is_sparse else own).to(wide) * scale - wide)
        return found


class _GaveUpError(Exception):
    """Tells the other processes that one takes no part."""


def _give_up() -> Tensor:
    raise _GaveUpError


def all_certain(doubt: bool, ranks: Ranks) -> Tensor:
    """Tell whether no process has a doubt: 0-d, on the device, without a host read. All processes must call this."""
    return ranks.sum_or_nan(lambda: torch.full((1,), float(doubt), device=ranks.device), 1)[0] == 0
