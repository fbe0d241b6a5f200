"""What the curvature of the whole loss is: eigenvalues, stability, traces, densities, blocks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
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
from dynamon.curvature.memory import free_memory
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.curvature.operators.preconditioner import (
    NoSecondMomentError,
    has_second_moment,
    preconditioned,
    preconditioner,
)
from dynamon.curvature.solvers.lanczos import random_start
from dynamon.distributed.dtensor import is_sharded
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.evaluation import trained_parameters
from dynamon.monitoring.failures import PAUSE_AFTER, Failures, forget_frames
from dynamon.monitoring.gauss_newton import GaussNewton, OutputsFn
from dynamon.monitoring.matvec_allowance import LEAST, MatvecAllowance
from dynamon.monitoring.memory_plan import plan_memory
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.planner import Plan
from dynamon.monitoring.probe import SAVED_NUMBERS, ProbeMeter, why_never, why_not
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.update_curvature import UpdateCurvatureMeter
from dynamon.optim import steering_of
from dynamon.quantities import Scope, meanings, quantities_of
from dynamon.quantities.entries.sharpness import SUBSPACE
from dynamon.stability import (
    StabilityScaling,
    has_stability_condition,
    stability_operator,
    stability_scaling,
    stability_threshold,
)

_EXTRAS = ("preconditioned", "trace", "density", "blocks", "ggn")  # which a measurement can do without
_TRACE_VECTORS = 16
_DENSITY_STEPS, _DENSITY_VECTORS = 60, 2
_SMALL_PROBE = "; so small a probe is sharper than the whole training set. probe_size sets their number."


@dataclass
class _Point:
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


class EigenvalueMeter(Meter):
    """Tracks the top of the curvature on the probe, and whatever else of the spectrum was asked for.

    Args:
        cadence: When.
        probe: What the loss is evaluated on.
        steps: Takes over with critical sharpness where the vectors do not fit into memory.
        quantities: Those that are chosen, of ``dynamon.quantities.choices("sharpness")``.
        tol: Relative tolerance of the solves.
        max_matvecs: Most products a solve.
        outputs: ``outputs(module, batch) -> (outputs, loss)`` for the Gauss-Newton matrix, or None to find them.
        memory_limit: GiB for the solver's vectors; None for half of what is free when training starts.
    """

    name = "sharpness"

    def __init__(
        self,
        cadence: Cadence,
        probe: ProbeMeter,
        steps: UpdateCurvatureMeter,
        quantities: Sequence[str],
        tol: float,
        max_matvecs: int,
        outputs: OutputsFn | None = None,
        memory_limit: float | None = None,
    ) -> None:
        """Nothing tracked yet."""
        super().__init__(cadence)
        self._probe, self._steps, self._memory_limit = probe, steps, memory_limit
        self._gauss_newton = GaussNewton(probe, outputs)
        self._wanted = frozenset(quantities)
        self._tol, self._max_matvecs = tol, max_matvecs
        declared = [one for one in quantities_of("sharpness") if self._wanted and one.choice in self._wanted | {""}]
        self.tags = meanings(one for one in declared if one.scope is Scope.SCALAR)
        self.quantities = meanings(one for one in declared if one.scope is Scope.PER_LAYER)
        self.panels = chart_layout(declared)
        self._trackers: dict[str, EigenTracker] = {}
        self._blocks: dict[str, Tensor] = {}
        self._space: Tensor | None = None
        self.last_density: SpectralDensity | None = None
        self._allowance = MatvecAllowance()
        self._extras: dict[str, Cadence] = {}  # what is taken along with a measurement now and then
        self._too_large, self._never, self._certify = False, False, True
        self._needed = 0.0  # bytes of the vectors of a solve
        self._is_guess = self._is_solving = False
        self._told: set[str] = set()
        self._failures = Failures()
        self._last_loss = math.inf

    def start(self, run: RunContext) -> None:
        """Say what cannot be measured, and what is measured instead."""
        if self._probe.off:
            return
        optimizer = _only(run.loop.optimizers)
        if self._wanted & {"stability_ratio", "preconditioned"} and _is_spread(run.loop.optimizers):
            self._wanted -= {"stability_ratio", "preconditioned"}
            rank_zero_warn("no stability ratio: ZeroRedundancyOptimizer keeps a part of its state on each process.")
        if optimizer is None and self._wanted & {"stability_ratio", "preconditioned"}:
            rank_zero_info("no stability ratio: it is defined for one optimizer, and there are several.")
        if optimizer is not None and "stability_ratio" in self._wanted and not has_stability_condition(optimizer):
            self._steps.also("directional")
            rank_zero_info(
                f"no stability ratio: {type(optimizer).__name__} has no known stability condition; the Hessian's "
                "largest eigenvalue and the sharpness along the step in the layers' own norms are shown instead."
            )
        with run.ranks.collective_section():
            self._check_memory(run)
        # On a device of its own memory is not what it will be: activations and states of optimizers come with training.
        whole = not any(is_sharded(p) for p in trained_parameters(run).values())
        self._is_guess = run.device.type != "cpu" and not self._memory_limit and whole

    def _fits(self, run: RunContext) -> bool:
        """Whether the vectors of a solve fit beside what training holds, asked once more before the first one."""
        if self._is_guess:
            self._is_guess = False
            self._check_memory(run)
        return not self._too_large

    def _check_memory(self, run: RunContext) -> None:
        trained = list(trained_parameters(run).values())
        if not trained:
            return
        room = plan_memory(run, trained, self._max_eigenvalues(), _DENSITY_STEPS + 1, self._memory_limit)
        self._probe.gathers, self._certify, self._too_large = room.gathers, room.certifies, not room.solves
        self._needed = room.needed
        allowed = f"GiB and {room.limit / 2**30:.3g} GiB are allowed"
        if room.differences:
            self._told.add("backend")
            if "ggn" in self._wanted:
                self._wanted -= {"ggn"}
                rank_zero_warn("ggn is left out: it needs gathered parameters. Raise memory_limit to have it.")
        if "density" in self._wanted and not room.has_density:
            self._wanted -= {"density"}
            rank_zero_warn(
                f"density is left out: its vectors take {room.density / 2**30:.3g} {allowed}. Raise memory_limit to "
                "have it."
            )
        if self._too_large:
            self._steps.also("critical")
            rank_zero_warn(
                f"the vectors of an eigenvalue solve take {room.needed / 2**30:.3g} {allowed}: critical sharpness, "
                "which needs forward passes only, is shown instead. Raise memory_limit to have eigenvalues."
            )

    def _max_eigenvalues(self) -> int:
        return SUBSPACE if "subspace" in self._wanted else 1

    def is_off(self) -> bool:
        """Where nothing was asked for or its vectors do not fit, or sharpness is off."""
        return not self._wanted or self._too_large or self._never or self._probe.off

    def is_missed(self) -> bool:
        """Not where it is off for another reason."""
        return super().is_missed() and not self.is_off()

    def plans(self, run: RunContext) -> list[Plan]:
        """Return what the planner has to know, also of the expensive quantities that not every measurement brings."""
        own = super().plans(run)
        if not self.cadence.is_planned or run.budget.fraction is None:
            return own
        self._extras = {
            quantity: Cadence(None, self.cadence.interval) for quantity in _EXTRAS if quantity in self._wanted
        }
        return own + [
            Plan(quantity, cadence, partial(self._expected_extra, run, quantity), partial(self._lacks, quantity), True)
            for quantity, cadence in self._extras.items()
        ]

    def _lacks(self, quantity: str) -> bool:
        return self.is_off() or quantity not in self._wanted

    def _expected_extra(self, run: RunContext, quantity: str) -> float | None:
        return self._allowance.price(self._products_of(run, quantity), self._probe.graph_seconds)

    def expected(self, run: RunContext) -> float | None:
        """Return the seconds of the coming measurement, its extras left out; None as long as nothing was timed.

        The first one is made as small as the budget allows, down to a few products.
        """
        tracked = list(self._trackers.values()) or [self._tracker(k) for k in self._first_solves()]
        products = sum(map(_products_of_solve, tracked))
        price = self._allowance.price(products, self._probe.graph_seconds)
        least = self.least(run)
        if price is None or least is None or self._took:
            return price
        return min(price, max(least, run.budget.left))

    def least(self, run: RunContext) -> float | None:
        """Return the seconds of the smallest measurement."""
        return self._allowance.price(LEAST, self._probe.graph_seconds)

    def _first_solves(self) -> list[int]:
        """How many eigenvalues each of the first solves follows."""
        solves = len(self._wanted & {"stability_ratio", "hessian"})
        return [1] * (solves - 1) + [self._max_eigenvalues()]

    def _products_of(self, run: RunContext, quantity: str) -> int:
        """How many products an extra quantity takes."""
        blocks = _products_of_solve(EigenTracker()) * len(run.layers)
        known = {"trace": _TRACE_VECTORS, "density": _DENSITY_STEPS * _DENSITY_VECTORS, "blocks": blocks}
        return known.get(quantity, _products_of_solve(self._trackers.get(f"{quantity}_max") or self._tracker()))

    def _is_due(self, run: RunContext) -> bool:
        return not self.is_off() and self._probe.is_expected(run) and self.is_due(run)

    def before_step(self, run: RunContext, optimizer: Optimizer) -> None:
        """Have the update kept where its share in the top eigenspace is wanted."""
        if "subspace" in self._wanted and self._is_due(run):
            self._steps.copy_weights(run)

    def make_room(self, run: RunContext) -> str | None:
        """Halve the probe; give up solves where it is not to blame, of one process."""
        alone, share = not run.ranks.is_distributed, self._probe.share
        fits = free_memory(run.device) > self._needed
        said = self._probe.halve(run) if fits or not self._is_solving or not alone else None
        if not alone or not self._is_solving or self._probe.share < share:
            return said
        self._too_large = True
        self._steps.also("critical")
        return "Eigenvalues are left out: critical sharpness, which needs forward passes only, is shown instead."

    def batch_end(self, run: RunContext) -> None:
        """Measure when due."""
        if not self._is_due(run) or not run.steps.any_taken():
            return
        with run.charge(self.name, waits=True):
            is_there = self._probe.check(run)
        if not is_there:
            return
        spent = run.budget.spent_on.get(self.name, 0.0)
        try:
            with run.together(self.name):
                products = self._measure(run)
        except Exception:  # whatever it was, what is tracked belongs to a measurement that did not end
            self._start_anew(run)
            raise
        if self.is_off():
            return
        self._allowance.note(run.budget.spent_on[self.name] - spent, products)
        self.done(run)

    def _measure(self, run: RunContext) -> int:
        self._is_solving = False
        if not self._fits(run):
            return 0
        self._probe.agree(run)
        self._allowance.open(run, self.cadence.is_planned, self._probe.graph_seconds)
        with self._probe.evaluation(run) as params:
            hessian = self._probe.hessian(run, params)
            self._is_solving = True  # from here on the loss and its gradient fit
            if (never := why_never(hessian, hessian.gradient)) is not None:
                self._leave_out(run, never)
                return 0
            owned = list(trained_parameters(run).values())
            point = _Point(run, params, owned, hessian, _only(run.loop.optimizers))
            point.readings["sharpness/probe_loss"] = float(hessian.loss)
            if not math.isfinite(point.readings["sharpness/probe_loss"]):
                raise FloatingPointError("the loss on the probe is not finite.")
            if self._probe.samples_in_all is not None:
                point.readings["sharpness/probe_samples"] = float(self._probe.samples_in_all)
            self._measure_hessian(point)
            self._say_backend(point)
            del hessian, point.hessian  # its graph makes room for those that follow
            self._attempt(point, "bracket", self._measure_brackets)
            if "ggn" in self._wanted:
                self._attempt(point, "ggn", self._ggn)
            self._judge(point)
            point.readings["sharpness/matvecs"] = float(point.products)
            run.recorder.scalars(point.readings, headline=True)
        self._warn(run, point.readings)
        return point.products

    def _leave_out(self, run: RunContext, reason: str) -> None:
        """Measure nothing any more: what is in the way stays there.

        Raises:
            ArithmeticError: Under ``strict=True``.
        """
        sentence = f"sharpness is left out: {reason} Critical sharpness, which takes no derivative, is shown instead."
        if run.strict:
            raise ArithmeticError(sentence)
        self._never = True
        self._steps.also("critical")
        rank_zero_warn(sentence)

    def _measure_hessian(self, point: _Point) -> None:
        """Everything that shares the graph of the probe's gradient."""
        optimizer = point.optimizer
        if optimizer is not None and "stability_ratio" in self._wanted and has_stability_condition(optimizer):
            self._attempt(point, "stability_ratio", self._stability)
        # SGD's stability ratio brings the Hessian with it; without any ratio the Hessian is all there is.
        if self._wanted & {"hessian", "subspace"} or not point.products and "stability_ratio" in self._wanted:
            if "sharpness/hessian_min" not in point.readings:
                self._attempt(point, "hessian", self._solve_hessian)
        for quantity, function in (
            ("preconditioned", self._preconditioned),
            ("trace", self._trace),
            ("density", self._density),
            ("blocks", self._blockwise),
        ):
            if quantity in self._wanted:
                self._attempt(point, quantity, function)

    def _attempt(self, point: _Point, quantity: str, function: Callable[[_Point], Any]) -> None:
        """Measure one quantity; its failure leaves the others alone."""
        extra = self._extras.get(quantity)
        least = LEAST if extra is None else self._products_of(point.run, quantity)
        if quantity != "bracket" and point.products and self._allowance.rest(point.products) < least:
            return
        if self._failures.rests(quantity, self.points) or extra is not None and not extra.is_due(point.run.step):
            return
        try:
            before = point.products
            with point.run.ranks.collective_section():
                function(point)
            point.succeeded += point.products > before
            self._failures.clear(quantity)
            if extra is not None:
                extra.read(point.run.step)
        except NoSecondMomentError:
            return  # not yet: it comes with the optimizer's first steps
        except Exception as error:  # one quantity fails, the others are measured all the same
            if point.run.strict or ran_out_of_memory(error):
                raise
            forget_frames(error)  # this point is one of their variables: together they would keep the graph alive
            point.failed[quantity] = error
            self._start_anew(point.run)

    def _start_anew(self, run: RunContext) -> None:
        """After a failure some of several processes may have come further than others: all track from nothing."""
        if run.ranks.is_distributed:
            self._trackers, self._blocks, self._space = {}, {}, None

    def _judge(self, point: _Point) -> None:
        """Raise if nothing succeeded; else say once what failed; what failed three times in a row rests for a while."""
        first = next(iter(point.failed.values()), None)
        if first is not None and not point.succeeded:
            raise first
        for quantity, error in point.failed.items():
            point.run.failures += 1
            in_a_row = self._failures.add(quantity, self.points + 1)
            paused = in_a_row == PAUSE_AFTER
            if in_a_row == 1 and quantity not in self._told or paused:
                self._told.add(quantity)
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                later = "It is left out now, and tried again in 10 readings, then in twice as many each time."
                after = later if paused else "The other quantities go on."
                rank_zero_warn(f"step {point.run.step}: {quantity} could not be measured: {line} {after}")

    def _stability(self, point: _Point) -> None:
        optimizer = point.optimizer
        assert optimizer is not None
        rates = steering_of(optimizer)
        ratios = {} if rates is None else rates.ratios
        ratio_of = {} if rates is None else {id(la.parameter): ratios[la.name] for la in rates.layers}
        factors = [ratio_of.get(id(p), 1.0) for p in point.owned]
        scaling = stability_scaling(optimizer, point.owned, factors, point.params.space)
        point.readings["sharpness/excluded_coordinates"] = float(scaling.excluded)
        if scaling.constant is not None and scaling.constant > 0:
            # Plain SGD: the ratio is the Hessian's eigenvalue times a number, one solve gives both.
            found = self._solve_hessian(point)
            point.readings |= found.scaled(scaling.constant).readings("sharpness/stability_ratio")
        else:
            found = self._solve(point, "stability_ratio", stability_operator(point.hessian, scaling))
        self._note_bracket(point, "stability_ratio", found, scaling)

    def _preconditioned(self, point: _Point) -> None:
        optimizer = point.optimizer
        if optimizer is not None and has_second_moment(optimizer):
            diagonal = preconditioner(optimizer, point.owned, point.params.space)
            self._solve(point, "preconditioned_max", preconditioned(point.hessian, diagonal))
        elif "preconditioned" not in self._told:
            self._told.add("preconditioned")
            rank_zero_info(
                "preconditioned: there is no single optimizer that keeps a second moment, so nothing to show."
            )

    def _trace(self, point: _Point) -> None:
        _require_trust(point.hessian, random_start(point.hessian, None, self.points))
        found = trace(point.hessian, num_vectors=_TRACE_VECTORS, seed=self.points)
        point.readings |= {"sharpness/trace": found.value, "sharpness/trace_error": found.standard_error}
        point.products += found.matvecs

    def _solve_hessian(self, point: _Point) -> Eigenpairs:
        found = self._solve(point, "hessian_max", point.hessian, self._max_eigenvalues())
        point.readings["sharpness/hessian_min"] = found.smallest
        threshold = None if point.optimizer is None else stability_threshold(point.optimizer)
        if threshold is not None:
            point.readings["sharpness/threshold"] = threshold
        self._note_bracket(point, "hessian_max", found, None)
        if "subspace" in self._wanted:
            self._subspace(point, found)
        return found

    def _solve(self, point: _Point, tag: str, operator: LinearOperator, k: int = 1) -> Eigenpairs:
        tracker = self._trackers.setdefault(tag, self._tracker(k))
        rest = self._allowance.rest(point.products)
        found = tracker.update(operator, most=None if math.isinf(rest) else max(int(rest), LEAST))
        point.products += found.matvecs
        if (reason := why_not(operator, found.product_error)) is not None:
            raise ArithmeticError(reason)
        point.readings |= found.readings(f"sharpness/{tag}")
        return found

    def _tracker(self, k: int = 1) -> EigenTracker:
        # Several values take a second look for copies of repeated ones.
        products = self._max_matvecs * (1 if k == 1 else 2)
        return EigenTracker(k, certify=self._certify, tol=self._tol, max_matvecs=products)

    def _note_bracket(self, point: _Point, tag: str, found: Eigenpairs, scaling: StabilityScaling | None) -> None:
        """Have the top direction tried on other samples, when the upper bound is taken."""
        if found.upper is not None and "bracket" in self._wanted and self._probe.second_in_all:
            point.brackets.append((tag, found.vectors[:, 0], scaling))

    def _measure_brackets(self, point: _Point) -> None:
        """Curvature of the top directions on the second set of samples."""
        if not point.brackets:
            return
        other = self._probe.hessian(point.run, point.params, second=True)
        for tag, vector, scaling in point.brackets:
            operator = other if scaling is None else stability_operator(other, scaling)
            vector = vector.to(operator.dtype)
            _require_trust(operator, vector)
            point.readings[f"sharpness/{tag}_bracket"] = float(operator.space.inner(vector, operator @ vector))
            point.products += 1

    def _subspace(self, point: _Point, found: Eigenpairs) -> None:
        space, where = found.vectors[:, : len(found.values)], point.params.space
        point.readings["sharpness/gradient_share"] = eigenspace_share(space, point.hessian.gradient, where)
        update = self._steps.last_update(point.params)
        if update is not None:
            point.readings["sharpness/update_share"] = eigenspace_share(space, update, where)
        if self._space is not None and self._space.shape == space.shape:
            point.readings["sharpness/eigenspace_overlap"] = eigenspace_overlap(self._space.to(space), space, where)
        self._space = space

    def _density(self, point: _Point) -> None:
        _require_trust(point.hessian, random_start(point.hessian, None, self.points))
        found = spectral_density(point.hessian, steps=_DENSITY_STEPS, num_vectors=_DENSITY_VECTORS, seed=self.points)
        point.products += found.matvecs
        self.last_density = found
        point.readings["sharpness/outliers"] = float(len(found.outliers))
        point.readings["sharpness/bulk_edge"] = found.bulk_edge

    def _blockwise(self, point: _Point) -> None:
        tensors = dict(zip(point.params.names or [], point.params.tensors, strict=True))
        blocks = {la.name: [tensors[la.name]] for la in point.run.layers if la.name in tensors}
        found = blockwise_sharpness(point.hessian, blocks, warm_starts=self._blocks, seed=self.points)
        self._blocks = {name: pairs.vectors for name, pairs in found.items()}
        point.products += sum(pairs.matvecs for pairs in found.values())
        reasons = [why_not(point.hessian, pairs.product_error) for pairs in found.values()]
        if reasons and all(reasons):
            raise ArithmeticError(reasons[0])
        pairs = zip(found.values(), reasons, strict=True)
        values = np.array([math.nan if reason else float(one.values[0]) for one, reason in pairs])
        point.run.recorder.layers("sharpness/block", values, list(found))

    def _ggn(self, point: _Point) -> None:
        self._solve(point, "ggn_max", self._gauss_newton.operator(point.run, point.params))

    def _say_backend(self, point: _Point) -> None:
        reason = point.hessian.reason
        if reason is not None and "backend" not in self._told:
            self._told.add("backend")
            differences = "Finite differences of gradients are used instead, at two gradients a product."
            rank_zero_info(f"{reason} {differences}" if "finite_difference" in point.hessian.backend else reason)
        if self._probe.samples_in_all is not None and self._probe.is_complete and "probe" not in self._told:
            self._told.add("probe")
            are_all = self._probe.is_everything(point.run)
            after = ", the whole training set." if are_all else _SMALL_PROBE
            rank_zero_info(f"sharpness is measured on {self._probe.samples_in_all} samples{after}")

    def _warn(self, run: RunContext, readings: Mapping[str, float]) -> None:
        missed = [tag for tag in readings if tag.endswith("_unconverged")]
        if missed and "unconverged" not in self._told:
            self._told.add("unconverged")
            rank_zero_info(
                f"step {run.step}: {missed[0].removesuffix('_unconverged')} did not converge in "
                f"{self._max_matvecs} products and is shown as {missed[0]}, a lower bound."
            )
        ratio = readings.get("sharpness/stability_ratio", math.nan)
        rising = readings["sharpness/probe_loss"] > self._last_loss
        self._last_loss = readings["sharpness/probe_loss"]
        if ratio > 10 and rising and "ratio" not in self._told:
            self._told.add("ratio")
            rank_zero_info(
                f"step {run.step}: the stability ratio is {ratio:.3g} and the loss on the probe rises. Hovering around "
                "1 is normal training; ten times that means that the steps are too large for the curvature."
            )

    def state_dict(self) -> dict[str, Any]:
        """Trackers, their vectors where they are not large."""
        state: dict[str, Any] = {"points": self.points}
        most = SAVED_NUMBERS if self._probe.gathers else -1  # one process cannot save what each has a part of
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


def _products_of_solve(tracker: EigenTracker) -> int:
    """How many products a solve is expected to take; several eigenvalues take about three times as many."""
    products = 20 if tracker.next_is_certified else 10 if tracker.next_is_cold else 6
    return products * (1 if tracker.k == 1 else 3)


def _require_trust(operator: LinearOperator, vector: Tensor) -> None:
    """Raise where products are too noisy to show what rests on them: nothing else in such a number tells."""
    if (reason := why_not(operator, operator.product_error(vector))) is not None:
        raise ArithmeticError(reason)


def _only(optimizers: Sequence[Optimizer]) -> Optimizer | None:
    return optimizers[0] if len(optimizers) == 1 else None


def _is_spread(optimizers: Sequence[Optimizer]) -> bool:
    """Whether an optimizer's state is dealt out over the processes."""
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for o in optimizers for cls in type(o).__mro__)
