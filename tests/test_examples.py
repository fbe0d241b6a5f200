"""Every example runs, checks its own result, and draws its picture where it is told."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SMALLER = {
    "diverging_run": {"steps": 300},
    "edge_of_stability": {"steps": 1000},
    "noisy_layers": {"seeds": 1},
    "norm_transfer": {"widths": (64, 256)},
    "run_gone_wrong": {},
    "spectral_density": {"classes": (5, 10), "widths": (16, 64)},
}


def marked(*slow: str) -> list:
    """Every example, some of them among the slow tests."""
    return [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in slow else []) for p in EXAMPLES]


def example(path: Path):
    return runpy.run_path(str(path))["main"]


def named(stem: str):
    return example(next(path for path in EXAMPLES if path.stem == stem))


@pytest.mark.parametrize("path", marked("diverging_run", "edge_of_stability", "noisy_layers", "run_gone_wrong"))
@pytest.mark.filterwarnings("ignore")
def test_example(path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    example(path)(**SMALLER[path.stem], out=picture)
    assert picture.stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="and not at the edge"):
        named("edge_of_stability")(steps=100, rates=(0.1,), out=tmp_path / "picture.png")


@pytest.mark.filterwarnings("ignore")
def test_norms_that_do_not_grow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="with one rate the norm grows 1.00 times, and not over 1.00"):
        named("norm_transfer")(widths=(64, 64), steps=20, out=tmp_path / "picture.png")


def test_a_best_rate_at_the_edge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is at the edge of those tried"):
        named("noisy_layers")(steps=20, seeds=1, out=tmp_path / "picture.png")


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_does_not_diverge_is_refused(tmp_path: Path) -> None:
    namespace = runpy.run_path(str(next(path for path in EXAMPLES if path.stem == "diverging_run")))
    healthy = namespace["train"](0.05, 40)
    with pytest.raises(SystemExit, match="did not diverge"):
        namespace["check"](healthy, healthy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", marked(*SMALLER.keys() - {"spectral_density"}))
def test_without_matplotlib(path: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    example(path)(**SMALLER[path.stem], out=tmp_path / "picture.png")
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_fault_that_nobody_is_told_of_is_refused() -> None:
    namespace = runpy.run_path(str(next(path for path in EXAMPLES if path.stem == "run_gone_wrong")))
    untold = namespace["Run"](namespace["Model"](), None, [])
    with pytest.raises(SystemExit, match="nothing was told of precision/swallowed"):
        untold.of("precision/swallowed")
