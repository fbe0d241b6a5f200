"""Evaluations of a loss that all begin alike: random numbers, state of the module, code that runs, casts of weights."""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import torch


class Rewindable(Protocol):
    """State outside of the weights that evaluations of a loss move on."""

    def rewind(self) -> Callable[[], None] | None:
        """Have it as it was at the begin, and return what undoes that; None where nothing had changed."""


_KINDS = ("cpu", "cuda", "mps", "xpu")  # of devices that autocast knows
_ACTIVE: ContextVar[tuple[Rewindable, ...]] = ContextVar("dynamon_rewindable", default=())


class RandomState:
    """The random states of torch (those of the accelerator too), numpy and python at construction, to draw again."""

    def __init__(self) -> None:
        """Read them."""
        self._host = torch.get_rng_state()
        self._devices = _accelerator_states()
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Have them again from here on."""
        torch.set_rng_state(self._host)
        for put_back, state in self._devices:
            put_back(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _accelerator_states() -> list[tuple[Callable[[Any], None], Any]]:
    """The random states of all devices of the accelerator in use, and what sets them: one call, if it knows one."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    module: Any = getattr(torch, accelerator.type, None)
    if not hasattr(module, "get_rng_state") or not getattr(module, "is_initialized", module.is_available)():
        return []
    every = "_all" if hasattr(module, "get_rng_state_all") else ""
    return [(getattr(module, f"set_rng_state{every}"), getattr(module, f"get_rng_state{every}")())]


class Evaluations:
    """All evaluations of one loss: each begins where the first one did.

    That holds for random numbers anywhere, and for autocast, which is on where it was on at construction. Inside of
    :func:`dynamon.probe.undisturbed` it holds for the state of the module too (buffers, counters, queues, averages),
    and every loss in there begins from the same.

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
        with eager(), casts_anew(), _autocast(self.autocast):
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
def rewinding(state: Rewindable) -> Iterator[None]:
    """Inside, every :class:`Evaluations` has this state put back."""
    token = _ACTIVE.set((*_ACTIVE.get(), state))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled code runs as it was written: nothing is compiled, and training keeps the graphs that it has."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def casts_anew() -> Iterator[None]:
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
