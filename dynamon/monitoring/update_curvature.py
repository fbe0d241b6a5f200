"""Sharpness as the steps of training see it: along the update, on the batch, and how far a step could go."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.curvature import (
    DirectionalSharpness,
    HessianOperator,
    MeanOverRanks,
    batch_sharpness,
    critical_sharpness,
    directional_sharpness,
    norm_sharpness,
)
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.dtensor import to_local
from dynamon.isolation.preserve import NoLossError
from dynamon.kernels import widened
from dynamon.layers.complex_pairs import as_real
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.evaluation import trained_parameters
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.trust import why_never, why_not
from dynamon.norms import update_norm
from dynamon.optim import steering_of
from dynamon.quantities import meanings, quantities_of


class UpdateCurvatureMeter(Meter):
    """Measures along the update that the optimizer has just made: one or two products, or forward passes only.

    Args:
        cadence: When.
        probe: What the loss is evaluated on.
        quantities: Those that are chosen, of ``dynamon.quantities.choices("steps")``.
    """

    name = "steps"

    def __init__(self, cadence: Cadence, probe: ProbeMeter, quantities: Sequence[str]) -> None:
        """No step seen yet."""
        super().__init__(cadence)
        self._probe = probe
        self._wanted: frozenset[str] = frozenset()
        for quantity in quantities:
            self.also(quantity)
        self._before: dict[str, Tensor] = {}
        self._update: dict[str, Tensor] = {}
        self._planned = False  # something of this step is compared
        self._batch: float | None = None
        self._on_batch = False  # measuring on a whole batch, not on the probe
        self._seconds: float | None = None
        self._told: set[str] = set()

    def also(self, quantity: str) -> None:
        """Measure one more."""
        self._wanted |= {quantity}
        declared = [one for one in quantities_of("steps") if one.choice in self._wanted]
        self.tags, self.panels = meanings(declared), chart_layout(declared)

    def is_off(self) -> bool:
        """Return whether nothing was asked for, or sharpness is off."""
        return not self._wanted or self._probe.off

    def is_missed(self) -> bool:
        """Not where nothing was asked for."""
        return super().is_missed() and bool(self._wanted) and not self._probe.off

    def missed_reason(self) -> str | None:
        """Return why there was no loss to measure on."""
        return None if self.points or self.is_off() else self._probe.refusal

    def expected(self, run: RunContext) -> float | None:
        """Return the seconds a measurement took last; before the first, gradients on the probe; None without one.

        Critical sharpness takes five to nine forward passes; directional sharpness a graph, a product and the check of
        products; batch sharpness these on a whole batch.
        """
        if self._seconds is not None or self._probe.graph_seconds is None:
            return self._seconds
        on_batch = 4 / self._probe.share * ("batch" in self._wanted)
        graphs = 1 + 2 * ("critical" in self._wanted) + 4 * ("directional" in self._wanted) + on_batch
        return graphs * self._probe.graph_seconds

    def last_update(self, params: FlatParameters) -> Tensor | None:
        """The update that was just made, flat in the order of ``params``; None where it was not kept."""
        names = params.names or []
        if set(names) - set(self._update):
            return None
        return params.space.join([self._update[name] for name in names])

    def _known_update(self, params: FlatParameters) -> Tensor:
        update = self.last_update(params)
        assert update is not None
        return update

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """Measure what concerns the batch before it is trained on."""
        self._batch = None
        self._update = {}
        if run.steps.in_backward and self._compares(run):
            with run.untold(self.name):
                self.copy_weights(run)
        if "batch" not in self._wanted or not self._is_due(run):
            return
        if any(is_lazy(t) for t in (*run.module.parameters(), *run.module.buffers())):
            return  # an evaluation would draw their values before training does
        with run.charge(self.name, waits=True):
            is_there = self._probe.check(run)
        if not is_there:
            return
        self._on_batch, found = True, None
        try:
            with run.together(self.name), self._probe.evaluation(run) as params:
                hessian = self._probe.batch_hessian(run, params, batch)
                if self._is_trusted(hessian, hessian.gradient, "batch"):
                    found = batch_sharpness([hessian])
            self._batch = found  # of all processes, or of none
        except NoLossError:  # training skips this batch; with several processes it cannot
            if run.ranks.is_distributed:
                raise
        self._on_batch = False

    def make_room(self, run: RunContext) -> str | None:
        """Halve the probe; where a whole batch was too large, leave that quantity out."""
        if not self._on_batch:
            return self._probe.halve(run)
        self._on_batch = False
        self._wanted -= {"batch"}
        return "Batch sharpness, which takes a whole batch, is left out from now on."

    def before_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Copy the weights that are about to change."""
        if not run.steps.in_backward and self._compares(run):
            self.copy_weights(run)

    def _compares(self, run: RunContext) -> bool:
        return bool(self._wanted & {"directional", "critical"}) and self._is_due(run)

    def copy_weights(self, run: RunContext) -> None:
        """Copy the weights as they are now, unless that was done for this step; the next update is then known."""
        self._planned = True
        if not self._before:
            with run.charge(self.name):
                trained = trained_parameters(run)
                self._before = run.copies(layer for layer in run.all_layers if layer.name in trained)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was kept of a step that is undone; nothing is saved."""
        self._before, self._update, self._planned, self._batch = {}, {}, False, None

    def _is_due(self, run: RunContext) -> bool:
        return not self._probe.off and self.is_due(run)

    def batch_end(self, run: RunContext) -> None:
        """Measure along the update, if the weights were copied."""
        before, self._before = self._before, {}
        planned, self._planned = self._planned and (bool(before) or run.ranks.is_distributed), False
        if not planned and self._batch is None or not run.steps.any_taken():
            return
        spent = run.budget.spent_on.get(self.name, 0.0)
        with run.together(self.name):
            readings = self._along_update(run, before)
            if self._batch is not None:
                readings["sharpness/batch"] = self._batch
            run.recorder.scalars(readings, headline=True)
        if readings:
            self._seconds = run.budget.spent_on[self.name] - spent
            self.done(run)

    def _along_update(self, run: RunContext, before: Mapping[str, Tensor]) -> dict[str, float]:
        weights = {name: to_local(p) for name, p in trained_parameters(run).items() if name in before}
        with torch.no_grad():
            pairs = list(weights.values()), [to_local(before[name]) for name in weights]
            self._update = dict(zip(weights, torch._foreach_sub(*pairs), strict=True)) if weights else {}
        readings: dict[str, float] = {}
        if not self._wanted or not self._probe.is_expected(run):
            return readings
        if not self._has_moved(run):
            self._has_no_multiple(run)
            return readings
        if not self._probe.check(run):
            return readings
        self._probe.agree(run)
        if "directional" in self._wanted:
            with self._probe.evaluation(run, self._update) as params:
                readings |= self._directional(run, params)
        if "critical" in self._wanted:
            with self._probe.evaluation(run, self._update, moves=True) as params:
                readings |= self._critical(run, params)
        return readings

    def _has_moved(self, run: RunContext) -> bool:
        """Return whether the last step changed anything, on any process."""
        device = run.device
        steps = [step for step in self._update.values() if step.numel()]
        if len({(step.device, step.dtype) for step in steps}) == 1:
            moved = torch.stack(torch._foreach_norm(steps, math.inf)).any().to(device)
        else:
            each = [step.any().to(device) for step in steps]
            moved = torch.stack(each).any() if each else torch.tensor(0.0, device=device)
        return bool(run.ranks.maximum(widened(moved)))

    def _directional(self, run: RunContext, params: FlatParameters) -> dict[str, float]:
        update = self._known_update(params)
        hessian = self._probe.hessian(run, params)
        if not self._is_trusted(hessian, update, "directional"):
            return {}
        found = directional_sharpness(hessian, update)
        readings = {
            "sharpness/directional": found.sharpness,
            "sharpness/directional_norm": self._in_own_norm(run, params, update, found),
        }
        if found.curvature > 0:
            readings["sharpness/best_multiple"] = found.best_multiple_of_last_step
        return readings

    def _is_trusted(self, hessian: HessianOperator | MeanOverRanks, vector: Tensor, quantity: str) -> bool:
        """Return whether a product means something; the first time that it does not, say why."""
        never = why_never(hessian, vector)
        reason = never or why_not(hessian, hessian.product_error(vector))
        if reason is not None and quantity not in self._told:
            self._told.add(quantity)
            rank_zero_warn(f"sharpness/{quantity} is left out: {reason}")
        if never is not None:
            self._wanted -= {quantity}
        return reason is None

    def _in_own_norm(
        self, run: RunContext, params: FlatParameters, update: Tensor, found: DirectionalSharpness
    ) -> float:
        layers = {layer.name: layer for layer in run.all_layers}
        family = run.stated.family(run.loop.optimizers[0])
        if family == "euclidean":  # one norm for all layers together
            return found.sharpness
        norms = {name: update_norm(layers[name], family).primal for name in params.names or []}
        steps = [as_real(step) for step in params.split(update)]
        return norm_sharpness(found.product, steps, norms, params.space).sharpness

    def _critical(self, run: RunContext, params: FlatParameters) -> dict[str, float]:
        rate, update = _one_rate(run), self._known_update(params)
        with params.perturbed(-update):  # where the step came from
            found = critical_sharpness(lambda: self._probe.mean_loss(run), params, update, rate=rate)
        readings = {"sharpness/critical_multiple": found.multiple} if math.isfinite(found.multiple) else {}
        if math.isnan(found.multiple):
            self._has_no_multiple(run)
            if "lost" not in self._told:
                self._told.add("lost")
                rank_zero_info(
                    "sharpness/critical_multiple is left out at steps whose change of the loss is lost in rounding "
                    "(small steps, or weights and losses in half precision)."
                )
        return readings | ({"sharpness/critical": found.sharpness} if math.isfinite(found.sharpness) else {})

    def _has_no_multiple(self, run: RunContext) -> None:
        """Leave a gap in the history where no multiple of the update is known."""
        if "critical" in self._wanted:
            run.recorder.history.add("sharpness/critical_multiple", run.step, math.nan)


def _one_rate(run: RunContext) -> float | None:
    """The learning rate, where all layers of all optimizers have the same, steering included."""
    rates = {float(group["lr"]) for optimizer in run.loop.optimizers for group in optimizer.param_groups}
    steered = (steering_of(optimizer) for optimizer in run.loop.optimizers)
    ratios = {ratio for one in steered if one is not None for ratio in one.applied.values()}
    return rates.pop() if len(rates) == 1 and ratios <= {1.0} else None
