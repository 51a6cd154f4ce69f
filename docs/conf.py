"""Sphinx: markdown by MyST, the furo theme, API by autodoc; built with warnings as errors."""

import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.pycode import ModuleAnalyzer

from nngeom import __version__

sys.path.insert(0, str(Path(__file__).parent))
import public

project = "nngeom"
author = "the nngeom authors"
copyright = "the nngeom authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "nngeom"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"  # formulas are part of the page: nothing is loaded from elsewhere

PLACED = {
    "index",
    "quickstart",
    "concepts",
    "models",
    "architectures",
    "errors",
    "measures",
    "representations",
    "algebra",
    "extending",
    "api",
}


def inline_math(self, node):
    """MathML, which browsers render themselves."""
    self.body.append(tex2mathml(node.astext()))
    raise SkipNode


def block_math(self, node):
    """The same on a line of its own."""
    self.body.append(tex2mathml(node.astext(), as_block=True))
    raise SkipNode


def splice(app, what, name, x, options, lines):
    """The arguments that all measures share, in the list of each that takes them, and lists as Sphinx reads them."""
    if lines:
        lines[:] = public.as_fields(public.spliced(public.parameters(x), "\n".join(lines))).splitlines()


def hide(app, what, name, x, skip, options):
    """Constructors that take nothing of their own."""
    return True if name in ("__init__", "__new__") and not public.parameters(x) else None


def whole_signatures(app):
    """The page of an overloaded function shows the one signature that runs; overloads are for type checkers."""
    for name in [name for name in sys.modules if name.startswith("nngeom.")]:
        analyzer = ModuleAnalyzer.for_module(name)
        analyzer.analyze()
        analyzer.overloads.clear()


def setup(app):
    """Pages of the parts built on top of the core join the table of contents by being there."""
    order = [
        "seeing",
        "function_space",
        "analysis",
        "linearized",
        "optimizers",
        "tracking",
        "distributed",
        "benchmarks",
    ]
    rank = lambda name: next((j for j, first in enumerate(order) if name.startswith(first)), len(order))
    found = sorted(
        (p.stem for p in Path(app.srcdir).glob("*.md") if p.stem not in PLACED), key=lambda name: (rank(name), name)
    )

    made = {"index", "api"}  # of more than their sources, as are the pages of the reference

    def insert(app, name, source):
        if name == "index":
            source[0] = source[0].replace("@more@", "\n".join(found))

    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", insert)
    app.connect("env-get-outdated", lambda app, env, *args: [n for n in env.all_docs if n in made or "/" in n])
    app.connect("builder-inited", whole_signatures)
    app.connect("autodoc-skip-member", hide)
    app.connect("autodoc-process-docstring", splice)
