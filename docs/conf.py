"""Sphinx: markdown and notebooks by MyST, the furo theme, API by autodoc; built with warnings as errors."""

import os
import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

from nngeom import __version__

sys.path.insert(0, str(Path(__file__).parent))
import formulas
import objects
import public

project = "nngeom"
author = "the nngeom authors"
copyright = "the nngeom authors"
release = version = __version__

extensions = ["myst_nb", "sphinx_gallery.gen_gallery"]
extensions += [f"sphinx.ext.{name}" for name in ("autodoc", "autosummary", "intersphinx", "viewcode")]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they lie there; a test executes them
exclude_patterns = ["_build", "gallery", "how_to/*.ipynb", "sg_execution_times.rst", "how_to/sg_execution_times.rst"]
autosummary_generate = False

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
html_math_renderer = "mathml"  # part of the page

intersphinx_mapping = {"torch": (objects.TORCH, str(Path(__file__).parent / "_build" / "torch.inv"))}
objects.write_inventory(Path(__file__).parent / "_build" / "torch.inv")

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "how_to",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "nested_sections": False,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "reset_modules": ("matplotlib", "gallery_style.plain"),
    "min_reported_time": 1e9,
    "only_warn_on_example_error": False,
    "image_srcset": ["2x"],
    "plot_gallery": os.environ.get("GALLERY", "run") == "run",  # GALLERY=shown leaves the examples unexecuted
    "abort_on_example_error": False,
    "log_level": {"backreference_missing": "debug"},
}


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


def join_others(app, docname, source):
    """Pages that the table of contents does not name join it where it says ``@more@``."""
    if docname == "index":
        pages = sorted(p.stem for p in Path(app.srcdir).glob("*.md") if p.stem != "index")
        named = set(source[0].split())
        source[0] = source[0].replace("@more@", "\n".join(page for page in pages if page not in named))


def setup(app):
    """Formulas, a page an object, and signatures and arguments as they are."""
    made = {"index", "api"}  # of more than their sources, as are the pages of the reference
    app.add_html_math_renderer("mathml", (formulas.inline, None), (formulas.block, None))
    app.connect("env-get-outdated", lambda app, env, *args: [n for n in env.all_docs if n in made or "/" in n])
    app.connect("builder-inited", whole_signatures)
    app.connect("builder-inited", objects.write_pages)
    app.connect("source-read", objects.as_tables)
    app.connect("source-read", join_others)
    app.connect("autodoc-skip-member", hide)
    app.connect("autodoc-process-docstring", splice)
