"""The samples of training that a probe holds, for the whole run."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dynamon.isolation.batches import NoWeightError, batch_weight
from dynamon.isolation.preserve import LossFn
from dynamon.isolation.samples import take_samples
from dynamon.isolation.saved_batches import UnknownClassError, move_to_host
from dynamon.kernels import widest_dtype
from dynamon.monitoring.cadence import Cadence
from dynamon.monitoring.messages import rank_zero_info
from dynamon.monitoring.meter import Meter
from dynamon.monitoring.run_context import RunContext
from dynamon.monitoring.samples import Kept, batch_sizes, dealt, is_whole_training_set, numbers_of

SAVED_NUMBERS = 2**26  # a probe, or vectors to start from, enter a checkpoint up to this size


class HeldSamples(Meter):
    """Keeps copies of the first batches, or of parts of them, and saves them.

    A second set, of the batches that follow, serves the bracket between a small probe's curvature and the whole
    training set's. Under DDP and FSDP2 each process keeps a share of its own batches.

    Args:
        loss_fn: ``loss_fn(module, batch)``, or None for ``training_step``.
        batches: How many batches to keep.
        fraction: Share of each batch.
        size: Samples to keep in all, instead of ``batches`` and ``fraction``.
        weight: Name of an entry of the batch whose sum weighs it (a mask of tokens), or None for its samples.
        second: Whether to keep the second set.
        save: Whether checkpoints hold the samples.

    Attributes:
        off: Whether nothing is kept or measured.
        saves: Whether checkpoints hold the samples.
        share: Of one batch, roughly: what an evaluation costs in training steps.
        samples_in_all: Samples of all processes, None where they cannot be told apart.
        second_in_all: Whether all have their second set.
    """

    name = "probe"
    subject = "sharpness"  # what is measured on it, in messages

    def __init__(
        self,
        loss_fn: LossFn | None,
        batches: int,
        fraction: float,
        size: int | None = None,
        weight: str | None = None,
        second: bool = False,
        save: bool = True,
    ) -> None:
        """No samples yet."""
        super().__init__(Cadence(None, interval=1))
        self.loss_fn = loss_fn
        self.share = batches * fraction  # of one batch, roughly: what an evaluation costs in training steps
        self._batches, self._fraction, self._size, self._weight = batches, fraction, size, weight
        self.saves = save
        self._sets: list[list[Kept]] = [[], []] if second else [[]]
        self.off = False
        self.samples_in_all: int | None = None
        self.second_in_all = False
        self._parts: list[list[list[dict[str, Any]]]] = [[] for _ in self._sets]  # of all processes, for a checkpoint
        self._loaded: list[list[list[dict[str, Any]]]] = []
        self._resumed_without = False
        self._halvings = 0
        self._newest: Kept | None = None  # of this batch, as long as nothing was passed back
        self._let_go = False  # of a probe without a loss, by all processes, until the next batch
        self._told: set[str] = set()

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

    def is_idle(self, run: RunContext) -> bool:
        """Return whether no more samples are to be kept."""
        return self.off or self._newest is None and all(self._is_full(kept) for kept in self._sets)

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
                f"the checkpoint did not hold the probe, so it is taken anew: {self.subject} before and after differ "
                "by that."
            )
        with run.charge(self.name):
            kept = waiting[0]
            most = None if self._size is None else self._size - count_of(kept)
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
        """Let what was kept of a batch that training has skipped give way to the next one."""
        skipped, self._newest = self._newest, None
        if skipped is None or self.loss_fn is not None or run.ranks.is_distributed:  # Lightning refuses it under DDP
            return
        self._sets = [[one for one in kept if one is not skipped] for kept in self._sets]
        self._say("no loss", self._no_loss)

    def _kept(self, batch: Any, samples: int | None, is_cut: bool, index: int, is_tried: bool = False) -> Kept:
        weight = self._weight_of(batch, samples)
        return Kept(batch, index, samples, weight, is_cut, is_tried, numbers_of(batch) if self.saves else None)

    @property
    def _no_loss(self) -> str:
        return f"there is no loss on the batch that {self.subject} was to be measured on: the next is taken."

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_info(sentence)

    def _is_full(self, kept: Sequence[Kept]) -> bool:
        if self._size is None or kept and kept[-1].samples is None:
            return len(kept) >= self._batches
        return count_of(kept) >= self._size

    @property
    def ready(self) -> bool:
        """Return whether there is something to measure on, on this process."""
        return not self.off and bool(self._sets[0])

    def is_expected(self, run: RunContext) -> bool:
        """Return whether there should be something to measure on: the same on all processes."""
        return not self.off and not self._let_go and (run.ranks.is_distributed or self.ready)

    def agree(self, run: RunContext) -> None:
        """At the begin of a measurement, see that all processes have something to measure on.

        Raises:
            LookupError: Where this one has nothing.
        """
        self._require_samples(run)
        numbers = [_numbers(kept) for kept in self._sets]
        full = [float(self._is_full(kept)) for kept in self._sets]
        lacking = [float(not parts) for parts in self._parts]  # on one process only, after a failure there
        known = [math.nan if n is None else float(n) for n in (self.samples, *numbers)]
        summed = torch.tensor([*known, *full, *lacking], dtype=widest_dtype(reduced_on(run)), device=reduced_on(run))
        samples, *found = run.ranks.sum(summed).tolist()
        self.samples_in_all = None if math.isnan(samples) else int(samples)
        own, full, lacking = (found[at : at + len(numbers)] for at in range(0, len(found), len(numbers)))
        are_full = [count == run.ranks.size for count in full]
        self.second_in_all = len(are_full) > 1 and are_full[1]
        if run.ranks.is_distributed:
            small = sum(own) <= SAVED_NUMBERS  # not where a part cannot be saved, which is NaN
            wanted = [bool(is_full and small and lacks) for is_full, lacks in zip(are_full, lacking, strict=True)]
            self._gather(run, wanted)

    def _require_samples(self, run: RunContext) -> None:
        if not self._sets[0]:
            raise LookupError("there is no batch for the probe.") from run.unsettled.get(self.name)

    def _gather(self, run: RunContext, wanted: Sequence[bool]) -> None:
        """Have the parts of all processes here, once: a checkpoint holds what the first process saves."""
        for place, (kept, is_wanted) in enumerate(zip(self._sets, wanted, strict=True)):
            if is_wanted:
                states = [one.state() for one in kept]
                self._parts[place] = run.ranks.all_gather_object(
                    [{**s, "batch": move_to_host(s["batch"])} for s in states]
                )

    @property
    def samples(self) -> int | None:
        """Samples in the probe, None where they cannot be told apart."""
        return None if any(one.samples is None for one in self._sets[0]) else count_of(self._sets[0])

    @property
    def is_complete(self) -> bool:
        """Return whether all of it is here, on this process."""
        return self._is_full(self._sets[0])

    def is_everything(self, run: RunContext) -> bool:
        """Return whether the probe is the whole training set."""
        return is_whole_training_set(run.loop, self._sets[0])

    def _weight_of(self, part: Any, samples: int | None) -> float:
        return batch_weight(part, self._weight) if self._weight else float(samples or 1)

    def _total(self, second: bool = False) -> float:
        return sum(one.weight for one in self._sets[1 if second else 0])

    def halve(self, run: RunContext) -> str | None:
        """Keep half of the samples, or of the batches where there are no samples to leave out.

        Several processes call it together, whichever of them ran out of memory. One that has two samples keeps them.

        Returns:
            One sentence the first time, None later and where nothing can be left out.
        """
        before = sum(count_of(kept) for kept in self._sets)
        self._sets = [self._half(kept) for kept in self._sets]
        if sum(count_of(kept) for kept in self._sets) == before and not run.ranks.is_distributed:
            return None
        self._halvings += 1
        self._want_less(1)
        self._parts = [[] for _ in self._sets]
        if self._halvings > 1:
            return None
        here = "on each process" if run.ranks.is_distributed else f"to {count_of(self._sets[0])} samples"
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
        """Keep as little of what is still to come as of what is there."""
        self._fraction, self.share = self._fraction / 2**times, self.share / 2**times
        if self._size is not None:
            self._size = max(2, min(self._size // 2**times, count_of(self._sets[0]) or self._size))

    def state_dict(self) -> dict[str, Any]:
        """The samples, where they are not many and a checkpoint can load them safely."""
        state: dict[str, Any] = {"halvings": self._halvings} if self._halvings else {}
        if self.saves and (self._loaded or self._parts[0]):
            return {**state, "parts": self._loaded or self._parts}
        if not self._sets[0]:
            return {**state, "held": False}  # where there is nothing, nothing is missing
        numbers = [_numbers(kept) for kept in self._sets]
        if not self.saves or None in numbers or sum(n for n in numbers if n is not None) > SAVED_NUMBERS:
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


def reduced_on(run: RunContext) -> torch.device:
    """Return where a few numbers are reduced: on the host where there is nobody to reduce with."""
    return run.device if run.ranks.is_distributed else torch.device("cpu")


def count_of(kept: Sequence[Kept]) -> int:
    """Return how many samples are held."""
    return sum(one.samples or 0 for one in kept)


def _numbers(kept: Sequence[Kept]) -> int | None:
    """Return how many numbers these are in a checkpoint, None where it cannot hold them."""
    counts = [one.numbers for one in kept]
    return None if None in counts else sum(n for n in counts if n is not None)
