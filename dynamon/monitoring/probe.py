"""The probe: the training loss on held samples, on which sharpness is measured."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynamon.curvature import HessianOperator, LinearOperator, MeanOverRanks, ShardedHessian, ShardedParameters
from dynamon.curvature.operators.backends import fit_differences
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.isolation.evaluations import is_autocast
from dynamon.isolation.preserve import LossError, LossFn, NoLossError, training_loss
from dynamon.isolation.samples import count_samples
from dynamon.kernels import widest_dtype
from dynamon.monitoring.effect_check import EffectCheck
from dynamon.monitoring.evaluation import evaluation, trained_parameters, why_not_evaluated
from dynamon.monitoring.failures import forget_frames
from dynamon.monitoring.held_samples import HeldSamples, reduced_on
from dynamon.monitoring.messages import rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.samples import batch_sizes

_PATIENCE = 5  # batches in a row without a loss, after which whole ones are tried: it may be their parts that have none
_TRIES = 10  # ... after which that is a failure; where it is there and not finite, at the first of the two
_FEWEST = 2  # samples that a probe is not made smaller than
_STEPS_TO_TIME = 4.0  # training steps on as many samples that timing takes: two losses, and a gradient with its graph
_GOOD, _PART_FAILS, _NO_LOSS = 0.0, 1.0, 2.0  # what an evaluation says of what was kept
OperatorT = TypeVar("OperatorT", bound=LinearOperator)


class ProbeMeter(HeldSamples):
    """Evaluates the training loss on samples that it holds, without leaving a trace.

    Measures nothing itself: other meters hold it and ask.

    Args:
        loss_fn: ``loss_fn(module, batch)``, or None for ``training_step``.
        batches: How many batches to keep.
        fraction: Share of each batch.
        size: Samples to keep in all, instead of ``batches`` and ``fraction``.
        weight: Name of an entry of the batch whose sum weighs it (a mask of tokens), or None for its samples.
        second: Whether to keep the second set.
        save: Whether checkpoints hold the samples.
        may_shrink: Whether a first reading may have fewer samples, so that the budget pays for it.

    Under DDP and FSDP2 each process keeps a share of its own batches, and what is measured is that of all of them
    together.

    Attributes:
        gathers: Whether parameters that are sharded are gathered while they are measured; else they stay so.
        samples_in_all: Samples in the probe of all processes, None where they cannot be told apart.
        second_in_all: Whether all have their second set.
        users: Who measures on it.
        guests: What else is measured on it, in words.
        graph_seconds: What a gradient on it with its graph takes; None until that was timed.
    """

    def __init__(
        self,
        loss_fn: LossFn | None,
        batches: int,
        fraction: float,
        size: int | None = None,
        weight: str | None = None,
        second: bool = False,
        save: bool = True,
        may_shrink: bool = False,
    ) -> None:
        """No samples yet."""
        super().__init__(loss_fn, batches, fraction, size, weight, second, save)
        self._may_shrink, self.gathers = may_shrink, True
        self.users: Sequence[Meter] = ()
        self.guests: Sequence[str] = ()
        self.graph_seconds: float | None = None
        self.effects = EffectCheck(loss_fn)
        self._refused = 0  # batches in a row without one
        self.refusal: str | None = None  # why the last batch had none
        self._part_error = "on another process."

    def start(self, run: RunContext) -> None:
        """Say what cannot be measured, and take up what a checkpoint held."""
        reason = why_not_evaluated(run, list(trained_parameters(run).values()), self.loss_fn)
        self.off = reason is not None or self.effects.reason is not None
        if reason is not None:
            others = f", and so are {' and '.join(self.guests)}" if self.guests else ""
            rank_zero_warn(f"{self.subject} is off{others}: {reason}")
        else:
            self.effects.is_done |= self.loss_fn is None and run.loop.loss_source is None
            self._take_up(run)

    def is_off(self) -> bool:
        """Return whether there is nothing to be timed: it was done, or nobody keeps to a budget."""
        return self.off or self.graph_seconds is not None or not any(m.cadence.is_planned for m in self.users)

    def expected(self, run: RunContext) -> float | None:
        """Return the seconds of a gradient with its graph, after the evaluations that try the loss out."""
        return _STEPS_TO_TIME * self.share * run.seconds_per_step

    def batch_end(self, run: RunContext) -> None:
        """Time a gradient on the samples before the first measurement; take fewer where that is too expensive."""
        if run.budget.fraction is None or self.is_off() or not self.is_due(run) or not self.is_expected(run):
            return
        with run.charge(self.name, waits=True):
            is_there = self.check(run)
        if not is_there:
            return
        try:
            with run.together(self.name):
                self._time_graph(run)
                halvings = self._halvings_that_fit(run)
                for _ in range(halvings):
                    self.halve(run)
                if halvings:
                    self._time_graph(run)
        except Exception:  # whatever it was: known on all processes, or on none
            self.graph_seconds = None
            raise
        self.cadence.read(run.step)

    def _time_graph(self, run: RunContext) -> None:
        self.agree(run)
        with self.evaluation(run) as params:
            begin = time.perf_counter()
            hessian = self.hessian(run, params)
            float(hessian.loss)
            self.graph_seconds = time.perf_counter() - begin

    def _halvings_that_fit(self, run: RunContext) -> int:
        """Return how often to halve the samples so that the grace pays for a measurement; 0 where no number does."""
        least = sum(getattr(user, "least", user.expected)(run) or 0.0 for user in self.users if not user.is_off())
        left = run.budget.left
        halvings = math.ceil(math.log2(least / left)) if 0 < left < least else 0
        samples = self.samples or 1
        is_worth_it = self._may_shrink and run.budget.grace > 0 and samples // 2**halvings >= _FEWEST
        own = halvings if is_worth_it and run.ranks.rank == 0 else 0  # the first process decides
        return int(run.ranks.sum(torch.tensor(own, dtype=widest_dtype(reduced_on(run)), device=reduced_on(run))))

    def evaluation(
        self, run: RunContext, names: Collection[str] | None = None, moves: bool = False
    ) -> AbstractContextManager[FlatParameters]:
        """Enter :func:`dynamon.monitoring.evaluation.evaluation`, where the loss may be evaluated again.

        Args:
            run: The run.
            names: Layers whose parameters are meant; None for all that are trained.
            moves: Whether they are to be moved by as little as a step.
        """
        owned = {name: p for name, p in trained_parameters(run).items() if names is None or name in names}
        return evaluation(run, owned, self.gathers, moves)

    def loss(self, run: RunContext, second: bool = False) -> Tensor:
        """Mean loss over this process's batches of the probe by their weights."""
        try:
            return self.weighted(lambda batch, index: self._evaluate(run, batch, index), second)
        except NoLossError:  # it had one before: the next measurement finds out whether it has one again
            self._sets = [[replace(one, is_tried=False) for one in kept] for kept in self._sets]
            raise

    def _evaluate(self, run: RunContext, batch: Any, index: int) -> Tensor:
        """Evaluate the loss of a batch: the function that was given, or that of the loop."""
        return (
            run.loop.loss(batch, index) if self.loss_fn is None else training_loss(run.loop.model, batch, self.loss_fn)
        )

    def mean_loss(self, run: RunContext) -> Tensor:
        """The same over the batches of all processes, without a graph where there are several."""
        return run.ranks.mean(self.loss(run), self._total())

    def hessian(
        self, run: RunContext, params: FlatParameters, second: bool = False, error: float | None = None
    ) -> HessianOperator | MeanOverRanks:
        """The Hessian of the mean loss over the probe of all processes.

        Args:
            run: The run, of one process where an error is given.
            params: The parameters.
            second: Whether the second set is meant.
            error: That of one-sided differences, which then make the products; None for exact products.
        """
        if isinstance(params, ShardedParameters):
            share = self._share(run, self._total(second))
            return ShardedHessian(lambda: share * self.loss(run, second), params)
        is_possible = fit_differences(params, is_autocast(params.tensors[0].device))  # a resumed run can have changed
        backend = "forward_difference" if error is not None and is_possible else "auto"
        own = HessianOperator(lambda: self.loss(run, second), params, backend=backend, error=error)
        return self.over_ranks(run, own, second)

    def over_ranks(self, run: RunContext, operator: OperatorT, second: bool = False) -> OperatorT | MeanOverRanks:
        """From an operator of this process's part of the probe to that of the whole."""
        return MeanOverRanks(operator, self._total(second), run.ranks) if run.ranks.is_distributed else operator

    def batch_hessian(self, run: RunContext, params: FlatParameters, batch: Any) -> HessianOperator | MeanOverRanks:
        """The Hessian of the loss on a batch, that of all processes together."""
        index, weight = (
            run.loop.batch_index,
            self._weight_of(batch, count_samples(batch, batch_sizes(run.loop.loaders))),
        )
        if isinstance(params, ShardedParameters):
            share = self._share(run, weight)
            return ShardedHessian(lambda: share * self._evaluate(run, batch, index), params)
        own = HessianOperator(lambda: self._evaluate(run, batch, index), params)
        return MeanOverRanks(own, weight, run.ranks) if run.ranks.is_distributed else own

    def _share(self, run: RunContext, weight: float) -> float:
        """Return what this process's loss counts in the mean over the processes that FSDP2 takes."""
        total = run.ranks.sum(torch.tensor(weight, dtype=widest_dtype(run.device), device=run.device))
        return weight * run.ranks.size / float(total)

    def weighted(self, evaluate: Callable[[Any, int], Tensor], second: bool = False) -> Tensor:
        """Weighted mean of something evaluated on each batch."""
        kept = self._sets[1 if second else 0]
        values = torch.stack([evaluate(one.batch, one.index) for one in kept])
        weights = values.new_tensor([one.weight for one in kept])
        return (values * weights).sum() / weights.sum()

    def check(self, run: RunContext) -> bool:
        """Return whether there is something to measure on, the same on all processes; asked before each measurement.

        Where something was kept since the last time the loss is evaluated once. If it has none the next batch is taken
        instead, and if it cannot be evaluated on a part of a batch, whole ones. Before the first measurement it is
        evaluated once more, and sharpness is off if that changed anything for good. Of several processes each looks
        at its own part; what one of them finds counts for all of them.

        Raises:
            ValueError: Under ``strict=True``, where ``training_step`` changes anything for good.
        """
        if self.off:
            return False
        with run.ranks.collective_section():
            self._require_samples(run)
            if not self._try_out(run):
                return False
            if not self.effects.is_done:
                found = run.ranks.all_gather_object(self.effects.find(run.loop, lambda: self._look(run, 0)))
                self.effects.settle(next((text for text in found if text is not None), None))
            if self.effects.reason is None:
                return True
            self.off = True
            if run.strict:
                raise ValueError(self.effects.sentence(self.subject))
        self.effects.tell(self.subject)
        return False

    def _try_out(self, run: RunContext) -> bool:
        """Evaluate the loss on what has not been tried; whether the first set is good."""
        found = torch.zeros(len(self._sets), 2, dtype=widest_dtype(reduced_on(run)), device=reduced_on(run))
        for place, kept in enumerate(self._sets):
            found[place, 0] = float(any(not one.is_tried for one in kept))
        if run.ranks.is_distributed:
            run.ranks.maximum(found)
        if not found[:, 0].any():
            return True
        for place, kept in enumerate(self._sets):
            if any(not one.is_tried for one in kept):
                found[place, 1] = self._verdict(run, place)
        verdicts = run.ranks.maximum(found)[:, 1].tolist()
        for place, verdict in enumerate(verdicts):
            tried = [replace(one, is_tried=True) for one in self._sets[place]]
            self._sets[place], self._parts[place] = (tried, self._parts[place]) if verdict == _GOOD else ([], [])
        if _PART_FAILS in verdicts:
            self._fraction, self._size, self.share = 1.0, None, float(self._batches)
            self._say(
                "part",
                f"the probe holds whole batches: the loss of a part of one could not be evaluated: {self._part_error}",
            )
        self._refused = 0 if _NO_LOSS not in verdicts else self._refused + 1
        self._let_go = verdicts[0] != _GOOD
        return not self._let_go

    def _verdict(self, run: RunContext, place: int) -> float:
        """Return what the loss on a set says of it.

        Raises:
            Exception: What it raised on whole batches.
        """
        is_cut, self.refusal = any(one.is_cut for one in self._sets[place]), None
        try:
            loss = self._looked(run, place)
        except NoLossError as error:
            if self._refused >= _TRIES:
                raise
            self.refusal = str(error)
            if is_cut and self._refused >= _PATIENCE:
                self._part_error = "there was none."
                return _PART_FAILS
            self._say("no loss", self._no_loss)
            return _NO_LOSS
        except Exception as error:  # a user's training_step may raise anything on a part of a batch
            if not is_cut or isinstance(error, LossError) or ran_out_of_memory(error):
                raise
            self._part_error = (str(error).strip() or type(error).__name__).splitlines()[0]
            forget_frames(error)
            return _PART_FAILS
        if not math.isfinite(loss) and self._refused < _PATIENCE:
            self.refusal = "the loss on the probe is not finite."
            self._say(
                "not finite",
                f"the loss on the batch that {self.subject} was to be measured on is not finite: the next is taken.",
            )
            return _NO_LOSS
        return _GOOD

    def _looked(self, run: RunContext, place: int) -> float:
        """The loss on a set; of the first one it is watched what its evaluation changes."""
        return self._look(run, place) if place else self.effects.watch(run.loop, lambda: self._look(run, place))

    def _look(self, run: RunContext, place: int) -> float:
        with self.evaluation(run):
            return float(self.loss(run, second=place == 1).detach())
