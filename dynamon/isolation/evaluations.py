"""Make all evaluations of a loss start alike: random numbers, module state, eager code, casts of weights."""

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
    """State besides the weights that evaluations of a loss change."""

    def rewind(self) -> Callable[[], None] | None:
        """Restore the initial state, and return what undoes that; None if nothing had changed."""


_KINDS = ("cpu", "cuda", "mps", "xpu")  # device types that support autocast
_ACTIVE: ContextVar[tuple[Rewindable, ...]] = ContextVar("dynamon_rewindable", default=())
_IS_PLAIN: ContextVar[bool] = ContextVar("dynamon_plain", default=False)
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # torch functions that may use cuDNN
_BACKWARD = (torch.autograd.grad, torch.Tensor.backward)


class Evaluations:
    """Makes all evaluations of one loss start as the first did.

    That covers all random numbers, and autocast, which is on where it was on at construction. Inside
    :func:`dynamon.isolation.preserve.preserve_state` it covers the state of the module, too (buffers, counters, queues,
    averages), and every loss in there starts from the same state.

    Attributes:
        autocast: The dtype of autocast by device type, where it is on.
    """

    def __init__(self) -> None:
        """Start the first evaluation here."""
        _rewound()
        self._random = RandomState()
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in _KINDS if is_autocast(torch.device(kind))}

    def in_full_precision(self) -> "Evaluations":
        """Return the same without autocast."""
        other = copy.copy(self)
        other.autocast = {}
        return other

    @contextmanager
    def first(self) -> Iterator[None]:
        """Wrap the first evaluation, which changes state and random numbers like any evaluation of the loss."""
        with force_eager(), fresh_autocast_cache(), _autocast(self.autocast):
            yield

    @contextmanager
    def another(self) -> Iterator[None]:
        """Wrap another evaluation and its backward pass; state that earlier graphs may use is restored afterwards."""
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
        """Return a function that restores the present state, for backward passes that recompute a part of the loss."""
        undo = _rewound()
        _redo(undo)
        return lambda: _redo(undo) if undo else None


def _rewound() -> list[Callable[[], None]]:
    """Restore all state, and return what undoes that."""
    return [undo for undo in [state.rewind() for state in _ACTIVE.get()] if undo is not None]


def _redo(undo: Sequence[Callable[[], None]]) -> None:
    """Restore state from before the last rewind, whatever it is now."""
    _rewound()
    for function in reversed(undo):
        function()


@contextmanager
def rewind_state(state: Rewindable) -> Iterator[None]:
    """Register state that every :class:`Evaluations` inside restores."""
    token = _ACTIVE.set((*_ACTIVE.get(), state))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def force_eager() -> Iterator[None]:
    """Run code inside as written.

    Compiled code runs uncompiled, so that training keeps its graphs. Recurrent layers run without cuDNN, which has no
    second derivative for them and a dropout state that cannot be read or restored.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.cuda.is_initialized() and not _IS_PLAIN.get():
            stack.callback(_IS_PLAIN.reset, _IS_PLAIN.set(True))
            stack.enter_context(_WithoutCudnn())
        yield


class _WithoutCudnn(TorchFunctionMode):
    """Disables cuDNN for recurrent layers only: convolutions have their derivatives in cuDNN.

    Attributes:
        seen: Whether there was a recurrent layer in this process.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, with cuDNN disabled where it cannot be used."""
        if getattr(func, "__name__", "") in _RECURRENT:
            _WithoutCudnn.seen = True
        elif not (self.seen and func in _BACKWARD):  # checkpoints recompute in backward, where this mode is off
            return func(*args, **(kwargs or {}))
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False  # alone: flags() sets the others too
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.backends.cudnn.enabled = enabled


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Clear autocast's cache of cast weights before and after: it does not notice that weights were exchanged."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable autocast inside: for backward passes, as in training, and for computations on their results."""
    with _autocast({}):
        yield


@contextmanager
def _autocast(wanted: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Enable autocast inside for the given device types, and disable it for all others."""
    with ExitStack() as stack:
        for kind in _KINDS:
            now = torch.get_autocast_dtype(kind) if is_autocast(torch.device(kind)) else None
            if now != wanted.get(kind):
                stack.enter_context(torch.autocast(kind, wanted.get(kind, now), enabled=kind in wanted))
        yield


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast is on for a device type."""
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device type without autocast
        return False
