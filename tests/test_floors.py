"""Imports go down only: cli -> callbacks -> dynamon -> kernels, and within dynamon/ from room to room as in ROOMS."""

import ast
from collections.abc import Iterable, Iterator
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


# The rooms of dynamon/: what each may import beside kernels, and why. Those that a room may import stand above it, so
# there are no cycles. REGISTRY is what dynamon.quantities says about quantities, and measures none.
REGISTRY = ("entries", "names", "progress", "registry", "tables")
ROOMS: dict[str, tuple[set[str], str]] = {
    "registry": (set(), "facts and names, which files of runs are read with where torch is not installed"),
    "schedule": (set(), "factors from numbers alone"),
    "distributed": (set(), "processes and parts of tensors, whatever is in them"),
    "isolation": ({"distributed"}, "a model is put back as it was, on all processes"),
    "layers": ({"registry", "distributed"}, "roles of parameters, which may be sharded; names are chosen by patterns"),
    "spectra": ({"distributed", "layers"}, "singular values of what a layer holds"),
    "norms": ({"registry", "layers", "spectra"}, "norms by role, some of them of singular values"),
    "quantities": ({"registry", "distributed", "layers", "spectra", "norms"}, "readings of each layer in its norm"),
    "curvature": ({"registry", "distributed", "isolation", "layers"}, "products with the Hessian of a model at rest"),
    "stability": ({"distributed", "layers", "norms", "quantities", "curvature"}, "curvature as an optimizer sees it"),
    "rates": ({"registry", "layers", "norms", "quantities"}, "rules follow readings, and know no optimizer"),
    "optim": ({"registry", "distributed", "layers", "norms", "quantities", "rates"}, "optimizers that rules steer"),
    "runs": ({"registry"}, "what was written and is read again, without torch"),
    "health": ({"registry", "runs"}, "findings in what was read, without torch"),
    "board": ({"registry", "runs", "health"}, "shows what was read, without torch"),
    "monitoring": (
        {"registry", "distributed", "isolation", "layers", "spectra", "norms", "quantities", "curvature", "stability"}
        | {"rates", "optim", "runs", "health", "board"},
        "decides when to measure, measures, and hands on; only the commands know it",
    ),
    "cli": (
        {
            "registry",
            "schedule",
            "layers",
            "norms",
            "quantities",
            "rates",
            "optim",
            "runs",
            "health",
            "board",
            "monitoring",
        },
        "commands",
    ),
}
# Arrows upwards: an entry of the registry may name a function that is imported when it is called.
UPWARDS = {"dynamon/quantities/entries/weight.py": {"quantities"}}


def room(name: str) -> str | None:
    """Return the room that a module or a name in it belongs to; None outside of rooms."""
    first, second, third, *_ = [*name.split("."), "", "", ""]
    if first != "dynamon" or second in ("", "callbacks", "kernels"):
        return None
    measures = (ROOT / "dynamon" / "quantities" / f"{third}.py").exists() and third not in REGISTRY
    return "registry" if second == "quantities" and not measures else second if second in ROOMS else None


def upward(source: str, package: str, own: str, exceptions: Iterable[str] = ()) -> list[str]:
    """Return "line: name" for each import from a room that this one may not know."""
    allowed = {own, None, *ROOMS[own][0], *exceptions}
    return [f"{line}: {name}" for line, name in sorted(set(uses(source, package))) if room(name) not in allowed]


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


def module(path: Path) -> str:
    """Return the full name of a file of the package."""
    return ".".join([package(path), *([] if path.stem == "__init__" else [path.stem])])


IN_ROOMS = {path: room(module(path)) for path in sources("dynamon") if path != ROOT / "dynamon" / "__init__.py"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_knows_those_above_it_only(name):
    found = {
        where: bad
        for path, own in IN_ROOMS.items()
        if own == name
        and (where := str(path.relative_to(ROOT)))
        and (bad := upward(path.read_text(), package(path), own, UPWARDS.get(where, ())))
    }
    assert not found


def test_no_cycles():
    above = set()
    for name, (allowed, _) in ROOMS.items():
        assert allowed <= above, name
        above.add(name)


def test_all_rooms_are_seen():
    assert set(IN_ROOMS.values()) == set(ROOMS)
    assert all((ROOT / where).exists() for where in UPWARDS)


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("curvature", "from dynamon.quantities.weights import weight_readings"),
        ("curvature", "def f():\n    from dynamon.monitoring import Watch"),
        ("runs", "import dynamon.health"),
        ("registry", "from dynamon.quantities.updates import wide_lengths"),
        ("layers", "from ..norms import get_norm"),
        ("rates", "from dynamon import optim"),
    ],
)
def test_an_arrow_upwards_is_caught(own, source):
    assert upward(source, f"dynamon.{own}", own)


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("curvature", "from dynamon.quantities.names import is_chosen\nfrom dynamon.kernels import polar_factor"),
        ("runs", "from dynamon.quantities import REGISTRY\nfrom . import history\nfrom dynamon import __version__"),
        ("quantities", "from dynamon.quantities.noise import SOURCES\nfrom dynamon.norms import Norm"),
    ],
)
def test_an_arrow_downwards_passes(own, source):
    assert not upward(source, f"dynamon.{own}", own)


# Tests stand on the floor of what they test: those of kernels/ and dynamon/ know no Trainer.
MIRRORED = {
    "tests/kernels": (*LIGHTNING, "dynamon.callbacks", "dynamon.cli", "tests.helpers"),
    "tests/dynamon": (*LIGHTNING, "dynamon.callbacks", "dynamon.cli", "tests.helpers"),
}


@pytest.mark.parametrize("folder", MIRRORED)
def test_tests_stand_on_their_floor(folder):
    found = {path: violations(path.read_text(), "tests", MIRRORED[folder]) for path in sources(folder)}
    assert not {str(path.relative_to(ROOT)): bad for path, bad in found.items() if bad}
