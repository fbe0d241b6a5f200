"""Walks over autograd graphs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def nodes_behind(tensors: Sequence[Tensor], beyond: Sequence[Tensor] = ()) -> Iterator[torch.autograd.graph.Node]:
    """Yield every node of the graph behind some tensors once, without those behind ``beyond``."""
    seen, waiting = {t.grad_fn for t in beyond}, [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def dtypes_behind(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """Return the dtypes of everything computed on the way to some tensors, their own included."""
    found = {t.dtype for t in tensors}
    for node in nodes_behind(tensors):
        found |= {entry.dtype for entry in getattr(node, "_input_metadata", ())}
    return found


def rounding_behind(tensors: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the coarsest dtype behind some tensors; 0 for float32 and finer."""
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes_behind(tensors) if dtype.is_floating_point)
    return coarsest if coarsest > torch.finfo(torch.float32).eps else 0.0
