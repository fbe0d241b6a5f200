"""Editors and type checkers find ``dynamon.callbacks`` and ``dynamon.kernels`` in a checkout."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = """
import dynamon
from dynamon.callbacks import DynamicsMonitor
from dynamon.kernels import gram_iteration
from dynamon.norms import get_norm
reveal_type(DynamicsMonitor.history)
reveal_type(gram_iteration)
reveal_type(get_norm)
reveal_type(dynamon.measure)
"""


def test_links_are_those_of_the_package_table() -> None:
    mapped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    folders = {package.removeprefix("dynamon."): ROOT / path for package, path in mapped.items() if "." in package}
    links = {link.name: link.resolve() for link in (ROOT / "typings" / "dynamon").iterdir()}
    assert links == {**folders, "__init__.py": ROOT / "dynamon" / "__init__.py"}


def test_pyright_looks_where_the_links_are() -> None:
    text = re.sub(r"^ *//.*$", "", (ROOT / "pyrightconfig.json").read_text(), flags=re.M)
    settings = json.loads(text)
    assert (ROOT / settings["stubPath"] / "dynamon" / "callbacks" / "__init__.py").exists()
    assert all((ROOT / folder).is_dir() for folder in settings["include"])


@pytest.mark.slow
@pytest.mark.timeout(900)  # mypy reads torch and Lightning the first time
def test_mypy_finds_all_packages_in_the_checkout() -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache" / "checkout"), "-c", SOURCE]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    types = re.findall(r'Revealed type is "(.*)"', found.stdout)
    assert len(types) == 4 and all(len(name) > len("Any") for name in types), types
