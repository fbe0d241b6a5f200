"""`make gpu` without a GPU: every check runs at tiny sizes, and what goes wrong in one costs that one."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import GPT2, counted
from tests.gpu.__main__ import Results, arguments
from tests.gpu.report import CHECKS, PARTS, Record, Report, status
from tests.gpu.runner import Runner, Worker
from tests.gpu.worker import load

ROOT = Path(__file__).parents[2]
NAMES = ("is well", "raises", "is killed", "hangs", "skips", "breaks", "takes too long", "has a bar")


@pytest.fixture
def fakes():
    before = dict(CHECKS)
    CHECKS.clear()
    sys.modules.pop("tests.gpu.fakes", None)
    import tests.gpu.fakes  # noqa: F401

    yield dict(CHECKS)
    CHECKS.clear()
    CHECKS.update(before)


@pytest.mark.parametrize("count", [1, 3])
def test_what_goes_wrong_in_a_check_costs_that_check(fakes, count) -> None:
    results, lines = Results({}, None), []
    runner = Runner(["tests.gpu.fakes"], count)
    runner.said, runner.over, runner.patience = lines.append, results.over, 5.0
    runner.least = 0.1
    try:
        runner.get_ready(apart=count > 1)
        until = time.monotonic() + 120
        runner.side_by_side([fakes[name] for name in NAMES[:-1]], until)
        runner.alone([fakes["has a bar"]], until)
    finally:
        runner.stop()
    found = {record.check: record for record in results.records}
    assert {name: found[name].status for name in NAMES} == {
        "is well": "passed",
        "raises": "failed",
        "is killed": "failed",
        "hangs": "failed",
        "skips": "skipped",
        "breaks": "failed",
        "takes too long": "skipped",
        "has a bar": "not judged",
    }
    assert "ValueError: as it should" in found["raises"].reason and found["skips"].reason == "nothing to do"
    assert "signal 9" in found["is killed"].reason and "no end within 1.5 s" in found["hangs"].reason
    assert found["takes too long"].reason.startswith("no time left")
    # What they had said by then is kept, and was heard at once.
    assert all(found[name].figures == {"so far": "well"} for name in ("raises", "is killed", "hangs"))
    assert found["hangs"].bars == [{"what": "half of it", "holds": True}]
    assert {"check": "is killed", "figure": "so far", "value": "well"} in lines
    assert results.failed and "misses: what must hold" in results.table()


def test_a_clone_that_is_not_installed_will_do() -> None:
    """With the installed package's own finder gone."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import tests.gpu.place, dynamon.callbacks, dynamon.kernels; from dynamon.callbacks import monitor\n"
        "print(monitor.__file__, dynamon.kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "callbacks" / "monitor.py"), str(ROOT / "kernels" / "__init__.py")]


def test_a_worker_ends_with_its_processes(fakes) -> None:
    worker = Worker(["tests.gpu.fakes"], {})
    assert worker.start() == ""
    pid = worker._process.pid
    worker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_module_that_cannot_be_imported_costs_its_checks_only(fakes) -> None:
    worker, until = Worker(["tests.gpu.nothing", "tests.gpu.fakes"], {}), time.monotonic() + 60
    load("tests.gpu.nothing")
    try:
        record = worker.perform(CHECKS["tests.gpu.nothing"], 9.0, until, print)
        assert record.status == "failed" and "No module named 'tests.gpu.nothing'" in record.reason
        assert worker.perform(fakes["is well"], 9.0, until, print).status == "passed"
    finally:
        worker.stop()


