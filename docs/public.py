"""The public names, the objects behind the entries of the reference pages, and the arguments that measures share."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

PACKAGES = (
    "nngeom",
    "nngeom.optim",
    "nngeom.analysis",
    "nngeom.mgs",
    "nngeom.linearized",
    "nngeom.track",
    "nngeom.plot",
)
PACKAGES += ("nngeom.layers", "nngeom.pmat", "nngeom.cotangents")  # for those who write their own
SHARED = {
    "model",
    "loader",
    "function",
    "layer_collection",
    "progress",
    "memory_budget",
    "check",
    "process_group",
}
ENTRY = re.compile(r"^\.\. (?:auto\w+|py:data):: (nngeom[\w.]*)$", re.M)
LIST = re.compile(r"^Args:\n((?: {4}.*\n?)+)", re.M)
ARGUMENT = re.compile(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", re.M)


def entries() -> list[str]:
    """The dotted name of every entry of the reference pages."""
    here = Path(__file__).parent
    pages = [here / "api.md", *sorted((here / "reference").glob("*.md"))]
    return [name for page in pages for name in ENTRY.findall(page.read_text())]


def resolve(name: str) -> object:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def home() -> str:
    """The one docstring that describes the shared arguments."""
    from nngeom.sweep.run import Run

    return inspect.getdoc(Run.of) or ""


def arguments(doc: str) -> dict[str, str]:
    """``{name: lines}`` of the ``Args:`` list of a docstring, indented as there."""
    listed = LIST.search(doc)
    return {m[1]: m[0].rstrip() for m in ARGUMENT.finditer(listed[1])} if listed else {}


def parameters(f: object) -> list[str]:
    """The public parameters of a callable, without ``*args`` and ``**kwargs`` that it passes on."""
    passed_on = {inspect.Parameter.VAR_POSITIONAL: "args", inspect.Parameter.VAR_KEYWORD: "kwargs"}
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return []
    given = signature.parameters.values()
    return [p.name for p in given if not p.name.startswith("_") and p.name not in ("self", passed_on.get(p.kind))]


def named(doc: str) -> set[str]:
    """The words that a docstring has in double backticks or as entries of its ``Args:`` list."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"``(.+?)``", doc, re.S)))) | set(arguments(doc))


def shared(names: list[str], doc: str) -> list[str]:
    """Which of these parameters are described in the one place, not in ``doc``: of callables that take a model."""
    return [name for name in names if name in SHARED and name not in named(doc)] if "model" in names else []


def spliced(names: list[str], doc: str) -> str:
    """A docstring with the shared arguments in its ``Args:`` list, in the order of the signature."""
    there = arguments(home())
    added = {name: there[name] for name in shared(names, doc) if name in there}
    if not added:
        return doc
    own = arguments(doc)
    listed = sorted({**own, **added}.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names))
    block = "\n".join(["Args:", *(text for _, text in listed)]) + "\n"
    if own:
        return LIST.sub(lambda _: block, doc, count=1)
    body, last, end = doc.rpartition("\n\nRaises ")
    return "\n\n".join([body, block, f"Raises {end}"]) if last else f"{doc.rstrip()}\n\n{block}"


def as_fields(doc: str) -> str:
    """A docstring with its ``Args:`` list as a list of fields."""
    fields = [":param " + textwrap.dedent(text).replace("\n", "\n    ") for text in arguments(doc).values()]
    return LIST.sub(lambda _: "\n".join(fields) + "\n", doc, count=1)
