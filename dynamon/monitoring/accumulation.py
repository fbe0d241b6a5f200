"""What the gradients of a Trainer's optimizers are accumulated over, and where independent ones come from."""

from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.dtensor import any_sharded, to_local
from dynamon.isolation.samples import guess_samples
from dynamon.monitoring.base import callbacks_of, unscales_in_step
from dynamon.monitoring.rank_decisions import averages_gradients, is_sharded_run
from dynamon.monitoring.samples import batch_sizes
from dynamon.quantities.scales import Scale, inverse_scale
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

    def before(self, is_watched: bool) -> None:
        """A backward pass begins."""
        self._before = _marks(self._parameters) if is_watched else []
        if self.is_over or not self.count or is_watched and all(mark is None for mark in self._before):
            self._begin()
        elif self._before != self._marks:
            if _are_zero(self._parameters):
                self._begin()
            else:
                self.changed.append(self.count)

    def after(self, is_watched: bool, samples: int | None) -> None:
        """It is over; where it gave this optimizer nothing, it was none of its passes."""
        self._marks = _marks(self._parameters) if is_watched else []
        if is_watched and self._marks == self._before:
            return
        self.samples.append(samples)
        # A backward pass adds to a gradient once, or not at all; asked at every pass, so without a call for each.
        most = self._writes
        pairs = zip(self._before, self._marks, strict=True)
        if [1 for b, a in pairs if b is not None and (a is None or a[0] != b[0] or a[1] - b[1] > most)]:
            self.changed.append(self.count)

    def is_untouched(self, writes: int) -> bool:
        """Whether nobody has written to the gradients since, but so many times in each."""
        expected = [None if mark is None else (mark[0], mark[1] + writes) for mark in self._marks]
        return _marks(self._parameters) == expected


class Windows:
    """Follows the passes of a Trainer's optimizers; every callback that asks calls all of its hooks.

    What counts as a pass is a backward pass that wrote to the optimizer's gradients. Lightning divides each loss by the
    length of the window, however many passes there will be: a short one has a smaller gradient, and so has one of which
    ``training_step`` skipped a batch.
    """

    def __init__(self) -> None:
        """Nothing seen."""
        self._passes: dict[Optimizer, _Passes] = {}
        self._batch: Any = None
        self._samples: int | None = None
        self._sizes: tuple[tuple[Any, int], tuple[int, ...]] | None = None  # the loaders, the epoch, what they say
        self._form: Any = None
        self._found: int | None = None  # samples of a batch of that form
        self._inside = False  # a backward pass
        self._is_watched = False  # in which others may have changed what was accumulated before

    def batch_start(self, trainer: pl.Trainer, batch: Any) -> None:
        """A batch has arrived."""
        position = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step
        if position == self._batch:
            return
        self._batch, self._inside = position, False
        self._samples = self._samples_of(batch, trainer)
        for passes in self._passes.values():
            passes.rest()

    def _samples_of(self, batch: Any, trainer: pl.Trainer) -> int | None:
        """How many samples a batch has, looked at once for batches of one form."""
        loader = trainer.train_dataloader, trainer.current_epoch
        if self._sizes is None or loader[0] is not self._sizes[0][0] or loader[1] != self._sizes[0][1]:
            self._sizes, self._form = (loader, batch_sizes(trainer)), None
        form = _form(batch)
        if form is None or form != self._form:
            self._form, self._found = form, guess_samples(batch, self._sizes[1])
        return self._found

    def before_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A backward pass begins."""
        if not self._inside:
            self._inside = True
            # With one pass a step nobody can get in between two.
            self._is_watched = trainer.accumulate_grad_batches > 1 or not module.automatic_optimization
            for optimizer in trainer.optimizers:
                self._of(optimizer).before(self._is_watched)

    def after_backward(self, trainer: pl.Trainer) -> None:
        """A backward pass is over."""
        if self._inside:
            self._inside = False
            for optimizer in trainer.optimizers:
                self._of(optimizer).after(self._is_watched, self._samples)

    def half(self, trainer: pl.Trainer, optimizer: Optimizer) -> float | None:
        """The share of its window that an optimizer's gradients hold, if it is the time to keep it; else None.

        To be asked after a backward pass under automatic optimisation. It is a guess: the last window of an epoch may
        be shorter, and passes may be skipped. :meth:`before_step` knows.
        """
        passes = self._of(optimizer)
        done, length = _position(trainer)
        if not passes.count or passes.half is not None and passes.half != passes.count or done < max(1, length // 2):
            return None
        if done >= length:
            return None
        passes.half = passes.count
        return passes.count / (passes.count + length - done)

    def before_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> Window:
        """What the gradients have been accumulated over that the optimizer is about to use."""
        passes = self._of(optimizer)
        passes.is_over = True
        if not module.automatic_optimization:
            # By hand nothing is agreed on with other processes, whose batches may be of other sizes.
            return Window(passes.count, 1, None if averages_gradients(trainer) else passes.sizes, tuple(passes.changed))
        return Window(passes.count, trainer.accumulate_grad_batches, passes.sizes, tuple(passes.changed))

    def share(self, trainer: pl.Trainer, optimizer: Optimizer, window: Window) -> float | None:
        """The weight in the window of the part that was kept; None where the rest is not alike."""
        passes = self._of(optimizer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        given = getattr(optimizer, "grad_scale", None)
        unscaled = scaler is not None and given is None and not unscales_in_step(optimizer)
        if passes.half is None or not passes.is_untouched(writes=_writes_of_unscaling() if unscaled else 0):
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


_of_trainers: "WeakKeyDictionary[pl.Trainer, Windows]" = WeakKeyDictionary()


def windows_of(trainer: pl.Trainer) -> Windows:
    """Those of a Trainer, shared by all callbacks in it."""
    if trainer not in _of_trainers:
        _of_trainers[trainer] = Windows()
    return _of_trainers[trainer]


def begin_windows(trainer: pl.Trainer) -> None:
    """Training begins: forget what was seen of another fit."""
    _of_trainers.pop(trainer, None)


def _form(batch: Any) -> Any:
    """What tells how many samples a batch of plain tensors has; None for batches of other things."""
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


@cache
def _writes_of_unscaling() -> int:
    """By how much unscaling raises a gradient's version, which is up to torch."""
    gradient = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([gradient], torch.zeros(1), torch.ones(1))
    return gradient._version


