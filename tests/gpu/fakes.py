"""Checks that go wrong in every way, for the test of what runs them. They need no torch."""

import os
import signal
import time

from tests.gpu.report import Report, Skip, check


@check("hazards", 5.0, rank=1)
def is_well(report: Report) -> None:
    report.note("figure", 1.5)
    report.hold("what must hold", True)


@check("hazards", 5.0, rank=2)
def raises(report: Report) -> None:
    report.note("so far", "well")
    raise ValueError("as it should")


@check("hazards", 5.0, rank=3)
def is_killed(report: Report) -> None:
    report.note("so far", "well")
    os.kill(os.getpid(), signal.SIGKILL)


@check("hazards", 0.3, rank=4)
def hangs(report: Report) -> None:
    report.note("so far", "well")
    report.hold("half of it", True)
    time.sleep(600)


@check("hazards", 5.0, rank=5)
def skips(report: Report) -> None:
    raise Skip("nothing to do")


@check("hazards", 5.0, rank=6)
def breaks(report: Report) -> None:
    print("what others print is no answer")
    report.hold("what must hold", False)


@check("hazards", 1e6, rank=7)
def takes_too_long(report: Report) -> None:
    report.hold("never run", False)


@check("timing", 5.0, alone=True, rank=8)
def has_a_bar(report: Report) -> None:
    report.bar("share", 0.5, most=0.02)
    report.bar("times", 0.5, least=30)
