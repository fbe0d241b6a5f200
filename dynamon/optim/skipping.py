"""Let an optimizer's step leave weights and state as they are."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Skipping:
    """Skips a step that has begun: between :meth:`begin`, in a step pre-hook, and :meth:`end`, in the post-hook.

    Fused optimizers of torch skip on the device where their attribute ``found_inf`` is 1, which a gradient scaler uses
    too; nothing waits for it. From others the gradients are hidden during the step, as the host decides: it waits for
    one number. The same holds for the first step of a fused optimizer with momentum, whose buffers ``found_inf`` would
    leave without a value. The step is called in any case, so that schedulers and counters of steps go on.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Begin outside of a step."""
        self._optimizer: Any = optimizer
        self._lent: Tensor | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def begin(self, skipped: Tensor) -> None:
        """Skip the step if a device tensor of one number is 1."""
        if self._skips_on_device():
            flag = skipped.to(torch.float32).reshape(())
            given = getattr(self._optimizer, "found_inf", None)
            self._lent = flag if given is None else torch.maximum(flag, given.to(flag).reshape(()))
            self._optimizer.found_inf = self._lent
        elif bool(skipped):
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._hidden.append((parameter, parameter.grad))
                        parameter.grad = None

    def end(self) -> None:
        """Put back what :meth:`begin` has changed."""
        if self._lent is not None and getattr(self._optimizer, "found_inf", None) is self._lent:
            if getattr(self._optimizer, "grad_scale", None) is None:
                del self._optimizer.found_inf  # a gradient scaler deletes it itself
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        self._lent, self._hidden = None, []

    def _skips_on_device(self) -> bool:
        if not getattr(self._optimizer, "_step_supports_amp_scaling", False):
            return False
        state = self._optimizer.state
        return not any(
            group.get("momentum") and not any(state.get(parameter) for parameter in group["params"])
            for group in self._optimizer.param_groups
        )
