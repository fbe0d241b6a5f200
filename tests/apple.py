"""An Apple GPU played on the CPU: tensors of their own, without float64, that NumPy and LAPACK cannot take.

What it computes is what torch's own table of kernels says: an operation without one for this device raises, as it does
there without ``PYTORCH_ENABLE_MPS_FALLBACK``. Random numbers come from a stream of its own.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps", 0)
STREAM = torch.Generator()  # its random numbers
# Decompositions that the newest torch has there and older ones that are supported here have not.
_LACKING = ("_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_qr", "geqrf", "linalg_lu", "histc")
# What the CPU that stands for it calls where the device has kernels of its own.
_INSTEAD = ("mkldnn_rnn_layer",)
_UNKNOWN = (torch.float64, torch.complex128)
_ACROSS = ("copy_", "_to_copy", "_foreach_copy_")  # what takes tensors of two devices


class OnDevice(Tensor):
    """A tensor that lies there; a CPU tensor holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        """Wrap a CPU tensor."""
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What it says it is."""
        return DEVICE

    @property
    def is_mps(self) -> bool:  # type: ignore[override]
        """What it says it is."""
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """What it says it is not."""
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same numbers without a graph."""
        return OnDevice(self.held)

    @data.setter
    def data(self, value: "OnDevice") -> None:
        self.held = value.held

    def numpy(self, *, force: bool = False) -> Any:
        """As it fails there."""
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory.")

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        """On the device; torch would ask the wrapper's."""
        return OnDevice(self.held.new_tensor(data))

    def tolist(self) -> Any:
        """Read by the host."""
        return self.detach().held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        """What it holds."""
        return f"OnDevice({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what a checkpoint gives that is loaded to the host."""
        if getattr(self, "_is_param", False):
            return torch.nn.Parameter, (self.held, self.requires_grad)
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        """Another one of the same kind."""
        other: Any = OnDevice(self.held.clone())
        if getattr(self, "_is_param", False):
            other = torch.nn.Parameter(other, self.requires_grad)
        memo[id(self)] = other
        return other

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU, under the rules of the device."""
        return _compute(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is on, tensors can be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The same, where no argument lies there."""
        return _compute(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What asks the device itself, which is not there, or takes all to be on the CPU already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make it here, then take it there."""
        asked = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and asked is not None and torch.device(asked).type == "mps":
            here = func(*args, **{**kwargs, "device": None})
            return here if isinstance(here, OnDevice) else _wrapped(here, (), {})
        if func in (Tensor.to, Tensor.cpu):
            return _moved(func, *args, **(kwargs or {}))
        if func is scaled_dot_product_attention and isinstance(args[0], OnDevice):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """By the formula: torch would make the mask where it thinks that the numbers are."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf)
    return scores.softmax(-1) @ value


def _moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype, device = tensor.dtype, torch.device("cpu") if func is Tensor.cpu else tensor.device
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value)
    if device.type == tensor.device.type:
        return Tensor.to(tensor, dtype, copy=kwargs.get("copy", False))
    if device.type == "cpu" and dtype == torch.float64:
        raise TypeError("a MPS Tensor comes to the host in its own dtype; widen it there.")
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)


@lru_cache
def _kernels() -> dict[str, tuple[str | None, str]]:
    """Of each operation in torch's table the one that it is left to, if it is, and whom it has kernels for."""
    table = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    found = {}
    for entry in table.split("\n- func: ")[1:]:
        left_to = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
        kernels = re.search(r"^  dispatch:\n((?:    .*\n)+)", entry + "\n", re.MULTILINE)
        keys = " ".join(line.split(":")[0] for line in kernels[1].splitlines()) if kernels else "Composite"
        found[entry.split("(")[0]] = (left_to[1] if left_to else None, keys)
    return found


def has_kernel(operation: str) -> bool:
    """Whether an operation, as ``"mm"`` or ``"add.Tensor"``, has one there or is made of others; so if unknown."""
    left_to, keys = _kernels().get(operation, (None, "Composite"))
    if left_to is not None:
        return has_kernel(left_to)
    return "Composite" in keys or re.search(r"\bMPS\b", keys) is not None


def _refuse(func: Any, name: str, kwargs: dict[str, Any]) -> None:
    """What torch has no kernel for, and memory that is only CUDA's."""
    lacks = not name.startswith(_INSTEAD) and not has_kernel(func.name().removeprefix("aten::"))
    if lacks or name.startswith(_LACKING):
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
    if kwargs.get("pin_memory"):
        raise RuntimeError(f"{name}: cannot pin memory for the MPS device.")


def _drawn(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call something that draws from the stream of the device where it was given no other."""
    outside = torch.get_rng_state()
    torch.set_rng_state(STREAM.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        STREAM.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [isinstance(value, OnDevice) for value in given]
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        goes = torch.device(asked).type == "mps"
    else:
        goes = there[0] if name == "copy_" else any(there)
    if any(there) or goes:
        _refuse(func, name, kwargs)
    if any(there):
        if name not in _ACROSS and any(not isinstance(v, OnDevice) and v.ndim for v in given):
            if not (name.startswith("index") and isinstance(given[0], OnDevice)):
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found mps:0 and cpu!")
    draws = goes and torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    found = (_drawn if draws else _called)(func, _held(args), _held(kwargs))
    if not goes:
        return found
    return _wrapped(found, args, kwargs)


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _held(value: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, value)


def _wrapped(found: Any, args: Any, kwargs: Any) -> Any:
    known = {id(x.held): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnDevice)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice):
            return value
        if value.dtype in _UNKNOWN:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                "Please use float32 instead."
            )
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(wrap, found)


class _Generator(torch.Generator):
    """A generator of the device is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


def _take(state: Tensor, *_: Any) -> None:
    STREAM.set_state(state.clone())


_MODULE = {
    "is_available": lambda: True,
    "get_rng_state": lambda *_: STREAM.get_state(),
    "set_rng_state": _take,
    "manual_seed": lambda seed: STREAM.manual_seed(seed) and None,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "recommended_max_memory": lambda: 2**33,
    "current_allocated_memory": lambda: 2**20,
}


class Strategy(SingleDeviceStrategy):
    """One process on the device."""

    def __init__(self) -> None:
        """As Lightning makes it for ``accelerator="mps"``."""
        super().__init__(DEVICE)

    def setup_environment(self) -> None:
        """There is nothing to set up."""


@contextmanager
def apple(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors can be made on the device."""
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    for name, function in _MODULE.items():
        patch.setattr(torch.mps, name, function)
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with Device(), _Moves():
        yield
