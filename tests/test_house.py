"""The house rules that a reader relies on: one direction of imports, no layer names where they do not belong."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nngeom"
ORDER = ["core", "solve", "layers", "space", "capture", "pullback", "sweep", "cotangents", "pmat", "fmat", "maps"]
ORDER += ["measures", "top", "optim", "analysis", "mgs", "linearized", "track", "__init__"]
FILES = sorted(ROOT.rglob("*.py"))


# (module, imported, reason): imports upwards, inside functions
UPWARD = [
    ("nngeom.pmat.ekfac", "nngeom.measures.second_moments", "rescaled() measures with FIM unless told otherwise"),
]


def module(file: Path) -> str:
    """The name that a file is imported by."""
    return ".".join(["nngeom", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def floor(path_or_module: str) -> int:
    """The storey of the house a module is on: that of its package, or of the single files."""
    parts = path_or_module.split(".")
    name = "__init__" if len(parts) == 1 else parts[1] if (ROOT / parts[1]).is_dir() else "top"
    return ORDER.index(name)


TREES = {module(file): ast.parse(file.read_text()) for file in FILES}


def imports(node: ast.AST) -> Iterator[str]:
    """The modules of the library that are imported when the code runs, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            parts = (f"{child.module}.{alias.name}" for alias in child.names)
            yield from (part if part in TREES else child.module for part in parts)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        yield from imports(child)


IMPORTS = {name: {other for other in imports(tree) if other in TREES} for name, tree in TREES.items()}


@pytest.mark.parametrize("name", TREES)
def test_imports_go_down(name):
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(TREES[name])), "relative"
    up = {other for other in IMPORTS[name] if floor(other) > floor(name)}
    assert up == {other for mine, other, _ in UPWARD if mine == name}


def test_no_import_upwards_is_listed_twice_or_of_no_module():
    pairs = [(mine, other) for mine, other, _ in UPWARD]
    assert len(set(pairs)) == len(pairs) and {mine for mine, _ in pairs} <= TREES.keys()


def test_imports_make_no_circles():
    allowed = {(mine, other) for mine, other, _ in UPWARD}
    above = {name: {o for o in others if (name, o) not in allowed} for name, others in IMPORTS.items()}
    while free := {name for name, others in above.items() if not others & above.keys()}:  # imports nothing that is left
        above = {name: others for name, others in above.items() if name not in free}
    assert not above, f"these import each other, or one that does: {sorted(above)}"


def test_imports_of_the_library_stand_at_the_top():
    late = {
        (name, other)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for other in imports(node)
        if other in TREES
    }
    assert late == {(mine, other) for mine, other, _ in UPWARD}


# private names that modules other than their own may use, with the reason
BORROWED = {
    "_base": "torch's, of tensors that are views",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined(tree: ast.AST) -> set[str]:
    """The private names of functions, classes, variables and attributes that a module makes."""
    stored = (node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store))
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {getattr(node, "attr", getattr(node, "id", "")) for node in stored}
    return {name for name in names if private(name)}


DEFINED = {name: defined(tree) for name, tree in TREES.items()}


def borrowed(name: str) -> set[str]:
    """The private names of other modules that a module uses, but for those that its classes inherit."""
    mine, nodes = {"self", "cls", "super()"}, list(ast.walk(TREES[name]))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) not in mine}
    used |= {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return {x for x in used if private(x) and any(x in names for other, names in DEFINED.items() if other != name)}


@pytest.mark.parametrize("name", TREES)
def test_private_names_stay_in_their_module(name):
    assert borrowed(name) <= BORROWED.keys()


def test_private_names_that_may_be_borrowed_are():
    assert set().union(*map(borrowed, TREES)) == BORROWED.keys()


@pytest.mark.parametrize("file", sorted((ROOT / "pmat").glob("*.py")), ids=lambda f: f.name)
def test_representations_know_no_operation(file):
    code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.S)
    norms = r"layer_?norm|batch_?norm|group_?norm|rms_?norm"
    words = rf"\b(conv\w*|embedding|attention|{norms}|bilinear|F\.linear|nn\.\w+|patches|im2col|unfold)\b"
    allowed = {"implicit.py": {"F.embedding", "embedding", "attention", "nn.attention", "nn.functional", "nn.Module"}}
    allowed["sum_block.py"] = {"ConvergenceError"}
    found = {m.group(0) for m in re.finditer(words, code, flags=re.I)} - allowed.get(file.name, set())
    assert not {w for w in found if w.lower() not in {"nn.parameter"}}, found


@pytest.mark.parametrize("file", sorted((ROOT / "layers").glob("*.py")), ids=lambda f: f.name)
def test_adapters_know_no_representation(file):
    assert not re.search(r"PMat|FMat|Kronecker|KFAC|EKFAC", re.sub(r'""".*?"""', "", file.read_text(), flags=re.S))


KNOWS_OPERATIONS = {
    "capture/recorder.py": {"batch_norm"},  # in a training step of the user's it mixes examples, and is let pass
    "capture/fused.py": {"embedding", "embedding_bag"},  # gradients with gaps, and padding in forward mode
    "capture/written_out.py": {"embedding_bag", "layer_norm", "instance_norm", "prelu"},  # formulas in their place
    "pullback/placement.py": {"NativeBatchNorm"},  # of the batch in a training step
    "pullback/verify.py": {"NativeGroupNorm"},  # without its input the process ends (torch 2.13)
}
APART = {
    "layers",
    "pullback/safe",  # rules of torch's own operations, by the names of their nodes
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
