"""Shipped code stays in pieces that one can read: functions of at most 60 lines, files of at most 450."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION, FILE = 60, 450
# Longer for a reason that stays: tables, whose lines are entries. Path, with the reason.
TABLES: dict[str, str] = {}
# Too long, and to be cut: a name goes when its file or function fits. Path, or path::function.
TO_BE_CUT = {
    "callbacks/layerwise_lr.py",
    "dynamon/monitoring/eigenvalues.py",
    "dynamon/monitoring/gradient_meter.py",
    "dynamon/monitoring/monitor.py",
    "dynamon/monitoring/probe.py",
    "dynamon/optim/layerwise.py",
    "dynamon/quantities/gradient_reader.py",
}


def shipped(*kinds: str) -> list[Path]:
    """Return the files of the three floors that the wheel holds."""
    found = [p for top in ("kernels", "dynamon", "callbacks") for p in (ROOT / top).rglob("*") if p.suffix in kinds]
    return sorted(found)


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield name and lines of each function that is too long, its docstring not counted, decorators neither."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
            docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
            lines = node.end_lineno - node.lineno + 1 - docstring
            if lines > FUNCTION:
                yield node.name, lines


def too_long() -> dict[str, int]:
    """Return what is too long, with its lines."""
    found = {}
    for path in shipped(".py", ".js", ".css"):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        lines = len(text.splitlines())
        if lines > FILE:
            found[name] = lines
        if path.suffix == ".py":
            found |= {f"{name}::{function}": count for function, count in long_functions(text)}
    return found


def test_functions_and_files_are_short() -> None:
    assert {name: lines for name, lines in too_long().items() if name not in TO_BE_CUT | TABLES.keys()} == {}


def test_the_lists_hold_nothing_that_is_short_by_now() -> None:
    assert (TO_BE_CUT | TABLES.keys()) - too_long().keys() == set()


@pytest.mark.parametrize(
    ("lines", "docstring", "found"), [(59, 0, []), (60, 0, [61]), (59, 30, []), (60, 30, [61])], ids=str
)
def test_the_checker(lines: int, docstring: int, found: list[int]) -> None:
    doc = '    """Do.\n' + "    so.\n" * (docstring - 2) + '    """\n' if docstring else ""
    source = "class A:\n  pass\n\n@property\ndef f():\n" + doc + "    x = 1\n" * lines
    assert [count for _, count in long_functions(source)] == found


def test_files_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in shipped(".py", ".js")}
    assert {"kernels/gram.py", "dynamon/curvature/solvers/lanczos.py", "dynamon/board/board.js"} <= names
