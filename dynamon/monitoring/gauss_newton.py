"""The Gauss-Newton matrix of the training loss on the probe."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dynamon.curvature import GGNOperator, LinearOperator, MeanOverRanks, OutputsOfLoss
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext

OutputsFn = Callable[[Any, Any], tuple[Any, Tensor]]
_BESIDE = 1e-3  # share of the gradient beside the outputs that is not rounding


class GaussNewton:
    """Finds the outputs of the network inside of a training loss, and makes the operator.

    Args:
        probe: Evaluates the loss.
        outputs: Called with the module and a batch; returns outputs and loss. None finds the outputs in the calls of
            losses that are convex in them.
    """

    def __init__(self, probe: ProbeMeter, outputs: OutputsFn | None) -> None:
        """Start with nothing said."""
        self._probe, self._outputs = probe, outputs
        self._told = False

    def operator(self, run: RunContext, params: FlatParameters) -> LinearOperator | MeanOverRanks:
        """The matrix on the samples of all processes; the first time it says what was found and what it misses."""
        held: dict[str, Tensor] = {}

        def outputs() -> list[Tensor]:
            if self._outputs is None:
                return self._find(run, held)
            return self._ask(run, held)

        operator = GGNOperator(outputs, lambda _: held["loss"], params)
        if not self._told and operator.share_beside(held["loss"]) > _BESIDE:
            rank_zero_warn(
                "ggn covers a part of the loss only: the gradient through the outputs that were found is not the whole "
                "gradient. Pass outputs=lambda module, batch: ... which returns (outputs, loss)."
            )
        self._told = True
        return self._probe.over_ranks(run, operator)

    def _find(self, run: RunContext, held: dict[str, Tensor]) -> list[Tensor]:
        with OutputsOfLoss() as watch:
            held["loss"] = self._probe.loss(run)
        found, names = watch.of(held["loss"])
        if not self._told:
            rank_zero_info(f"ggn: the outputs are what goes into {names} ({len(found)} tensors in the probe).")
        return found

    def _ask(self, run: RunContext, held: dict[str, Tensor]) -> list[Tensor]:
        found: list[Tensor] = []

        def evaluate(batch: Any, index: int) -> Tensor:
            given, loss = self._outputs(run.loop.model, batch)  # type: ignore[misc]
            found.extend([given] if isinstance(given, Tensor) else given)
            return loss

        held["loss"] = self._probe.weighted(evaluate)
        return found
