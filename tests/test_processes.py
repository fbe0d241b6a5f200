"""The processes of the tests: a failure comes with its traceback, a hang with its stacks, and none is left behind."""

import gc
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conftest import forks
from tests.processes import ProcessFailedError, in_processes, rank

pytestmark = pytest.mark.processes


def test_processes_reach_each_other_and_hand_back_what_they_found() -> None:
    patched = {"here": 3}  # a fork has what this process has

    def work(own: int) -> dict:
        total = torch.tensor(float(own + 1))
        dist.all_reduce(total)
        return {"total": total, "rank": rank(), "patched": patched["here"]}

    found = in_processes(work, 3, group=True)
    assert [one["rank"] for one in found] == [0, 1, 2] and rank() == 0
    assert all(one["total"] == 6 and one["patched"] == 3 for one in found)


def fails(own: int) -> None:
    if own == 1:
        raise ValueError("no such sample")
    dist.barrier()


def dies(own: int) -> None:
    if own == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("work", "said"), [
    (fails, r"process 1: Traceback(.|\n)*in fails(.|\n)*ValueError: no such sample"),
    (dies, r"process 1: ended with status -9"),
])  # fmt: skip
def test_a_failure_ends_those_that_wait_for_it(work, said: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ProcessFailedError, match=said):
        in_processes(work, 2, group=True)
    assert time.monotonic() - begin < 60 and not forks()


def waits_for_nobody(own: int) -> None:
    if own == 0:
        dist.barrier()
    threading.Event().wait()


def test_a_hang_ends_with_the_stacks_of_all_processes() -> None:
    with pytest.raises(ProcessFailedError) as caught:
        in_processes(waits_for_nobody, 2, group=True, patience=5)
    said = str(caught.value)
    assert "process 0 hangs:" in said and "process 1 hangs:" in said
    assert said.count("in waits_for_nobody") == 2 and "in barrier" in said and "threads of the process" in said
    assert not forks()


class Held(nn.Module):
    """A module with a buffer, which DDP broadcasts in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def leaves_the_group_to_ddp(own: int) -> None:
    """What deadlocks in torch, where the thread of gloo is late to let go of a broadcast tensor (pytorch 56297)."""
    model = nn.parallel.DistributedDataParallel(Held())
    model(torch.ones(1, 2)).sum().backward()


def test_the_end_of_a_process_waits_for_no_thread_of_gloo() -> None:
    for _ in range(10):
        in_processes(leaves_the_group_to_ddp, 2, group=True)


def test_a_fork_that_goes_on_is_seen() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    assert [pid for pid, _ in forks()] == [process.pid]
    process.kill()
    process.join()
    gc.collect()
    assert not forks()
