"""Do the tests fail when the code is wrong? Random small changes of the library, one at a time, and what notices them.

``python tests/mutants.py --count 20 --seed 0 --jobs 2`` draws changes (an operator, a comparison, a condition, a
transpose, a constant) in ``nngeom/{core,pmat,fmat,metrics,generator,optim}``. For each, in a copy of the tree, it runs
the test files most likely to touch the place, then all others of ``make test``, until one fails or the time is over.
Survivors are printed with their diffs: a test is missing there, or the change means the same. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "pmat", "fmat", "cotangents", "capture", "pullback", "sweep", "optim")
MEMORY = 24 * 2**30  # bytes of addresses: a change may allocate without end
EXCHANGED = {
    ast.Lt: ("<", (">", "<=")),
    ast.Gt: (">", ("<", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.And: ("and", ("or",)),
    ast.Or: ("or", ("and",)),
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("*",)),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
}


@dataclass(frozen=True)
class Change:
    """``source[lo:hi]`` replaced by ``new``."""

    lo: int
    hi: int
    new: str

    def applied(self, source: str) -> str:
        """The changed source."""
        return source[: self.lo] + self.new + source[self.hi :]


@dataclass(frozen=True)
class Mutant:
    """One change of one file of the library."""

    file: str  # relative to the root
    line: int
    scope: str  # the function or class around it
    source: str
    changed: str

    def diff(self) -> str:
        """As ``diff -u`` shows it."""
        lines = (self.source.splitlines(), self.changed.splitlines())
        return "\n".join(difflib.unified_diff(*lines, self.file, self.file, n=2, lineterm=""))


# -- changes -----------------------------------------------------------------------------------------------------------


def changes(source: str) -> Iterator[tuple[Change, int, str]]:
    """Every change of a source, its line and the name of what it stands in; a few are no program, or the same one."""
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    at = lambda line, column: starts[line - 1] + len(lines[line - 1].encode()[:column].decode())
    span = lambda node: (at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset))
    for node, scope in _within(ast.parse(source), "module"):
        for change in _of(node, span, source):
            yield change, node.lineno, scope


def differs(changed: str, source: str) -> bool:
    """Whether a changed source is a program, and another one."""
    try:
        return ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _within(node: ast.AST, scope: str) -> Iterator[tuple[ast.AST, str]]:
    """All that computes something: no annotations, texts, decorators, nor what only makes an error or a name."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)
            ):
                continue
            if isinstance(child, ast.Call) and getattr(child.func, "attr", "") == "manual_seed":
                continue  # another seed is as good
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            if named and child.name == "__repr__":
                continue
            inner = child.name if named else scope
            yield child, inner
            yield from _within(child, inner)


