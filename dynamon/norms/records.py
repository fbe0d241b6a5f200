"""The record of a norm: everything known of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dynamon.layers import Layer
from dynamon.norms.forms import euclidean_norms

STATISTICS = ("l1", "l2", "matrix")
REDUCTIONS = ("sum", "max over entries", "max over rows", "max over columns", "whole")
ORACLES = ("polar", "sign", "own")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The record of a norm on weight tensors: everything known of it, so that no other code depends on its name.

    Norms are in float32 (float64 for float64), the oracle in the dtype of its argument. All are computed in at least
    float32, on the argument's device, without waiting for it. ``primal(lmo(g)) == 1`` for ``g != 0``; ``lmo(0) == 0``.

    No field has a default. In the following, a norm of matrices takes one ``[m, n]``; any other takes all entries as
    ``[1, size]``.

    Attributes:
        name: The norm's name, as for :func:`get_norm`.
        primal: Norm of a weight.
        dual: Dual norm of a gradient.
        lmo: The unit-ball minimiser of ``<g, .>``.
        on_matrices: Whether it is a norm of matrices, of which a layer may hold several; it does not fit vectors.
        per_window: Whether it is multiplied by ``sqrt(prod(k))`` for convolutions, see :func:`norm_for_layer`.
        primal_factor: From m and n to the multiple of the statistic behind ``batched_primal``, if any.
        dual_factor: From m and n to the multiple of the statistic named by ``dual_of``.
        dual_of: The statistic that the dual is a multiple of: ``"l1"`` or ``"l2"`` of all entries; ``"matrix"`` if it
            needs the tensor itself.
        reduces: How the primal norm of a sharded tensor follows from its shards: ``"sum"`` of squares, the norm being
            its root over ``dual_factor``; the largest of the shards' norms, for any sharding (``"max over entries"``),
            or if rows or columns of the map are not split (``"max over rows"``, ``"max over columns"``); ``"whole"`` if
            the tensor is gathered.
        iid_dual: From blocks, m and n to the dual norm of noise with i.i.d. entries of mean square one, to leading
            order.
        oracle: The batched form of ``lmo``: minus a multiple of the ``"polar"`` factor, minus the ``"sign"``, or its
            ``"own"`` function of stacked matrices.
        batched_primal: From layers, their norms and tensors to primal norms ``[L]``; norms with the same function share
            its calls. ``each_primal`` if there is none.
        batched_dual: From the same to dual norms, 0-d tensors. ``each_dual`` if there is none.

    Raises:
        TypeError: If a field is missing.
        ValueError: If a field is invalid, or two contradict each other.
    """

    name: str
    primal: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    lmo: Callable[[Tensor], Tensor]
    on_matrices: bool
    per_window: bool
    primal_factor: Callable[[int, int], float]
    dual_factor: Callable[[int, int], float]
    dual_of: str
    reduces: str
    iid_dual: Callable[[int, int, int], float]
    oracle: str
    batched_primal: Callable[[Sequence[Layer], Sequence["Norm"], Sequence[Tensor]], Tensor]
    batched_dual: Callable[[Sequence[Layer], Sequence["Norm"], Sequence[Tensor]], list[Tensor]]

    def __post_init__(self) -> None:
        """Check that the fields are valid and consistent."""
        for name in _FUNCTIONS:
            if not callable(getattr(self, name)):
                raise ValueError(f"the norm {self.name!r} is incomplete: {name} must be a function.")
        for name, allowed in (("dual_of", STATISTICS), ("reduces", REDUCTIONS), ("oracle", ORACLES)):
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(
                    f"{name} of the norm {self.name!r} must be one of {', '.join(allowed)}, got {given!r}."
                )
        if (self.reduces == "sum") != (self.batched_primal is euclidean_norms):
            raise ValueError(f"the norm {self.name!r} must reduce by 'sum' if, and only if, it is a multiple of l2.")
        if self.reduces == "sum" and (
            self.dual_of != "l2" or not math.isclose(self.primal_factor(1, 6) * self.dual_factor(1, 6), 1)
        ):
            raise ValueError(f"the norm {self.name!r} is a multiple of l2, so its dual must be l2 over that multiple.")
        if not self.on_matrices and self.reduces not in ("sum", "max over entries"):
            raise ValueError(f"the norm {self.name!r} sees all entries: it must reduce by 'sum' or 'max over entries'.")
        if not self.on_matrices and self.per_window:
            raise ValueError(f"the norm {self.name!r} sees all entries: per_window must be False.")
        if self.on_matrices and not self.needs_matrix:
            raise ValueError(f"the norm {self.name!r} is one of matrices: dual_of must be 'matrix'.")

    def __repr__(self) -> str:
        """Show the name; the other fields are functions and follow from it."""
        return f"Norm({self.name!r})"

    @property
    def needs_matrix(self) -> bool:
        """Whether the dual norm takes the tensor itself, and not only sums over its entries."""
        return self.dual_of == "matrix"

    def dual_multiples(self, size: int) -> tuple[float, float]:
        """Return the multiples of l1 and l2 of ``size`` entries in the dual norm; zeros if it needs the tensor."""
        factor = 0.0 if self.needs_matrix else self.dual_factor(1, size)
        return (factor, 0.0) if self.dual_of == "l1" else (0.0, factor)

    def window(self, layer: Layer) -> float:
        """Return the factor for a convolution's window: ``sqrt(prod(k))`` if it counts, else 1."""
        return math.sqrt(math.prod(layer.parameter.shape[2:])) if self.per_window and layer.role == "conv" else 1.0


_FUNCTIONS = (
    *("primal", "dual", "lmo", "primal_factor", "dual_factor"),
    *("iid_dual", "batched_primal", "batched_dual"),
)
