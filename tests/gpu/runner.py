"""Runs checks in processes of their own: what hangs, dies or breaks the device costs one check and not the rest."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.gpu.report import Check, Record

ROOT = Path(__file__).parents[2]
START = 60.0  # most seconds that the start of a process may take


class Worker:
    """A process that makes checks.

    Args:
        modules: Which hold the checks.
        environment: Added to this process's.
    """

    def __init__(self, modules: Iterable[str], environment: dict[str, str]) -> None:
        self._modules, self._environment = list(modules), environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._rest = b""
        self._starts = threading.Lock()
        self.is_over = False
        self.failed_to_start = ""

    def start(self) -> str:
        """Start where none runs; why not, or an empty text."""
        with self._starts:
            if self.is_over:
                return "the checks are over"
            self.failed_to_start = "" if self._process is not None else self._start()
            return self.failed_to_start

    def _start(self) -> str:
        self._rest = b""
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **self._environment},
            start_new_session=True,  # so that its own children end with it
        )
        self._send(self._modules)
        for line in self._lines(time.monotonic() + START):
            if line is None:
                break
            if line.get("ready"):
                return ""
        reason = f"the process did not start: {self.last_words()}"
        self.stop()
        return reason

    def perform(self, check: Check, limit: float, until: float, said: Callable[[dict[str, Any]], None]) -> Record:
        """Make one check within ``limit`` seconds and ``until`` some moment; each line it says goes to ``said``."""
        record = Record(check.name, check.part, "failed")
        record.reason = self.start()
        if record.reason:
            return record
        begin = time.monotonic()
        cut = until - begin < limit
        limit = max(min(limit, until - begin), 0.1)
        self._send(check.name)
        for line in self._lines(begin + limit):
            if line is None:
                alive = self._is_alive()
                why = f"no end within {limit:.3g} s" if alive else f"the process died ({self._code()})"
                record.reason = f"{why}: {self.last_words()}"
                if cut and alive and not any(bar["holds"] is False for bar in record.bars):
                    record.status, record.reason = "skipped", f"cut off after {limit:.3g} s: no time left"
                break
            if line.pop("is_over", False):
                broken = line.pop("is_broken", False)
                record = Record(**{**line, "part": check.part})
                if broken:
                    self.stop()
                return record
            said(line)
            if "figure" in line:
                record.figures[line["figure"]] = line["value"]
            elif "what" in line:
                record.bars.append({k: v for k, v in line.items() if k != "check"})
        record.seconds = round(time.monotonic() - begin, 2)
        self.stop()
        return record

    def last_words(self) -> str:
        """The end of what it wrote to the screen."""
        if self._log is not None:
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - 600))
            return self._log.read().decode(errors="replace").strip()[-500:]
        return ""

    def stop(self) -> None:
        """End the process, and those that it has started."""
        process, self._process = self._process, None
        log, self._log = self._log, None
        if log is not None:
            log.close()
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe and pipe.close()

    def end(self) -> None:
        """End the process, and start no other."""
        self.is_over = True
        self.stop()

    def _send(self, what: Any) -> None:
        process = self._process
        with suppress(OSError, ValueError):  # it died, or was ended
            if process is not None and process.stdin is not None:
                process.stdin.write((json.dumps(what) + "\n").encode())
                process.stdin.flush()

    def _lines(self, until: float) -> Iterable[dict[str, Any] | None]:
        """What it says; None once it is dead or the time is over."""
        process = self._process
        if process is None or process.stdout is None:
            yield None
            return
        pipe = process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                line, separator, rest = self._rest.partition(b"\n")
                if separator:
                    self._rest = rest
                    with suppress(ValueError):
                        yield json.loads(line)
                    continue
                left = until - time.monotonic()
                if left <= 0 or pipe.closed:
                    yield None
                    return
                if not selector.select(min(left, 1.0)):  # who ends the process closes the pipe, which wakes nobody
                    continue
                found = b""
                with suppress(OSError, ValueError):  # closed since
                    found = os.read(pipe.fileno(), 65536)
                if not found:
                    process.wait()
                    yield None
                    return
                self._rest += found

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _code(self) -> str:
        code = None if self._process is None else self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


class Runner:
    """Makes all checks: those that measure no time side by side, then the others alone.

    Args:
        modules: Which hold the checks.
        count: Processes side by side.

    Attributes:
        said: Takes every line that a check says, at once.
        over: Takes the record of every check, at once.
        patience: Factor on what checks should take, after which they are ended.
        least: Seconds before which none is ended.
    """

    def __init__(self, modules: Iterable[str], count: int) -> None:
        self._modules, self._count = list(modules), count
        self.said: Callable[[dict[str, Any]], None] = print
        self.over: Callable[[Record], None] = print
        self.patience, self.least = 4.0, 30.0
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._alone: Worker | None = None

    def get_ready(self, apart: bool) -> None:
        """Start the processes, among them one for the checks that run alone if it is to stand ``apart``."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self._count) if apart else 1)
        environment = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._workers = [Worker(self._modules, environment) for _ in range(self._count)]
        self._alone = self._workers[0]
        if apart:
            self._alone = Worker(self._modules, {})
            self._workers.append(self._alone)
        for worker in self._workers:
            threading.Thread(target=worker.start, daemon=True).start()

    def side_by_side(self, checks: Iterable[Check], until: float) -> None:
        """Make checks in several processes; what has not begun in time is skipped."""
        queue, workers = list(checks), self._workers[: self._count]
        while queue and (able := [worker for worker in workers if not worker.failed_to_start]):
            threads = [threading.Thread(target=self._work, args=(w, queue, until), daemon=True) for w in able]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if any(worker.is_over for worker in workers):
                return
        self._give_up(queue, workers[0])
        for worker in workers:
            if worker is not self._alone:
                worker.stop()

    def alone(self, checks: Iterable[Check], until: float) -> None:
        """Make checks one after the other, with nothing beside them."""
        assert self._alone is not None
        queue = list(checks)
        self._work(self._alone, queue, until)
        self._give_up(queue, self._alone)

    def _give_up(self, queue: list[Check], worker: Worker) -> None:
        """Checks that no process could be started for."""
        for check in [] if worker.is_over else queue:
            self._tell(Record(check.name, check.part, "failed", reason=worker.failed_to_start))

    def stop(self) -> None:
        """End all processes, for good."""
        for worker in self._workers:
            worker.end()

    def _work(self, worker: Worker, queue: list[Check], until: float) -> None:
        while True:
            with self._lock:
                if not queue or worker.is_over:
                    return
                check = queue.pop(0)
            record = self._one(worker, check, until)
            if worker.is_over:
                return
            if worker.failed_to_start:  # it must not use up what others can make
                with self._lock:
                    queue.insert(0, check)
                return
            self._tell(record)

    def _one(self, worker: Worker, check: Check, until: float) -> Record:
        left = until - time.monotonic()
        if left < check.seconds:
            return Record(check.name, check.part, "skipped", reason=f"no time left: it takes about {check.seconds:g} s")
        limit = max(self.patience * check.seconds, self.least)
        return worker.perform(check, limit, until, self._hear)

    def _hear(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.said(line)

    def _tell(self, record: Record) -> None:
        with self._lock:
            self.over(record)
