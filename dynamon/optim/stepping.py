"""Watch what optimizers do: which steps are taken, how often a step runs its closure, and which gradients it uses."""

import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

GONE = 3  # after this many initial steps without a gradient after backward, there will be none
_MAX_STEPS = 1000  # remembered if nothing clears them
Closure = Callable[[], Any]


class Follower(Protocol):
    """Receives every step of an optimizer, also those that are not measured."""

    def step_begins(self, optimizer: Optimizer) -> None:
        """Note what a step uses: its rates are in force, its gradients may not be there yet."""

    def step_ends(self, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Note that a step completed; ``skipped`` is a device tensor that is not zero if it left the weights alone."""


_Changed = tuple[tuple[Any, ...], dict[str, Any]]


class Nesting:
    """Distinguishes a nested step, of a class whose ``step`` calls its base class's, from the next step.

    Hooks run around both, and an exception runs none. So the frame that ran the hooks of the outer step is kept, and a
    step is nested if that frame is still running. Pass :func:`sys._getframe` of the hook's caller.
    """

    def __init__(self) -> None:
        """Start outside of any step."""
        self._outer: FrameType | None = None

    def begins(self, frame: FrameType) -> bool:
        """Note the begin of a step, and return whether it is an outer one."""
        if self._outer is not None and _is_running(self._outer):
            return False
        self._outer = frame
        return True

    def ends(self, frame: FrameType) -> bool:
        """Note the end of a step, and return whether it is the outer one."""
        if self._outer is not None and frame is not self._outer:
            return False
        self._outer = None
        return True

    def clear(self) -> None:
        """Forget a step that raised; a running one goes on."""
        if self._outer is not None and not _is_running(self._outer):
            self._outer = None


def _is_running(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


class StepWatch:
    """Watches the steps of an optimizer, and of those that it wraps, by hooks that change nothing.

    A step counts if the optimizer, or a nested one, had gradients and completed. A gradient scaler that skips a step
    does not call it, or passes ``found_inf`` if the optimizer unscales gradients itself (``fused=True``). Only
    :attr:`taken` may wait for a device, and only where there is such a tensor.

    Args:
        optimizer: What to watch. A wrapped optimizer is found if it is an attribute, as in sharpness-aware (SAM) or
            averaging wrappers.
        begins: Called before a step that was not announced (:attr:`is_announced`), when its gradients are there.
        uses: Called when a step, or an evaluation of its closure, has the (clipped) gradients that it uses.

    Attributes:
        evaluation: Which evaluation of its closure a step is at; 0 outside of one.
        evaluations: Evaluations in the last step; 1 where there was no closure.
        outcomes: For each step completed since :meth:`clear`, a device tensor that is not zero if the weights were left
            alone, or None where nothing is known.
        is_blind: Whether its steps cannot be watched: neither its class nor that of a wrapped optimizer ever called
            ``Optimizer.__init__``, or it is compiled.
        is_announced: Whether a caller has announced the coming step.
        is_quiet: Whether only followers are told of the steps to come.
        followers: Those that are told of every step.
    """

    def __init__(
        self, optimizer: Optimizer, begins: Callable[[], None] | None = None, uses: Callable[[], None] | None = None
    ) -> None:
        """Attach to the optimizer's step hooks."""
        self._optimizer, self._begins, self._uses = optimizer, begins, uses
        self.followers: list[Follower] = []
        self.is_quiet = False
        self._nesting = Nesting()
        self.evaluations = 1
        self.clear()
        self._handles: list[Any] = []
        for each in (optimizer, *wrapped_optimizers(optimizer)):
            if runs_hooks(each):
                self._handles += [
                    each.register_step_pre_hook(self._before),
                    each.register_step_post_hook(self._after),
                ]
        self.is_blind = not self._handles

    def clear(self) -> None:
        """Forget all steps."""
        self._nesting.clear()
        self.evaluation = 0
        self.outcomes: deque[Tensor | None] = deque(maxlen=_MAX_STEPS)
        self.is_announced = self._has_gradients = self._has_begun = False

    def remove(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    @property
    def is_last(self) -> bool:
        """Whether the closure has run as often as in the last step, so that it is not expected to run again."""
        return self.evaluation == 0 or self.evaluation >= self.evaluations

    @property
    def is_repeated(self) -> bool:
        """Whether the closure ran more often than expected, so that gradients read before are not the ones used."""
        return self.evaluation > self.evaluations

    @property
    def taken(self) -> bool:
        """Whether a step was taken since :meth:`clear`; True if the optimizer cannot be watched."""
        if self.is_blind:
            return True
        return any(found_inf is None or not bool(found_inf) for found_inf in self.outcomes)

    @property
    def was_told(self) -> bool:
        """Whether a device tensor tells if a step was taken."""
        return any(found_inf is not None for found_inf in self.outcomes)

    @property
    def may_have_stepped(self) -> bool:
        """Like :attr:`taken`, without waiting for the device: steps skipped there count."""
        return self.is_blind or bool(self.outcomes)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Changed | None:
        if torch.compiler.is_compiling():
            self.is_blind = True
            return None
        if self.is_quiet:
            for follower in self.followers:
                follower.step_begins(self._optimizer)
            return None
        is_outer = self._nesting.begins(sys._getframe(1))
        if is_outer:
            self.evaluation, self._has_begun = 0, True
            for follower in self.followers:
                follower.step_begins(self._optimizer)
        if closure_of(optimizer, args, kwargs) is None:
            self._use(optimizer)
            return None
        return with_closure(optimizer, args, kwargs, partial(self._watched, optimizer)) if is_outer else None

    def _watched(self, optimizer: Optimizer, closure: Closure) -> Closure:
        def watched() -> Any:
            self.evaluation += 1
            result = closure()
            self._use(optimizer)
            return result

        return watched

    def _use(self, optimizer: Optimizer) -> None:
        if not self.is_announced and self._begins is not None:
            self._begins()
        self._has_gradients = has_gradients(optimizer)
        if self._uses is not None:
            self._uses()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self.is_quiet:
            for follower in self.followers:  # one inside of it ends first: a follower counts a step that began, once
                follower.step_ends(self._optimizer, getattr(optimizer, "found_inf", None))
            return
        if self._nesting.ends(sys._getframe(1)):
            # A step that had begun before it was watched is known by its end only.
            if self._has_gradients or not self._has_begun and has_gradients(optimizer):
                self.outcomes.append(getattr(optimizer, "found_inf", None))
                for follower in self.followers:
                    follower.step_ends(self._optimizer, self.outcomes[-1])
            self.evaluations, self.evaluation = max(self.evaluation, 1), 0
            self.is_announced = self._has_begun = False


def closure_of(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """Return the closure among the arguments of a step hook."""
    if "closure" in kwargs:
        return kwargs["closure"]
    position = _position(optimizer, args)
    return args[position] if len(args) > position else None


def with_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Closure], Closure]
) -> _Changed:
    """Return the arguments with the closure wrapped, as a step pre-hook returns them."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    position = _position(optimizer, args)
    return (*args[:position], wrap(args[position]), *args[position + 1 :]), kwargs


def _position(optimizer: Optimizer, args: tuple[Any, ...]) -> int:
    return 1 if args and args[0] is optimizer else 0


def wrapped_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """List the optimizers that an optimizer holds as attributes and steps itself, as SAM and averaging wrappers do."""
    found, waiting = [optimizer], [optimizer]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            if isinstance(value, Optimizer) and all(value is not one for one in found):
                found.append(value)
                waiting.append(value)
    return found[1:]


def runs_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's steps run hooks.

    Wrappers that never call ``Optimizer.__init__`` do not.
    """
    places = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    step = getattr(type(optimizer), "step", None)
    return getattr(step, "hooked", False) and all(isinstance(place, OrderedDict) for place in places)


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether any parameter of an optimizer has a gradient."""
    for group in optimizer.param_groups:  # asked several times a step: without a call for each parameter
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def uses_gradients_at_once(parameter: Tensor) -> bool:
    """Return whether a hook sees a parameter's gradient during backward, be it to step or only to look."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None)) or hasattr(parameter, _IN_BACKWARD)


def steps_in_backward(parameter: Tensor) -> bool:
    """Return whether an optimizer steps when a parameter's gradient arrives, as far as its hooks show it."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return hasattr(parameter, _IN_BACKWARD) or any(_holds_optimizer(hook) for hook in hooks.values())


_IN_BACKWARD = "_in_backward_optimizers"  # set by torch.distributed.optim


def _holds_optimizer(hook: Any) -> bool:
    """Return whether a hook refers to an optimizer: in its closure, arguments, or the object that it is a method of."""
    held = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if not _is_empty(cell)]
    held += [*getattr(hook, "args", ()), *getattr(hook, "keywords", {}).values()]  # functools.partial
    held += [*(getattr(hook, "__defaults__", None) or ()), getattr(hook, "__self__", None), getattr(hook, "func", None)]
    for each in held:
        inside = each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else (each,)
        if any(isinstance(value, Optimizer) for value in inside):
            return True
    return False


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
