"""Docstrings: examples that run, public functions that show one, summaries that begin with a verb or name the thing."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynamon

ROOT = Path(__file__).parents[1]
PACKAGES = ("dynamon.kernels", "dynamon.curvature", "dynamon.spectra", "dynamon.stability")
# What their examples would need: several processes, or a device queue.
WITHOUT_EXAMPLE = {"unsharded", "waiter", "warm_up"}
PUBLIC = (
    *("dynamon.describe_layers", "dynamon.measure"),
    *("dynamon.layers.layer_table", "dynamon.layers.select"),
    *("dynamon.norms.get_norm", "dynamon.norms.optimizer_family"),
    *("dynamon.rates.FixedRates", "dynamon.rates.NoiseAdaptiveRates", "dynamon.rates.Rule"),
    *("dynamon.optim.LayerwiseRates", "dynamon.optim.Lanton", "dynamon.optim.steering_of"),
    *("dynamon.schedule.refined_schedule", "dynamon.schedule.schedule_factor"),
    *("dynamon.runs.History", "dynamon.runs.Series", "dynamon.runs.read_run"),
    *("dynamon.health.findings", "dynamon.health.judged_loss"),
    *("dynamon.isolation.preserve.preserve_state", "dynamon.board.live.LiveFolder"),
)
QUESTIONS = ("What", "Where", "Whether", "How", "Why", "When", "Nothing", "That ", "Those ")


def modules(package: str) -> list[str]:
    """Return the modules of a package, or of a module itself."""
    found = importlib.import_module(package)
    below = getattr(found, "__path__", None)
    inner = [m.name for m in pkgutil.walk_packages(below, f"{package}.")] if below is not None else []
    return [package, *inner]


def public_functions(package: str) -> Iterator[tuple[str, object]]:
    """Yield the functions that users of a package import."""
    found = importlib.import_module(package)
    own = [name for name, value in vars(found).items() if getattr(value, "__module__", "") == package]
    for name in getattr(found, "__all__", own):
        value = getattr(found, name)
        if inspect.isroutine(value) and not name.startswith("_"):
            yield name, value


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_show_an_example(name: str) -> None:
    module, _, last = name.rpartition(".")
    found = doctest.DocTestParser().get_examples(getattr(importlib.import_module(module), last).__doc__)
    assert found and any(example.want for example in found) or name == "dynamon.rates.Rule"


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(dynamon.__path__, "dynamon.") if not m.name.endswith("__main__")]
)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_has_an_example(package: str) -> None:
    functions = dict(public_functions(package))
    missing = {name for name, function in functions.items() if ">>>" not in (inspect.getdoc(function) or "")}
    assert functions and missing - WITHOUT_EXAMPLE == set()


def summaries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and first docstring line of everything in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.stem), text.splitlines()[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_summary_begins_with_a_question(package: str) -> None:
    found = []
    for name in modules(package):
        path = Path(inspect.getsourcefile(importlib.import_module(name)) or "")
        found += [f"{name}.{item}: {line}" for item, line in summaries(path) if line.startswith(QUESTIONS)]
    assert found == []


def test_all_files_of_these_packages_are_looked_at() -> None:
    files = {Path(inspect.getsourcefile(importlib.import_module(name)) or "").name for name in modules(PACKAGES[0])}
    assert files == {path.name for path in (ROOT / "kernels").glob("*.py")}
