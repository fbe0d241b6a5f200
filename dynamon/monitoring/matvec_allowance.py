"""How many Hessian products a measurement may take, and what they cost."""

import math
import time
from collections import deque
from statistics import median

import torch

from dynamon.kernels import widest_dtype
from dynamon.monitoring.run_context import RunContext

LEAST = 10  # products from which on a solve is worth beginning
_GRADIENTS = 2.5  # that a product takes as long as, before one was timed
_GRAPH = 3  # products that the gradient with its graph, and the check of what is kept, take as long as
_RECENT = 5


class MatvecAllowance:
    """Counts the products of a measurement against the seconds that a budget has left for it.

    What is too much for it is cut short: a solve gets fewer products, and what has to be begun anew is left out.
    """

    def __init__(self) -> None:
        """Start without a limit, and without a price."""
        self._took: deque[float] = deque(maxlen=_RECENT)  # seconds a product
        self._seconds, self._begun, self._products = math.inf, 0.0, math.inf
        self._is_shared = False

    def price(self, products: float, gradient_seconds: float | None) -> float | None:
        """Return the seconds that a measurement of so many products takes; None where nothing is known.

        Args:
            products: How many.
            gradient_seconds: What a gradient on the probe takes, which tells as long as no product was timed.
        """
        if self._took:
            return products * median(self._took)
        return None if gradient_seconds is None else (products + _GRAPH) * _GRADIENTS * gradient_seconds

    def note(self, seconds: float, products: int) -> None:
        """Learn from a measurement."""
        self._took.append(seconds / max(products, 1))

    def open(self, run: RunContext, is_limited: bool, gradient_seconds: float | None) -> None:
        """Begin a measurement. Every process calls this; the first one's clock counts.

        Args:
            run: The run.
            is_limited: Whether the budget decides, and not a fixed step.
            gradient_seconds: As for :meth:`price`.
        """
        self._seconds = self._products = math.inf
        self._begun, self._is_shared = time.perf_counter(), run.ranks.is_distributed
        one = self.price(1, gradient_seconds)
        if not is_limited or run.budget.fraction is None or one is None:
            return
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
