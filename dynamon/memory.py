"""How much memory an eigenvalue solve takes, and how much there is."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.curvature.lanczos import basis_vectors
from dynamon.pairs import real_dtype, real_size


def basis_memory(params: Sequence[Tensor], k: int = 1, certify: bool = False) -> int:
    """Bytes that the vectors of :func:`dynamon.curvature.top_eigenvalues` take, without the loss's own graph.

    Args:
        params: The parameters of the operator.
        k: Eigenvalues.
        certify: Whether the run is certified, in which case it keeps at least 21 vectors.
    """
    size = sum(real_size(p) for p in params)
    width = max(real_dtype(p).itemsize for p in params)
    vectors = basis_vectors(k, certify) + k + 3  # at a restart, and at the end, some are held twice
    return vectors * size * max(width, torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; all of the host's where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