def _are_zero(parameters: Sequence[Tensor]) -> bool:
    """Whether somebody has zeroed all gradients in place. Cost: a host read, where gradients were changed only."""
    return not any(bool(to_local(p.grad).any()) for p in parameters if p.grad is not None and not p.grad.is_sparse)


def _position(trainer: pl.Trainer) -> tuple[int, int]:
    """How many batches of its window are done with this one, and how many it has."""
    batch, wanted = trainer.fit_loop.epoch_loop.batch_idx, trainer.accumulate_grad_batches
    begin = batch // wanted * wanted
    return batch - begin + 1, int(min(wanted, trainer.num_training_batches - begin))


def has_windows(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether the gradients of what counts as one batch are accumulated over several, by Lightning.

    Those of one process, or under FSDP2 of all of them, which are summed in every backward pass.
    """
    return trainer.accumulate_grad_batches > 1 and _can_have_windows(trainer, module)


def _can_have_windows(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    return (trainer.world_size == 1 or is_sharded_run(trainer)) and module.automatic_optimization


def compares_independent(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether a run has independent gradients, now or when its windows have become longer."""
    if compares_ranks(trainer, module):
        return True
    longest = min(longest_window(trainer), trainer.num_training_batches)
    return longest > 1 and _can_have_windows(trainer, module)


def longest_window(trainer: pl.Trainer) -> int:
    """Most batches in an accumulation window of this run."""
    lengths = [trainer.accumulate_grad_batches]
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            lengths += callback.scheduling.values()
    return max(lengths)


def begins_window(trainer: pl.Trainer) -> bool:
    """Whether a batch is the first of those whose gradients are accumulated; to be asked at its start."""
    return trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0


def compares_ranks(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether independent gradients are those of the processes; by hand it is not known which ones belong together."""
    return averages_gradients(trainer) and module.automatic_optimization


def scale_before_step(trainer: pl.Trainer) -> Scale:
    """What brings gradients to their true size before the precision plugin has unscaled them; waits for no device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else inverse_scale(scaler)
