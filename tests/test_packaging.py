"""What is distributed is whole: an sdist and a wheel, built, installed beside nothing else, run what the docs show."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import nngeom as nng

ROOT = Path(__file__).parent.parent
TEXTS = {".py", ".md", ".toml", ".cff", ".txt", ".in", ".js", ".yml"}
SKIPPED = {
    ".git",
    "_build",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "out",
}


def texts() -> list[Path]:
    """All texts of the project, not of what stands in its folder by chance."""
    found = [f for f in ROOT.rglob("*") if f.suffix in TEXTS or f.name == "Makefile"]
    ours = lambda parts: SKIPPED.isdisjoint(parts) and not parts[0].startswith(".venv")  # of other versions, too
    return [f for f in found if ours(f.relative_to(ROOT).parts) and ".egg-info" not in str(f)]


def test_nobody_is_told_to_install_what_is_not_ours():
    """``nngeom`` on the package index is another project's; so is whatever ``pip install nngeom[...]`` would bring."""
    ours = re.compile(r"(pip|uv|poetry|conda)[^\n`]{0,30} (install|add) [^\n`]*?['\"\s]nngeom(?!-torch|\w)")
    told = {str(f.relative_to(ROOT)): ours.findall(f.read_text()) for f in texts() if f != Path(__file__)}
    assert {name: found for name, found in told.items() if found} == {}
    assert ours.search("pip install 'nngeom[plot]'") and ours.search("pip install -U nngeom")
    assert not ours.search("pip install nngeom-torch") and not ours.search("pip install nngeometry")


def test_missing_libraries_are_named_by_their_own_names():
    """Every error that a library is missing says ``pip install`` and a name which is no extra of ours."""
    for file in (ROOT / "nngeom").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtraError":
                parts = [c.value for c in ast.walk(node.args[0]) if isinstance(getattr(c, "value", None), str)]
                assert "pip install" in "".join(parts) and not re.search(r"nngeom|\[", "".join(parts)), file


