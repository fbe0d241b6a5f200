"""A process that makes the checks it is told, one after the other, and says what it finds in lines of JSON."""

import importlib
import json
import os
import sys
import threading
import time
import traceback
from typing import Any, TextIO

import tests.gpu.place  # noqa: F401
from tests.gpu.report import CHECKS, Check, Report, Skip, quiet, status


def perform(name: str, on_gpu: bool, out: TextIO | None = None) -> dict[str, Any]:
    """Make one check; the record of it."""
    check, begin = CHECKS[name], time.perf_counter()
    report, reason = Report(name, on_gpu, out), ""
    with quiet() as said:
        try:
            check.run(report)
            found = status(report.bars)
        except Skip as skip:
            found, reason = "skipped", str(skip)
        except Exception as error:
            place = traceback.format_exc().replace(os.getcwd() + "/", "")[-700:]
            found, reason = "failed", f"{type(error).__name__}: {str(error)[:400]} | {place}"
    seconds = round(time.perf_counter() - begin, 2)
    return {
        "check": name,
        "status": found,
        "reason": reason,
        "seconds": seconds,
        "bars": report.bars,
        "figures": report.figures,
        "said": said,
    }


def load(module: str) -> None:
    """Know the checks of a module; where it cannot be imported, one that says why."""
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"

        def run(report: Report) -> None:
            raise RuntimeError(f"cannot be imported: {reason}")

        CHECKS[module] = Check(module, "hazards", run, 1.0)


def main() -> None:
    """Answer what stands in the input: the modules of the checks first, then a name a line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not part of the answer
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for module in json.loads(sys.stdin.readline()):
        load(module)
    subjects = sys.modules.get("tests.gpu.subjects")
    on_gpu = subjects is not None and subjects.begin()
    _answer(out, {"ready": True})
    for line in sys.stdin:
        record = perform(json.loads(line), on_gpu, out)
        _answer(out, {**record, "is_over": True, "is_broken": on_gpu and _is_broken()})


def _answer(out: TextIO, found: dict[str, Any]) -> None:
    out.write(json.dumps(found, default=str) + "\n")
    out.flush()


def _is_broken() -> bool:
    """Whether the device no longer answers this process; what the last check has left is freed."""
    import gc

    import torch

    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
