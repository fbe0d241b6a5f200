"""What imports bring in: `import dynamon` costs nothing, and without the callbacks neither Lightning nor a compiler."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torch._dynamo",
    "torch._inductor",
    "matplotlib",
    "pandas",
)
# The names of these packages stay put; users of a plain torch loop import them.
PLAIN = (
    "kernels",
    "norms",
    "layers",
    "curvature",
    "stability",
    "spectra",
    "rates",
    "optim",
    "schedule",
    "runs",
    "health",
)


def brought_in(code: str, before: str = "") -> set[str]:
    """Return the modules that some code imports in a process of its own, beyond those that ``before`` does."""
    say = "print(json.dumps([*(sys.modules.keys() - known)]))"
    script = "\n".join(["import sys, json", before, "known = set(sys.modules)", code, say])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return {module for module in modules if f"{module}.".startswith(tuple(f"{name}." for name in HEAVY))}


def test_dynamon_alone_brings_in_nothing_but_itself() -> None:
    """At most 0.2 s more than `import torch` is what was asked; a module and nothing else takes a millisecond."""
    found = {module.split(".")[0] for module in brought_in("import dynamon")}
    assert found - sys.stdlib_module_names == {"dynamon"}


def test_without_callbacks_there_is_neither_lightning_nor_a_compiler() -> None:
    code = "\n".join(f"import dynamon.{name}" for name in PLAIN)
    found = brought_in(code, before="import torch")
    assert heavy(found) == set() and {f"dynamon.{name}" for name in PLAIN} <= found


def test_the_checker_sees_them() -> None:
    assert "torch._dynamo" in heavy(brought_in("import torch._dynamo", before="import torch"))
