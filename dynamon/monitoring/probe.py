"""The probe: samples of training that sharpness is measured on, kept for the whole run."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynamon.curvature import HessianOperator, LinearOperator, MeanOverRanks, ShardedHessian, ShardedParameters
from dynamon.curvature.distributed.fsdp import unsupported_reason
from dynamon.curvature.operators.parameters import FlatParameters
from dynamon.distributed.ranks import ran_out_of_memory
from dynamon.isolation.batches import NoWeightError, batch_weight
from dynamon.isolation.preserve import LossError, LossFn, NoLossError, training_loss
from dynamon.isolation.random_streams import is_restorable
from dynamon.isolation.samples import count_samples, take_samples
from dynamon.isolation.saved_batches import UnknownClassError, move_to_host
from dynamon.isolation.side_effects import changed_names, external_state
from dynamon.kernels import widest_dtype
from dynamon.kernels.devices import reads_are_free
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.evaluation import evaluation, trained_parameters
from dynamon.monitoring.failures import forget_frames
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.samples import Kept, batch_sizes, dealt, is_whole_training_set, numbers_of

SAVED_NUMBERS = 2**26  # a probe, or vectors to start from, enter a checkpoint up to this size
NOISY = 0.1  # relative error of a product from which on nothing is shown
_SAME, _SAME_ON_HOST = 1e-3, 1e-6  # two evaluations of a loss differ by less where a GPU adds up in another order
_PATIENCE = 5  # batches in a row without a loss, after which whole ones are tried: it may be their parts that have none
_TRIES = 10  # ... after which that is a failure; where it is there and not finite, at the first of the two
_FEWEST = 2  # samples that a probe is not made smaller than
_GOOD, _PART_FAILS, _NO_LOSS = 0.0, 1.0, 2.0  # what an evaluation says of what was kept
OperatorT = TypeVar("OperatorT", bound=LinearOperator)
_NO_LOSS_SENTENCE = "there is no loss on the batch that sharpness was to be measured on: the next is taken."


class ProbeMeter(Meter):
    """Keeps copies of the first batches, and evaluates the training loss on them without leaving a trace.

    Measures nothing itself: other meters hold it and ask. A second set, of the batches that follow, serves the
    bracket between a small probe's curvature and the whole training set's.

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
        graph_seconds: What a gradient on it with its graph takes; None until that was timed.
    """

    name = "probe"

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
        self._may_shrink = may_shrink
        super().__init__(Cadence(None, interval=1))
        self.users: Sequence[Meter] = ()
        self.graph_seconds: float | None = None
        self.loss_fn = loss_fn
        self.share = batches * fraction  # of one batch, roughly: what an evaluation costs in training steps
        self._batches, self._fraction, self._size, self._weight = batches, fraction, size, weight
        self._save = save
        self._sets: list[list[Kept]] = [[], []] if second else [[]]
        self.off, self.gathers = False, True
        self.samples_in_all: int | None = None
        self.second_in_all = False
        self._parts: list[list[list[dict[str, Any]]]] = [[] for _ in self._sets]  # of all processes, for a checkpoint
        self._loaded: list[list[list[dict[str, Any]]]] = []
        self._resumed_without = False
        self._halvings = 0
        self._checked = loss_fn is not None
        self._newest: Kept | None = None  # of this batch, as long as nothing was passed back
        self._let_go = False  # of a probe without a loss, by all processes, until the next batch
        self._refused = 0  # batches in a row without one
        self._part_error = "on another process."
        self._marks: list[dict[str, str]] = []  # of what is outside of the module, before each evaluation
        self._losses: list[float] = []
        self._told: set[str] = set()

    def start(self, run: RunContext) -> None:
        """Say what cannot be measured, and take up what a checkpoint held."""
        self.off = True
        if run.loop.world_size > 1 and not run.ranks.is_distributed:
            name = run.loop.strategy
            rank_zero_warn(
                f"sharpness is off: of several processes it is measured under DDP and FSDP2 only, and this is {name}."
            )
        elif (
            split := unsupported_reason(run.module, list(trained_parameters(run).values()), run.ranks.size)
        ) is not None:
            rank_zero_warn(f"sharpness is off: {split}.")
        elif run.ranks.is_distributed and any(isinstance(m, nn.SyncBatchNorm) for m in run.module.modules()):
            rank_zero_warn("sharpness is off: SyncBatchNorm has no second derivative and waits for other processes.")
        elif _has_transformer_engine(run):
            rank_zero_warn(
                "sharpness is off: Transformer Engine keeps the scales of its FP8 numbers outside of the module, where "
                "they cannot be put back after an evaluation."
            )
        elif not is_restorable(run.device):
            rank_zero_warn(
                f"sharpness is off: torch cannot put back the random numbers of {run.device.type}, so that "
                "training would go on with others."
            )
        elif self.loss_fn is None and (reason := run.loop.no_loss_reason()) is not None:
            rank_zero_warn(f"sharpness is off: {reason}")
        else:
            self.off, self._checked = False, self._checked or run.loop.loss_source is None
            self._take_up(run)

    def _take_up(self, run: RunContext, like: Any = None) -> None:
        """This process's part of a saved probe: what it had, or where their number has changed, as many as others.

        What is made of the run's own classes waits for ``like``, a batch of the run, that has them.
        """
        if not self._loaded:
            return
        own = [dealt(parts, run.ranks.rank, run.ranks.size) for parts in self._loaded[: len(self._sets)]]
        try:
            found = [[Kept.from_state(state, run.device, like) for state in states] for states in own]
        except Exception as error:  # made of something else than the batches of this run
            if like is None and isinstance(error, UnknownClassError):
                return
            found = []
        self._sets = [*found, *([] for _ in self._sets[len(found) :])]
        self._resumed_without = self._resumed_without or not self._sets[0]
        self._loaded = []
        if self._halvings:
            self._want_less(self._halvings)

    def is_missed(self) -> bool:
        """It has no readings of its own."""
        return False

    def is_off(self) -> bool:
        """Return whether there is nothing to be timed: it was done, or nobody keeps to a budget."""
        return self.off or self.graph_seconds is not None or not any(m.cadence.is_planned for m in self.users)

    def is_idle(self, run: RunContext) -> bool:
        """Return whether no more samples are to be kept."""
        return self.off or self._newest is None and all(self._is_full(kept) for kept in self._sets)

    def expected(self, run: RunContext) -> float | None:
        """Return zero: what follows rests on it."""
        return 0.0

    def batch_end(self, run: RunContext) -> None:
        """Time a gradient on the samples before the first measurement; take fewer where that is too expensive."""
        if run.budget.fraction is None or self.is_off() or not self.is_due(run) or not self.is_expected(run):
            return
        with run.charge(self.name, waits=True):
            is_there = self.check(run)
        if not is_there:
            return
        with run.together(self.name):
            self._time_graph(run)
            halvings = self._halvings_that_fit(run)
            for _ in range(halvings):
                self.halve(run)
            if halvings:
                self._time_graph(run)
        self.cadence.read(run.step)

    def _time_graph(self, run: RunContext) -> None:
        self.agree(run)
        with self.evaluation(run) as params:
            begin = time.perf_counter()
            hessian = self.hessian(run, params)
            float(hessian.loss)
            self.graph_seconds = time.perf_counter() - begin

    def _halvings_that_fit(self, run: RunContext) -> int:
        """How often to halve the samples so that the grace pays for a first measurement; 0 where no number does."""
        least = sum(getattr(user, "least", user.expected)(run) or 0.0 for user in self.users if not user.is_off())
        left = run.budget.left
        halvings = math.ceil(math.log2(least / left)) if 0 < left < least else 0
        samples = self.samples or 1
        is_worth_it = self._may_shrink and run.budget.grace > 0 and samples // 2**halvings >= _FEWEST
        (found,) = run.ranks.broadcast_from_rank0([float(halvings if is_worth_it else 0)])
        return int(found)

    def batch_start(self, run: RunContext, batch: Any) -> None:
        """Keep a share of the first batches."""
        if self.off:
            return
        self._let_go = False
        self._leave_skipped(run)
        self._take_up(run, batch)
        waiting = [kept for kept in self._sets if not self._is_full(kept)]
        if not waiting:
            return
        if self._resumed_without:
            self._resumed_without = False
            rank_zero_info(
                "the checkpoint did not hold the probe, so it is taken anew: sharpness before and after differ by that."
            )
        with run.charge(self.name):
            kept = waiting[0]
            most = None if self._size is None else self._size - _size(kept)
            part = take_samples(batch, 1.0 if self._size else self._fraction, most, batch_sizes(run.loop.loaders))
            index = run.loop.batch_index
            try:
                self._newest = self._kept(part.batch, part.samples, part.is_cut, index)
                kept.append(self._newest)
            except NoWeightError as error:
                self._say("no weight", f"{error} The probe takes the next batch.")
        if part.reason is not None:
            self._say("whole", f"the probe holds whole batches: {part.reason}. A loss_fn can take less of them.")

    def after_backward(self, run: RunContext) -> None:
        """The batch that was kept last has a loss, if anything was passed back."""
        if self._newest is not None and any(p.grad is not None for p in run.module.parameters()):
            self._newest = None

    def _leave_skipped(self, run: RunContext) -> None:
        """What was kept of a batch that training has skipped gives way to the next one."""
        skipped, self._newest = self._newest, None
        if skipped is None or self.loss_fn is not None or run.ranks.is_distributed:  # Lightning refuses it under DDP
            return
        self._sets = [[one for one in kept if one is not skipped] for kept in self._sets]
        self._say("no loss", _NO_LOSS_SENTENCE)

    def _kept(self, batch: Any, samples: int | None, is_cut: bool, index: int, is_tried: bool = False) -> Kept:
        weight = self._weight_of(batch, samples)
        return Kept(batch, index, samples, weight, is_cut, is_tried, numbers_of(batch) if self._save else None)

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_info(sentence)

    def _is_full(self, kept: Sequence[Kept]) -> bool:
        if self._size is None or kept and kept[-1].samples is None:
            return len(kept) >= self._batches
        return _size(kept) >= self._size

    @property
    def ready(self) -> bool:
        """Whether there is something to measure on, on this process."""
        return not self.off and bool(self._sets[0])

    def is_expected(self, run: RunContext) -> bool:
        """Whether there should be something to measure on: the same on all processes."""
        return not self.off and not self._let_go and (run.ranks.is_distributed or self.ready)

    def agree(self, run: RunContext) -> None:
        """At the begin of a measurement, see that all processes have something to measure on.

        Raises:
            LookupError: Where this one has nothing.
        """
        self._require_samples(run)
        numbers = [_numbers(kept) for kept in self._sets]
        full = [float(self._is_full(kept)) for kept in self._sets]
        known = [math.nan if n is None else float(n) for n in (self.samples, *numbers)]
        summed = torch.tensor([*known, *full], dtype=widest_dtype(_where(run)), device=_where(run))
        samples, *found = run.ranks.sum(summed).tolist()
        self.samples_in_all = None if math.isnan(samples) else int(samples)
        are_full = [count == run.ranks.size for count in found[len(numbers) :]]
        self.second_in_all = len(are_full) > 1 and are_full[1]
        if run.ranks.is_distributed:
            small = sum(found[: len(numbers)]) <= SAVED_NUMBERS  # not where a part cannot be saved, which is NaN
            self._gather(run, [is_full and small for is_full in are_full])

    def _require_samples(self, run: RunContext) -> None:
        if not self._sets[0]:
            raise LookupError("there is no batch for the probe.") from run.unsettled.get(self.name)

    def _gather(self, run: RunContext, wanted: Sequence[bool]) -> None:
        """Have the parts of all processes here, once: a checkpoint holds what the first process saves."""
        for place, (kept, is_wanted) in enumerate(zip(self._sets, wanted, strict=True)):
            if is_wanted and not self._parts[place]:
                states = [one.state() for one in kept]
                self._parts[place] = run.ranks.all_gather_object(
                    [{**s, "batch": move_to_host(s["batch"])} for s in states]
                )

    @property
    def samples(self) -> int | None:
        """Samples in the probe, None where they cannot be told apart."""
        return None if any(one.samples is None for one in self._sets[0]) else _size(self._sets[0])

    @property
    def is_complete(self) -> bool:
        """Whether all of it is here, on this process."""
        return self._is_full(self._sets[0])

    def is_everything(self, run: RunContext) -> bool:
        """Whether the probe is the whole training set."""
        return is_whole_training_set(run.loop, self._sets[0])

    def evaluation(
        self, run: RunContext, names: Collection[str] | None = None, moves: bool = False
    ) -> AbstractContextManager[FlatParameters]:
        """Where the loss may be evaluated again: :func:`dynamon.monitoring.evaluation.evaluation`.

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

    def hessian(self, run: RunContext, params: FlatParameters, second: bool = False) -> HessianOperator | MeanOverRanks:
        """The Hessian of the mean loss over the probe of all processes."""
        if isinstance(params, ShardedParameters):
            share = self._share(run, self._total(second))
            return ShardedHessian(lambda: share * self.loss(run, second), params)
        return self.over_ranks(run, HessianOperator(lambda: self.loss(run, second), params), second)

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
        """What this process's loss counts in the mean over the processes that FSDP2 takes."""
        total = run.ranks.sum(torch.tensor(weight, dtype=widest_dtype(run.device), device=run.device))
        return weight * run.ranks.size / float(total)

    def _weight_of(self, part: Any, samples: int | None) -> float:
        return batch_weight(part, self._weight) if self._weight else float(samples or 1)

    def _total(self, second: bool = False) -> float:
        return sum(one.weight for one in self._sets[1 if second else 0])

    def weighted(self, evaluate: Callable[[Any, int], Tensor], second: bool = False) -> Tensor:
        """Weighted mean of something evaluated on each batch."""
        kept = self._sets[1 if second else 0]
        values = torch.stack([evaluate(one.batch, one.index) for one in kept])
        weights = values.new_tensor([one.weight for one in kept])
        return (values * weights).sum() / weights.sum()

    def check(self, run: RunContext) -> bool:
        """Whether there is something to measure on, the same on all processes; asked before each measurement.

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
            if self._checked:
                return True
            found = run.ranks.all_gather_object(self._effect(run))
            self._checked = True
            reason = next((text for text in found if text is not None), None)
            if reason is None:
                return True
            self.off = True
            sentence = (
                f"sharpness is off: training_step has effects outside the module that cannot be undone ({reason}); "
                "pass loss_fn=lambda module, batch: ... that computes the loss and nothing else."
            )
            if run.strict:
                raise ValueError(sentence)
        rank_zero_warn(sentence)
        return False

    def _try_out(self, run: RunContext) -> bool:
        """Evaluate the loss on what has not been tried; whether the first set is good."""
        found = torch.zeros(len(self._sets), 2, dtype=widest_dtype(_where(run)), device=_where(run))
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
        """What the loss on a set says of it.

        Raises:
            Exception: What it raised on whole batches.
        """
        is_cut = any(one.is_cut for one in self._sets[place])
        try:
            loss = self._look(run, place)
        except NoLossError:
            if self._refused >= _TRIES:
                raise
            if is_cut and self._refused >= _PATIENCE:
                self._part_error = "there was none."
                return _PART_FAILS
            self._say("no loss", _NO_LOSS_SENTENCE)
            return _NO_LOSS
        except Exception as error:  # a user's training_step may raise anything on a part of a batch
            if not is_cut or isinstance(error, LossError) or ran_out_of_memory(error):
                raise
            self._part_error = (str(error).strip() or type(error).__name__).splitlines()[0]
            forget_frames(error)
            return _PART_FAILS
        if not math.isfinite(loss) and self._refused < _PATIENCE:
            self._say(
                "not finite",
                "the loss on the batch that sharpness was to be measured on is not finite: the next is taken.",
            )
            return _NO_LOSS
        return _GOOD

    def _look(self, run: RunContext, place: int) -> float:
        """The loss on a set; what is outside of the module is marked before the first evaluations of the first set."""
        if place == 0 and not self._checked:
            self._marks.append(external_state(run.module, run.loop.loss_source))
        with self.evaluation(run):
            loss = float(self.loss(run, second=place == 1).detach())
        if place == 0 and not self._checked:
            self._losses.append(loss)
        return loss

    def _effect(self, run: RunContext) -> str | None:
        """What two evaluations change outside of the module, in words; None where there is nothing."""
        self._marks, self._losses = self._marks[-1:], self._losses[-1:]  # of the evaluation that tried it, if any
        while len(self._losses) < 2:
            self._look(run, 0)
        marks = [*self._marks, external_state(run.module, run.loop.loss_source)]
        # What changed the first time only is a cache that has been filled.
        changed = [name for name in changed_names(*marks[1:]) if name in changed_names(*marks[:2])]
        if changed:
            return f"it changes {', '.join(changed[:3])}"
        first, second = self._losses
        return _difference(first, second, run.device)

    def halve(self, run: RunContext) -> str | None:
        """Keep half of the samples, or of the batches where there are no samples to leave out.

        Several processes call it together, whichever of them ran out of memory. One that has two samples keeps them.

        Returns:
            One sentence the first time, None later and where nothing can be left out.
        """
        before = sum(_size(kept) for kept in self._sets)
        self._sets = [self._half(kept) for kept in self._sets]
        if sum(_size(kept) for kept in self._sets) == before and not run.ranks.is_distributed:
            return None
        self._halvings += 1
        self._want_less(1)
        self._parts = [[] for _ in self._sets]
        if self._halvings > 1:
            return None
        here = "on each process" if run.ranks.is_distributed else f"to {_size(self._sets[0])} samples"
        return f"The probe is halved {here}."

    def _half(self, kept: list[Kept]) -> list[Kept]:
        halves = []
        for one in kept:
            part = take_samples(one.batch, 0.5, sizes=() if one.samples is None else (one.samples,))
            if part.samples is None or part.reason is not None:
                return kept
            is_cut = one.is_cut or part.is_cut
            halves.append(self._kept(part.batch, part.samples, is_cut, one.index, one.is_tried))
        return halves

    def _want_less(self, times: int) -> None:
        """What is still to be kept is as small as what is there."""
        self._fraction, self.share = self._fraction / 2**times, self.share / 2**times
        if self._size is not None:
            self._size = max(2, min(self._size // 2**times, _size(self._sets[0]) or self._size))

    def state_dict(self) -> dict[str, Any]:
        """The samples, where they are not many and a checkpoint can load them safely."""
        state: dict[str, Any] = {"halvings": self._halvings} if self._halvings else {}
        if self._save and (self._loaded or self._parts[0]):
            return {**state, "parts": self._loaded or self._parts}
        if not self._sets[0]:
            return {**state, "held": False}  # where there is nothing, nothing is missing
        numbers = [_numbers(kept) for kept in self._sets]
        if not self._save or None in numbers or sum(n for n in numbers if n is not None) > SAVED_NUMBERS:
            return state
        return {**state, "parts": [[[one.state() for one in kept]] for kept in self._sets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples; without them new ones are kept, and those that are there stay."""
        if self._sets[0]:
            return
        self._loaded = [list(parts) for parts in state.get("parts", [])]
        self._loaded = self._loaded if any(any(parts) for parts in self._loaded) else []
        self._resumed_without = not self._loaded and bool(state.get("held", True))
        self._halvings = int(state.get("halvings", 0))


