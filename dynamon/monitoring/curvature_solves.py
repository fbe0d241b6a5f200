"""Solve for eigenvalues, traces, densities and blocks of one measurement, and track them to the next."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from dynamon.curvature import (
    Eigenpairs,
    EigenTracker,
    HessianOperator,
    LinearOperator,
    MeanOverRanks,
    SpectralDensity,
    blockwise_sharpness,
    eigenspace_overlap,
    eigenspace_share,
    spectral_density,
    trace,
)
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.curvature.operators.preconditioner import (
    has_second_moment,
    preconditioned,
    preconditioner,
)
from dynamon.curvature.solvers.lanczos import random_start
from dynamon.curvature.solvers.tracker import COMPARED
from dynamon.distributed.dtensor import is_sharded
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.gauss_newton import GaussNewton, OutputsFn
from dynamon.monitoring.held_samples import SAVED_NUMBERS
from dynamon.monitoring.matvec_allowance import LEAST, MatvecAllowance
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.trust import require_trust, why_not
from dynamon.monitoring.update_curvature import UpdateCurvatureMeter
from dynamon.optim import steering_of
from dynamon.quantities.entries.sharpness import SUBSPACE
from dynamon.stability import (
    StabilityScaling,
    has_stability_condition,
    stability_operator,
    stability_scaling,
    stability_threshold,
)

EXTRAS = ("next", "preconditioned", "trace", "density", "blocks", "ggn")  # which a measurement can do without
_ON_THE_GRAPH = {"trace", "density", "blocks"}  # those whose products are all to be exact
_TAGS = {"next": "stability_ratio_next", "preconditioned": "preconditioned_max"}  # those with a solve on the same loss
DENSITY_STEPS, DENSITY_VECTORS = 60, 2
TRACE_VECTORS = 16


@dataclass
class Point:
    """One measurement in the making."""

    run: RunContext
    params: FlatParameters  # as the loss sees them
    owned: list[Tensor]  # as the optimizers do
    hessian: HessianOperator | MeanOverRanks
    optimizer: Optimizer | None
    readings: dict[str, float] = field(default_factory=dict)
    products: int = 0
    succeeded: int = 0
    failed: dict[str, Exception] = field(default_factory=dict)
    brackets: list[tuple[str, Tensor, StabilityScaling | None]] = field(default_factory=list)

    @property
    def is_one_sided(self) -> bool:
        """True where products are one-sided differences of gradients."""
        return self.hessian.backend == "forward_difference"

    def exact(self) -> HessianOperator | MeanOverRanks:
        """Return the Hessian with exact products, where it has them."""
        if self.is_one_sided and isinstance(self.hessian, HessianOperator):
            self.hessian.make_exact()
        return self.hessian


class CurvatureSolves(Meter):
    """Solves for each quantity of the spectrum, from where the last measurement ended.

    Args:
        cadence: When.
        probe: What the loss is evaluated on.
        steps: Knows the last update.
        quantities: Those that are chosen, of ``dynamon.quantities.choices("sharpness")``.
        tol: Relative tolerance of the solves.
        max_matvecs: Most products per solve.
        outputs: ``outputs(module, batch) -> (outputs, loss)`` for the Gauss-Newton matrix, or None to find them.
        save_vectors: Whether checkpoints hold the vectors that the next solve starts from.

    Attributes:
        last_density: The whole density of the last measurement that took one.
    """

    def __init__(
        self,
        cadence: Cadence,
        probe: ProbeMeter,
        steps: UpdateCurvatureMeter,
        quantities: Sequence[str],
        tol: float,
        max_matvecs: int,
        outputs: OutputsFn | None = None,
        save_vectors: bool = True,
    ) -> None:
        """Start with nothing tracked."""
        super().__init__(cadence)
        self._probe, self._steps = probe, steps
        self._gauss_newton = GaussNewton(probe, outputs)
        self._wanted = frozenset(quantities)
        self._tol, self._max_matvecs, self._save_vectors = tol, max_matvecs, save_vectors
        self._trackers: dict[str, EigenTracker] = {}
        self._blocks: dict[str, Tensor] = {}
        self._space: Tensor | None = None
        self._extras: dict[str, Cadence] = {}  # what is taken along with a measurement now and then
        self.last_density: SpectralDensity | None = None
        self._allowance = MatvecAllowance()
        self._certify = True
        self._told: set[str] = set()
        self._last_loss = math.inf

    def _stability(self, point: Point) -> None:
        optimizer = point.optimizer
        assert optimizer is not None
        scaling = stability_scaling(optimizer, point.owned, _rate_factors(point), point.params.space)
        point.readings["sharpness/excluded_coordinates"] = float(scaling.excluded)
        if scaling.constant is not None and scaling.constant > 0:
            # Plain SGD: the ratio is the Hessian's eigenvalue times a number, one solve gives both.
            found = self._solve_hessian(point)
            point.readings |= found.scaled(scaling.constant).readings("sharpness/stability_ratio")
        else:
            found = self._solve(point, "stability_ratio", stability_operator(point.hessian, scaling))
        self._note_bracket(point, "stability_ratio", found, scaling)

    def _next(self, point: Point) -> None:
        """Solve for the stability ratio of the step that would be taken on the probe."""
        optimizer = point.optimizer
        if optimizer is None or not has_stability_condition(optimizer) or not has_second_moment(optimizer):
            self._say_once("next", "next: there is no single Adam, AdamW or RMSprop, so nothing to show.")
        elif any(is_sharded(p) for p in point.owned):
            self._say_once("next", "next is left out: it is not measured with sharded parameters.")
        else:
            gradient = point.run.loop.clipped(point.hessian.gradient)
            scaling = stability_scaling(optimizer, point.owned, _rate_factors(point), point.params.space, gradient)
            self._solve(point, "stability_ratio_next", stability_operator(point.hessian, scaling))

    def _say_once(self, key: str, sentence: str) -> None:
        if key not in self._told:
            self._told.add(key)
            rank_zero_info(sentence)

    def _preconditioned(self, point: Point) -> None:
        optimizer = point.optimizer
        if optimizer is not None and has_second_moment(optimizer):
            diagonal = preconditioner(optimizer, point.owned, point.params.space)
            self._solve(point, "preconditioned_max", preconditioned(point.hessian, diagonal))
        else:
            self._say_once(
                "preconditioned",
                "preconditioned: there is no single optimizer that keeps a second moment, so nothing to show.",
            )

    def _trace(self, point: Point) -> None:
        require_trust(point.exact(), random_start(point.hessian, None, self.points))
        found = trace(point.hessian, num_vectors=TRACE_VECTORS, seed=self.points)
        point.readings |= {"sharpness/trace": found.value, "sharpness/trace_error": found.standard_error}
        point.products += found.matvecs

    def _solve_hessian(self, point: Point) -> Eigenpairs:
        found = self._solve(point, "hessian_max", point.hessian, self._max_eigenvalues())
        point.readings["sharpness/hessian_min"] = found.smallest
        threshold = None if point.optimizer is None else stability_threshold(point.optimizer)
        if threshold is not None:
            point.readings["sharpness/threshold"] = threshold
        self._note_bracket(point, "hessian_max", found, None)
        if "subspace" in self._wanted:
            self._subspace(point, found)
        return found

    def _solve(self, point: Point, tag: str, operator: LinearOperator, k: int = 1) -> Eigenpairs:
        tracker = self._trackers.setdefault(tag, self._tracker(k))
        one_sided = "forward_difference" in operator.backend
        if one_sided and tracker.backend == "auto":
            point.exact()
        found = self._tracked(point, tracker, operator)
        if one_sided and found.product_error > self._tol:
            point.exact()
            found = self._tracked(point, tracker, operator)
        if found.converged and self._allowance.rest(point.products) >= COMPARED:
            point.products += tracker.compare(operator)
        if (reason := why_not(operator, found.product_error)) is not None:
            raise ArithmeticError(reason)
        point.readings |= found.readings(f"sharpness/{tag}")
        return found

    def _tracked(self, point: Point, tracker: EigenTracker, operator: LinearOperator) -> Eigenpairs:
        rest = self._allowance.rest(point.products)
        found = tracker.update(operator, most=None if math.isinf(rest) else max(int(rest), LEAST))
        point.products += found.matvecs
        return found

    def _difference_error(self, run: RunContext) -> float | None:
        """Return the error of one-sided differences where all of the coming measurement can rest on them, else None."""
        due = {one for one in EXTRAS if one in self._wanted and self._extra_is_due(one, run)}
        tags = {"stability_ratio", "hessian_max"} | {_TAGS[one] for one in due if one in _TAGS}
        trackers = [tracker for tag, tracker in self._trackers.items() if tag in tags]
        if (
            run.ranks.is_distributed
            or due & _ON_THE_GRAPH
            or not trackers
            or any(one.backend == "auto" for one in trackers)
        ):
            return None
        return max(one.difference_error for one in trackers)

    def _tracker(self, k: int = 1) -> EigenTracker:
        # Several values take a second look for copies of repeated ones.
        products = self._max_matvecs * (1 if k == 1 else 2)
        return EigenTracker(k, certify=self._certify, tol=self._tol, max_matvecs=products)

    def _max_eigenvalues(self) -> int:
        return SUBSPACE if "subspace" in self._wanted else 1

    def _note_bracket(self, point: Point, tag: str, found: Eigenpairs, scaling: StabilityScaling | None) -> None:
        """Have the top direction tried on other samples, when the upper bound is taken."""
        if found.upper is not None and "bracket" in self._wanted and self._probe.second_in_all:
            point.brackets.append((tag, found.vectors[:, 0], scaling))

    def _measure_brackets(self, point: Point) -> None:
        """Curvature of the top directions on the second set of samples."""
        if not point.brackets:
            return
        other = self._probe.hessian(point.run, point.params, second=True)
        for tag, vector, scaling in point.brackets:
            operator = other if scaling is None else stability_operator(other, scaling)
            vector = vector.to(operator.dtype)
            require_trust(operator, vector)
            point.readings[f"sharpness/{tag}_bracket"] = float(operator.space.inner(vector, operator @ vector))
            point.products += 1

    def _subspace(self, point: Point, found: Eigenpairs) -> None:
        space, where = found.vectors[:, : len(found.values)], point.params.space
        point.readings["sharpness/gradient_share"] = eigenspace_share(space, point.hessian.gradient, where)
        update = self._steps.last_update(point.params)
        if update is not None:
            point.readings["sharpness/update_share"] = eigenspace_share(space, update, where)
        if self._space is not None and self._space.shape == space.shape:
            point.readings["sharpness/eigenspace_overlap"] = eigenspace_overlap(self._space.to(space), space, where)
        self._space = space

    def _density(self, point: Point) -> None:
        require_trust(point.exact(), random_start(point.hessian, None, self.points))
        found = spectral_density(point.hessian, steps=DENSITY_STEPS, num_vectors=DENSITY_VECTORS, seed=self.points)
        point.products += found.matvecs
        self.last_density = found
        point.readings["sharpness/outliers"] = float(len(found.outliers))
        point.readings["sharpness/bulk_edge"] = found.bulk_edge

    def _blockwise(self, point: Point) -> None:
        tensors = dict(zip(point.params.names or [], point.params.tensors, strict=True))
        blocks = {la.name: [tensors[la.name]] for la in point.run.layers if la.name in tensors}
        found = blockwise_sharpness(point.exact(), blocks, warm_starts=self._blocks, seed=self.points)
        self._blocks = {name: pairs.vectors for name, pairs in found.items()}
        point.products += sum(pairs.matvecs for pairs in found.values())
        reasons = [why_not(point.hessian, pairs.product_error) for pairs in found.values()]
        if reasons and all(reasons):
            raise ArithmeticError(reasons[0])
        pairs = zip(found.values(), reasons, strict=True)
        values = np.array([math.nan if reason else float(one.values[0]) for one, reason in pairs])
        point.run.recorder.layers("sharpness/block", values, list(found))

    def _ggn(self, point: Point) -> None:
        self._solve(point, "ggn_max", self._gauss_newton.operator(point.run, point.params))

    def _extra_is_due(self, quantity: str, run: RunContext) -> bool:
        """Return whether an extra quantity is taken along now."""
        return quantity not in self._extras or self._extras[quantity].is_due(run.step)

    def _start_anew(self, run: RunContext) -> None:
        """After a failure some of several processes may have come further than others: all track from nothing."""
        if run.ranks.is_distributed:
            self._trackers, self._blocks, self._space = {}, {}, None

    def state_dict(self) -> dict[str, Any]:
        """Trackers, their vectors where they are not large."""
        state: dict[str, Any] = {"points": self.points}
        # One process cannot save what each has a part of.
        most = SAVED_NUMBERS if self._save_vectors and self._probe.gathers else -1
        state["trackers"] = {tag: tracker.state_dict(most) for tag, tracker in self._trackers.items()}
        if sum(v.numel() for v in self._blocks.values()) <= most:
            state["blocks"] = dict(self._blocks)
        if self._space is not None and self._space.numel() <= most:
            state["space"] = self._space
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the trackers; without vectors their next run is cold."""
        self.points = int(state["points"])
        self._trackers, self._last_loss = {}, math.inf
        for tag, saved in state["trackers"].items():
            self._trackers[tag] = self._tracker(int(saved["k"]))
            self._trackers[tag].load_state_dict(saved)
        self._blocks, self._space = dict(state.get("blocks", {})), state.get("space")


def _rate_factors(point: Point) -> list[float]:
    """Return the factor that steering puts on the rate of each parameter."""
    rates = None if point.optimizer is None else steering_of(point.optimizer)
    ratios = {} if rates is None else rates.ratios
    ratio_of = {} if rates is None else {id(la.parameter): ratios[la.name] for la in rates.layers}
    return [ratio_of.get(id(p), 1.0) for p in point.owned]