def test_versions_and_names_agree():
    tomllib = pytest.importorskip("tomllib")
    yaml = pytest.importorskip("yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "nngeom-torch" and project["license"] == "MIT"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == nng.__version__ and cited["cff-version"] == "1.2.0" and cited["authors"]
    assert f"## [{nng.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    oldest = int(re.search(r">=3\.(\d+)", project["requires-python"])[1])
    pythons = [int(m[1]) for c in project["classifiers"] if (m := re.fullmatch(r".*Python :: 3\.(\d+)", c))]
    assert min(pythons) == oldest and pythons == sorted(pythons)


def test_outside_of_the_repository_no_link_leads_nowhere():
    """What a package index shows says what the README says, and has links to whole addresses alone, or none."""
    shown, readme = ((ROOT / name).read_text() for name in ("DESCRIPTION.md", "README.md"))
    link = re.compile(r"\]\((?!https://)[^)]*\)")
    assert link.search(readme) and not link.search(shown)
    said, code = shown.split("\n\n")[1], re.search(r"```python.*?```", shown, re.S)[0]
    assert said in readme and code in readme


def test_dependencies_are_those_that_are_imported():
    """Every library that is imported when ``nngeom`` is imported is asked for, and no other."""
    tomllib = pytest.importorskip("tomllib")
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", d)[0].replace("-", "_") for d in asked}
    used = set()
    for file in (ROOT / "nngeom").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
    outer = used - set(sys.stdlib_module_names) - {"nngeom"}
    optional = {
        "matplotlib",
        "threadpoolctl",
        "lightning",
        "transformers",
        "tensorboard",
        "pytorch_lightning",
        "accelerate",
        "laplace",
    }
    assert names <= outer and outer - names <= optional, outer - names


# -- built -------------------------------------------------------------------------------------------------------------


def run(*command: str, cwd: Path) -> str:
    """The output of a command that succeeds, with no folder on its path but its own."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def built(source: Path, kind: str, to: Path) -> Path:
    """An ``sdist`` or a ``wheel`` of a source tree, in a process of its own, without a network."""
    pytest.importorskip("setuptools", "77")
    code = f"from setuptools import build_meta; print('made', build_meta.build_{kind}({str(to)!r}))"
    return to / re.search(r"made (\S+)", run(sys.executable, "-c", code, cwd=source))[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, which building does not litter."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED, ".venv*", "*.egg-info", "build", "dist"))
    if (ROOT / ".git").exists() and shutil.which("git"):  # what lies there by chance is no part of it
        known = {copy / name for name in run("git", "ls-files", cwd=ROOT).splitlines()}
        for stray in [f for f in copy.rglob("*") if f.is_file() and f not in known]:
            stray.unlink()
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return built(source, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """The sdist as a folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Built from the sdist, as an installer does."""
    return built(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


def files(folder: Path) -> set[str]:
    """All files below, relative."""
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_the_sdist_is_whole(source, sdist, unpacked):
    assert re.fullmatch(r"nngeom_torch-[\d.]+\.tar\.gz", sdist.name)
    tracked = {f for f in files(source) if not f.startswith(("nngeom_torch.egg-info/", ".")) and "__pycache__" not in f}
    assert tracked - files(unpacked) == set(), "MANIFEST.in leaves these out"
    extra = {f for f in files(unpacked) - tracked if ".egg-info" not in f}
    assert extra <= {"PKG-INFO", "setup.cfg"}  # the last is written by setuptools itself


def test_the_wheel_holds_the_library_alone(unpacked, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        told = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    library = {f for f in files(unpacked) if f.startswith("nngeom/")}
    assert names == library and {"nngeom/py.typed", "nngeom/page/assets/page.js"} <= names
    assert (unpacked / "DESCRIPTION.md").read_text().strip() in told
    assert "Name: nngeom-torch" in told and "Requires-Python: >=3.10" in told and "License-Expression: MIT" in told


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Makes an environment with one distribution installed, which sees the libraries of this one but not its nngeom."""

    def make(distribution: Path) -> str:
        folder = tmp_path_factory.mktemp("fresh") / "venv"
        run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
        (site,) = folder.glob("lib/python*/site-packages")
        place = Path(metadata.distribution("torch").locate_file(""))
        (site / "libraries.pth").write_text(
            f"{place}\n"
        )  # a folder on the path alone: no editable install of it counts
        install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
        run(sys.executable, "-m", "pip", *install, str(distribution), cwd=folder.parent)
        return str(folder / "bin" / "python")

    return make


AFTERWARDS = """
from importlib.metadata import version

nng.report("a.html", torch.nn.Linear(2, 2), [torch.ones(3, 2)])
print(nng.__file__)
print(version("nngeom-torch"))
"""


@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def test_installed_it_runs_the_quickstart(kind, fresh, request, tmp_path):
    python = fresh(request.getfixturevalue(kind))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "quickstart.md").read_text(), re.M | re.S)
    (tmp_path / "quickstart.py").write_text("\n".join([*blocks, AFTERWARDS]))
    file, version = run(python, "-W", "error", "quickstart.py", cwd=tmp_path).splitlines()[-2:]
    assert Path(file).is_relative_to(Path(python).parent.parent) and version == nng.__version__
    assert "addEventListener" in (tmp_path / "a.html").read_text()
    assert "report" in run(python, "-m", "nngeom", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(unpacked):
    chosen = [
        "tests/test_docstrings.py",
        "tests/test_regression.py",
        "tests/test_docs.py::test_links_between_pages_resolve",
    ]
    out = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *chosen, cwd=unpacked)
    assert re.search(r"100%", out)
    where = "import nngeom; print(nngeom.__file__)"
    assert Path(run(sys.executable, "-c", where, cwd=unpacked).strip()).is_relative_to(unpacked)
