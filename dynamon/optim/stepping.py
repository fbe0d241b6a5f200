"""What optimizers really do: which steps are taken, how often a closure runs in one, and which gradients are used."""

import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

GONE = 3  # the first steps without a gradient after a backward pass, after which there will be none
_MOST = 1000  # steps that are remembered where nobody clears them
Closure = Callable[[], Any]


class Follower(Protocol):
    """What wants to know of every step of an optimizer, also of those that nobody measures."""

    def step_begins(self, optimizer: Optimizer) -> None:
        """Take note of what a step uses: its rates are in force, its gradients may not be there yet."""

    def step_ends(self, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Take note that a step came to its end, with a tensor that is not zero where it left the weights alone."""


_Changed = tuple[tuple[Any, ...], dict[str, Any]]


class Nesting:
    """Tells a step inside of a step, of a class whose ``step`` calls that of its base class, from one that follows.

    Hooks run around both, and an exception runs none: so the frame that ran the hooks of the outer step is kept, and
    a step is inside of it where that frame is still running. Give :func:`sys._getframe` of the hook's caller.
    """

    def __init__(self) -> None:
        """No step under way."""
        self._outer: FrameType | None = None

    def begins(self, frame: FrameType) -> bool:
        """A step begins; whether it is an outer one."""
        if self._outer is not None and _is_running(self._outer):
            return False
        self._outer = frame
        return True

    def ends(self, frame: FrameType) -> bool:
        """A step is over; whether it is the outer one."""
        if self._outer is not None and frame is not self._outer:
            return False
        self._outer = None
        return True

    def clear(self) -> None:
        """Let go of a step that raised; one that is running goes on."""
        if self._outer is not None and not _is_running(self._outer):
            self._outer = None


def _is_running(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


class StepWatch:
    """Watches the steps of an optimizer, and of those that it wraps, by hooks that read and change nothing.

    A step counts where the optimizer, or one inside of it, had gradients and has come to its end: a gradient scaler
    that skips a step does not call it, or, where the optimizer unscales gradients itself (``fused=True``), hands over
    ``found_inf``. Nothing waits for a device but :attr:`taken`, and that only where there is such a tensor.

    Args:
        optimizer: What to watch. One inside of it is found where it is an attribute, as in wrappers that sharpen (SAM)
            or average.
        begins: Called before a step that nobody has announced (:attr:`is_announced`), when its gradients are there.
        uses: Called when a step, or an evaluation of its closure, has the gradients that it uses, clipped ones.

    Attributes:
        evaluation: Which evaluation of its closure a step is at; 0 outside of one.
        evaluations: Evaluations in the last step; 1 where there was no closure.
        outcomes: For each step that came to its end since :meth:`clear`, the tensor that is not zero where it left the
            weights alone, on its device; None where nobody said.
        is_blind: Whether its steps cannot be watched: neither its class nor that of one inside of it ever called
            ``Optimizer.__init__``, or it is compiled.
        is_announced: Whether somebody has said that the step is about to be taken.
        is_quiet: Whether nobody asks for the steps to come, so that only followers are told of them.
        followers: Those that are told of every step.
    """

    def __init__(
        self, optimizer: Optimizer, begins: Callable[[], None] | None = None, uses: Callable[[], None] | None = None
    ) -> None:
        """Attach to the steps."""
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
        """Begin anew: no step was taken."""
        self._nesting.clear()
        self.evaluation = 0
        self.outcomes: deque[Tensor | None] = deque(maxlen=_MOST)
        self.is_announced = self._has_gradients = self._has_begun = False

    def remove(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    @property
    def is_last(self) -> bool:
        """Whether the closure is not expected to run again in this step, as many times as in the last one."""
        return self.evaluation == 0 or self.evaluation >= self.evaluations

    @property
    def is_repeated(self) -> bool:
        """Whether the closure ran once more than was expected, so that what was read before it is not used."""
        return self.evaluation > self.evaluations

    @property
    def taken(self) -> bool:
        """Whether a step was taken since :meth:`clear`; one that cannot be watched is taken to be."""
        if self.is_blind:
            return True
        return any(found_inf is None or not bool(found_inf) for found_inf in self.outcomes)

    @property
    def was_told(self) -> bool:
        """Whether somebody said on the device whether a step was taken."""
        return any(found_inf is not None for found_inf in self.outcomes)

    @property
    def may_have_stepped(self) -> bool:
        """The same without asking the device: a step that was skipped there counts."""
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
    """The closure among the arguments that a step hook is given."""
    if "closure" in kwargs:
        return kwargs["closure"]
    position = _position(optimizer, args)
    return args[position] if len(args) > position else None


def with_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Closure], Closure]
) -> _Changed:
    """The arguments with the closure wrapped, for a step pre-hook to return."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    position = _position(optimizer, args)
    return (*args[:position], wrap(args[position]), *args[position + 1 :]), kwargs


def _position(optimizer: Optimizer, args: tuple[Any, ...]) -> int:
    return 1 if args and args[0] is optimizer else 0


def wrapped_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one holds as attributes and steps itself: the base of a sharpening or averaging wrapper."""
    found, waiting = [optimizer], [optimizer]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            if isinstance(value, Optimizer) and all(value is not one for one in found):
                found.append(value)
                waiting.append(value)
    return found[1:]


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer's steps run hooks.

    Wrappers that never call ``Optimizer.__init__`` have nothing that would run them, whatever they put in their place.
    """
    places = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    step = getattr(type(optimizer), "step", None)
    return getattr(step, "hooked", False) and all(isinstance(place, OrderedDict) for place in places)


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter of an optimizer has a gradient, so that there is something to take a step with."""
    for group in optimizer.param_groups:  # asked several times a step: without a call for each parameter
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def uses_gradients_at_once(parameter: Tensor) -> bool:
    """Whether something sees a parameter's gradient as it arrives in backward: to take a step, or only to look."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None)) or hasattr(parameter, _IN_BACKWARD)


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether an optimizer steps as soon as a parameter's gradient arrives, as far as its hooks show it."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return hasattr(parameter, _IN_BACKWARD) or any(_holds_optimizer(hook) for hook in hooks.values())


_IN_BACKWARD = "_in_backward_optimizers"  # set by torch.distributed.optim


def _holds_optimizer(hook: Any) -> bool:
    """Whether a hook has an optimizer at hand: in its closure, its arguments or the object it is a method of."""
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
