"""Whoever catches every exception says why beside it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_CATCHES_ALL = re.compile(r"\s*except\b(?:\s*\(?[\w., ]*\b(?:Base)?Exception\b[^:]*)?\s*:")


def without_a_reason(source: str) -> list[int]:
    """Return the lines of handlers of every exception with no comment on their line, the one above or below."""
    lines = ["", *source.splitlines(), ""]
    return [
        number
        for number, line in enumerate(lines)
        if _CATCHES_ALL.match(line) and not any("#" in near for near in lines[number - 1 : number + 2])
    ]


@pytest.mark.parametrize("top", ["kernels", "dynamon", "callbacks"])
def test_each_has_a_reason(top: str) -> None:
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        lines = without_a_reason(path.read_text())
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}


@pytest.mark.parametrize(
    ("handler", "found"),
    [
        ("except Exception:\n    pass", [3]),
        ("except Exception as error:\n    raise", [3]),
        ("except:\n    pass", [3]),
        ("except BaseException:\n    pass", [3]),
        ("except (ValueError, Exception):\n    pass", [3]),
        ("except Exception:  # a tracker's own\n    pass", []),
        ("except Exception:\n    # a tracker's own\n    pass", []),
        ("# a tracker's own\nexcept Exception:\n    pass", []),
        ("except ValueError:\n    pass", []),
        ("except (OSError, ValueError) as error:\n    pass", []),
    ],
)
def test_the_checker(handler: str, found: list[int]) -> None:
    assert without_a_reason(f"try:\n    work()\n{handler}\n") == found
