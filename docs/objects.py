"""Reference pages: tables of the objects of a topic, and a page of its own for each, from the same directives."""

import re
import zlib
from pathlib import Path

HERE = Path(__file__).parent
PAGES = ["api.md", *sorted(f"reference/{p.name}" for p in (HERE / "reference").glob("*.md"))]
BLOCK = re.compile(r"^```\{eval-rst\}\n(.*?)^```\n", re.M | re.S)
DIRECTIVE = re.compile(r"^\.\. auto\w+:: (nngeom[\w.]*)\n((?:   .*\n)*)", re.M)
FOLDER = "objects"  # beside the reference pages, made by the build

TORCH = "https://docs.pytorch.org/docs/stable/"
THEIRS = {  # what signatures of this library name, and where it is described
    "torch.Tensor": ("class", "tensors.html#$"),
    "torch.Generator": ("class", "generated/$.html#$"),
    "torch.dtype": ("class", "tensor_attributes.html#$"),
    "torch.device": ("class", "tensor_attributes.html#$"),
    "torch.Size": ("class", "size.html#$"),
    "torch.nn.Module": ("class", "generated/$.html#$"),
    "torch.nn.Parameter": ("class", "generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter"),
    "torch.optim.Optimizer": ("class", "optim.html#$"),
    "torch.utils.data.DataLoader": ("class", "data.html#$"),
    "torch.distributed.ProcessGroup": ("class", "distributed.html#$"),
}
ALIASES = {
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def write_inventory(path: Path) -> None:
    """An inventory of torch's pages as Sphinx reads them, so that building asks nobody."""
    lines = [f"{name} py:{role} 1 {place.replace('$', name)} {name}" for name, (role, place) in THEIRS.items()]
    for alias, name in ALIASES.items():
        role, place = THEIRS[name]
        lines.append(f"{alias} py:{role} 1 {place.replace('$', name)} {name}")
    head = "# Sphinx inventory version 2\n# Project: torch\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress("\n".join(lines).encode() + b"\n"))


def write_pages(app) -> None:
    """A page for every directive of the reference; written anew only where it changed."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {}
    for page in PAGES:
        for directive in DIRECTIVE.finditer((HERE / page).read_text()):
            name, short = directive[1], directive[1].rpartition(".")[2]
            text = f"{short}\n{'=' * len(short)}\n\n{directive[0].rstrip()}\n"
            pages[f"{name}.rst"] = ":orphan:\n\n" + text if ":noindex:" in directive[0] else text
    for stale in {p.name for p in folder.iterdir()} - pages.keys():
        (folder / stale).unlink()
    for file, text in pages.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def as_tables(app, docname, source) -> None:
    """The directives of a reference page as a table that links to the pages of the objects."""
    if f"{docname}.md" not in PAGES:
        return
    depth = "../" * docname.count("/")

    def table(block):
        names = [m[1] for m in DIRECTIVE.finditer(block[1]) if ":noindex:" not in m[0]]
        rest = DIRECTIVE.sub("", block[1]).strip()
        made = ".. autosummary::\n\n" + "".join(f"   ~{name}\n" for name in names)
        made += "\n.. toctree::\n   :hidden:\n\n" + "".join(f"   {depth}{FOLDER}/{name}\n" for name in names)
        body = (made if names else "") + (f"\n{rest}\n" if rest else "")
        return f"```{{eval-rst}}\n{body}```\n"

    source[0] = BLOCK.sub(table, source[0])
