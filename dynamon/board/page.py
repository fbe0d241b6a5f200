"""Make the board one HTML file that needs no network: styles, modules and data inside."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

MODULES = (
    "uplot",
    "dom",
    "numbers",
    "colors",
    "axis",
    "spikes",
    "chart",
    "heatmap",
    "place",
    "views",
    "layers",
    "sweep",
    "progress",
    "board",
)  # each after those that it imports
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./\w+\.js\";\n", re.M)
_EXPORTS = re.compile(r"\nexport \{[^}]*\};\n")
_START = """
mountReport(document.getElementById("board"), JSON.parse(document.getElementById("data").textContent));
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '{script_hash}'; \
style-src '{style_hash}'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div id="board"><noscript>This report draws its charts with JavaScript.</noscript></div>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """Make the page.

    Names in the data are shown as text only. The page's content security policy lets no script run but the one inside.

    Args:
        runs: Results of :func:`dynamon.board.payload.payload`.
    """
    script, style = _script(), style_sheet()
    names = [str(run["name"]) for run in runs]
    title = "dynamon: " + (" and ".join(names) if len(names) < 3 else f"{len(names)} runs, {names[0]} and others")
    return _PAGE.format(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embedded(runs),
    )


def embedded(value: Any) -> str:
    """Convert to JSON that can be put into a script element: nothing ends the element or opens a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def module_names() -> tuple[str, ...]:
    """Return the names of all modules: those of the page, and the one that TensorBoard loads."""
    return *MODULES, "tab"


def module(name: str) -> str:
    """Return a module's source. ``uplot`` is the library as its authors build it, with its licence and an export."""
    if name == "uplot":
        return f"/*\n{_file('uplot/LICENSE')}\n*/\n{_file('uplot/uPlot.iife.min.js')}\nexport {{ uPlot }};\n"
    return _file(f"{name}.js")


def style_sheet() -> str:
    """Return the styles of the library and of the board."""
    return _file("uplot/uPlot.min.css") + "\n" + _file("board.css")


def _script() -> str:
    """Join all modules: their imports of each other are removed, and so is ``export``."""
    parts = [_EXPORTS.sub("\n", _IMPORT.sub("", module(name))).replace("\nexport ", "\n") for name in MODULES]
    return "\n".join([*parts, _START])


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(*name.split("/")).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
