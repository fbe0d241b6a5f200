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
    "dom",
    "numbers",
    "colors",
    "chart",
    "heatmap",
    "views",
    "layers",
    "progress",
    "board",
)  # each after those that it imports
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./\w+\.js\";\n", re.M)
_START = """
mount(document.getElementById("board"), JSON.parse(document.getElementById("data").textContent).map(packed));
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
        runs: Results of :func:`dynamon.board.payload.payload`, one or two of them.
    """
    script, style = _script(), _file("board.css")
    title = "dynamon: " + " and ".join(str(run["name"]) for run in runs)
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


def _script() -> str:
    """Join all modules: their imports of each other are removed, and so is ``export``."""
    parts = [_IMPORT.sub("", _file(f"{name}.js")).replace("\nexport ", "\n") for name in MODULES]
    return "\n".join([*parts, _START])


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