def _of(node: ast.AST, span, source: str) -> Iterator[Change]:
    """The changes of one node."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:]):
            yield from _exchanged(op, span(left)[1], span(right)[0], source)
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):
            yield from _exchanged(node.op, span(left)[1], span(right)[0], source)
    elif isinstance(node, ast.BinOp):
        if not isinstance(node.op, ast.BitOr) or not isinstance(node.left, ast.Name):  # types are joined by | too
            yield from _exchanged(node.op, span(node.left)[1], span(node.right)[0], source)
        if isinstance(node.op, ast.MatMult):
            for side in (node.left, node.right):
                yield Change(*span(side), f"({source[slice(*span(side))]}).mT")
    elif isinstance(node, ast.AugAssign):
        yield from _exchanged(node.op, span(node.target)[1], span(node.value)[0], source)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield Change(*span(node), f"({source[slice(*span(node.operand))]})")
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield Change(*span(node), source[slice(*span(node.value))])
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        lo, hi = span(node.test)
        yield Change(lo, hi, f"(not ({source[lo:hi]}))")
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        new = (
            not value
            if isinstance(value, bool)
            else value + 1
            if isinstance(value, int)
            else 2 * value
            if value
            else 1.0
        )
        yield Change(*span(node), repr(new))


def _exchanged(op: ast.AST, lo: int, hi: int, source: str) -> Iterator[Change]:
    """The operator that stands between two places."""
    text, others = EXCHANGED.get(type(op), ("", ()))
    word = r"\b" if text[:1].isalpha() else ""
    found = re.search(word + re.escape(text).replace(r"\ ", r"\s+") + word, source[lo:hi]) if text else None
    for other in others if found else ():
        yield Change(lo + found.start(), lo + found.end(), other)


def draw(count: int, seed: int, root: Path = ROOT, only: str = "") -> list[Mutant]:
    """So many different mutants of the library, the same for the same seed and tree."""
    every: list[tuple[str, str, Change, int, str]] = []
    for folder in FOLDERS:
        for path in sorted((root / "nngeom" / folder).glob("*.py")):
            name = str(path.relative_to(root))
            if only in name:
                source = path.read_text()
                every += [(name, source, *found) for found in changes(source)]
    random.Random(seed).shuffle(every)
    made = (Mutant(name, line, scope, source, change.applied(source)) for name, source, change, line, scope in every)
    return list(itertools.islice((m for m in made if differs(m.changed, m.source)), count))


# -- tests -------------------------------------------------------------------------------------------------------------


def ordered_tests(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """All test files, those first that speak of the changed module and of what it defines, in words that few use."""
    module = mutant.file.removesuffix(".py").replace("/", ".")
    tree = ast.parse(mutant.source)
    names = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")}
    texts = {path: path.read_text() for path in sorted((root / "tests").rglob("test_*.py"))}
    weights = {
        module: 6.0,
        Path(mutant.file).stem: 2.0,
        mutant.scope: 4.0,
        **dict.fromkeys(names - {mutant.scope}, 1.0),
    }

    hits = {w: {p: len(re.findall(rf"\b{re.escape(w)}\b", text)) for p, text in texts.items()} for w in weights}
    rare = {w: math.log((1 + len(texts)) / (1 + sum(n > 0 for n in found.values()))) for w, found in hits.items()}

    def score(path: Path) -> float:
        own = 8.0 if Path(mutant.file).stem in path.stem or Path(mutant.file).parent.name in path.stem else 0.0
        return own + sum(weights[w] * rare[w] * min(hits[w][path], 5) for w in weights)

    return [str(path.relative_to(root)) for path in sorted(texts, key=score, reverse=True)]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    killed: bool
    by: str
    seconds: float

    def line(self) -> str:
        """One line."""
        what = "killed  " if self.killed else "SURVIVED"
        return f"{what} {self.mutant.file}:{self.mutant.line} ({self.mutant.scope}) {self.seconds:.0f} s {self.by}"


def judge(mutant: Mutant, tree: Path, limit: float, first: int, rest: bool) -> Verdict:
    """Run the tests on the mutant in a copy of the tree, which is put back afterwards."""
    begin, place = time.monotonic(), tree / mutant.file
    place.write_text(mutant.changed)
    try:
        tests = ordered_tests(mutant, tree)
        for group in (*([t] for t in tests[:first]), *([tests[first:]] if rest else [])):
            by = run(group, tree, limit - (time.monotonic() - begin))
            if by:
                return Verdict(mutant, True, by, time.monotonic() - begin)
        return Verdict(mutant, False, "", time.monotonic() - begin)
    finally:
        place.write_text(mutant.source)


def run(files: list[str], tree: Path, limit: float) -> str:
    """The first test that fails, or the time limit; empty where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, start_new_session=True, **options)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        out, _ = process.communicate(timeout=max(limit, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and what it started
        process.communicate()
        return "by the time limit"
    if process.returncode in (0, 5):  # 5: none but slow tests
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", out, re.M)
    return f"by {failed[0]}" if failed else f"by exit status {process.returncode}"


def copied(root: Path, place: Path) -> Path:
    """A copy of the files of a tree that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place / name)
    return place


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds a mutant; one that takes longer counts as killed"
    )
    parser.add_argument("--only", default="", help="a part of the path of the files to change")
    parser.add_argument("--first", type=int, default=6, help="test files run one by one, the likeliest first")
    parser.add_argument("--no-rest", action="store_true", help="none but the first: survivors are to be looked at")
    parser.add_argument("--list", action="store_true", help="print the diffs and run nothing")
    args = parser.parse_args()
    mutants = draw(args.count, args.seed, only=args.only)
    if args.list:
        print("\n\n".join(m.diff() for m in mutants))
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees: Queue[Path] = Queue()
        for j in range(args.jobs):
            trees.put(copied(ROOT, Path(folder) / str(j)))

        def one(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                return judge(mutant, tree, args.limit, args.first, not args.no_rest)
            finally:
                trees.put(tree)

        verdicts = []
        for verdict in pool.map(one, mutants):
            verdicts.append(verdict)
            print(verdict.line(), flush=True)
    survivors = [v.mutant for v in verdicts if not v.killed]
    print(f"\n{len(verdicts) - len(survivors)} of {len(verdicts)} killed")
    for mutant in survivors:
        print(f"\n{mutant.diff()}")


if __name__ == "__main__":
    main()
