"""Find out whether evaluating a training step once more changes anything that cannot be put back."""

import math
from collections.abc import Callable

import torch

from dynamon.isolation.preserve import LossFn
from dynamon.isolation.side_effects import changed_names, external_state
from dynamon.kernels.devices import reads_are_free
from dynamon.monitoring.loop import Loop
from dynamon.monitoring.messages import rank_zero_info, rank_zero_warn

_SAME, _SAME_ON_HOST = 1e-3, 1e-6  # two evaluations of a loss differ by less where a GPU adds up in another order


class EffectCheck:
    """Compares what is outside of the module before and after two evaluations of a loss, and the two losses.

    Args:
        loss_fn: The user's own loss function; None for the loop's. Numbers and lists that it counts in are its own
            matter, since they change nothing that is trained.

    Attributes:
        is_done: Whether nothing is left to be checked.
        reason: What was found, in words; None where there was nothing.
    """

    def __init__(self, loss_fn: LossFn | None = None) -> None:
        """Start with nothing evaluated."""
        self.is_done, self._loss_fn, self._name = False, loss_fn, "loss_fn"
        self._is_told = False
        self.reason: str | None = None
        self._marks: list[dict[str, str]] = []  # of what is outside of the module, before each evaluation
        self._losses: list[float] = []

    def watch(self, loop: Loop, evaluate: Callable[[], float]) -> float:
        """Evaluate a loss, and remember what was outside of the module before and what it was."""
        if self.is_done:
            return evaluate()
        self._marks.append(self._state(loop))
        self._losses.append(evaluate())
        return self._losses[-1]

    def clear(self) -> None:
        """Forget evaluations that were watched: what comes is another loss, on another batch."""
        self._marks, self._losses = [], []

    def find(self, loop: Loop, evaluate: Callable[[], float]) -> str | None:
        """Return what two evaluations change outside of the module, in words; None where there is nothing.

        Args:
            loop: The training loop.
            evaluate: Evaluates the loss; called twice, or once where it was watched before.
        """
        self._marks, self._losses = self._marks[-1:], self._losses[-1:]
        while len(self._losses) < 2:
            self.watch(loop, evaluate)
        marks = [*self._marks, self._state(loop)]
        # What changed the first time only is a cache that has been filled.
        changed = [name for name in changed_names(*marks[1:]) if name in changed_names(*marks[:2])]
        if changed:
            return f"it changes {', '.join(changed[:3])}"
        return _difference(self._losses[0], self._losses[1], loop.device)

    def _state(self, loop: Loop) -> dict[str, str]:
        source = loop.loss_source if self._loss_fn is None else self._loss_fn
        self._name = loop.loss_name if self._loss_fn is None else "loss_fn"
        return external_state(loop.module, source, counts=self._name == "training_step")

    def settle(self, reason: str | None) -> None:
        """Take what was found, here or on another process."""
        self.is_done, self.reason = True, reason

    def sentence(self, what: str) -> str:
        """Say that something is off because of what was found, at full length once."""
        if self._is_told:
            return f"{what} is off for the same reason."
        self._is_told = True
        mend = "let it compute" if self._name == "loss_fn" else "pass loss_fn=lambda module, batch: ... that computes"
        return (
            f"{what} is off: {self._name} has effects outside the module that cannot be undone ({self.reason}); {mend} "
            "the loss and nothing else."
        )

    def tell(self, what: str) -> None:
        """Warn of it, once; whatever else is off because of it only says so."""
        (rank_zero_info if self._is_told else rank_zero_warn)(self.sentence(what))


def _difference(first: float, second: float, device: torch.device) -> str | None:
    """Return what to say of two evaluations of one loss on a device; None where they agree."""
    tolerance = _SAME_ON_HOST if reads_are_free(device) else _SAME
    if math.isclose(first, second, rel_tol=tolerance) or not math.isfinite(first + second):
        return None
    return f"on the same samples with the same random numbers its loss was {first:.6g}, then {second:.6g}"
