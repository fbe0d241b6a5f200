"""Follow what gradients are accumulated over, and where independent ones come from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded, to_local
from dynamon.isolation.samples import guess_samples
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.samples import batch_sizes
from dynamon.quantities.windows import Window

_Marks = list[tuple[int, int] | None]  # of each gradient: which tensor it is, and how often it was written to


class _Passes:
    """The backward passes since one optimizer's gradients were zeroed, and who else has written to them."""

    def __init__(self, optimizer: Optimizer) -> None:
        """None yet."""
        self._parameters = _parameters(optimizer)
        self.held = len(self._parameters)
        self._writes = 2 if any_sharded(self._parameters) else 1  # of one pass at most; FSDP2 adds in two
        self._marks: _Marks = []  # after the last pass
        self._before: _Marks = []
        self._begin()

    def _begin(self) -> None:
        self.samples: list[int | None] = []
        self.changed: list[int] = []
        self.half: int | None = None  # passes in the part that was kept
        self.is_over = False  # the step has been taken

    @property
    def count(self) -> int:
        return len(self.samples)

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Samples of each pass, sorted; None where those of one are not known."""
        known = [samples for samples in self.samples if samples is not None]
        return tuple(sorted(known)) if len(known) == self.count else None

    def rest(self) -> None:
        """A batch has arrived: what the last step has used is past."""
        if self.is_over:
            self._begin()

    def before(self, is_watched: bool, is_cleared_late: bool = False) -> None:
        """A backward pass begins; where gradients are cleared after this, those of the last step do not count."""
        self._before = _marks(self._parameters) if is_watched else []
        if is_cleared_late and self.is_over:
            self._before = [None] * len(self._before)
        if self.is_over or not self.count or is_watched and all(mark is None for mark in self._before):
            self._begin()
        elif self._before != self._marks:
            if _are_zero(self._parameters):
                self._begin()
            else:
                self.changed.append(self.count)

    def after(self, is_watched: bool, samples: int | None, unscaling: int = 0) -> None:
        """It is over; where it gave this optimizer nothing, it was none of its passes.

        Args:
            is_watched: Whether to look at the gradients.
            samples: Of the batch.
            unscaling: How often unscaling has written to each gradient by now.
        """
        self._marks = _marks(self._parameters) if is_watched else []
        if is_watched and self._marks == self._before:
            return
        self.samples.append(samples)
        # A backward pass adds to a gradient once, or not at all; asked at every pass, so without a call for each.
        most = self._writes + unscaling
        pairs = zip(self._before, self._marks, strict=True)
        if [1 for b, a in pairs if b is not None and (a is None or a[0] != b[0] or a[1] - b[1] > most)]:
            self.changed.append(self.count)

    def is_untouched(self, writes: int) -> bool:
        """Return whether nobody has written to the gradients since, but so many times in each."""
        expected = [None if mark is None else (mark[0], mark[1] + writes) for mark in self._marks]
        return _marks(self._parameters) == expected


class Windows:
    """Follows the passes of a loop's optimizers; every monitor that asks calls all of its hooks.

    What counts as a pass is a backward pass that wrote to the optimizer's gradients. Each loss is taken to be divided
    by the length of the window, however many passes there will be: a short one has a smaller gradient, and so has one
    of which a batch was skipped.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._passes: dict[Optimizer, _Passes] = {}
        self._batch: Any = None
        self._samples: int | None = None
        self._sizes: tuple[tuple[Any, ...], tuple[int, ...]] | None = None  # what tells loaders apart, what they say
        self._form: Any = None
        self._found: int | None = None  # samples of a batch of that form
        self._inside = False  # a backward pass
        self._is_watched = False  # in which others may have changed what was accumulated before

    def batch_start(self, loop: Loop, batch: Any) -> None:
        """A batch has arrived."""
        position = loop.position
        if position == self._batch:
            return
        self._batch, self._inside = position, False
        self._samples = self._samples_of(batch, loop)
        for passes in self._passes.values():
            passes.rest()

    def _samples_of(self, batch: Any, loop: Loop) -> int | None:
        """Return how many samples a batch has, counted once for batches of one form."""
        key = loop.loader_key
        if self._sizes is None or any(a is not b and a != b for a, b in zip(key, self._sizes[0], strict=True)):
            self._sizes, self._form = (key, batch_sizes(loop.loaders)), None
        form = _form(batch)
        if form is None or form != self._form:
            self._form, self._found = form, guess_samples(batch, self._sizes[1])
        return self._found

    def before_backward(self, loop: Loop) -> None:
        """A backward pass begins."""
        if not self._inside:
            self._inside = True
            # With one pass a step nobody can get in between two.
            self._is_watched = loop.accumulates > 1 or not loop.knows_windows
            for optimizer in loop.optimizers:
                self._of(optimizer).before(self._is_watched, loop.is_cleared_late)

    def after_backward(self, loop: Loop) -> None:
        """A backward pass is over."""
        if self._inside:
            self._inside = False
            for optimizer in loop.optimizers:
                unscaling = loop.writes_in_backward(optimizer) if self._is_watched else 0
                self._of(optimizer).after(self._is_watched, self._samples, unscaling)

    def half(self, loop: Loop, optimizer: Optimizer) -> float | None:
        """Return the share of its window that an optimizer's gradients hold, if it is the time to keep it; else None.

        To be asked after a backward pass of a loop that knows its windows. It is a guess: the last window of an epoch
        may be shorter, and passes may be skipped. :meth:`before_step` knows.
        """
        passes = self._of(optimizer)
        done, length = loop.window_position()
        if not passes.count or passes.half is not None and passes.half != passes.count or done < max(1, length // 2):
            return None
        if done >= length:
            return None
        passes.half = passes.count
        return passes.count / (passes.count + length - done)

    def before_step(self, loop: Loop, optimizer: Optimizer) -> Window:
        """Return what the gradients have been accumulated over that the optimizer is about to use."""
        passes = self._of(optimizer)
        passes.is_over = True
        if not loop.knows_windows:
            # Nothing is agreed on with other processes, whose batches may be of other sizes.
            return Window(passes.count, 1, None if loop.averages_gradients else passes.sizes, tuple(passes.changed))
        return Window(passes.count, loop.accumulates, passes.sizes, tuple(passes.changed))

    def share(self, loop: Loop, optimizer: Optimizer, window: Window) -> float | None:
        """Return the weight in the window of the part that was kept; None where the rest is not alike."""
        passes = self._of(optimizer)
        if passes.half is None or not passes.is_untouched(loop.writes_since_backward(optimizer)):
            return None
        return window.share(passes.half)

    def _of(self, optimizer: Optimizer) -> _Passes:
        held = 0  # asked at each hook
        for group in optimizer.param_groups:
            held += len(group["params"])
        known = self._passes.get(optimizer)
        if known is None or known.held != held:
            known = self._passes[optimizer] = _Passes(optimizer)
        return known


def _form(batch: Any) -> Any:
    """Return what tells how many samples a batch of plain tensors has; None for batches of other things."""
    if type(batch) is dict:
        return (*batch, *inner) if (inner := _form(list(batch.values()))) is not None else None
    is_one = type(batch) is Tensor
    if not is_one and type(batch) not in (list, tuple):
        return None
    held = (batch,) if is_one else batch
    if [t for t in held if type(t) is not Tensor or t.is_nested or t.layout != torch.strided]:
        return None
    return (type(batch), *[(t.shape, t.dtype) for t in held])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _marks(parameters: Sequence[Tensor]) -> _Marks:
    # Every write to a tensor raises its version, also one under no_grad.
    gradients = [p.grad for p in parameters]
    return [None if g is None else (id(g), (g if type(g) is Tensor else to_local(g))._version) for g in gradients]


def _are_zero(parameters: Sequence[Tensor]) -> bool:
    """Return whether all gradients were zeroed in place. Cost: a host read, where gradients were changed only."""
    return not any(bool(to_local(p.grad).any()) for p in parameters if p.grad is not None and not p.grad.is_sparse)


def has_windows(loop: Loop) -> bool:
    """Return whether the gradients of what counts as one batch are accumulated over several, by the loop.

    Those of one process, or under FSDP2 of all of them, which are summed in every backward pass.
    """
    return loop.accumulates > 1 and _can_have_windows(loop)


def _can_have_windows(loop: Loop) -> bool:
    return (loop.world_size == 1 or loop.sums_gradients) and loop.knows_windows


def compares_independent(loop: Loop) -> bool:
    """Return whether a run has independent gradients, now or when its windows have become longer."""
    if compares_ranks(loop):
        return True
    return min(loop.longest_window, loop.batches_per_epoch) > 1 and _can_have_windows(loop)


def begins_window(loop: Loop) -> bool:
    """Return whether a batch is the first of those whose gradients are accumulated; to be asked at its start."""
    return loop.window_position()[0] == 1


def compares_ranks(loop: Loop) -> bool:
    """Return whether independent gradients are those of the processes, where it is known which ones belong together."""
    return loop.averages_gradients and loop.knows_windows
