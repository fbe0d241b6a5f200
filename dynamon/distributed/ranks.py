"""Collectives of processes that measure together, in which one that fails leaves no other waiting."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynamon.kernels import widest_dtype

# CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED and their like, beside torch's words.
_NO_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC(ATION)?_FAILED", re.IGNORECASE)
_MESSAGE_BYTES = 200  # of a failed process's message that the others receive
_FLAGS = 2  # failed, out of memory
_BUFFER = 8  # the flags and some attached values


class OthersFailedError(RuntimeError):
    """Raised where a measurement ends because it failed on another process.

    Attributes:
        out_of_memory: Whether one of the others ran out of memory.
    """

    out_of_memory = False


class Ranks:
    """Processes that take the same measurements in the same order. A process alone reduces nothing.

    A process that fails must not leave the others waiting in a collective. So every message that can end a measurement
    begins with two flags, which are summed over the processes: failed, and out of memory.

    - Inside :meth:`collective_section` the flags are reduced and read before each collective (:meth:`check`). A process
      that raises sends its flags in place of its next check; every process then leaves the section with an exception.
    - :meth:`sum_or_nan` reduces the flags along with the numbers, whose count all processes know. Nothing is read on
      the host: where a process failed, the others receive NaN.

    Args:
        device: Where reductions take place: that of the parameters.
        group: The processes; all if None.
        alone: Whether this is one process, without ``torch.distributed``.

    Attributes:
        device: Where reductions take place.
        size: Number of processes.
        rank: Which of them this is.
        group: The processes; all if None.

    Cost: a check is a reduction of two numbers and a host read.
    """

    def __init__(self, device: torch.device, group: "dist.ProcessGroup | None" = None, alone: bool = False) -> None:
        """Look up the size of the group and allocate the buffers."""
        self.device, self.group = device, group
        self._attached: Callable[[], list[float]] | None = None
        self._sums: list[float] | None = None  # of the values attached last
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        if self.size > 1:  # reporting a failure must not take memory
            self._buffer = torch.zeros(_BUFFER, dtype=widest_dtype(device), device=device)
            self._messages = torch.zeros(self.size, _MESSAGE_BYTES, dtype=torch.int32, device=device)

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; inside of :meth:`collective_section`."""
        if self.is_distributed:
            self.check()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the processes, elementwise and in place; inside of :meth:`collective_section`."""
        if self.is_distributed:
            self.check()
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_or_nan(self, measure: Callable[[], Tensor], count: int) -> Tensor:
        """Sum what each process measures, without a check or a host read; inside of a section or outside.

        Every process must call this at the same time.

        Args:
            measure: Returns ``count`` numbers.
            count: How many, the same on every process.

        Returns:
            ``[count]``, the same on every process, in the widest dtype of the device; NaN where another process failed.
            On a process alone what ``measure`` returns, flattened.

        Raises:
            Exception: What ``measure`` raised, on this process only.
        """
        if not self.is_distributed:
            return measure().reshape(-1)
        packed, error = self._zeros(_FLAGS + count), None
        try:
            packed[_FLAGS:] = measure().reshape(-1)
        except Exception as caught:  # the others are waiting in the reduction
            error = caught
        self._all_reduce(packed, error)
        if error is not None:
            raise error
        return torch.where(packed[0] > 0, torch.nan, packed[_FLAGS:])

    def mean(self, value: Tensor, weight: float) -> Tensor:
        """Take the weighted mean of a 0-d tensor over the processes, in its dtype, without graph."""
        if not self.is_distributed:
            return value
        pair = torch.tensor([float(value) * weight, weight], dtype=widest_dtype(self.device), device=self.device)
        total, weights = self.sum(pair).tolist()
        return torch.tensor(total / weights, dtype=value.dtype, device=value.device)

    def broadcast_from_rank0(self, values: list[float]) -> list[float]:
        """Return the first process's values on every process. It must not fail: there is no check before it."""
        if not self.is_distributed:
            return values
        sent = torch.tensor(values, dtype=widest_dtype(self.device), device=self.device)
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.tolist()

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return the objects of all processes in their order; inside of :meth:`collective_section`."""
        if not self.is_distributed:
            return [item]
        self.check()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def attach_values(self, values: Callable[[], list[float]]) -> None:
        """Sum values over the processes with the flags of the next check, without a message of their own.

        Every process must call this at the same time, and then perhaps :meth:`attached_sums`.

        Args:
            values: Returns the values, as many on every process. It is called when they are needed and must not fail.
        """
        self._attached, self._sums = values, None

    def attached_sums(self) -> list[float]:
        """Return the sums of the values attached last; where there was no check since, by a reduction of their own."""
        if self._sums is None:
            assert self._attached is not None
            own, self._attached = self._attached(), None
            self._sums = own
            if self.is_distributed:
                packed = torch.tensor(own, dtype=widest_dtype(self.device), device=self.device)
                dist.all_reduce(packed, group=self.group)
                self._sums = packed.tolist()
        return self._sums

    def detach_values(self) -> None:
        """Send no attached values any more."""
        self._attached = self._sums = None

    def check(self) -> None:
        """Return only if no process has failed.

        Raises:
            OthersFailedError: Where another one has.
        """
        if self.is_distributed:
            self._raise_if_failed(*self._count_failures(None))

    @contextmanager
    def collective_section(self) -> Iterator[None]:
        """Measure on all processes together: it succeeds on all of them, or on none.

        Raises:
            OthersFailedError: Where it failed on another process; where it failed here, its own exception.
        """
        try:
            yield
        except Exception as error:  # whatever failed here, the other processes must hear of it
            if self.is_distributed and not self.is_collective_failure(error):
                self._report(error)
            raise
        self.check()

    def is_collective_failure(self, error: Exception) -> bool:
        """Whether an exception ended a section on every process."""
        return not self.is_distributed or getattr(error, "_dynamon_is_collective", False)

    def _report(self, error: Exception) -> None:
        error._dynamon_is_collective = True  # type: ignore[attr-defined]
        # All draw the same conclusion, also one that failed for another reason at the same time.
        error._dynamon_out_of_memory = self._count_failures(error)[1] > 0  # type: ignore[attr-defined]
        self._exchange((str(error).strip() or type(error).__name__).splitlines()[0])

    def _count_failures(self, error: Exception | None) -> tuple[int, int]:
        """Count the processes that have failed, and those that ran out of memory."""
        values, self._attached = self._attached, None
        own = [] if values is None else values()
        packed = self._zeros(_FLAGS + len(own))
        if own:
            packed[_FLAGS:].copy_(torch.tensor(own, dtype=packed.dtype, device="cpu"))
        failed, memory, *sums = self._all_reduce(packed, error).tolist()
        self._sums = self._sums if values is None else sums
        return int(failed), int(memory)

    def _zeros(self, count: int) -> Tensor:
        """Zero the first ``count`` numbers of the buffer."""
        if count > len(self._buffer):
            with torch.inference_mode(False):
                self._buffer = self._buffer.new_zeros(count)
        return self._buffer[:count].zero_()

    def _all_reduce(self, packed: Tensor, error: Exception | None) -> Tensor:
        """Set the flags and sum them, with the numbers behind them, over the processes."""
        if error is not None:
            packed[0], packed[1] = 1.0, float(ran_out_of_memory(error))
        dist.all_reduce(packed, group=self.group)
        return packed

    def _raise_if_failed(self, failed: int, memory: int) -> None:
        if not failed:
            return
        rank, cause = next((rank, text) for rank, text in enumerate(self._exchange("")) if text)
        error = OthersFailedError(f"on {failed} of {self.size} processes, first on rank {rank}: {cause}")
        error.out_of_memory = memory > 0
        error._dynamon_is_collective = True  # type: ignore[attr-defined]
        raise error

    def _exchange(self, text: str) -> list[str]:
        """Return the messages of all processes; only after a count that told all of them of a failure."""
        messages, own = self._messages.zero_(), list(text.encode()[:_MESSAGE_BYTES])
        messages[self.rank, : len(own)].copy_(torch.tensor(own, dtype=torch.int32, device="cpu"))
        dist.all_reduce(messages, group=self.group)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in messages.tolist()]


def has_several_processes() -> bool:
    """Return whether ``torch.distributed`` runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ran_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, here or on another process."""
    if isinstance(error, OthersFailedError):
        return error.out_of_memory
    if hasattr(error, "_dynamon_out_of_memory"):
        return bool(error._dynamon_out_of_memory)
    # The allocators of some devices, and of the CPU, raise a plain RuntimeError.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
