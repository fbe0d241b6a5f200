"""How much memory an eigenvalue solve takes, and how much there is."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dynamon.curvature.solvers.lanczos import basis_vectors
from dynamon.layers.complex_pairs import real_dtype, real_numel


def basis_memory(params: Sequence[Tensor], k: int = 1, certify: bool = False) -> int:
    """Bytes that the vectors of :func:`dynamon.curvature.top_eigenvalues` take, without the loss's own graph.

    Args:
        params: The parameters of the operator.
        k: Eigenvalues.
        certify: Whether the run is certified, in which case it keeps at least 21 vectors.
    """
    size = sum(real_numel(p) for p in params)
    width = max(real_dtype(p).itemsize for p in params)
    vectors = basis_vectors(k, certify) + k + 3  # at a restart, and at the end, some are held twice
    return vectors * size * max(width, torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device.

    On the host that is the least of what the system has free and what the limits of the control groups that this
    process is in (a container's, a batch system's) leave. Where nothing says, it is 8 GiB. An Apple GPU shares the
    memory of the host and takes as much of it as its driver recommends. What the allocator of a device holds and nobody
    uses is free.
    """
    if device.type == "mps":
        return max(int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()), 0)
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0]) + _held(module, device)
    found = [left for left in (_of_system(), *_of_control_groups()) if left is not None]
    return min(found, default=_UNKNOWN)


def _held(module: Any, device: torch.device) -> int:
    """Bytes that the allocator of a kind of device holds and nobody uses, where it says so."""
    if not hasattr(module, "memory_reserved") or not hasattr(module, "memory_allocated"):
        return 0
    return max(int(module.memory_reserved(device) - module.memory_allocated(device)), 0)


def empty_cache(device: torch.device) -> None:
    """Give back what the allocator of a device holds and nobody uses, if it does such a thing."""
    getattr(getattr(torch, device.type, None), "empty_cache", lambda: None)()


_UNKNOWN = 2**33
_MEMORY, _ENTRIES, _CONTROL_GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of control groups in version 2, then 1: their tree, files of the limit and of what is used, cache in the latter.
_VERSIONS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _of_system() -> int | None:
    """What the machine has free, or all that it has where that is all it says; None where it says nothing."""
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
    """What each limit of a control group above this process leaves."""
    for tree, limit_file, usage_file, cache in _VERSIONS:
        for folder in _folders(tree):
            limit, used = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and used is not None and limit < 2**60:  # version 1 writes no limit as a huge one
                cached = _table(folder / "memory.stat").get(cache, 0)  # given back when it is needed
                yield max(limit - max(used - cached, 0), 0)


def _folders(tree: str) -> list[Path]:
    """The control groups that this process is in, from its own up to the root, as they may be seen from here."""
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
    """Lines of a name and a number."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _of_windows() -> int | None:
    """What GlobalMemoryStatusEx calls available."""
    import ctypes

    names = ("total", "available", "page_total", "page", "virtual_total", "virtual", "extended")

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32), *((n, ctypes.c_uint64) for n in names)]

    status = Status(length=ctypes.sizeof(Status))
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
