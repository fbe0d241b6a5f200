"""Count how many Hessian products a measurement may take, and what they cost."""

import math
import time
from collections import deque
from statistics import median

import torch

from dynamon.kernels import widest_dtype
from dynamon.monitoring.run_context import RunContext

LEAST = 10  # products from which on a solve is worth beginning
# What was seen on GPTs and MLPs: a product takes 1.3 to 1.6 times as long as the gradient with its graph.
_GRAPHS_A_PRODUCT, _GRAPHS_BESIDE = 1.5, 2.0
_GRADIENT_A_PRODUCT = 0.5  # a gradient, which a one-sided difference takes, against an exact product
_RECENT = 5


class MatvecAllowance:
    """Counts the products of a measurement against the seconds that a budget has left for it.

    What is too much for it is cut short: a solve gets fewer products, and what has to be begun anew is left out.
    """

    def __init__(self) -> None:
        """Start without a limit, and without a price."""
        # Seconds a product: exact ones, and one-sided differences.
        self._took: dict[bool, deque[float]] = {kind: deque(maxlen=_RECENT) for kind in (False, True)}
        self._seconds, self._begun, self._products = math.inf, 0.0, math.inf
        self._is_shared = False

    def price(self, products: float, graph_seconds: float | None, one_sided: bool = False) -> float | None:
        """Return the seconds that a measurement of so many products takes; None where nothing is known.

        Args:
            products: How many.
            graph_seconds: What a gradient on the probe with its graph takes; it tells before a product was timed.
            one_sided: Whether they are one-sided differences; without experience, half as much as exact ones.
        """
        if self._took[one_sided]:
            return products * median(self._took[one_sided])
        if one_sided:
            exact = self.price(products, graph_seconds)
            return None if exact is None else _GRADIENT_A_PRODUCT * exact
        if graph_seconds is None:
            return None
        return (_GRAPHS_A_PRODUCT * products + _GRAPHS_BESIDE) * graph_seconds

    def note(self, seconds: float, products: int, one_sided: bool = False) -> None:
        """Learn from a measurement."""
        self._took[one_sided].append(seconds / max(products, 1))

    def open(self, run: RunContext, is_limited: bool, graph_seconds: float | None, one_sided: bool = False) -> None:
        """Begin a measurement. Every process calls this; the first one's clock counts.

        Args:
            run: The run.
            is_limited: Whether the budget decides, and not a fixed step.
            graph_seconds: As for :meth:`price`.
            one_sided: As for :meth:`price`.
        """
        self._seconds = self._products = math.inf
        self._begun, self._is_shared = time.perf_counter(), run.ranks.is_distributed
        if not is_limited or run.budget.fraction is None:
            return
        one = self.price(1, graph_seconds, one_sided)
        if one is not None:
            self._seconds = max(run.budget.left, 0.0)
            self._products = max(self._seconds / max(one, 1e-9), LEAST)
        if self._is_shared:
            own = self._products if run.ranks.rank == 0 else 0.0
            shared = torch.tensor(own, dtype=widest_dtype(run.device), device=run.device)
            self._products = float(run.ranks.sum(shared))

    def rest(self, taken: int) -> float:
        """Return how many products may still be taken, after so many in this measurement.

        On one process those that were taken tell what the next ones cost; several processes keep to what was agreed.
        """
        if self._is_shared or not taken or math.isinf(self._seconds):
            return self._products - taken
        elapsed = time.perf_counter() - self._begun
        return (self._seconds - elapsed) / elapsed * taken
