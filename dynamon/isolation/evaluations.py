"""Evaluations of a loss that all begin alike: random numbers, state of the module, code that runs, casts of weights."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from dynamon.isolation.random_streams import RandomState


class Rewindable(Protocol):
    """State outside of the weights that evaluations of a loss move on."""

    def rewind(self) -> Callable[[], None] | None:
        """Have it as it was at the begin, and return what undoes that; None where nothing had changed."""


_KINDS = ("cpu", "cuda", "mps", "xpu")  # of devices that autocast knows
_ACTIVE: ContextVar[tuple[Rewindable, ...]] = ContextVar("dynamon_rewindable", default=())
_IS_PLAIN: ContextVar[bool] = ContextVar("dynamon_plain", default=False)
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # torch's own functions that may go to cuDNN
_BACKWARD = (torch.autograd.grad, torch.Tensor.backward)


class Evaluations:
    """All evaluations of one loss: each begins where the first one did.

    That holds for random numbers anywhere, and for autocast, which is on where it was on at construction. Inside of
    :func:`dynamon.isolation.preserve.preserve_state` it holds for the state of the module too (buffers, counters,
    queues, averages), and every loss in there begins from the same.

    Attributes:
        autocast: By kind of device, the dtype of autocast where it is on.
    """

    def __init__(self) -> None:
        """The first one begins here."""
        _rewound()
        self._random = RandomState()
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in _KINDS if is_autocast(torch.device(kind))}

    def in_full_precision(self) -> "Evaluations":
        """The same without autocast."""
        other = copy.copy(self)
        other.autocast = {}
        return other

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first evaluation, which moves state and random numbers on as any evaluation of the loss does."""
        with force_eager(), fresh_autocast_cache(), _autocast(self.autocast):
            yield

    @contextmanager
    def another(self) -> Iterator[None]:
        """Around one more, its backward pass included; state that graphs made before may still look at comes back."""
        outside = RandomState()
        undo = _rewound()
        self._random.restore()
        try:
            with self.first():
                yield
        finally:
            _redo(undo)
            outside.restore()

    def mark(self) -> Callable[[], None]:
        """What has the state as it is now again: for backward passes that compute a part of the loss once more."""
        undo = _rewound()
        _redo(undo)
        return lambda: _redo(undo) if undo else None


def _rewound() -> list[Callable[[], None]]:
    """Put all state back; return what undoes that."""
    return [undo for undo in [state.rewind() for state in _ACTIVE.get()] if undo is not None]


def _redo(undo: Sequence[Callable[[], None]]) -> None:
    """From wherever it has come, have state as it was when it was last put back."""
    _rewound()
    for function in reversed(undo):
        function()


@contextmanager
def rewind_state(state: Rewindable) -> Iterator[None]:
    """Inside, every :class:`Evaluations` has this state put back."""
    token = _ACTIVE.set((*_ACTIVE.get(), state))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def force_eager() -> Iterator[None]:
    """Code runs as it was written.

    Compiled code runs uncompiled, so that training keeps the graphs that it has. Recurrent layers run without cuDNN,
    where they have no second derivative, and a state of dropout that nobody can read or put back.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.cuda.is_initialized() and not _IS_PLAIN.get():
            stack.callback(_IS_PLAIN.reset, _IS_PLAIN.set(True))
            stack.enter_context(_WithoutCudnn())
        yield


class _WithoutCudnn(TorchFunctionMode):
    """Recurrent layers inside do not use cuDNN; convolutions, which have their derivatives there, do.

    Attributes:
        seen: Whether there was any in this process.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call; with cuDNN off where it would be of no use."""
        if getattr(func, "__name__", "") in _RECURRENT:
            _WithoutCudnn.seen = True
        elif not (self.seen and func in _BACKWARD):  # a checkpoint computes its part again, and this mode is off there
            return func(*args, **(kwargs or {}))
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False  # alone: flags() sets the others too
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.backends.cudnn.enabled = enabled


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Autocast casts weights inside anew and afterwards again: its cache does not see that they were exchanged."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast, where it is on, is off inside: for backward passes, as in training, and for what is made of them."""
    with _autocast({}):
        yield


@contextmanager
def _autocast(wanted: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Autocast is on inside for some kinds of devices, and off for all others."""
    with ExitStack() as stack:
        for kind in _KINDS:
            now = torch.get_autocast_dtype(kind) if is_autocast(torch.device(kind)) else None
            if now != wanted.get(kind):
                stack.enter_context(torch.autocast(kind, wanted.get(kind, now), enabled=kind in wanted))
        yield


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a kind of device."""
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a kind of device that it does not know
        return False
