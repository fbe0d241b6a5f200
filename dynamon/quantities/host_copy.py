"""Numbers of a device on their way to the host."""

import torch
from torch import Tensor


class HostCopy:
    """Queues a copy of a device tensor into pinned memory; by the next step it has arrived.

    Args:
        rows: The tensor. On a CPU, and on devices without CUDA's events, it is read when it is asked for.

    Cost: one copy on the device's stream, no wait.

    Example:
        >>> import torch
        >>> from dynamon.quantities.host_copy import HostCopy
        >>> HostCopy(torch.tensor([1.0, 2.0])).wait()
        tensor([1., 2.])
    """

    def __init__(self, rows: Tensor) -> None:
        """Queue the copy."""
        self._event: torch.cuda.Event | None = None
        self._host = rows
        if rows.is_cuda:
            self._host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            self._host.copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(rows.device))  # not that of the current device

    def wait(self) -> Tensor:
        """Return the numbers, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()
