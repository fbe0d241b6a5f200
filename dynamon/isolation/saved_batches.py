"""Store batches of any class in checkpoints: plain tensors, and how they belong together."""

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamon.isolation.batches import to_device


class UnknownClassError(Exception):
    """A saved batch holds objects of classes that are not in the batch it is rebuilt from."""


def pack_batch(batch: Any) -> dict[str, Any] | None:
    """Convert a batch to plain tensors, which load safely from a checkpoint; None if that is not possible.

    Its classes are named, not stored: :func:`unpack_batch` takes them from another batch of the run.

    Returns:
        ``tensors``, ``structure`` (a pickle without them, as ``uint8``), ``numbers`` (their total count), and ``host``
        (whether all of them were in host memory).
    """
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(batch)
    except Exception:  # classes made inside of functions, locks, generators
        return None
    structure = torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())
    return {
        "tensors": packer.tensors,
        "structure": structure,
        "numbers": structure.numel() + sum(map(_numbers, packer.tensors)),
        "host": all(t.device.type == "cpu" for t in packer.tensors),
    }


def unpack_batch(state: Mapping[str, Any], device: torch.device, like: Any = None) -> Any:
    """Rebuild the batch from :func:`pack_batch`; tensors that were on a device are moved to ``device``.

    Args:
        state: The result of :func:`pack_batch`.
        device: The run's device.
        like: A batch of the run. Only its classes are called or imported.

    Raises:
        UnknownClassError: If other classes are needed.
    """
    batch = _Unpacker(state, device, _names(pack_batch(like))).load()
    return to_device(batch, device) if state["host"] and device.type != "cpu" else batch


def move_to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors of a packed batch into host memory."""
    return {**state, "tensors": [t.cpu() for t in state["tensors"]]}


def _numbers(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return tensor._values().numel() + tensor._indices().numel()
    return tensor.numel() if tensor.layout is torch.strided else tensor.values().numel()


def _names(state: Mapping[str, Any] | None) -> frozenset[tuple[str, str]]:
    """List module and name of every class and function that a batch of the run refers to."""
    if state is None:
        return frozenset()
    reader = _Reader(state, torch.device("cpu"))
    reader.load()
    return frozenset(reader.names)


class _Packer(pickle.Pickler):
    """Stores tensors apart, in ``tensors``."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        """Return where a tensor is stored, and how it is rebuilt."""
        if not isinstance(value, Tensor):
            return None
        if value.is_nested:
            layout = "jagged" if value.layout is torch.jagged else "strided"
            return layout, [self._keep(t) for t in value.unbind()]
        if type(value) is not Tensor:
            return "subclass", self._keep(value.as_subclass(Tensor)), type(value), dict(value.__dict__)
        return "plain", self._keep(value)

    def reducer_override(self, value: Any) -> Any:
        """Reduce classes derived from OrderedDict without their constructor, like all others."""
        kind: Any = type(value)
        if kind is not OrderedDict and isinstance(value, OrderedDict) and kind.__reduce__ is OrderedDict.__reduce__:
            return copyreg.__newobj__, (kind,), vars(value), None, iter(value.items())  # type: ignore[attr-defined]
        return NotImplemented

    def _keep(self, tensor: Tensor) -> tuple[int, bool]:
        self.tensors.append(tensor.detach())
        return len(self.tensors) - 1, tensor.device.type == "cpu"


class _Unpacker(pickle.Unpickler):
    """Restores the tensors, and calls nothing but what is allowed."""

    def __init__(
        self, state: Mapping[str, Any], device: torch.device, allowed: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        super().__init__(io.BytesIO(state["structure"].cpu().numpy().tobytes()))
        self._tensors, self._device, self._allowed = state["tensors"], device, allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function, if a batch of the run refers to it as well."""
        if (module, name) not in self._allowed:
            raise UnknownClassError(f"{module}.{name}")
        found = super().find_class(module, name)
        if module == "builtins" and not isinstance(found, type):  # getattr and the like lead to everything
            raise UnknownClassError(f"{module}.{name}")
        return found

    def persistent_load(self, where: Any) -> Tensor:
        """Return a stored tensor."""
        kind, place, *rest = where
        if kind in ("jagged", "strided"):
            parts = [self._tensor(p) for p in place]
            return torch.nested.nested_tensor(parts, layout=getattr(torch, kind), device=parts[0].device)
        tensor = self._tensor(place)
        if kind == "subclass":
            tensor = tensor.as_subclass(rest[0])
            tensor.__dict__.update(rest[1])
        return tensor

    def _tensor(self, place: tuple[int, bool]) -> Tensor:
        index, was_on_host = place
        tensor = self._tensors[index]
        return tensor.cpu() if was_on_host else tensor.to(self._device)


class _Reader(_Unpacker):
    """Collects the names in a batch of the run itself."""

    def __init__(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(state, device)
        self.names: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Return any class: the run made the batch."""
        self.names.add((module, name))
        return pickle.Unpickler.find_class(self, module, name)
