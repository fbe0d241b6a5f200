import logging
import os
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # tests that need it say so themselves
    pass
else:
    settings.register_profile("dynamon", deadline=None)  # how long an example takes says how busy the machine is
    settings.load_profile("dynamon")

try:
    from tqdm import tqdm
except ImportError:  # Lightning brings it
    pass
else:
    tqdm.monitor_interval = 0  # no thread that holds tqdm's lock now and then, a fork might inherit it


def listed(name: str) -> tuple[str, ...]:
    """Read what a list beside this file names: beginnings of the names of tests."""
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return tuple(line for line in lines if line and line[0] != "#")


LISTED = {"slow": listed("slow.txt"), "long": listed("long.txt")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that are listed, before those that are not wanted are left out."""
    for item in items:
        for mark, beginnings in LISTED.items():
            if item.nodeid.startswith(beginnings):
                item.add_marker(mark)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors of these tests are tiny: on a busy machine several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def loggers_are_put_back():
    """Benchmarks and examples, which some tests run in this process, quiet the loggers that others read."""
    own = [
        logging.getLogger(name) for name in ("dynamon", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    ]
    before = [logger.level for logger in own]
    yield
    for logger, level in zip(own, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def no_fork_is_left_behind():
    """A process that a test has forked, and that goes on, would hold files and take time of all tests after it."""
    yield
    assert not forks(), "left behind"


def forks() -> list[tuple[int, str]]:
    """Processes that this one has forked and that still run, with their command line; none where /proc is missing."""
    own, found = (Path("/proc/self/cmdline").read_bytes() if Path("/proc").is_dir() else b""), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(state[1]) == os.getpid() and command == own and state[0] != "Z":
            found.append((int(folder.name), command.replace(b"\0", b" ").decode()))
    return found
