"""How much memory an eigenvalue solve takes, and how much there is."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.curvature.lanczos import basis_vectors


def basis_memory(params: Sequence[Tensor], k: int = 1, certify: bool = False) -> int:
    """Bytes that the vectors of :func:`dynamon.curvature.top_eigenvalues` take, without the loss's own graph.

    Args:
        params: The parameters of the operator.
        k: Eigenvalues.
        certify: Whether the run is certified, in which case it keeps at least 21 vectors.
    """
    size = sum(p.numel() for p in params)
    width = max(p.element_size() for p in params)
    return basis_vectors(k, certify) * size * max(width, torch.float32.itemsize)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; all of the host's where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
