"""Imports go down only: cli -> callbacks -> dynamon -> kernels."""

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")

# A name stands for itself and all below it. Of two matching names the longer one decides.
FLOORS = {
    "kernels": {
        "forbidden": (*LIGHTNING, "dynamon", "torch.nn"),
        "allowed": ("dynamon.kernels", "torch.nn.functional"),
    },
    "dynamon": {"forbidden": (*LIGHTNING, "dynamon.callbacks", "dynamon.cli"), "allowed": ()},
    "callbacks": {"forbidden": ("dynamon.cli",), "allowed": ()},
    "dynamon/cli": {"forbidden": (), "allowed": ()},
}
# `lightning` brings a second tree, `pytorch_lightning`, with classes of its own; tests may show that.
EVERYWHERE = ("callbacks", "kernels")
OUTSIDE_TESTS = (*EVERYWHERE, "pytorch_lightning", "lightning_fabric")


def uses(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of all that a source imports, anywhere, and of each `torch.a.b` in it."""
    nodes = list(ast.walk(ast.parse(source)))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, resolve_name(str(node.args[0].value), package)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            if (name := ast.unparse(node)).startswith("torch."):
                yield node.lineno, name


def violations(source: str, package: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """Return "line: name" for each use of a forbidden name."""

    def rank(name: str, prefixes: tuple[str, ...]) -> int:
        return max((len(prefix) for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")), default=0)

    found = {use for use in uses(source, package) if rank(use[1], forbidden) > rank(use[1], allowed)}
    return [f"{line}: {name}" for line, name in sorted(found)]


def floor(path: Path) -> str:
    """Return the floor a file of the package belongs to."""
    parts = path.relative_to(ROOT).parts
    return "dynamon/cli" if parts[:2] == ("dynamon", "cli") else parts[0]


def package(path: Path) -> str:
    """Return the package that relative imports of a file start from."""
    parts = path.parent.relative_to(ROOT).parts
    return ".".join(parts if parts[:1] == ("dynamon",) else ("dynamon", *parts))


def sources(*folders: str) -> list[Path]:
    """Return all Python files below the folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SHIPPED = sources("dynamon", "callbacks", "kernels")
AROUND = [ROOT / "conftest.py", *sources("tests", "examples", "benchmarks", "docs")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    assert not violations(path.read_text(), package(path), **FLOORS[floor(path)])


@pytest.mark.parametrize("path", [*SHIPPED, *AROUND], ids=lambda path: str(path.relative_to(ROOT)))
def test_one_name_for_each_module(path):
    forbidden = EVERYWHERE if path.is_relative_to(ROOT / "tests") else OUTSIDE_TESTS
    assert not violations(path.read_text(), package(path), forbidden)


def test_all_floors_are_seen():
    assert {floor(path) for path in SHIPPED} == set(FLOORS)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("kernels", "import dynamon"),
        ("kernels", "import dynamon.norms"),
        ("kernels", "from dynamon import norms"),
        ("kernels", "from ..norms import get_norm"),
        ("kernels", "import lightning as L"),
        ("kernels", "import torch.nn"),
        ("kernels", "from torch import nn"),
        ("kernels", "from torch.nn import Module"),
        ("kernels", "from torch.nn.utils import clip_grad_norm_"),
        ("kernels", "import torch\ndef f(x): return isinstance(x, torch.nn.Module)"),
        ("dynamon", "def f():\n    from dynamon.callbacks import DynamicsMonitor"),
        ("dynamon", "if TYPE_CHECKING:\n    import lightning.pytorch as pl"),
        ("dynamon", "import pytorch_lightning"),
        ("dynamon", "from . import callbacks"),
        ("dynamon", "from .cli import main"),
        ("dynamon", "import importlib\nimportlib.import_module('.cli', __package__)"),
        ("dynamon", "__import__('lightning')"),
        ("callbacks", "from dynamon.cli import main"),
        ("callbacks", "from ..cli.report import write"),
    ],
)
def test_an_offender_is_caught(where, source):
    assert violations(source, "dynamon" if where == "dynamon" else f"dynamon.{where}", **FLOORS[where])


@pytest.mark.parametrize(
    ("where", "source"),
    [
        (
            "kernels",
            "import torch.nn.functional as F\nfrom torch.nn import functional\nfrom torch import Tensor",
        ),
        ("kernels", "import torch\ntorch.nn.functional.pad(x, (1, 1))"),
        (
            "kernels",
            "from dynamon.kernels.gram import gram_iteration\nfrom . import gram\nfrom .gram import bound",
        ),
        ("dynamon", "import torch.nn as nn\nfrom dynamon.kernels import polar_factor\nimport dynamon.norms"),
        ("callbacks", "import lightning as L\nfrom dynamon.curvature import HessianOperator"),
        ("dynamon/cli", "from dynamon.callbacks import DynamicsMonitor\nimport lightning as L"),
    ],
)
def test_the_lawful_passes(where, source):
    assert not violations(source, "dynamon" if where == "dynamon" else f"dynamon.{where}", **FLOORS[where])


@pytest.mark.parametrize(
    "source",
    [
        "import callbacks",
        "from kernels import gram_iteration",
        "import kernels.gram",
        "import pytorch_lightning as pl",
    ],
)
def test_a_second_name_is_caught(source):
    assert violations(source, "dynamon", OUTSIDE_TESTS)