def why_not(operator: LinearOperator, error: float) -> str | None:
    """Why nothing is shown of products with an error that the operator gave; None where they can be trusted."""
    if error <= NOISY:
        return None
    doubt, reason = getattr(operator, "doubt", None), getattr(operator, "reason", None)
    after = "" if reason is None else f", and {reason.removesuffix('.')}"
    return doubt or f"finite differences at two step sizes differ by {error:.0%}, so nothing is read off them{after}."


def why_never(operator: LinearOperator, vector: Tensor) -> str | None:
    """Why nothing can be shown of products, now and later; None where they can be trusted, or may be another time.

    That is so where a function of unknown curvature takes part in half precision, or differences of gradients have to
    be taken there.
    """
    if getattr(operator, "doubt", None) is None and not getattr(operator, "is_coarse", False):
        return None
    return why_not(operator, operator.product_error(vector))


def check_probe(
    probe_batches: int,
    probe_fraction: float,
    loss_fn: object,
    probe_size: int | None = None,
    probe_weight: str | None = None,
) -> None:
    """Raise ValueError naming the argument that is out of range."""
    if probe_batches < 1:
        raise ValueError(f"probe_batches must be 1 or more, got {probe_batches}.")
    if not 0 < probe_fraction <= 1:
        raise ValueError(f"probe_fraction must lie in (0, 1], got {probe_fraction}.")
    if probe_size is not None and probe_size < 2:
        raise ValueError(f"probe_size must be 2 samples or more, or None, got {probe_size}.")
    if probe_weight is not None and not isinstance(probe_weight, str):
        raise ValueError(f"probe_weight must be the name of an entry of the batch, or None, got {probe_weight!r}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of (module, batch), got {type(loss_fn).__name__}.")


def _has_transformer_engine(run: RunContext) -> bool:
    own = any(type(m).__module__.split(".")[0] == "transformer_engine" for m in run.module.modules())
    return own or run.loop.precision.startswith("transformer-engine")


def _where(run: RunContext) -> torch.device:
    """Where a few numbers are reduced: on the host where there is nobody to reduce with."""
    return run.device if run.ranks.is_distributed else torch.device("cpu")


def _size(kept: Sequence[Kept]) -> int:
    return sum(one.samples or 0 for one in kept)


def _numbers(kept: Sequence[Kept]) -> int | None:
    """How many numbers these are in a checkpoint, None where it cannot hold them."""
    counts = [one.numbers for one in kept]
    return None if None in counts else sum(n for n in counts if n is not None)


def _difference(first: float, second: float, device: torch.device) -> str | None:
    """What to say of two evaluations of one loss on a device; None where they agree."""
    tolerance = _SAME_ON_HOST if reads_are_free(device) else _SAME
    if math.isclose(first, second, rel_tol=tolerance) or not math.isfinite(first + second):
        return None
    return f"on the same samples with the same random numbers its loss was {first:.6g}, then {second:.6g}"
