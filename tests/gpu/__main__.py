"""Everything that must be known of a GPU, in one command: run ``make gpu``, or ``python -m tests.gpu``.

One H100 or H200, torch with Triton, no network, at most eight minutes. Checks go by value, each in a process that may
hang, die or break the device without the others. Those that measure no time run side by side, the others alone
afterwards. Every figure and every check is a line of JSON at once, a table stands at the end, and the exit status is 1
if a check has failed. Without a GPU everything runs at tiny sizes: what needs one is skipped with the reason, and bars
on times are not judged.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.gpu.report import CHECKS, PARTS, Check, Record, log
from tests.gpu.runner import Runner
from tests.gpu.worker import load

MODULES = [f"tests.gpu.{name}" for name in ("neutral", "hazards", "numbers", "launches", "timing", "suites")]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
SECONDS = 480.0
BESIDE = 0.42  # share of the time in which checks run side by side
TABLE = 3.0  # seconds kept for the end


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="leave the others out")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    parser.add_argument(
        "--seconds", type=_more_than_nothing, help=f"end after so many; {SECONDS:g} on a GPU, no limit without"
    )
    parser.add_argument("--workers", type=_at_least_one, help="processes side by side; by default 10, or 5 for 8 cores")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu hides the GPU")
    parser.add_argument("--out", type=Path, help="where the records go; on a GPU benchmarks/results/gpu.json")
    parser.add_argument("--list", action="store_true", help="name the checks, and make none")
    chosen = parser.parse_args(given)
    if chosen.out is not None and not chosen.list:
        _try_to_write(parser, chosen.out)
    return chosen


def _more_than_nothing(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"give a number of seconds above 0, not {text!r}")


def _at_least_one(text: str) -> int:
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"give a whole number of processes from 1, not {text!r}")


def _try_to_write(parser: argparse.ArgumentParser, out: Path) -> None:
    """Ends where the records could not be written, before any is made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder")
        part = out.with_suffix(".part")
        part.touch()
        part.unlink()
    except OSError as error:
        parser.error(f"--out cannot be written: {error}.")


class Results:
    """All records so far: lines on the screen, a file that is whole at any time, a table."""

    def __init__(self, environment: dict[str, Any], out: Path | None) -> None:
        self.environment, self.out = environment, out
        self.records: list[Record] = []

    def said(self, line: dict[str, Any]) -> None:
        """One figure or bar of a check that goes on."""
        print(json.dumps(line, default=str), flush=True)

    def over(self, record: Record) -> None:
        """A check is over."""
        self.records.append(record)
        print(record.line(), flush=True)
        self.write()

    def write(self) -> None:
        """The file, in the place of the one before."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"environment": self.environment, "checks": [json.loads(record.line()) for record in self.records]}
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(self.out)

    def table(self) -> str:
        """One line a check, and for each bar that is missed what was found."""
        lines = []
        for record in sorted(self.records, key=lambda r: PARTS.index(r.part)):
            reason = record.reason.partition(" | ")[0][:150].replace("\n", " ")
            lines.append(f"{record.status:<11}{record.part:<10}{record.seconds:>7.1f} s  {record.check:<62} {reason}")
            lines += [f"{'':<29} misses: {_said(bar)}" for bar in record.bars if bar["holds"] is False]
        counts = {s: sum(r.status == s for r in self.records) for s in ("passed", "failed", "skipped", "not judged")}
        return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])

    @property
    def failed(self) -> bool:
        """Whether a check has failed."""
        return any(record.status == "failed" for record in self.records)


def _said(bar: dict[str, Any]) -> str:
    return f"{bar['what']} {bar['value']} ({bar['bar']})" if "bar" in bar else bar["what"]


def environment() -> dict[str, Any]:
    """Card, versions, commit, date."""
    import platform
    from importlib.util import find_spec

    import torch

    found: dict[str, Any] = {
        "command": " ".join(["python -m tests.gpu", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "triton": importlib.metadata.version("triton") if find_spec("triton") else None,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found["memory, GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or os.environ.get("DYNAMON_COMMIT")
    except OSError:
        return os.environ.get("DYNAMON_COMMIT")


def main(given: list[str] | None = None) -> int:
    """Make the checks; 1 if one has failed."""
    begin = time.monotonic()
    chosen = arguments(given)
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Asked without torch, whose import takes seconds.
    hope = chosen.device != "cpu" and (any(Path("/dev").glob("nvidia*")) or Path("/dev/dxg").exists())
    runner = Runner(MODULES, chosen.workers or (max(1, min(10, 5 * (os.cpu_count() or 1) // 8)) if hope else 1))
    try:
        if not chosen.list:
            runner.get_ready(apart=hope)
        return check_all(chosen, runner, begin)
    finally:
        runner.stop()


def check_all(chosen: argparse.Namespace, runner: Runner, begin: float) -> int:
    """Make the checks while there is time; 1 if one has failed."""
    for module in MODULES:
        load(module)
    from tests.gpu.subjects import ON_GPU

    checks = sorted(CHECKS.values(), key=lambda check: check.rank)
    checks = [c for c in checks if c.part in chosen.parts and chosen.only in c.name]
    if not checks:
        log(f"No check of {', '.join(chosen.parts)} has {chosen.only!r} in its name; --list names them.")
        return 2
    if chosen.list:
        for check in checks:
            log(f"{check.part:<10}{check.seconds:>6.0f} s  {'alone' if check.alone else '':<6}{check.name}")
        return 0
    if chosen.device == "cuda" and not ON_GPU:
        log("There is no GPU.")
        return 1
    results = Results(environment(), chosen.out or (RESULTS if ON_GPU else None))
    print(json.dumps({"environment": results.environment}), flush=True)
    try:
        run(checks, runner, results, begin, chosen.seconds or (SECONDS if ON_GPU else 1e9), ON_GPU)
    finally:  # also where it is ended from outside
        print(results.table(), flush=True)
    return int(results.failed)


def run(checks: list[Check], runner: Runner, results: Results, begin: float, seconds: float, on_gpu: bool) -> None:
    """Both phases."""
    for check in [] if on_gpu else [c for c in checks if c.on_cpu]:
        results.over(Record(check.name, check.part, "skipped", reason=check.on_cpu))
    left = [check for check in checks if on_gpu or not check.on_cpu]
    beside, alone = [c for c in left if not c.alone], [c for c in left if c.alone]
    end = begin + seconds - TABLE
    runner.said, runner.over = results.said, results.over
    runner.patience = 4.0 if on_gpu else 60.0
    runner.side_by_side(beside, begin + BESIDE * seconds if alone else end)
    runner.alone(alone, end)


if __name__ == "__main__":
    sys.exit(main())
