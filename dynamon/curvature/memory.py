"""Memory that an eigenvalue solve takes, and memory that is free."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dynamon.curvature.operators.parameters import FlatParameters, Parameters, names_and_tensors
from dynamon.curvature.solvers.lanczos import basis_vectors
from dynamon.curvature.solvers.rayleigh_ritz import MOST_VECTORS
from dynamon.layers.complex_pairs import real_dtype, real_numel


def basis_memory(params: Parameters | FlatParameters, k: int = 1, certify: bool = False) -> int:
    """Return the bytes that the vectors of :func:`dynamon.curvature.top_eigenvalues` take, without the loss's graph.

    Args:
        params: The parameters of the operator, or a mapping from their names.
        k: Number of eigenvalues.
        certify: True for a certified run, which keeps at least 21 vectors.

    Examples:
        >>> import torch
        >>> from dynamon.curvature.memory import basis_memory
        >>> basis_memory([torch.zeros(1000)]) // 4000  # vectors in float32
        15
    """
    _, tensors = names_and_tensors(params)
    size = sum(real_numel(p) for p in tensors)
    width = max(real_dtype(p).itemsize for p in tensors)
    vectors = basis_vectors(k, certify) + k + 3  # at a restart, and at the end, some are held twice
    vectors = max(vectors, MOST_VECTORS) if k == 1 else vectors
    return vectors * size * max(width, torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device.

    On the host that is the minimum of the system's free memory and of what the limits of this process's control groups
    (of a container or batch system) leave; 8 GiB where neither is known. An Apple GPU shares the host's memory up to
    the driver's recommended maximum. Memory that a device's allocator has reserved and does not use counts as free.
    """
    if device.type == "mps":
        return max(int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()), 0)
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0]) + _held(module, device)
    found = [left for left in (_of_system(), *_of_control_groups()) if left is not None]
    return min(found, default=_UNKNOWN)


def _held(module: Any, device: torch.device) -> int:
    """Return the bytes that a device's allocator has reserved and does not use; 0 where it does not say."""
    if not hasattr(module, "memory_reserved") or not hasattr(module, "memory_allocated"):
        return 0
    return max(int(module.memory_reserved(device) - module.memory_allocated(device)), 0)


def empty_cache(device: torch.device) -> None:
    """Release unused memory of the device's allocator, where it supports that."""
    getattr(getattr(torch, device.type, None), "empty_cache", lambda: None)()


_UNKNOWN = 2**33
_MEMORY, _ENTRIES, _CONTROL_GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of control groups in version 2, then 1: their tree, files of the limit and of what is used, cache in the latter.
_VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _of_system() -> int | None:
    """Return the free memory of the machine, its total where the free part is unknown, or None where both are."""
    available = _table(_MEMORY).get("MemAvailable")
    if available is not None:
        return available * 1024
    if sys.platform == "win32":
        return _of_windows()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_control_groups() -> Iterator[int]:
    """Yield the bytes left by each limit of a control group above this process."""
    for tree, limit_file, usage_file, cache in _VERSIONS:
        for folder in _folders(tree):
            limit, used = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and used is not None and limit < 2**60:  # version 1 writes no limit as a huge one
                cached = _table(folder / "memory.stat").get(cache, 0)  # given back when it is needed
                yield max(limit - max(used - cached, 0), 0)


def _folders(tree: str) -> list[Path]:
    """Return the control groups of this process, from its own up to the root, as seen from here."""
    root = _CONTROL_GROUPS / tree
    try:
        entries = [line.split(":", 2) for line in _ENTRIES.read_text().splitlines()]
    except OSError:
        return []
    own = [PurePosixPath(entry[2].lstrip("/")) for entry in entries if len(entry) == 3 and tree in entry[1].split(",")]
    # In a container the path may be the host's, and what is mounted at the root is the container's own group.
    return list(dict.fromkeys(root / place for path in own for place in (path, *path.parents)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" where there is no limit
        return None


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _of_windows() -> int | None:
    """Return the available memory that GlobalMemoryStatusEx reports."""
    import ctypes

    names = ("total", "available", "page_total", "page", "virtual_total", "virtual", "extended")

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32), *((n, ctypes.c_uint64) for n in names)]

    status = Status(length=ctypes.sizeof(Status))
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
