"""Find a network's outputs inside a loss that was written for training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVEX_LOSSES: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.mse_loss: "mse_loss",
}


class OutputsOfLoss(TorchFunctionMode):
    """Record the first argument of every call to a loss that is convex in it.

    Cross-entropy, binary cross-entropy with logits and squared error are known, as functions and as modules. Use it as
    a context around the evaluation of a training loss, then call :meth:`of`.

    Examples:
        >>> import torch
        >>> from dynamon.curvature import OutputsOfLoss
        >>> model = torch.nn.Linear(2, 3)
        >>> with OutputsOfLoss() as recorded:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.zeros(4, dtype=torch.long))
        >>> outputs, names = recorded.of(loss)
        >>> outputs[0].shape, names
        (torch.Size([4, 3]), 'cross_entropy')
    """

    def __init__(self) -> None:
        """Start without calls."""
        super().__init__()
        self._calls: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the call and carry it out."""
        kwargs = kwargs or {}
        if func in CONVEX_LOSSES:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and given.requires_grad:
                self._calls.append((CONVEX_LOSSES[func], given))
        return func(*args, **kwargs)

    def of(self, loss: Tensor) -> tuple[list[Tensor], str]:
        """Return the recorded outputs that ``loss`` depends on, and the names of the losses they went into.

        Outputs that other outputs depend on are not returned.

        Raises:
            ValueError: If no recorded output enters the loss.
        """
        calls = list({id(z): (name, z) for name, z in self._calls}.values())
        slopes = [torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)[0] for _, z in calls]
        used = [call for call, slope in zip(calls, slopes, strict=True) if slope is not None]
        if not used:
            raise ValueError(
                "the outputs were not found: the loss has no call of "
                + ", ".join(CONVEX_LOSSES.values())
                + ". Pass outputs=lambda module, batch: ... which returns (outputs, loss)."
            )
        above = _depended_on([z for _, z in used])
        used = [call for call in used if id(call[1]) not in above]
        return [z for _, z in used], " and ".join(dict.fromkeys(name for name, _ in used))


def _depended_on(outputs: list[Tensor]) -> set[int]:
    """Return the identities of those tensors from which another of them was computed."""
    found: set[int] = set()
    for z in outputs:
        others = [other for other in outputs if other is not z]
        if others:
            slopes = torch.autograd.grad(z.sum(), others, retain_graph=True, allow_unused=True)
            found |= {id(other) for other, slope in zip(others, slopes, strict=True) if slope is not None}
    return found
