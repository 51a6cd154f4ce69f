"""The house rules that a reader relies on: one direction of imports, no layer names where they do not belong."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nngeom

ROOT = Path(__file__).parent.parent / "nngeom"
ORDER = ["core", "ranks", "solve", "layers", "space", "capture", "pullback", "sweep", "cotangents", "pmat", "fmat"]
ORDER += ["maps", "measures", "attribution", "top", "views", "optim", "analysis", "mgs", "linearized", "track", "plot"]
ORDER += ["page", "interop", "__init__"]
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
    outermost = len(parts) == 1 or parts[1] == "__main__"
    name = "__init__" if outermost else parts[1] if (ROOT / parts[1]).is_dir() else "top"
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
    "_parameters": "torch's, of modules: what they hold under which name",
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
    words = rf"\b(conv(?!ergence)\w*|embedding|attention|{norms}|bilinear|F\.linear|nn\.\w+|patches|im2col|unfold)\b"
    allowed = {"implicit.py": {"F.embedding", "embedding", "attention", "nn.attention", "nn.functional", "nn.Module"}}
    allowed["sum_block.py"] = {"ConvergenceError"}
    found = {m.group(0) for m in re.finditer(words, code, flags=re.I)} - allowed.get(file.name, set())
    assert not {w for w in found if w.lower() not in {"nn.parameter"}}, found


@pytest.mark.parametrize("file", sorted((ROOT / "layers").glob("*.py")), ids=lambda f: f.name)
def test_adapters_know_no_representation(file):
    assert not re.search(r"PMat|FMat|Kronecker|KFAC|EKFAC", re.sub(r'""".*?"""', "", file.read_text(), flags=re.S))


REPRESENTATION = re.compile(r"(PMat|FMat|PushForward|PullBack)[A-Z]\w*")
BY_PRODUCTS = {"PMatImplicit", "FMatImplicit", "PushForwardImplicit", "PullBackImplicit"}
# (package or module, names that its code asks for or makes, reason); the other packages name none
NAMES_REPRESENTATIONS = [
    ("measures", BY_PRODUCTS, "they hold a model, and are not measured by a recipe or by tiles"),
    ("measures", {"FMatSharded"}, "rows of an FMatDense that are not gathered"),
    ("measures.in_parts", {"PMatSharded"}, "what parts of any representation make"),
    ("measures", {"PushForwardDense", "PullBackDense"}, "maps have two representations each"),
    ("measures", {"PushForwardSharded", "PullBackSharded"}, "rows of these that are not gathered"),
    ("measures", {"FMatDense", "FMatDiag", "FMatBlockDiag"}, "files and estimates of kernels are of these kinds"),
    ("measures", {"PMatKFAC", "PMatLowRank"}, "what is measured by default, said to type checkers"),
    ("attribution.influence", {"PMatInFiles"}, "scores are sums over the parts of a folder"),
    ("attribution.over_products", {"PMatImplicit", "PMatSharded"}, "whose products processes make together"),
    ("opened_folder", {"PMatInFiles"}, "what a folder is opened as"),
    ("checks", {"PMatSum", "FMatSum"}, "sums do not check their own values"),
    ("io", {"FMatSharded", "PMatSharded"}, "kept in parts, and so in a folder"),
    ("matrix_folder", {"PMatSharded"}, "layers that processes keep"),
    ("kernel_folder", {"FMatDense", "FMatSharded"}, "rows that processes keep, and the whole that they are of"),
    ("tree", {"PMatSum", "PMatProduct", "FMatSum", "PushForwardDense", "PullBackDense"}, "a closed list, for files"),
    ("analysis", {"FMatDense"}, "kernels of a quantity's own, entry by entry"),
    ("analysis.fisher_rao", {"PMatImplicit"}, "one product with the Fisher matrix"),
    ("optim.arguments", {"PMatDiag", "PMatEye"}, "names of rest="),
    ("interop", {"PMatBlockDiag", "PMatDense", "PMatDiag", "PMatKFAC", "PMatMixed"}, "what other libraries ask for"),
    ("optim.kfac", {"PMatKFAC"}, "a preset"),
    ("optim.ekfac", {"PMatEKFAC"}, "a preset"),
    ("optim.soap", {"PMatEKFAC"}, "a preset"),
    ("optim.eigenbasis", {"PMatEKFAC"}, "how this one is kept in training"),
]


def representations_in(node: ast.AST) -> set[str]:
    """The representations that code names: not text, imports, annotations and defaults of arguments."""
    passed_over = (ast.arguments, ast.Import, ast.ImportFrom)
    children = [c for c in ast.iter_child_nodes(node) if not isinstance(c, passed_over)]
    children = [c for c in children if c not in (getattr(node, "returns", None), getattr(node, "annotation", None))]
    own = {getattr(node, "id", getattr(node, "attr", ""))}
    return {name for name in own if REPRESENTATION.fullmatch(name)}.union(*map(representations_in, children))


def allowed_representations(name: str) -> list[tuple[str, set[str]]]:
    place = name.removeprefix("nngeom.")
    return [(of, names) for of, names, _ in NAMES_REPRESENTATIONS if place == of or place.startswith(f"{of}.")]


@pytest.mark.parametrize("name", [n for n in TREES if n.split(".")[1:2] not in (["pmat"], ["fmat"], ["maps"])])
def test_representations_are_asked_not_listed(name):
    assert representations_in(TREES[name]) <= set().union(*(names for _, names in allowed_representations(name)))


def test_representations_that_may_be_named_are():
    places = [(of, representations_in(tree)) for n, tree in TREES.items() for of, _ in allowed_representations(n)]
    named = [(of, x) for of, found in places for x in found]
    assert [(of, x) for of, names, _ in NAMES_REPRESENTATIONS for x in names if (of, x) not in named] == []


KNOWS_OPERATIONS = {
    "capture/recorder.py": {"batch_norm"},  # in a training step of the user's it mixes examples, and is let pass
    "capture/fused.py": {"embedding", "embedding_bag"},  # gradients with gaps, and padding in forward mode
    "capture/written_out.py": {"embedding_bag", "layer_norm", "instance_norm", "prelu"},  # formulas in their place
    "pullback/placement.py": {"NativeBatchNorm"},  # of the batch in a training step
    "plot/heatmap.py": {"linear"},  # a scale of matplotlib
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


def test_no_module_hides_a_public_function():
    """``nngeom.explain`` is what is called, whatever was imported before."""
    assert {name for name in nngeom.__all__ if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()} == set()


def test_only_one_file_knows_processes():
    """``DistributedDataParallel``, which a model may be wrapped in, is of ``torch.nn``."""
    foreign = ((name, node) for name, tree in TREES.items() for node in ast.walk(tree))
    users = {
        name
        for name, node in foreign
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
        or (isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names))
        or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"))
    }
    assert users == {"nngeom.ranks.team"}


LINES, COLUMNS, PARAMETERS, POSITIONAL = 250, 120, 8, 6
SHARED = {"model", "loader", "function", "layer_collection", "progress", "memory_budget", "check", "process_group"}
SHARED |= {"checkpoint", "every"}
ADAPTERS = {  # parameters stand where those of torch's functions do, which these are called for or call
    *("nngeom.layers.embedding", "nngeom.layers.norm", "nngeom.layers.refuse", "nngeom.capture.written_out"),
}
# functions that take booleans by position, with the reason
BY_POSITION = {
    "nngeom.analysis.alignment.alignment": "public: alignment(K, L, centered=True)",
    "nngeom.analysis.alignment.label_alignment": "public: label_alignment(model, loader, centered, by_layer)",
    "nngeom.checks._require": "a condition, and what to say where it does not hold",
    "nngeom.cotangents.causal.CausalLM.__init__": "public: CausalLM(ignore_index=-100, logits_are_shifted=False)",
    "nngeom.cotangents.precise.logsumexp": "torch.logsumexp",
    "nngeom.interop.laplace.NNGeomInterface.jacobians": "laplace's: jacobians(x, enable_backprop)",
    "nngeom.interop.laplace.NNGeomInterface.selected_output_jacobians": "laplace's",
    "nngeom.optim.preconditioned.Preconditioned.zero_grad": "torch.optim.Optimizer.zero_grad",
    "nngeom.optim.robust.WinsorizedSGD.zero_grad": "torch.optim.Optimizer.zero_grad",
}
# functions of many parameters, all options of a training, of a kernel, of scores: the public contract fixes them
MANY = {f"nngeom.optim.{name}.__init__" for name in ("natural_gradient.NaturalGradient", "kfac.KFAC", "ekfac.EKFAC")}
MANY |= {"nngeom.measures.kernels.GramMatrix", "nngeom.attribution.influence.influence"}
CALLED = r"getattr|setattr|set_\w+"  # by others: of a name and a value


def functions(tree: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        inner = f"{path}.{node.name}" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else path
        if isinstance(node, ast.FunctionDef):
            yield inner, node
        yield from functions(node, inner)


def is_boolean(node: ast.AST) -> bool:
    """Whether this is ``True`` or ``False``."""
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def takes_booleans(node: ast.FunctionDef) -> bool:
    """Whether a boolean may be given by position."""
    types = (part for a in node.args.args if a.annotation for part in ast.unparse(a.annotation).split(" | "))
    return "bool" in types or any(map(is_boolean, node.args.defaults))


FUNCTIONS = {path: node for name in TREES if name not in ADAPTERS for path, node in functions(TREES[name], name)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_and_lines_are_short(file):
    lines = [re.sub(r"  # type: ignore.*", "", line) for line in file.read_text().splitlines()]
    assert len(lines) <= LINES, "split it by concept"
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_booleans_go_by_name():
    assert {path for path, node in FUNCTIONS.items() if takes_booleans(node)} == BY_POSITION.keys(), "put a * before"


def test_functions_take_few_parameters():
    many = {
        path
        for path, node in FUNCTIONS.items()
        if len({a.arg for a in [*node.args.args, *node.args.kwonlyargs]} - {"self", "cls"} - SHARED) > PARAMETERS
    }
    assert {path for path in many if not path.startswith("nngeom.layers.")} == MANY


@pytest.mark.parametrize("name", [name for name in TREES if name not in ADAPTERS])
def test_calls_name_what_they_pass(name):
    for node in (n for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)):
        called = ast.unparse(node.func).rpartition(".")[2]
        assert len(node.args) <= POSITIONAL or called == "adapts", ast.unparse(node)
        assert not any(map(is_boolean, node.args)) or re.fullmatch(CALLED, called), ast.unparse(node)
