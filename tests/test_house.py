"""The house rules that a reader relies on: one direction of imports, no layer names where they do not belong."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nngeom"
ORDER = ["core", "solve", "layers", "space", "generator", "metrics", "pmat", "fmat", "maps", "top"]
ORDER += ["optim", "analysis", "mgs", "linearized", "track", "__init__"]
FILES = sorted(ROOT.rglob("*.py"))


def floor(path_or_module: str) -> str:
    """The storey of the house a module is on: its package, ``top`` for the single files."""
    parts = path_or_module.split(".")
    if len(parts) == 1:
        return "__init__"
    return parts[1] if (ROOT / parts[1]).is_dir() else "top"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file):
    module = ".".join(["nngeom", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    mine = ORDER.index(floor(module))
    for node in ast.parse(file.read_text()).body:  # imports inside functions are for optional or heavy things
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for name in names:
            if name and name.startswith("nngeom."):
                assert ORDER.index(floor(name)) <= mine, f"{module} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "pmat").glob("*.py")), ids=lambda f: f.name)
def test_representations_know_no_operation(file):
    code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.S)
    norms = r"layer_?norm|batch_?norm|group_?norm|rms_?norm"
    words = rf"\b(conv\w*|embedding|attention|{norms}|bilinear|F\.linear|nn\.\w+|patches|im2col|unfold)\b"
    allowed = {"implicit.py": {"F.embedding", "embedding", "attention", "nn.attention", "nn.functional", "nn.Module"}}
    found = {m.group(0) for m in re.finditer(words, code, flags=re.I)} - allowed.get(file.name, set())
    assert not {w for w in found if w.lower() not in {"nn.parameter"}}, found


@pytest.mark.parametrize("file", sorted((ROOT / "layers").glob("*.py")), ids=lambda f: f.name)
def test_adapters_know_no_representation(file):
    assert not re.search(r"PMat|FMat|Kronecker|KFAC|EKFAC", re.sub(r'""".*?"""', "", file.read_text(), flags=re.S))


KNOWS_OPERATIONS = {
    "generator/capture.py": {"batch_norm"},  # in a training step of the user's it mixes examples, and is let pass
    "generator/kernels.py": {"embedding", "embedding_bag"},  # gradients with gaps, and padding in forward mode
    "generator/written_out.py": {"embedding_bag", "layer_norm", "instance_norm", "prelu"},  # formulas in their place
    "generator/placement.py": {"NativeBatchNorm"},  # of the batch in a training step
    "generator/verify.py": {"NativeGroupNorm"},  # without its input the process ends (torch 2.13)
}
APART = {
    "layers",
    "generator/safe",  # rules of torch's own operations, by the names of their nodes
    "linearized",  # a linear regime, and a list of the maps whose input counts as a representation
}
ABOVE_ADAPTERS = [f for f in FILES if str(f.parent.relative_to(ROOT)) not in APART]
NORM = r"(native_?)?(layer|batch|group|instance|rms)_?norm(\dd)?"
OPERATION = rf"(bi)?linear|conv(_?transpose)?(\dd)?|embedding(_?bag)?|prelu|{NORM}"


@pytest.mark.parametrize("file", ABOVE_ADAPTERS, ids=lambda f: str(f.relative_to(ROOT)))
def test_operations_have_no_names_above_their_adapters(file):
    named = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Attribute(value=ast.Name("F" | "nn" | "torch"), attr=name) | ast.Constant(value=str(name)):
                named.add(name)
    found = {name for name in named if re.fullmatch(OPERATION, name, flags=re.I)}
    assert found == KNOWS_OPERATIONS.get(str(file.relative_to(ROOT)), set())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_is_decided_by_the_name_of_an_operation(file):
    for node in ast.walk(ast.parse(file.read_text())):
        asked = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        asked += [node.value] if isinstance(node, ast.Attribute) else []  # use.operation.startswith
        assert not any(isinstance(x, ast.Attribute) and x.attr == "operation" for x in asked), ast.unparse(node)


def test_only_one_file_knows_processes():
    users = [f.name for f in FILES if "torch.distributed" in f.read_text()]
    assert set(users) <= {"distributed.py", "collection.py"}
