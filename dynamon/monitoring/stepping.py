"""Follow which optimizers really stepped, and whether gradients are there to be read."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamon.distributed.ranks import Ranks
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn
from dynamon.optim import steering_of
from dynamon.optim.stepping import GONE, Follower, StepWatch, has_gradients, steps_in_backward, uses_gradients_at_once

if TYPE_CHECKING:
    from dynamon.monitoring.run_context import RunContext

_MANY = 50  # steps in a row: a scaler that begins at 2^16 has halved its scale to nothing by then
_Told = Callable[[Optimizer], None]
_NOT_FINITE = "gradients are not finite at any scale. Look at the loss, or train in bf16-mixed."


class Steps:
    """Follow what happens between two batches: backward passes, and steps that are announced, begun and taken.

    A step that leaves the weights alone on purpose is none: where a batch was skipped, a gradient scaler skipped the
    step, or nothing was passed back to an optimizer.

    Args:
        loop: The training loop.
        ranks: The processes that measure together.
        waiting: A context in which the host waits for what training has queued on the device.

    Attributes:
        passes: Backward passes since the last step, as far as the loop tells of them.
        followers: Those that are told of every step, measured or not.
        in_backward: Whether weights may change before the step, because hooks work in backward.
        frees_gradients: Whether an optimizer works there, so that gradients are gone by the time they could be read.
    """

    def __init__(
        self,
        loop: Loop,
        ranks: Ranks,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start with nothing seen."""
        self._loop, self._ranks, self._waiting = loop, ranks, waiting
        self._watches: dict[Optimizer, StepWatch] = {}
        self.followers: list[Follower] = []
        self._begins: _Told | None = None
        self._uses: _Told | None = None
        self._begun: set[Optimizer] = set()
        self._taken: frozenset[Optimizer] | None = None
        self.passes = 0
        self._gone: int | None = 0  # steps without gradients after a backward pass; None once there were some
        self.frees_gradients = any(steps_in_backward(p) for p in loop.module.parameters())
        self.in_backward = any(uses_gradients_at_once(p) for p in loop.module.parameters())

    def listen(self, begins: _Told, uses: _Told) -> None:
        """Have somebody told of steps that the loop does not announce, and of the gradients that a step uses."""
        self._begins, self._uses = begins, uses

    def batch_start(self) -> None:
        """A batch begins: follow the loop's optimizers, which may have changed."""
        optimizers = self._loop.optimizers
        for gone in [o for o in self._watches if not any(o is one for one in optimizers)]:
            self._watches.pop(gone).remove()
        for optimizer in optimizers:
            self.of(optimizer).clear()
        self.forget()

    @property
    def can_sleep(self) -> bool:
        """Return whether nobody has to look at steps that are not measured, but followers."""
        return bool(self._watches) and not any(watch.is_blind for watch in self._watches.values())

    def sleep(self, is_quiet: bool = True) -> None:
        """Tell only followers of the steps to come, or everybody again."""
        for watch in self._watches.values():
            watch.is_quiet = is_quiet
        if not is_quiet:
            self.passes = 0

    def forget(self) -> None:
        """Forget what was begun in this batch: it is undone."""
        self._begun, self._taken = set(), None

    def of(self, optimizer: Optimizer) -> StepWatch:
        """The watch of an optimizer."""
        if optimizer not in self._watches:
            watch = self._watches[optimizer] = StepWatch(
                optimizer, lambda: self._tell(self._begins, optimizer), lambda: self._tell(self._uses, optimizer)
            )
            watch.followers = self.followers
            rates = steering_of(optimizer)
            if rates is not None:  # both expect the same
                watch.evaluations = rates.watch.evaluations
        return self._watches[optimizer]

    @staticmethod
    def _tell(told: _Told | None, optimizer: Optimizer) -> None:
        if told is not None:
            told(optimizer)

    def begin(self, optimizer: Optimizer) -> bool:
        """A step is about to be taken; whether there is something to take it with."""
        self.of(optimizer).is_announced = True
        if not has_gradients(optimizer):
            if not self.passes or any(has_gradients(other) for other in self._loop.optimizers):
                return False
            self._note_gone()
            if not self.frees_gradients:
                return False  # the module leaves a step out by zero_grad
        else:
            self._gone = None
        self._begun.add(optimizer)
        return True

    def _note_gone(self) -> None:
        """Gradients were passed back and are gone; where there never were any, an optimizer works in backward."""
        if self._gone is not None:
            self._gone += 1
            if self._gone == GONE:
                self.in_backward = self.frees_gradients = True

    @property
    def is_begun(self) -> bool:
        """Return whether a step of this batch has begun."""
        return bool(self._begun) or self._only_in_backward

    def has_gradients(self, optimizer: Optimizer) -> bool:
        """Return whether there are gradients of backward passes since the last step: others are left over, or zeros."""
        # Where the loop does not run them itself, there may be passes that it knows nothing of.
        return (not self._loop.drives_steps or self.passes > 0) and has_gradients(optimizer)

    @property
    def may_have_stepped(self) -> bool:
        """Return whether a step was taken in this batch, as far as that is known without waiting for a device."""
        if self._taken is not None:
            return bool(self._taken)
        return any(self._may_have(optimizer) for optimizer in self._begun) or self._only_in_backward

    def _may_have(self, optimizer: Optimizer) -> bool:
        return self.frees_gradients or self.of(optimizer).may_have_stepped

    @property
    def _only_in_backward(self) -> bool:
        """Return whether weights have changed in backward and nobody has called a step."""
        return self.frees_gradients and self.passes > 0 and not self._loop.drives_steps

    def taken(self) -> frozenset[Optimizer]:
        """The optimizers that have stepped in this batch; may wait for the device, once.

        Several processes ask together, in measurements that all of them take.
        """
        if self._taken is None:
            begun = [o for o in self._loop.optimizers if o in self._begun]
            self._taken = frozenset(o for o, taken in zip(begun, self._ask(begun), strict=True) if taken)
        return self._taken

    def outcomes(self) -> dict[Optimizer, Sequence[Tensor | None]] | None:
        """Return what is known of the steps of this batch without waiting; None where they cannot be watched."""
        watches = {optimizer: self.of(optimizer) for optimizer in self._begun}
        if any(watch.is_blind for watch in watches.values()):
            return None
        return {optimizer: watch.outcomes for optimizer, watch in watches.items()}

    def any_taken(self) -> bool:
        """Return whether a step has been taken in this batch."""
        return bool(self.taken()) or self._only_in_backward

    def _ask(self, begun: Sequence[Optimizer]) -> list[bool]:
        watches = [self.of(optimizer) for optimizer in begun]
        if self.frees_gradients:
            return [True] * len(begun)
        if not self._ranks.is_distributed:
            return self._taken_here(watches)
        # What is on one process is on all, but for what a scaler found in its part of the gradients.
        if self._loop.scaler is None and not any(watch.was_told for watch in watches):
            return [True] * len(begun)
        own = [float(taken) for taken in self._taken_here(watches)]
        found = self._ranks.sum_or_nan(lambda: torch.tensor(own, dtype=torch.float64), len(own))
        return [count == self._ranks.size for count in found.tolist()]

    def _taken_here(self, watches: Sequence[StepWatch]) -> list[bool]:
        if not any(watch.was_told for watch in watches):
            return [watch.taken for watch in watches]
        with self._waiting():
            return [watch.taken for watch in watches]

    def end(self) -> None:
        """A batch is over in which steps were begun."""
        self.passes = 0

    def remove(self) -> None:
        """Detach from the optimizers."""
        for watch in self._watches.values():
            watch.remove()
        self._watches = {}


