"""Gradient readings: on the host, or on their way there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynamon.quantities.host_copy import HostCopy
from dynamon.quantities.windows import Window

L1, L2, DUAL = 0, 1, 4  # rows of a reading of the gradients themselves


@dataclass(frozen=True)
class GradientReadings:
    """Holds the results of one pass over the gradients on the host; arrays ``[L]`` in the order of the layers.

    A layer without a gradient, or one that is not trained and has zeros in its place, has NaN for everything but
    ``present``, ``compared`` and ``nonfinite``, which is 0.

    Attributes:
        present: Whether the layer had a gradient at all.
        l1: Sum of magnitudes.
        l2: Euclidean norm.
        dual: Dual norm of the gradient in the layer's update norm.
        nonfinite: Number of NaN or infinite entries.
        difference_dual: Dual norm of the change since the gradient one step before; NaN where there was none over a
            window like this one.
        difference_l2: Euclidean norm of that change, likewise.
        inner: Inner product with the previous gradient, likewise.
        compared: Whether there was such a gradient one step before.
        independent_dual: Dual norm of the difference of two independent gradients of this step, in the unit of two
            full batches; NaN where there were none
            (:meth:`dynamon.quantities.gradient_reader.GradientReader.store_part`,
            :meth:`dynamon.quantities.gradient_reader.GradientReader.watch_ranks`).
        independent_l2: Euclidean norm of it, likewise.
        trend: Cosine of that change with the one at the reading before, 0 where it is not known: see
            :class:`dynamon.quantities.trends.Trends`.
        rounding: Share of a gradient's length up to which a change of it is rounding.
        frozen: Whether the layer is not trained now (``requires_grad=False``); None where that was not looked at.
        window: What the gradients were accumulated over, as far as the reader was told.
    """

    present: NDArray[Any]
    l1: NDArray[Any]
    l2: NDArray[Any]
    dual: NDArray[Any]
    nonfinite: NDArray[Any]
    difference_dual: NDArray[Any]
    difference_l2: NDArray[Any]
    inner: NDArray[Any]
    compared: NDArray[Any]
    independent_dual: NDArray[Any]
    independent_l2: NDArray[Any]
    trend: NDArray[Any]
    rounding: NDArray[Any]
    frozen: NDArray[Any] | None = None
    window: Window | None = None

    @property
    def finite(self) -> bool:
        """Whether every gradient, and every change that could be taken, is finite."""
        changes = np.where(self.compared, self.difference_dual, 0.0)
        own = self.l1[self.present]
        return not self.nonfinite.any() and bool(np.isfinite(own).all() and np.isfinite(changes).all())


@dataclass(frozen=True)
class ReadingContext:
    """Holds what the host knows before a reading arrives; arrays ``[L]`` as in :class:`GradientReadings`.

    Attributes:
        present: Whether the layer has a gradient.
        read: Whether it is among the I layers that are read.
        rounding: Share of a gradient's length up to which a change of it is rounding.
        frozen: Whether the layer is not trained now.
        window: What the gradients were accumulated over.
    """

    present: NDArray[Any]
    read: NDArray[Any]
    rounding: NDArray[Any]
    frozen: NDArray[Any]
    window: Window | None


class PendingReadings:
    """Holds readings on their way to the host.

    The copy is queued on the device at construction; :meth:`wait` returns without blocking where it has
    arrived, which one step later it has.
    """

    def __init__(self, rows: Tensor, context: ReadingContext, has_dual: bool = True) -> None:
        """Queue the copy of ``rows``, a device tensor ``[12, I]``.

        l1; l2 and dual norm of the gradient, of its change and between two parts of the window; entries that are not
        finite; inner product; trend; whether there is a change, and whether there are two parts.
        """
        self.rows, self.context, self.has_dual = rows, context, has_dual
        self._copy = HostCopy(rows)

    def wait(self) -> GradientReadings:
        """Return the readings, once they have arrived."""
        context = self.context
        arrived = self._copy.wait()
        table = np.full((len(arrived), len(context.present)), np.nan)
        table[:, context.read] = arrived.double().numpy()
        # Where gradients are not set to None, zeros are left over for layers that are not trained.
        present = context.present & ~(context.frozen & (table[L1] == 0))
        table[:, ~present] = np.nan
        l1, l2, change_l2, parts_l2, dual, change_dual, parts_dual, nonfinite, inner, trend, compared, parted = table
        compared, parted = compared > 0, parted > 0
        return GradientReadings(
            present,
            l1,
            l2,
            dual,
            np.where(present, nonfinite, 0.0),
            np.where(compared, change_dual, np.nan),
            np.where(compared, change_l2, np.nan),
            np.where(compared, inner, np.nan),
            compared,
            np.where(parted, parts_dual, np.nan),
            np.where(parted, parts_l2, np.nan),
            trend=np.where(compared, trend, 0.0),
            rounding=context.rounding,
            frozen=context.frozen,
            window=context.window,
        )