def test_a_worker_that_cannot_start_is_no_end(fakes, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    record = Worker(["tests.gpu.fakes"], {}).perform(fakes["is well"], 1.0, time.monotonic() + 60, print)
    assert record.status == "failed" and record.reason.startswith("the process did not start")


def test_a_process_that_cannot_start_leaves_its_checks_to_others(fakes, monkeypatch) -> None:
    results, runner = Results({}, None), Runner(["tests.gpu.fakes"], 2)
    runner.over = results.over
    runner.get_ready(apart=True)
    monkeypatch.setattr(runner._workers[0], "_start", lambda: "the process did not start: no room")
    runner._workers[0].stop()
    try:
        runner.side_by_side([fakes["is well"], fakes["skips"]], time.monotonic() + 60)
        assert {record.check: record.status for record in results.records} == {"is well": "passed", "skips": "skipped"}
        monkeypatch.setattr(runner._workers[1], "_start", lambda: "the process did not start: no room")
        runner._workers[1].stop()
        runner.side_by_side([fakes["is well"], fakes["skips"]], time.monotonic() + 60)
    finally:
        runner.stop()
    assert [record.status for record in results.records[2:]] == ["failed", "failed"]


def test_what_time_cuts_off_has_not_failed(fakes) -> None:
    worker = Worker(["tests.gpu.fakes"], {})
    try:
        assert worker.start() == ""
        record = worker.perform(fakes["hangs"], 60.0, time.monotonic() + 0.5, print)
    finally:
        worker.end()
    assert record.status == "skipped" and record.reason == "cut off after 0.5 s: no time left"
    assert record.figures == {"so far": "well"}


def test_a_runner_that_is_stopped_starts_nothing(fakes) -> None:
    results, runner = Results({}, None), Runner(["tests.gpu.fakes"], 1)
    runner.over, runner.least = results.over, 60.0
    runner.get_ready(apart=False)
    checks = [fakes["is well"], fakes["hangs"], fakes["skips"]]
    thread = threading.Thread(target=runner.side_by_side, args=(checks, time.monotonic() + 120))
    thread.start()
    while not results.records:
        time.sleep(0.05)
    time.sleep(0.5)
    runner.stop()
    thread.join(timeout=30)
    assert not thread.is_alive() and runner._workers[0]._process is None
    assert [record.check for record in results.records] == ["is well"]


@dataclass
class Event:
    """An event of a profile on a GPU."""

    kind: str
    device: object = torch.autograd.DeviceType.CPU
    nanoseconds: int = 0
    annotates: bool = False

    def name(self) -> str:
        return self.kind

    def device_type(self) -> object:
        return self.device

    def duration_ns(self) -> int:
        return self.nanoseconds

    def is_user_annotation(self) -> bool:
        return self.annotates


def test_launches_copies_and_waits_of_a_gpu_are_counted() -> None:
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [
        *(Event("aten::mul"), Event("cudaLaunchKernel"), Event("cuLaunchKernelEx"), Event("cudaMemcpyAsync")),
        *(Event("cudaStreamSynchronize"), Event("cudaEventSynchronize"), Event("cudaEventRecord")),
        *(Event("a kernel", on_gpu, 2_000_000), Event("Memcpy HtoD", on_gpu, 1_000_000)),
        Event("Optimizer.step#AdamW.step", on_gpu, 9_000_000, True),
    ]
    profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    counts, busy = counted(profile, "cuda")
    assert counts == {"launches": 2, "graph launches": 0, "copies": 1, "waits": 1, "event waits": 1} and busy == 3.0


def test_gpt2_has_as_many_tensors_as_gpt2() -> None:
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in GPT2().parameters()]
    assert len(sizes) == 148 and sum(sizes) == 124_439_808


def test_bars_are_judged_on_a_gpu_only() -> None:
    for on_gpu, value, expected in ((True, 0.01, "passed"), (True, 0.03, "failed"), (False, 0.03, "not judged")):
        report = Report("", on_gpu)
        report.bar("share", value, most=0.02)
        assert status(report.bars) == expected
    report.hold("what must hold anywhere", False)
    assert status(report.bars) == "failed" and status([]) == "passed"


def test_the_file_is_whole_at_any_time(tmp_path) -> None:
    results = Results({"torch": "2"}, tmp_path / "gpu.json")
    for name in ("one", "two"):
        results.over(Record(name, "hazards", "passed"))
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["checks"][-1] == {"check": name, "part": "hazards", "status": "passed", "seconds": 0.0}
    assert not results.failed and "2 passed" in results.table()


@pytest.mark.processes
@pytest.mark.timeout(1200)  # on a machine with much else to do
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(PARTS, marks=pytest.mark.slow, id="all"),
        pytest.param(
            [p for p in PARTS if p != "neutral"], id="but neutral"
        ),  # it trains each model twice, some compiled
    ],
)
def test_make_gpu_runs_to_its_end_without_a_gpu(tmp_path, parts) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--out", str(out), "--parts", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(out.read_text())
    failed = [check for check in found["checks"] if check["status"] == "failed"]
    assert done.returncode == 0 and not failed, done.stdout[-3000:] + done.stderr[-2000:]
    assert {check["status"] for check in found["checks"]} == {"passed", "skipped", "not judged"}
    assert all(check["reason"] for check in found["checks"] if check["status"] == "skipped")
    assert {"device", "torch", "triton", "cuda", "commit", "date", "python"} <= found["environment"].keys()
    listed = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(listed.stderr.splitlines()) == len(found["checks"])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["check"] for line in lines if "status" in line] == [check["check"] for check in found["checks"]]


@pytest.mark.parametrize(
    "given", [["--seconds", "0"], ["--seconds", "nan"], ["--workers", "-2"], ["--out", "/"], ["--parts", "nothing"]]
)
def test_arguments_that_mean_nothing_are_refused(given, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(given)
    assert ended.value.code == 2 and given[0] in capsys.readouterr().err
