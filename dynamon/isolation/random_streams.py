"""Random streams of torch, numpy and python: kept, seeded and put back so that nothing shows that they were used."""

import random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Stream(Protocol):
    """What can be read, set and seeded like a ``torch.Generator``."""

    def get_state(self) -> Any:
        """Where it is."""

    def set_state(self, state: Any) -> Any:
        """Be there again."""

    def manual_seed(self, seed: int) -> Any:
        """Begin anew."""


class RandomState:
    """The random states of torch (those of the accelerator too), numpy and python at construction, to draw again.

    Cost: some microseconds and no wait for a device; of CUDA all devices that are visible.
    """

    def __init__(self) -> None:
        """Read them."""
        self._streams = [(stream, stream.get_state()) for stream in _of_torch()]
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        """Have them again from here on."""
        for stream, state in self._streams:
            stream.set_state(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def seed_all(seed: int) -> None:
    """Seed torch, on the host and on the accelerator in use, numpy and python.

    Unlike ``torch.manual_seed`` it seeds no accelerator that is not in use yet, and cuDNN does not hear of it.
    """
    for stream in _of_torch():
        stream.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def stream_of(generator: torch.Generator) -> Stream:
    """A generator as a stream that may be set without anybody else hearing of it."""
    return _Twin(generator) if generator.device.type == "cuda" else generator


def is_restorable(device: torch.device) -> bool:
    """Whether torch can say where the random stream of a kind of device is, and put it back there."""
    return device.type in ("cpu", "meta") or hasattr(getattr(torch, device.type, None), "get_rng_state")


def _of_torch() -> list[Stream]:
    """The default streams: of the host, and of all devices of the accelerator in use."""
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
    """A generator of CUDA, read and written through another one that shares its state.

    What is set itself remembers that: at its next forward pass a recurrent layer of cuDNN then draws a new seed for
    its dropout, from that very stream, and training goes on with other masks and other numbers. The object that holds
    the state stays the same, which captured CUDA graphs know.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._twin = generator, generator.graphsafe_get_state()

    def get_state(self) -> Tensor:
        """Seed and offset, on the host."""
        return self._twin.get_state()

    def set_state(self, state: Tensor) -> None:
        """Be there again."""
        self._twin.set_state(state)
        self._generator.graphsafe_set_state(self._twin)

    def manual_seed(self, seed: int) -> None:
        """Begin anew."""
        self._twin.manual_seed(seed)
        self._generator.graphsafe_set_state(self._twin)


class _AllOf:
    """The streams of all devices of an accelerator, by the functions of its module in torch."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._all = "_all" if hasattr(module, "get_rng_state_all") else ""

    def get_state(self) -> Any:
        """Of all of them, or of the only one."""
        return getattr(self._module, f"get_rng_state{self._all}")()

    def set_state(self, state: Any) -> None:
        """Be there again."""
        getattr(self._module, f"set_rng_state{self._all}")(state)

    def manual_seed(self, seed: int) -> None:
        """Begin anew."""
        every = getattr(self._module, "manual_seed_all", None) or self._module.manual_seed
        every(seed)
