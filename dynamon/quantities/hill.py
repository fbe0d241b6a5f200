"""Hill's estimate of how heavy the tail of each weight's spectrum is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamon.distributed.dtensor import holders_section, to_local
from dynamon.distributed.work_sharing import share_work
from dynamon.kernels import in_double
from dynamon.layers import Layer


def hill_exponent(matrix: Tensor) -> Tensor:
    """Compute Hill's estimate of the tail exponent of a matrix's squared singular values, over their upper half.

    Args:
        matrix: ``[m, n]``.

    Returns:
        0-d, float64; infinite where the upper half is constant.

    Cost: the singular values, in float64; waits for the device.

    Example:
        >>> import torch
        >>> from dynamon.quantities.hill import hill_exponent
        >>> ranks = torch.arange(1, 401, dtype=torch.float64)
        >>> round(float(hill_exponent(torch.diag(ranks**-0.5))), 1)  # density l^-2
        2.0
    """
    logs = torch.linalg.svdvals(in_double(matrix)).square().log().sort().values
    upper = logs[len(logs) // 2 :]
    return 1 + len(upper) / (upper - upper[0]).sum()


def hill_exponents(layers: Sequence[Layer]) -> list[float]:
    """Compute the exponents of weights of two or more dimensions, each taken as one matrix of its rows.

    Args:
        layers: The layers, on one device. Sharded weights are gathered, each on the process that takes it, and all
            processes that hold them must call this.

    Returns:
        One number a layer.

    Cost: as :func:`hill_exponent` for each.
    """
    if not layers:
        return []
    likes = [layer.parameter.detach() for layer in layers]

    def measure(chosen: list[int], wholes: list[Sequence[Tensor]]) -> Tensor:
        return torch.stack([hill_exponent(tensors[0].flatten(1)) for tensors in wholes])[None]

    costs = [like.numel() * min(like.shape[0], like.shape[1:].numel()) for like in likes]
    with holders_section(likes, None) as group:
        table = group.sum(share_work(measure, [[to_local(like)] for like in likes], likes, costs, 1, group))
    found: list[float] = table[0].tolist()
    return found