class SkippedSteps:
    """Says once that a gradient scaler skips steps, and once that it skips very many.

    Args:
        name: Who speaks.

    Attributes:
        any_taken: Whether any step was taken.
    """

    def __init__(self, name: str) -> None:
        """None seen."""
        self._name, self._said, self._in_a_row = name, False, 0
        self._none_said = self.any_taken = False

    def see(self, run: "RunContext") -> None:
        """A batch is over in which steps were begun; asks no device."""
        self._in_a_row = 0 if run.steps.may_have_stepped else self._in_a_row + 1
        self.any_taken |= not self._in_a_row
        if self._in_a_row == _MANY:
            why = _NOT_FINITE if run.loop.scaler is not None else run.loop.never_taken
            rank_zero_warn(
                f"{self._name}: none of the last {_MANY} steps was taken, so nothing is learned or measured: {why}"
            )
        if self._said or not self._in_a_row:
            return
        self._said = True
        by_scaler = run.loop.scaler is not None
        why = "by a gradient scaler that looks for its scale" if by_scaler else run.loop.not_taken
        rank_zero_info(
            f"{self._name}: step {run.step} was not taken, {why}. Steps that are not taken have no readings; "
            "the next one that is stands in for them."
        )

    def see_none(self, run: "RunContext", is_over: bool = False) -> None:
        """No step was begun in a batch, or in the whole fit: say once where none ever was, and one was due.

        Where the loop does not run the steps itself a window may be of any length, so that only the end tells.
        """
        due = 0 if is_over else _MANY * run.loop.accumulates
        is_due = run.steps.passes > due and (is_over or run.loop.drives_steps)
        if not run.steps_seen and is_due and not self._none_said:
            self._none_said = True
            rank_zero_warn(
                f"{self._name}: no optimizer has taken a step in {run.steps.passes} backward passes, so nothing is "
                f"learned or measured: {run.loop.never_taken}"
            )
