"""The curvature of the whole loss during training: which quantities are measured when, and what is said of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from dynamon.board.custom_scalars import chart_layout
from dynamon.curvature import (
    EigenTracker,
)
from dynamon.curvature.memory import free_memory
from dynamon.curvature.operators.preconditioner import (
    NoSecondMomentError,
)
from dynamon.distributed.dtensor import is_sharded
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.monitoring import curvature_solves
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.curvature_solves import DENSITY_VECTORS, EXTRAS, TRACE_VECTORS, CurvatureSolves, Point
from dynamon.monitoring.evaluation import trained_parameters
from dynamon.monitoring.failures import PAUSE_AFTER, Failures, forget_frames
from dynamon.monitoring.gauss_newton import OutputsFn
from dynamon.monitoring.matvec_allowance import LEAST
from dynamon.monitoring.memory_plan import plan_memory
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.planner import Plan
from dynamon.monitoring.probe import ProbeMeter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.trust import why_never
from dynamon.monitoring.update_curvature import UpdateCurvatureMeter
from dynamon.quantities import Scope, meanings, quantities_of
from dynamon.stability import (
    has_stability_condition,
)

_SMALL_PROBE = "; so small a probe is sharper than the whole training set. probe_size sets their number."


class EigenvalueMeter(CurvatureSolves):
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
        save_vectors: Whether checkpoints hold the vectors that the next solve starts from.
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
        save_vectors: bool = True,
    ) -> None:
        """Start with nothing tracked."""
        super().__init__(cadence, probe, steps, quantities, tol, max_matvecs, outputs, save_vectors)
        self._memory_limit = memory_limit
        declared = [one for one in quantities_of("sharpness") if self._wanted and one.choice in self._wanted | {""}]
        self.tags = meanings(one for one in declared if one.scope is Scope.SCALAR)
        self.quantities = meanings(one for one in declared if one.scope is Scope.PER_LAYER)
        self.panels = chart_layout(declared)
        self._too_large = self._never = False
        self._needed = 0.0  # bytes of the vectors of a solve
        self._is_guess = self._is_solving = False
        self._failures = Failures()

    def start(self, run: RunContext) -> None:
        """Say what cannot be measured, and what is measured instead."""
        if self._probe.off:
            return
        optimizer = _only(run.loop.optimizers)
        of_state = {"stability_ratio", "next", "preconditioned"}
        if self._wanted & of_state and _is_spread(run.loop.optimizers):
            self._wanted -= of_state
            rank_zero_warn("no stability ratio: ZeroRedundancyOptimizer keeps a part of its state on each process.")
        if optimizer is None and self._wanted & of_state:
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
        """Return whether the vectors of a solve fit beside what training holds; asked again before the first one."""
        if self._is_guess:
            self._is_guess = False
            self._check_memory(run)
        return not self._too_large

    def _check_memory(self, run: RunContext) -> None:
        trained = list(trained_parameters(run).values())
        if not trained:
            return
        room = plan_memory(
            run, trained, self._max_eigenvalues(), curvature_solves.DENSITY_STEPS + 1, self._memory_limit
        )
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

    def is_off(self) -> bool:
        """Return whether nothing was asked for, its vectors do not fit, or sharpness is off."""
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
            quantity: Cadence(None, self.cadence.interval) for quantity in EXTRAS if quantity in self._wanted
        }
        return own + [
            Plan(quantity, cadence, partial(self._expected_extra, run, quantity), partial(self._lacks, quantity), True)
            for quantity, cadence in self._extras.items()
        ]

    def _lacks(self, quantity: str) -> bool:
        return self.is_off() or quantity not in self._wanted

    def _expected_extra(self, run: RunContext, quantity: str) -> float | None:
        return self._allowance.price(self._products_of(run, quantity), self._probe.graph_seconds)

    def missed_reason(self) -> str | None:
        """Return why there was no loss to measure on."""
        return None if self.points or self.is_off() else self._probe.refusal

    def expected(self, run: RunContext) -> float | None:
        """Return the seconds of the coming measurement, its extras left out; None as long as nothing was timed.

        The first one is made as small as the budget allows, down to a few products.
        """
        tracked = list(self._trackers.values()) or [self._tracker(k) for k in self._first_solves()]
        products = sum(map(_products_of_solve, tracked))
        one_sided = self._difference_error(run) is not None
        price = self._allowance.price(products, self._probe.graph_seconds, one_sided)
        least = self.least(run)
        if price is None or least is None or self._took:
            return price
        return min(price, max(least, run.budget.left))

    def _is_overspent(self, run: RunContext) -> bool:
        """Return whether other readings of this step took what was left for this one; it is then planned anew."""
        least = self.least(run)
        is_alone = self.cadence.is_planned and not run.ranks.is_distributed  # several keep to what was agreed
        return is_alone and least is not None and run.budget.left < least / 2

    def least(self, run: RunContext) -> float | None:
        """Return the seconds of the smallest measurement."""
        one_sided = self._difference_error(run) is not None
        return self._allowance.price(LEAST, self._probe.graph_seconds, one_sided)

    def _first_solves(self) -> list[int]:
        """Return how many eigenvalues each of the first solves follows."""
        solves = len(self._wanted & {"stability_ratio", "hessian"})
        return [1] * (solves - 1) + [self._max_eigenvalues()]

    def _products_of(self, run: RunContext, quantity: str) -> int:
        """Return how many products an extra quantity takes."""
        blocks = _products_of_solve(EigenTracker()) * len(run.layers)
        known = {"trace": TRACE_VECTORS, "density": curvature_solves.DENSITY_STEPS * DENSITY_VECTORS, "blocks": blocks}
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
        if not self._is_due(run) or not run.steps.any_taken() or self._is_overspent(run):
            return
        with run.charge(self.name, waits=True):
            is_there = self._probe.check(run)
        if not is_there:
            return
        spent = run.budget.spent_on.get(self.name, 0.0)
        try:
            with run.together(self.name):
                products, one_sided = self._measure(run)
        except Exception:  # whatever it was, what is tracked belongs to a measurement that did not end
            self._start_anew(run)
            raise
        if self.is_off():
            return
        self._allowance.note(run.budget.spent_on[self.name] - spent, products, one_sided)
        self.done(run)

    def _measure(self, run: RunContext) -> tuple[int, bool]:
        """Return the number of products, and whether they were one-sided differences to the end."""
        self._is_solving = False
        if not self._fits(run):
            return 0, False
        self._probe.agree(run)
        error = self._difference_error(run)
        self._allowance.open(run, self.cadence.is_planned, self._probe.graph_seconds, error is not None)
        with self._probe.evaluation(run) as params:
            hessian = self._probe.hessian(run, params, error=error)
            self._is_solving = True  # from here on the loss and its gradient fit
            if (never := why_never(hessian, hessian.gradient)) is not None:
                self._leave_out(run, never)
                return 0, False
            owned = list(trained_parameters(run).values())
            point = Point(run, params, owned, hessian, _only(run.loop.optimizers))
            point.readings["sharpness/probe_loss"] = float(hessian.loss)
            if not math.isfinite(point.readings["sharpness/probe_loss"]):
                raise FloatingPointError("the loss on the probe is not finite.")
            if self._probe.samples_in_all is not None:
                point.readings["sharpness/probe_samples"] = float(self._probe.samples_in_all)
            self._measure_hessian(point)
            self._say_backend(point)
            one_sided = point.is_one_sided
            del hessian, point.hessian  # its graph makes room for those that follow
            self._attempt(point, "bracket", self._measure_brackets)
            if "ggn" in self._wanted:
                self._attempt(point, "ggn", self._ggn)
            self._judge(point)
            point.readings["sharpness/matvecs"] = float(point.products)
            run.recorder.scalars(point.readings, headline=True)
        self._warn(run, point.readings)
        return point.products, one_sided

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

    def _measure_hessian(self, point: Point) -> None:
        """Everything that shares the graph of the probe's gradient."""
        optimizer = point.optimizer
        if optimizer is not None and "stability_ratio" in self._wanted and has_stability_condition(optimizer):
            self._attempt(point, "stability_ratio", self._stability)
        # SGD's stability ratio brings the Hessian with it; without any ratio the Hessian is all there is.
        if self._wanted & {"hessian", "subspace"} or not point.products and "stability_ratio" in self._wanted:
            if "sharpness/hessian_min" not in point.readings:
                self._attempt(point, "hessian", self._solve_hessian)
        for quantity, function in (
            ("next", self._next),
            ("preconditioned", self._preconditioned),
            ("trace", self._trace),
            ("density", self._density),
            ("blocks", self._blockwise),
        ):
            if quantity in self._wanted:
                self._attempt(point, quantity, function)

    def _attempt(self, point: Point, quantity: str, function: Callable[[Point], Any]) -> None:
        """Measure one quantity; its failure leaves the others alone."""
        extra = self._extras.get(quantity)
        least = LEAST if extra is None else self._products_of(point.run, quantity)
        if quantity != "bracket" and point.products and self._allowance.rest(point.products) < least:
            return
        if self._failures.rests(quantity, self.points) or not self._extra_is_due(quantity, point.run):
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

    def _judge(self, point: Point) -> None:
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

    def _say_backend(self, point: Point) -> None:
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


def _products_of_solve(tracker: EigenTracker) -> int:
    """Return how many products a solve is expected to take; several eigenvalues take about three times as many."""
    products = 20 if tracker.next_is_certified else 10 if tracker.next_is_cold else 6
    return products * (1 if tracker.k == 1 else 3)


def _only(optimizers: Sequence[Optimizer]) -> Optimizer | None:
    return optimizers[0] if len(optimizers) == 1 else None


def _is_spread(optimizers: Sequence[Optimizer]) -> bool:
    """Return whether an optimizer's state is dealt out over the processes."""
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for o in optimizers for cls in type(o).__mro__)
