"""Shipped code stays in pieces that one can read: functions of at most 60 lines, files of at most 450."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION, FILE = 60, 450


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
    assert too_long() == {}


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
