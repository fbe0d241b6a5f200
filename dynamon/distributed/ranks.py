"""Processes that measure together, and never wait for one that cannot."""

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
_LETTERS = 200  # bytes of a failed process's message that the others get to see
_NUMBERS = 8  # two counts of failures, and what is taken along with them


class OthersFailedError(RuntimeError):
    """A measurement ended here because it failed on another process.

    Attributes:
        out_of_memory: Whether one of the others ran out of memory.
    """

    out_of_memory = False


class Ranks:
    """Several processes that take the same measurements in the same order; one alone works too and reduces nothing.

    A process that fails must not leave the others waiting in a reduction. So every reduction of a measurement begins
    with a check in which each process says whether it is well, and one that fails inside of :meth:`collective_section`
    says so in the place of its next check: the measurement is then over on all processes, with an exception on each.

    Args:
        device: Where reductions take place: that of the parameters.
        group: The processes; all if None.
        alone: Whether this is one process, without ``torch.distributed``.

    Attributes:
        size: Number of processes.
        rank: Which of them this is.
        group: The processes; all if None.

    Cost: a check is a reduction of two numbers and a host read.
    """

    def __init__(self, device: torch.device, group: Any = None, alone: bool = False) -> None:
        """Remember who takes part."""
        self._device, self.group = device, group
        self._said_along: Callable[[], list[float]] | None = None
        self._brought: list[float] | None = None
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        if self.size > 1:  # what tells of a failure must not fail for want of memory itself
            self._numbers = torch.zeros(_NUMBERS, dtype=widest_dtype(device), device=device)
            self._letters = torch.zeros(self.size, _LETTERS, dtype=torch.int32, device=device)

    @property
    def is_distributed(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; inside of :meth:`collective_section`."""
        if self.is_distributed:
            self.check()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, entry by entry, in place; inside of :meth:`collective_section`."""
        if self.is_distributed:
            self.check()
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_or_nan(self, measure: Callable[[], Tensor], count: int) -> Tensor:
        """Sum what each process measures, in one reduction without a check or a host read, anywhere.

        Every process must call this at the same time.

        Args:
            measure: Gives ``count`` numbers.
            count: How many, the same on every process.

        Returns:
            ``[count]`` in float64, the same on every process; NaN where another one failed.

        Raises:
            Exception: What ``measure`` raised, on this process only.
        """
        packed = torch.zeros(count + 1, dtype=widest_dtype(self._device), device=self._device)
        error: Exception | None = None
        try:
            packed[:-1] = measure().reshape(-1)
        except Exception as caught:  # the others are waiting in the reduction
            error = caught
            packed[-1] = 1.0
        if self.is_distributed:
            dist.all_reduce(packed, group=self.group)
        if error is not None:
            raise error
        return torch.where(packed[-1] > 0, torch.nan, packed[:-1])

    def mean(self, value: Tensor, weight: float) -> Tensor:
        """The weighted mean of a 0-d tensor over the processes, in its dtype, without graph."""
        if not self.is_distributed:
            return value
        pair = torch.tensor([float(value) * weight, weight], dtype=widest_dtype(self._device), device=self._device)
        total, weights = self.sum(pair).tolist()
        return torch.tensor(total / weights, dtype=value.dtype, device=value.device)

    def broadcast_from_rank0(self, values: list[float]) -> list[float]:
        """What the first process gives, on all of them. It must not fail: there is no check before it."""
        if not self.is_distributed:
            return values
        said = torch.tensor(values, dtype=widest_dtype(self._device), device=self._device)
        dist.broadcast(said, group=self.group, group_src=0)
        return said.tolist()

    def all_gather_object(self, item: Any) -> list[Any]:
        """An object of every process, in their order, on all of them; inside of :meth:`collective_section`."""
        if not self.is_distributed:
            return [item]
        self.check()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def attach_values(self, say: Callable[[], list[float]]) -> None:
        """Have numbers summed over the processes by the next check, at no message of their own.

        Every process must call this at the same time, and then perhaps :meth:`attached_sums`.

        Args:
            say: Gives the numbers, as many on every process. It is called when they are needed and must not fail.
        """
        self._said_along, self._brought = say, None

    def attached_sums(self) -> list[float]:
        """The sums of what was taken along last; where there was no check since, by a reduction for them alone."""
        if self._brought is None:
            assert self._said_along is not None
            own, self._said_along = self._said_along(), None
            self._brought = own
            if self.is_distributed:
                packed = torch.tensor(own, dtype=widest_dtype(self._device), device=self._device)
                dist.all_reduce(packed, group=self.group)
                self._brought = packed.tolist()
        return self._brought

    def detach_values(self) -> None:
        """Take nothing along any more."""
        self._said_along = self._brought = None

    def check(self) -> None:
        """Go on only if all processes are well.

        Raises:
            OthersFailedError: Where another one is not.
        """
        if self.is_distributed:
            self._raise_if_failed(self._count(None))

    @contextmanager
    def collective_section(self) -> Iterator[None]:
        """What all processes measure together: it succeeds on all of them, or on none.

        Raises:
            OthersFailedError: Where it failed on another process; where it failed here, its own exception.
        """
        try:
            yield
        except Exception as error:  # whatever failed here, the other processes must hear of it
            if self.is_distributed and not self.is_collective_failure(error):
                self._tell(error)
            raise
        self.check()

    def is_collective_failure(self, error: Exception) -> bool:
        """Whether an exception ended a measurement on every process, here and there."""
        return not self.is_distributed or getattr(error, "_dynamon_is_collective", False)

    def _tell(self, error: Exception) -> None:
        error._dynamon_is_collective = True  # type: ignore[attr-defined]
        # All draw the same conclusion, also one that failed of something else at the same time.
        error._dynamon_out_of_memory = self._count(error)[1] > 0  # type: ignore[attr-defined]
        self._exchange(f"{(str(error).strip() or type(error).__name__).splitlines()[0]}")

    def _count(self, error: Exception | None) -> tuple[int, int]:
        """How many processes have failed, and how many of them for want of memory."""
        counts = [float(error is not None), float(error is not None and ran_out_of_memory(error))]
        say, self._said_along = self._said_along, None
        own = [] if say is None else say()
        packed = self._packed([*counts, *own])
        dist.all_reduce(packed, group=self.group)
        failed, memory, *brought = packed.tolist()
        self._brought = self._brought if say is None else brought
        return int(failed), int(memory)

    def _packed(self, values: list[float]) -> Tensor:
        """A few numbers where they are reduced, in memory that is there already."""
        if len(values) > len(self._numbers):
            self._numbers = self._numbers.new_zeros(len(values))
        packed = self._numbers[: len(values)]
        packed.copy_(torch.tensor(values, dtype=packed.dtype, device="cpu"))
        return packed

    def _raise_if_failed(self, counts: tuple[int, int]) -> None:
        failed, memory = counts
        if not failed:
            return
        rank, cause = next((rank, text) for rank, text in enumerate(self._exchange("")) if text)
        error = OthersFailedError(f"on {failed} of {self.size} processes, first on rank {rank}: {cause}")
        error.out_of_memory = memory > 0
        error._dynamon_is_collective = True  # type: ignore[attr-defined]
        raise error

    def _exchange(self, text: str) -> list[str]:
        """The messages of all processes; only after a count that told all of them of a failure."""
        letters, own = self._letters.zero_(), list(text.encode()[:_LETTERS])
        letters[self.rank, : len(own)].copy_(torch.tensor(own, dtype=torch.int32, device="cpu"))
        dist.all_reduce(letters, group=self.group)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in letters.tolist()]


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
