"""Classes of one name: a file gives back the one that was saved, or an error that names them."""

import importlib
import json
import types

import pytest
import safetensors
import safetensors.torch
import torch
from cases import build

import nngeom as nng
from nngeom.core.container import checksum
from nngeom.core.registry import Registry, qualified
from nngeom.fmat.fmat import FMat
from nngeom.pmat.block import Block
from nngeom.pmat.pmat import PMat

MATRIX = """
import nngeom as nng
class {name}(nng.PMatDiag):
    value = {value}
    def twice(self):
        return {value}
"""
BLOCK = """
from dataclasses import dataclass
import nngeom as nng
from nngeom.pmat.diag import DiagBlock
@dataclass(frozen=True, eq=False{more})
class {name}(DiagBlock):
    def scaled(self, c):
        return {name}({value} * c * self.d)
class {name}Matrix(nng.PMatDiag):
    @classmethod
    def recipe(cls, selection):
        return {{lay: {name}(b.d) for lay, b in (yield from nng.PMatDiag.recipe(selection)).items()}}
"""
KERNEL = """
from dataclasses import dataclass
import nngeom as nng
@dataclass(frozen=True, eq=False, repr=False)
class {name}(nng.FMatDiag):
    def value(self):
        return {value}
"""

TYPED = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
import nngeom as nng
from nngeom.pmat.diag import DiagBlock
if TYPE_CHECKING:
    from torch import Tensor
@dataclass(frozen=True, eq=False)
class {name}(DiagBlock):
    d: {annotation}
class {name}Matrix(nng.PMatDiag):
    @classmethod
    def recipe(cls, selection):
        return {{lay: {name}(b.d) for lay, b in (yield from nng.PMatDiag.recipe(selection)).items()}}
