"""Sphinx: pages in Markdown, reference from the docstrings, nothing from the network.

Tables that the code or a benchmark knows are made by ``docs/generated.py`` each time, so that they cannot go stale.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks, which generated.py reads
sys.path.insert(0, str(Path(__file__).parent))

import generated
import mathml

import dynamon

project, author, copyright = "dynamon", "the authors of dynamon", "the authors of dynamon"
release = version = dynamon.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["generated"]  # included by other pages
nitpicky = True  # a reference to something of ours that does not exist is an error
nitpick_ignore_regex = [  # other people's, whose pages are on the network
    ("py:.*", r"(torch|nn|optim|lightning|pl|numpy|np|scipy|collections|pathlib|typing|types|contextlib)(\..*)?"),
    ("py:.*", r"(Any|Tensor|Optimizer|ProcessGroup|optional|callable|tuple\[str|dict\[str)"),
    ("py:.*", r"dynamon\..*(\._\w+|\.Statistics|\.PartialStats)"),  # private classes and type variables in signatures
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "dynamon"
html_math_renderer = "mathml"
toc_object_entries_show_parents = "hide"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
pygments_style = "friendly"
pygments_dark_style = "native"


def keep_colons(app, what, name, obj, options, lines):
    """Keep napoleon from reading the words before a colon in a property's docstring as the name of its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def setup(app):
    mathml.setup(app)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    app.connect("builder-inited", lambda app: generated.write(Path(app.srcdir)))
