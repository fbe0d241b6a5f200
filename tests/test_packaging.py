"""What `pip install` gives: the package table, the metadata, and a wheel used far from this folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FLOORS = ("dynamon", "callbacks", "kernels")


def folder(package: str) -> Path:
    """Return where setuptools looks for a package: the folder of the nearest mapped ancestor, and down."""
    ancestor, below = package, []
    while ancestor not in SETUPTOOLS["package-dir"]:
        ancestor, _, last = ancestor.rpartition(".")
        below.insert(0, last)
    return ROOT.joinpath(SETUPTOOLS["package-dir"][ancestor], *below)


def kept() -> list[str]:
    """Return the files a wheel is made of; in a git checkout without what git ignores."""
    paths = ["pyproject.toml", "README.md", "LICENSE", *FLOORS]
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths)
    found = shutil.which("git") and subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if found and found.returncode == 0:
        names = found.stdout.split("\0")
    else:
        files = [file for path in paths for file in (ROOT / path, *(ROOT / path).rglob("*"))]
        names = [str(file.relative_to(ROOT)) for file in files]
    return [name for name in names if (ROOT / name).is_file()]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the environment of this one; return what it printed."""
    __tracebackhide__ = True
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_every_package_is_listed():
    tree = {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")}
    assert {folder(package) for package in SETUPTOOLS["packages"]} == tree


def test_every_module_lies_in_a_package():
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    assert not [path for path in files if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_package_comes_from_this_checkout(package):
    assert Path(import_module(package).__file__).parent == folder(package)


@pytest.mark.parametrize(
    "target",
    [
        *PROJECT["project"]["scripts"].values(),
        *(target for group in PROJECT["project"].get("entry-points", {}).values() for target in group.values()),
    ],
)
def test_entry_point_imports(target):
    assert callable(metadata.EntryPoint("", target, "").load())


def test_metadata():
    declared, installed = PROJECT["project"], metadata.metadata("lightning-dynamon")
    assert installed["Name"] == declared["name"]
    assert installed["Version"] == declared["version"]
    assert installed["Requires-Python"] == declared["requires-python"]
    assert installed["License-Expression"] == "Apache-2.0"
    required = [Requirement(line) for line in metadata.requires("lightning-dynamon") or []]
    assert {str(line) for line in required if line.marker is None} == {
        str(Requirement(line)) for line in declared["dependencies"]
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel, install it in a new environment, and stand in another folder."""
    base = tmp_path_factory.mktemp("wheel")
    for name in kept():
        (base / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, base / "tree" / name)

    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", base / "dist", base / "tree")
    run(*pip, *build, cwd=base)
    venv.create(base / "venv", symlinks=os.name != "nt")
    python = base / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (built,) = (base / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", built, cwd=base)

    # The new environment borrows what the tests run with. A plain path in a .pth file does that without
    # the .pth files over there, so the editable install of this checkout stays out.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=base)
    borrowed = dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (Path(purelib) / "borrowed.pth").write_text("\n".join(borrowed))
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    return SimpleNamespace(
        python=python, purelib=purelib, cwd=elsewhere, run=lambda *line: run(python, *line, cwd=elsewhere)
    )


@pytest.mark.slow
def test_wheel_imports_far_from_the_checkout(wheel):
    modules = [
        f"{package}.{file.stem}".removesuffix(".__init__")
        for package in SETUPTOOLS["packages"]
        for file in folder(package).glob("*.py")
        if file.name != "__main__.py"
    ]
    code = "import sys, importlib as i; [print(i.import_module(name).__file__) for name in sys.argv[1:]]"
    files = wheel.run("-c", code, *modules).splitlines()
    assert len(files) == len(modules) > 0
    assert [file for file in files if not file.startswith(f"{wheel.purelib}/dynamon/")] == []


@pytest.mark.slow
def test_wheel_holds_nothing_else(wheel):
    files = metadata.Distribution.at(next(Path(wheel.purelib).glob("lightning_dynamon-*.dist-info"))).files
    assert {file.parts[0] for file in files if file.parts[0] != ".."} == {
        "dynamon",
        f"lightning_dynamon-{PROJECT['project']['version']}.dist-info",
    }
    names = {file.as_posix() for file in files}
    front_end = {
        path.relative_to(ROOT).as_posix() for kind in ("*.js", "*.css") for path in (ROOT / "dynamon").rglob(kind)
    }
    assert {"dynamon/py.typed", "dynamon/board/uplot/LICENSE", *front_end} <= names
    assert {"dynamon/board/board.js", "dynamon/board/uplot/uPlot.iife.min.js"} <= front_end
    code = "import sys, importlib.util as util; print([util.find_spec(name) for name in sys.argv[1:]])"
    assert wheel.run("-c", code, "callbacks", "kernels") == "[None, None]"


@pytest.mark.slow
def test_wheel_brings_the_tab_to_tensorboard(wheel):
    code = (
        "import sys; from tensorboard import default; "
        "(plugin,) = [p for p in default.get_dynamic_plugins() if p.__name__ == 'DynamonPlugin']; "
        "print(sys.modules[plugin.__module__].__file__, 'torch' in sys.modules)"
    )
    file, has_torch = wheel.run("-c", code).rsplit(" ", 1)
    assert file.startswith(f"{wheel.purelib}/dynamon/board/") and has_torch == "False"


@pytest.mark.slow
def test_wheel_has_its_command(wheel):
    assert "usage" in run(wheel.python.with_name("dynamon"), "--help", cwd=wheel.cwd).lower()


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine the first time; .mypy_cache makes the next ones short
def test_wheel_is_typed(wheel):
    options = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    wheel.run("-m", "mypy", *options, "-p", "dynamon")
