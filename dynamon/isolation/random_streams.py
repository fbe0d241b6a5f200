"""Save, seed and restore the random streams of torch, numpy and python, without a trace."""

import random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Stream(Protocol):
    """An object that can be read, set and seeded like a ``torch.Generator``."""

    def get_state(self) -> Any:
        """Return the state."""

    def set_state(self, state: Any) -> Any:
        """Set the state."""

    def manual_seed(self, seed: int) -> Any:
        """Seed the stream."""


class RandomState:
    """The random states of torch (accelerators included), numpy and python at construction.

    Cost: some microseconds and no wait for a device; for CUDA, all visible devices are read.
    """

    def __init__(self) -> None:
        """Read the states."""
        self._streams = [(stream, stream.get_state()) for stream in _of_torch()]
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Set the states again."""
        for stream, state in self._streams:
            stream.set_state(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def seed_all(seed: int) -> None:
    """Seed torch, on the host and on the accelerator in use, numpy and python.

    Unlike ``torch.manual_seed`` it does not seed accelerators that are not yet in use, and cuDNN does not notice.
    """
    for stream in _of_torch():
        stream.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def stream_of(generator: torch.Generator) -> Stream:
    """Return a generator as a stream that can be set without side effects."""
    return _Twin(generator) if generator.device.type == "cuda" else generator


def is_restorable(device: torch.device) -> bool:
    """Return whether torch can read and set the random stream of a device type."""
    return device.type in ("cpu", "meta") or hasattr(getattr(torch, device.type, None), "get_rng_state")


def _of_torch() -> list[Stream]:
    """List the default streams: of the host, and of all devices of the accelerator in use."""
    found: list[Stream] = [torch.default_generator]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return found
    module: Any = getattr(torch, accelerator.type, None)
    if not hasattr(module, "get_rng_state") or not getattr(module, "is_initialized", module.is_available)():
        return found
    if accelerator.type == "cuda":
        return [*found, *map(_Twin, module.default_generators)]
    return [*found, _AllOf(module)]


class _Twin:
    """A CUDA generator, read and written through another one that shares its state.

    A generator that is set directly remembers it: at its next forward pass a recurrent cuDNN layer then draws a new
    dropout seed from that stream, and training continues with other masks and numbers. The object that holds the state
    stays the same, as captured CUDA graphs require.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._twin = generator, generator.graphsafe_get_state()

    def get_state(self) -> Tensor:
        """Return seed and offset, on the host."""
        return self._twin.get_state()

    def set_state(self, state: Tensor) -> None:
        """Set the state."""
        self._twin.set_state(state)
        self._generator.graphsafe_set_state(self._twin)

    def manual_seed(self, seed: int) -> None:
        """Seed the stream."""
        self._twin.manual_seed(seed)
        self._generator.graphsafe_set_state(self._twin)


class _AllOf:
    """The streams of all devices of an accelerator, through its module in torch."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._all = "_all" if hasattr(module, "get_rng_state_all") else ""

    def get_state(self) -> Any:
        """Return the states of all devices, or of the only one."""
        return getattr(self._module, f"get_rng_state{self._all}")()

    def set_state(self, state: Any) -> None:
        """Set the states."""
        getattr(self._module, f"set_rng_state{self._all}")(state)

    def manual_seed(self, seed: int) -> None:
        """Seed all devices."""
        every = getattr(self._module, "manual_seed_all", None) or self._module.manual_seed
        every(seed)
