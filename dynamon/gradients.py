"""Reading the gradients of a model's layers: one pass, one copy to the host, shared by all who ask."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamon.kernels import gradient_stats
from dynamon.layers import Layer
from dynamon.norms import Norm, update_norm

Array = np.ndarray[Any, np.dtype[Any]]
_FROM_STATS = ("one_to_inf", "frobenius", "rms")  # dual norms that follow from l1 or l2


@dataclass(frozen=True)
class GradientReadings:
    """What one pass over the gradients found, on the host; arrays ``[L]`` in the order of the layers.

    Attributes:
        present: Whether the layer had a gradient at all.
        l1: Sum of magnitudes.
        l2: Euclidean norm.
        dual: Dual norm of the gradient in the layer's update norm.
        nonfinite: Number of NaN or infinite entries.
        difference_dual: Dual norm of the change since the gradient one step before; NaN where there was none.
        difference_l2: Euclidean norm of that change, likewise.
        inner: Inner product with the previous gradient, likewise.
        compared: Whether there was a gradient one step before.
    """

    present: Array
    l1: Array
    l2: Array
    dual: Array
    nonfinite: Array
    difference_dual: Array
    difference_l2: Array
    inner: Array
    compared: Array

    @property
    def finite(self) -> bool:
        """Whether every gradient, and every change that could be taken, is finite."""
        changes = np.where(self.compared, self.difference_dual, 0.0)
        return not self.nonfinite.any() and bool(np.isfinite(self.l1).all() and np.isfinite(changes).all())


class PendingReadings:
    """Readings on their way to the host.

    The copy is queued on the device at construction; :meth:`wait` returns without blocking where it has
    arrived, which one step later it has.
    """

    def __init__(self, table: Tensor, present: Array, compared: Array) -> None:
        """Queue the copy of ``table``, a device tensor ``[7, L]``."""
        self._present, self._compared = present, compared
        self._event: torch.cuda.Event | None = None
        if table.is_cuda:
            self._host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._host.copy_(table, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = table

    def wait(self) -> GradientReadings:
        """The readings, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        l1, l2, dual, nonfinite, change_dual, change_l2, inner = self._host.double().numpy()
        return GradientReadings(self._present, l1, l2, dual, nonfinite, change_dual, change_l2, inner, self._compared)


class GradientReader:
    """Reads the gradients of a list of layers, at most once an optimizer step whoever asks.

    Args:
        layers: The layers, each with a floating parameter; sparse gradients are made dense.
        family: The optimizer's geometry, see :func:`dynamon.norms.optimizer_family`; with the layer's role it
            chooses the norm whose dual is taken.

    The gradient of one step before is stored (one copy, in the gradient's dtype) while differences are
    asked for.
    """

    def __init__(self, layers: Sequence[Layer], family: str) -> None:
        """Choose a norm for each layer."""
        self.layers = list(layers)
        self.norms: list[Norm] = [update_norm(layer, family) for layer in self.layers]
        self.step = 0
        self._key: Hashable = None
        self._pending: PendingReadings | None = None
        self._previous: dict[int, Tensor] = {}
        self._stored_at = -1  # the step whose gradients are stored

    def begin(self, key: Hashable) -> bool:
        """Say that an optimizer step is being taken.

        Returns:
            Whether it is a new one; the same key twice in a row is the same step.
        """
        if key == self._key:
            return False
        self._key, self._pending = key, None
        self.step += 1
        return True

    def store(self, scale: float = 1.0) -> None:
        """Keep this step's gradients, for a difference at the next step, without measuring them."""
        if self._stored_at == self.step:
            return
        self._previous = {index: g.clone() for index, g in enumerate(self._gradients(scale)) if g is not None}
        self._stored_at = self.step

    def forget(self) -> None:
        """Give the stored gradient's memory back."""
        self._previous, self._stored_at = {}, -1

    def read(self, scale: float = 1.0) -> PendingReadings:
        """Measure this step's gradients and their change, and keep them for the next step.

        Args:
            scale: Factor on the gradients, for those an AMP scaler has not unscaled yet.
        """
        if self._pending is None:
            self._pending = self._measure(scale)
        return self._pending

    def _gradients(self, scale: float) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for layer in self.layers:
            g = layer.parameter.grad
            if g is not None:
                g = g.detach().to_dense() if g.is_sparse else g.detach()
                g = g if scale == 1.0 else g * scale
            gradients.append(g)
        return gradients

    def _measure(self, scale: float) -> PendingReadings:
        consecutive = self._stored_at == self.step - 1
        gradients = self._gradients(scale)
        indices = [i for i, g in enumerate(gradients) if g is not None]
        present = np.zeros(len(self.layers), bool)
        present[indices] = True
        compared = np.array([consecutive and i in self._previous for i in range(len(self.layers))], bool) & present
        current = [g for g in gradients if g is not None]
        previous = [
            self._previous[i] if i in self._previous else torch.zeros_like(g)
            for i, g in zip(indices, current, strict=True)
        ]
        special = self._special_duals(indices, current, previous)
        stats = gradient_stats(current, previous)
        self._previous = dict(zip(indices, previous, strict=True))
        self._stored_at = self.step
        assert stats.difference_l1 is not None and stats.difference_sum_squares is not None
        table = torch.zeros(7, len(self.layers), dtype=stats.l1.dtype, device=stats.l1.device)
        l2, difference_l2 = stats.sum_squares.sqrt(), stats.difference_sum_squares.sqrt()
        duals = self._duals(indices, stats.l1, l2, special, 0)
        difference_duals = self._duals(indices, stats.difference_l1, difference_l2, special, 1)
        columns = [stats.l1, l2, duals, stats.nonfinite, difference_duals, difference_l2, stats.inner]
        table[:, indices] = torch.stack([c for c in columns if c is not None])
        missing = torch.as_tensor(~compared, device=table.device)
        table[4:, missing] = torch.nan
        return PendingReadings(table, present, compared)

    def _special_duals(
        self, indices: list[int], current: list[Tensor], previous: list[Tensor]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Dual norms that need the matrix itself, of the gradient and of its change."""
        return {
            i: (self.norms[i].dual(g).sum(), self.norms[i].dual(g.float() - p.float()).sum())
            for i, g, p in zip(indices, current, previous, strict=True)
            if self.norms[i].name not in _FROM_STATS
        }

    def _duals(
        self,
        indices: list[int],
        l1: Tensor,
        l2: Tensor,
        special: dict[int, tuple[Tensor, Tensor]],
        which: int,
    ) -> Tensor:
        duals = []
        for position, i in enumerate(indices):
            name = self.norms[i].name
            if i in special:
                duals.append(special[i][which].to(l1.dtype))
            elif name == "one_to_inf":
                duals.append(l1[position])
            else:
                size = self.layers[i].parameter.numel()
                duals.append(l2[position] * (size**0.5 if name == "rms" else 1.0))
        return torch.stack(duals) if duals else l1

    def state_dict(self) -> dict[str, Any]:
        """The stored gradient by parameter name, if it is this step's."""
        if self._stored_at != self.step:
            return {"previous": {}}
        return {"previous": {self.layers[i].name: g.clone() for i, g in self._previous.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a stored gradient; names and shapes that no longer exist are left out."""
        index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._previous = {
            index[name]: g.to(self.layers[index[name]].parameter.device)
            for name, g in state["previous"].items()
            if name in index and g.shape == self.layers[index[name]].parameter.shape
        }
        self._stored_at = self.step if self._previous else -1
