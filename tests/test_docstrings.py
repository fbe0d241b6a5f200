"""Public functions show an example, all examples run as they stand, and summaries say what is done."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import dynamon
import dynamon.callbacks
import dynamon.kernels

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
    *("dynamon.curvature.HessianOperator", "dynamon.curvature.GGNOperator", "dynamon.curvature.EigenTracker"),
)
NUMERICAL = ("dynamon.kernels", "dynamon.curvature", "dynamon.spectra", "dynamon.stability")
ENGINE = ("dynamon.monitoring", "dynamon.health", "dynamon.callbacks")
# An example of these would need several processes, or a device queue.
WITHOUT_EXAMPLE = {"unsharded", "waiter", "warm_up"}
QUESTIONS = ("What", "Where", "Whether", "How", "Why", "When", "Nothing", "That ", "Those ")


def modules() -> list[str]:
    """Return all modules but the programs; two folders lie beside that of the package."""
    found = [*pkgutil.walk_packages(dynamon.__path__, "dynamon.")]
    for beside in (dynamon.kernels, dynamon.callbacks):
        found += pkgutil.walk_packages(beside.__path__, f"{beside.__name__}.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def public_functions(package: str) -> Iterator[tuple[str, object]]:
    """Yield the functions that users of a package import."""
    found: ModuleType = importlib.import_module(package)
    own = [name for name, value in vars(found).items() if getattr(value, "__module__", "") == package]
    for name in getattr(found, "__all__", own):
        value = getattr(found, name)
        if inspect.isroutine(value) and not name.startswith("_"):
            yield name, value


def summaries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and first docstring line of everything in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.stem), text.splitlines()[0]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_show_an_example(name: str) -> None:
    module, _, last = name.rpartition(".")
    found = doctest.DocTestParser().get_examples(getattr(importlib.import_module(module), last).__doc__)
    assert found and any(example.want for example in found) or name == "dynamon.rates.Rule"


@pytest.mark.parametrize("package", NUMERICAL)
def test_every_function_of_the_numerical_packages_shows_an_example(package: str) -> None:
    functions = dict(public_functions(package))
    missing = {name for name, function in functions.items() if ">>>" not in (inspect.getdoc(function) or "")}
    assert functions and missing - WITHOUT_EXAMPLE == set()


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", (*NUMERICAL, *ENGINE))
def test_no_summary_begins_with_a_question(package: str) -> None:
    found = []
    for name in (module for module in (*modules(), package) if f"{module}.".startswith(f"{package}.")):
        path = Path(inspect.getsourcefile(importlib.import_module(name)) or "")
        found += [f"{name}.{item}: {line}" for item, line in summaries(path) if line.startswith(QUESTIONS)]
    assert found == []


def test_kernels_are_among_the_modules() -> None:
    assert {"dynamon.kernels.gram", "dynamon.kernels.polar", "dynamon.curvature.solvers.top"} <= set(modules())
