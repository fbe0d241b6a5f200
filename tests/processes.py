"""Work in several processes, and fits under DDP and FSDP2 in them. Nothing else in the tests starts such processes."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from dynamon.monitoring import messages
from tests.helpers import Classifier, fit

_PATIENCE = 60.0  # seconds without progress, after which processes are taken to hang
_BUSY = 1 / 60  # of a processor: what works takes more, on the busiest machine too; threads that only wait take less
_DEADLINE = 540.0  # seconds for all of it; pytest ends a test after 600
_LOOK = 1.0  # seconds between two looks at them
_SIGNAL_TIME = 2.0  # seconds in which a process writes its stacks


class ProcessFailedError(RuntimeError):
    """Raised where a process raised, died or hung, with its traceback or its stacks."""


def in_forks(work: Callable[[int], Any], count: int, patience: float = _PATIENCE) -> list[Any]:
    """Return what ``work(rank)`` returns on each of some forked processes.

    - They are forks: patches of a test hold in them, ``work`` may be any closure, and nothing is imported anew.
    - They end where ``work`` has returned, without a teardown. :class:`torch.nn.parallel.DistributedDataParallel` may
      be the last to hold a process group. Where it goes away, torch joins gloo's threads and holds the interpreter's
      lock meanwhile, which such a thread may be waiting for to let go of a tensor (pytorch issue 56297).
    - Where they take no processor time any more, they end here with the stacks of all.

    Args:
        work: Returns what ``torch.load`` takes with ``weights_only=True``.
        count: How many.
        patience: Seconds without progress, after which they are taken to hang.

    Raises:
        ProcessFailedError: With the traceback of the first process that failed, or the stacks of those that hang.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = [fork.Process(target=_begin, args=(rank, work, folder)) for rank in range(count)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on forking where there are threads
                for process in started:
                    process.start()
            _join(started, folder, patience)
        finally:
            for process in started:
                _kill(process)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def in_processes(
    work: Callable[[int], Any], processes: int = 2, group: bool = False, patience: float = _PATIENCE
) -> list[Any]:
    """Return what ``work(rank)`` returns on each of some forks that reach each other, see :func:`in_forks`.

    They meet in a file and not at a port, which somebody else may take between the choice and the use.

    Args:
        work: As for :func:`in_forks`.
        processes: How many.
        group: Whether to make the default process group before; a Trainer makes its own.
        patience: As for :func:`in_forks`.
    """
    with tempfile.TemporaryDirectory() as folder:

        def meet(rank: int) -> Any:
            # LOCAL_RANK tells Lightning that somebody else has made the processes.
            place = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": processes, "NODE_RANK": 0, _SIZE: processes}
            os.environ.update({key: str(value) for key, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # not used
            dist.init_process_group = _meeting_in(Path(folder), dist.init_process_group)
            if group:
                dist.init_process_group("gloo", rank=rank, world_size=processes)
            return work(rank)

        return in_forks(meet, processes, patience)


def _join(started: Sequence[Any], folder: Path, patience: float) -> None:
    """Wait for all; raise as soon as one has failed, or where there is no progress."""
    running = list(enumerate(started))
    begin = since = time.monotonic()
    known = 0.0
    while running:
        ready = wait([process.sentinel for _, process in running], timeout=_LOOK)
        now, taken = time.monotonic(), _processor_seconds([process.pid for process in started])
        if ready or taken is None or abs(taken - known) > _BUSY * patience:
            since, known = now, taken or 0.0
        if now - since > patience or now - begin > _DEADLINE:
            raise ProcessFailedError(_stacks(running, folder))
        for rank, process in running:
            if process.sentinel in ready:
                process.join()
                if process.exitcode:
                    said = folder / f"{rank}.error"
                    how = said.read_text() if said.exists() else f"ended with status {process.exitcode}"
                    raise ProcessFailedError(f"process {rank}: {how}")
        running = [(rank, process) for rank, process in running if process.sentinel not in ready]


def _processor_seconds(groups: Sequence[int]) -> float | None:
    """Return the time that processes have taken, with all that they have started; None where the system keeps none."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) in groups else 0
    return ticks / os.sysconf("SC_CLK_TCK") if Path("/proc/self/stat").exists() else None


def _stacks(running: Sequence[tuple[int, Any]], folder: Path) -> str:
    for _, process in running:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(_SIGNAL_TIME)
    found = [f"process {rank} hangs:\n{(folder / f'{rank}.stacks').read_text()}" for rank, _ in running]
    return "\n".join([*found, f"threads of the process that was forked: {threading.enumerate()}"])


def _kill(process: Any) -> None:
    """End a process with all that it has started, if it was started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError):  # it has ended, or has not come as far as to lead a group of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _begin(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    os.setpgid(0, 0)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    gc.freeze()  # nothing of the parent's is torn down here
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    status = 1
    try:
        torch.set_num_threads(1)  # the parent's threads did not come through the fork
        torch.save(work(rank), folder / f"{rank}.pt")
        status = 0
    except BaseException:  # also what pytest raises to skip or to fail
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _meeting_in(folder: Path, init: Callable[..., Any]) -> Callable[..., Any]:
    """Have process groups made by way of a file, which each of them has for itself."""
    made = 0

    def meet(backend: str | None = None, *_: Any, rank: int, world_size: int, **named: Any) -> None:
        nonlocal made
        made += 1
        store = dist.FileStore(str(folder / f"store-{made}"), world_size)
        init(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=_DEADLINE))

    return meet


_SIZE = "DYNAMON_TEST_PROCESSES"


def rank() -> int:
    """Which process this is."""
    return int(os.environ["RANK"]) if _SIZE in os.environ else 0


class Sharded(Classifier):
    """Deals out its network under FSDP2, by ``shard(network, mesh)``; one process alone keeps it whole."""

    def __init__(self, network: nn.Module, *arguments: Any, shard: Callable[[nn.Module, Any], None] | None = None):
        super().__init__(network, *arguments)
        self.shard = shard or by_parts

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not hasattr(self.network, "unshard"):
            self.shard(self.network, mesh)


def by_parts(network: nn.Module, mesh: Any, names: Sequence[str] = (), **policies: Any) -> None:
    """Deal out the submodules that are named, else every second layer, each by itself, and then the rest."""
    for name in names or [name for name, _ in network.named_children()][::2]:
        part = network.get_submodule(name)
        if next(part.parameters(), None) is not None:
            fully_shard(part, mesh=mesh["data_parallel"], **policies)
    fully_shard(network, mesh=mesh["data_parallel"], **policies)


def fit_in_processes(
    make: Callable[[], Any], callbacks: list[Any], processes: int = 2, more: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """Return what each of some processes ends with, see :func:`fit_here`; one process alone is not forked."""
    if processes == 1:
        return [fit_here(make(), callbacks, more, **settings)]
    return in_processes(lambda _: fit_here(make(), callbacks, more, **settings), processes)


def fit_here(
    module: Any, callbacks: list[Any], more: Callable[[Any], Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Fit in this process, and return what it ends with and what dynamon told the user.

    Each of the processes must call it. One alone has no strategy; several take FSDP2 for a :class:`Sharded` module,
    else DDP.

    Args:
        module: The module.
        callbacks: Those that are looked at.
        more: Called with the module when training ends, for more.
        settings: For :func:`tests.helpers.fit`; ``others`` are further callbacks, ``options`` those of the strategy,
            and ``mesh`` the numbers of processes of its dimensions, data parallel first.
    """
    size = int(os.environ.get(_SIZE, "1"))
    given = {"steps": 6, "max_epochs": -1, "use_distributed_sampler": False, "devices": size, "data": loader()}
    given |= settings
    others, options, mesh = given.pop("others", []), given.pop("options", {}), given.pop("mesh", (size, 1))
    if size > 1:
        options = {"process_group_backend": "gloo", **options}
        sharded = isinstance(module, Sharded)
        given["strategy"] = ModelParallelStrategy(*mesh, **options) if sharded else DDPStrategy(**options)
    last = AtTheEnd(more)
    with warnings.catch_warnings(), listening() as (said, warned):
        warnings.simplefilter("ignore")
        fit(module, [*callbacks, *others, last], **given)
    return {
        "weights": {name: whole(p) for name, p in module.state_dict().items()},
        "tables": tables([c for c in callbacks if hasattr(c, "history")]),
        "failures": [c.failures for c in callbacks if hasattr(c, "failures")],
        "ratios": [c.ratios for c in callbacks if hasattr(c, "ratios")],
        "said": said,
        "warned": warned,
        "random": torch.get_rng_state(),
        "more": last.found,
    }


class AtTheEnd(Callback):
    """Asks the module for something when training ends."""

    def __init__(self, ask: Callable[[Any], Any] | None) -> None:
        self.ask, self.found = ask, None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.found = None if self.ask is None else self.ask(pl_module)


@contextmanager
def listening() -> Iterator[tuple[list[str], list[str]]]:
    """Collect what dynamon tells the user, and of that the warnings, in place of telling it."""
    said: list[str] = []
    warned: list[str] = []

    def keep(*lists: list[str]) -> Callable[..., None]:
        return lambda sentence, *_, **__: [each.append(sentence) for each in lists]

    logger, shown = SimpleNamespace(info=keep(said)), SimpleNamespace(warn=keep(said, warned))
    with patch.object(messages, "_LOGGER", logger), patch.object(messages, "warnings", shown):
        yield said, warned


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with the parts of all processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def tables(callbacks: list[Any]) -> dict[str, dict[str, Any]]:
    """Steps and values of everything in the histories of some callbacks."""
    found = {}
    for callback in callbacks:
        for tag, series in callback.history.items():
            found[tag] = {"steps": list(map(int, series.steps)), "values": torch.as_tensor(series.values).double()}
    return found


def values(found: dict[str, Any], tag: str) -> torch.Tensor:
    """The values of a tag in what a process ended with."""
    return found["tables"][tag]["values"]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs end with bitwise the same weights and buffers."""
    first, second = one["weights"], other["weights"]
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def small() -> nn.Module:
    """Two tanh layers in double precision; 15 and 3 do not divide by 2, so shards differ in size."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 3)).double()


def regression(count: int = 96, features: int = 8, classes: int = 3) -> Dataset[Any]:
    """Inputs and labels in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(classes, (count,), generator=generator))


class Parts(Sampler[list[int]]):
    """Batches of ``size`` samples in order, of which rank r of R takes every R-th, or what ``bounds`` says."""

    def __init__(self, count: int, size: int, bounds: Sequence[int] = ()) -> None:
        self.count, self.size, self.bounds = count, size, bounds

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for begin in range(0, self.count, self.size):
            whole = list(range(begin, min(begin + self.size, self.count)))
            if self.bounds and ranks > 1:
                edges = [0, *self.bounds, self.size]
                yield whole[edges[rank] : edges[rank + 1]]
            else:
                yield whole[rank::ranks]


def loader(size: int = 16, count: int = 96, bounds: Sequence[int] = ()) -> DataLoader[Any]:
    """The same samples in each step whatever the number of processes."""
    return DataLoader(regression(count), batch_sampler=Parts(count, size, bounds))


def _fails(message: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(message)

    return fail


class Breaks(Callback):
    """Makes a function fail on one process, between two steps."""

    def __init__(self, owner: Any, name: str, begin: int, end: int, on: int = 1) -> None:
        self.owner, self.name, self.begin, self.end, self.on = owner, name, begin, end, on

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() != self.on:
            return
        if trainer.global_step == self.begin:
            self.kept = getattr(self.owner, self.name)
            setattr(self.owner, self.name, _fails("broken"))
        if trainer.global_step == self.end:
            setattr(self.owner, self.name, self.kept)
