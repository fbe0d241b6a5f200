"""Every example runs, and checks its own result."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_example(path: Path, capsys) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert "median over the last fifth" in capsys.readouterr().out