"""


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """Each test has its own, which begin with the classes of the library."""
    for base in (PMat, Block, FMat):
        registry = Registry()
        for cls in base.kinds.classes():
            if qualified(cls).startswith("nngeom."):
                registry.add(cls)
        monkeypatch.setattr(base, "kinds", registry)


def forget(base, cls):
    """As if the module of a class had not been imported."""
    registry = Registry()
    for other in base.kinds.classes():
        if other is not cls:
            registry.add(other)
    base.kinds = registry


def module(package, source, **values):
    """A module, or the state of a notebook, after some source was run in it."""
    made = types.ModuleType(package)
    exec(compile(source.format(**values), f"<{package}>", "exec"), made.__dict__)
    return made


def measured(cls):
    case = build("mlp")
    return (
        nng.GramMatrix(case.model, case.loader, cls) if issubclass(cls, FMat) else nng.FIM(case.model, case.loader, cls)
    )


def renamed(path, change):
    """A file whose objects are called otherwise."""

    def walk(x):
        if isinstance(x, dict):
            if "class" in x:
                change(x)
            for value in x.values():
                walk(value)
        elif isinstance(x, list):
            for value in x:
                walk(value)

    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
    tree = json.loads(metadata["nngeom"])
    walk(tree)
    header = json.dumps(tree)
    safetensors.torch.save_file(tensors, path, {"nngeom": header, "checksum": checksum(header, tensors)})


SOURCES = {"matrix": (MATRIX, PMat, "Mine"), "block": (BLOCK, PMat, "MineMatrix"), "kernel": (KERNEL, FMat, "Mine")}


@pytest.mark.parametrize("what", SOURCES)
def test_two_packages(tmp_path, what):
    source, base, name = SOURCES[what]
    a, b = (
        module(package, source, name="Mine", value=value, more="")
        for package, value in (("first.part", 1), ("second", 2))
    )
    for package in (a, b):
        m = measured(getattr(package, name))
        nng.save(m, tmp_path / package.__name__)
        copy = nng.load(tmp_path / package.__name__)
        assert type(copy) is getattr(package, name)
        if what == "block":
            assert all(type(block) is package.Mine for block in copy.blocks.values())
    forget(base, getattr(a, name))
    with pytest.raises(nng.FileError, match=rf"first.part.{name}.*not imported.*second.{name}"):
        nng.load(tmp_path / "first.part")
    forget(base, getattr(b, name))
    with pytest.raises(nng.FileError, match=f"'{name}', first.part.{name}, which this version does not know.*import"):
        nng.load(tmp_path / "first.part")


@pytest.mark.parametrize("what", SOURCES)
def test_notebook_cells(tmp_path, what):
    """A cell that is run again defines the same class; another one of that name is another class."""
    source, _, name = SOURCES[what]
    values = {"name": "Mine", "more": ""}
    old = getattr(module("__main__", source, value=1, **values), name)
    m = measured(old)
    nng.save(m, tmp_path / "m")
    again = getattr(module("__main__", source, value=1, **values), name)
    assert again is not old and type(nng.load(tmp_path / "m")) is again
    other = getattr(module("__main__", source, value=2, **values), name)
    with pytest.raises(nng.FileError, match=r"Mine.* is the name of 2 classes, __main__.* and __main__"):
        nng.load(tmp_path / "m")
    with pytest.raises(nng.ArgumentError, match="defined anew since"):
        nng.save(m, tmp_path / "m")
    nng.save(measured(other), tmp_path / "other")


def test_a_cell_that_changes_the_base_defines_another_class(tmp_path):
    values = {"name": "Mine", "value": 1, "more": ""}
    nng.save(measured(module("__main__", MATRIX, **values).Mine), tmp_path / "m")
    module("__main__", MATRIX.replace("nng.PMatDiag", "nng.PMatDense"), **values)
    with pytest.raises(nng.FileError, match=r"Mine.* is the name of 2 classes, __main__.* and __main__"):
        nng.load(tmp_path / "m")


def test_names_of_older_files(tmp_path):
    """They are short, and understood where they are unique."""
    shorten = lambda x: x.pop("qualified", None)
    mine = module("package", MATRIX, name="Mine", value=1).Mine
    for kind in (nng.PMatKFAC, nng.PMatEKFAC, nng.PMatMixed({"*": nng.PMatDiag}), mine, nng.FMatDense):
        m = measured(kind) if isinstance(kind, type) else nng.FIM(build("mlp").model, build("mlp").loader, kind)
        nng.save(m, tmp_path / "m")
        renamed(tmp_path / "m", shorten)
        copy = nng.load(tmp_path / "m")
        assert type(copy) is type(m) and torch.equal(copy.to_dense(), m.to_dense())
    nng.save(measured(nng.PMatDiag), tmp_path / "new")
    nng.save(measured(nng.PMatDiag), tmp_path / "old")
    renamed(tmp_path / "old", shorten)
    module("package", MATRIX, name="PMatDiag", value=1)
    with pytest.raises(nng.FileError, match=r"2 classes, nngeom.pmat.diag.PMatDiag.* and package.PMatDiag"):
        nng.load(tmp_path / "old")
    assert type(nng.load(tmp_path / "new")) is nng.PMatDiag
    assert type(nng.FIM(build("mlp").model, build("mlp").loader, nng.PMatKFAC).inverse(1.0)) is nng.PMatEKFAC


def test_classes_that_moved(tmp_path):
    """Within the library, and out of a script that is imported now."""
    nng.save(measured(nng.PMatKFAC), tmp_path / "m")
    renamed(tmp_path / "m", lambda x: "qualified" in x and x.update(qualified="nngeom.elsewhere." + x["class"]))
    assert type(nng.load(tmp_path / "m")) is nng.PMatKFAC
    script = module("__main__", MATRIX, name="Mine", value=1).Mine
    nng.save(measured(script), tmp_path / "s")
    forget(PMat, script)
    imported = module("script", MATRIX, name="Mine", value=1).Mine
    assert type(nng.load(tmp_path / "s")) is imported
    module("another", MATRIX, name="Mine", value=1)
    with pytest.raises(nng.FileError, match=r"2 classes, script.Mine .* and another.Mine"):
        nng.load(tmp_path / "s")


def test_local_classes(tmp_path):
    """By the same code around other values they are others; a dataclass with slots, which is made twice, is one."""

    def make(value):
        class Mine(nng.PMatDiag):
            def twice(self):
                return value

            def parent(self):
                return super().trace()

        return Mine

    first, second = make(1), make(1)
    nng.save(measured(second), tmp_path / "m")
    assert type(nng.load(tmp_path / "m")) is second is not first
    make(2)
    with pytest.raises(nng.FileError, match=r"2 classes.*make.<locals>.Mine \(.*test_registry.py:\d+\) and"):
        nng.load(tmp_path / "m")
    slotted = module("package", BLOCK, name="Slotted", value=1, more=", slots=True").SlottedMatrix
    nng.save(measured(slotted), tmp_path / "m")
    assert type(nng.load(tmp_path / "m")) is slotted


def test_registries_list_short_names():
    assert {"PMatDiag", "PMatKFAC", "PMatMixed"} <= set(PMat.kinds)
    assert PMat.kinds["PMatDiag"] is PMat.kinds["nngeom.pmat.diag.PMatDiag"] is nng.PMatDiag
    with pytest.raises(KeyError):
        PMat.kinds["PMatNone"]
    with pytest.raises(nng.ArgumentTypeError, match="'PMatDense', 'PMatDiag'"):
        nng.FIM(build("mlp").model, build("mlp").loader, 3)


def test_bytes_of_tensors_in_tuples():
    """Of tied parameters the factors of every use are held too."""
    case = build("language-model")
    m = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    held = [t for block in m.blocks.values() for t in block.tensors()]
    tuples = [t for block in m.blocks.values() for f in block.fields().values() if isinstance(f, tuple) for t in f]
    assert tuples and m.nbytes() == sum(t.numel() * t.element_size() for t in held)
    loose = [f for block in m.blocks.values() for f in block.fields().values() if isinstance(f, torch.Tensor)]
    assert m.nbytes() == sum(t.nbytes for t in loose + tuples) > sum(t.nbytes for t in loose)


@pytest.mark.parametrize("annotation", ["Tensor", "Any"])
def test_annotations_for_type_checkers_alone_are_believed(tmp_path, monkeypatch, annotation):
    """``Tensor`` cannot be looked up here, and ``Any`` is a class that nothing is an instance of."""
    name = f"annotated_by_{annotation}".lower()
    (tmp_path / f"{name}.py").write_text(TYPED.format(name="Mine", annotation=annotation))
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(name)
    m = measured(package.MineMatrix)
    nng.save(m, tmp_path / "m")
    copy = nng.load(tmp_path / "m")
    assert type(copy) is package.MineMatrix and torch.equal(copy.to_dense(), m.to_dense())
