"""What type checkers are told of the public functions is true, and told: ``tests/typing/usage.py``, checked and run."""

import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from small import model_of, normal
from torch import nn

import nngeom as nng
from nngeom.fmat.operator import FunctionOperator
from nngeom.pmat.operator import ParameterOperator

ROOT = Path(__file__).parent.parent
USAGE = ROOT / "tests" / "typing" / "usage.py"
DECLARED = {"trace", "diag", "norm", "solve", "logdet", "eigh", "to", "mv", "vTMv", "to_dense", "scaled"}


@pytest.mark.timeout(420)
def test_mypy_accepts_a_users_file(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", str(USAGE)]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "usage")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def usage() -> types.ModuleType:
    """The user's file, whose types are compared with those of what it is given."""
    module = types.ModuleType("usage")
    exec(compile(USAGE.read_text(), str(USAGE), "exec"), module.__dict__)
    module.__dict__["assert_type"] = is_of
    return module


def is_of(value: object, kind: object) -> None:
    """Whether a value is of a type, in the containers that the file uses too."""
    outer, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    assert isinstance(value, outer), f"a {type(value).__name__} was said to be a {kind}"
    if outer is tuple:
        assert len(value) == len(inner) and all(isinstance(x, t) for x, t in zip(value, inner))
    if outer is dict:
        assert value and all(isinstance(x, t) for item in value.items() for x, t in zip(item, inner))


@pytest.fixture
def given() -> dict[str, object]:
    model = model_of(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    loader = [(normal(12, 3), torch.arange(12) % 2)]
    matrix = nng.FIM(model, loader, likelihood="gaussian")
    return {
        "model": model,
        "loader": loader,
        "m": matrix,
        "n": nng.FIM(model, loader, nng.PMatDiag, likelihood="gaussian"),
        "v": nng.PVector.randn(matrix.layer_collection, dtype=torch.float64),
        "j": nng.Jacobian(model, loader),
        "f": nng.FVector(normal(2, 12)),
        "k": nng.GramMatrix(model, loader),
        "kind": nng.PMatDiag,
    }


RUN = [name for name, f in vars(usage()).items() if getattr(f, "__module__", "") == "usage" and name != "mistakes"]


@pytest.mark.parametrize("name", RUN)
def test_what_is_promised_is_returned(name, given):
    f = getattr(usage(), name)
    f(**{p: given[p] for p in inspect.signature(f).parameters})


@pytest.mark.parametrize("base", [ParameterOperator, FunctionOperator])
def test_the_base_classes_declare_what_all_offer(base):
    own = {"inverse", "sample"} if base is ParameterOperator else set()
    assert (DECLARED | own) <= set(dir(base))
    abstract = {"trace", "diag", "norm", "solve", "logdet", "eigh", "to"} | own
    assert abstract <= base.__abstractmethods__


@pytest.mark.parametrize("name", ["FIM", "FIM_MonteCarlo", "EmpiricalFIM", "GGN", "Hessian", "GramMatrix", "Jacobian"])
def test_overloads_are_the_signature(name):
    """Parameters, their kinds and defaults, of every overload as of the function that runs."""
    f = getattr(nng, name)
    told = {p.name: p for p in inspect.signature(f).parameters.values()}
    for overload in typing.get_overloads(f) if sys.version_info >= (3, 11) else []:
        mine = inspect.signature(overload).parameters
        assert list(mine) == list(told)
        for p in mine.values():
            assert p.kind == told[p.name].kind
            free = p.default in (..., told[p.name].default) or p.default is inspect.Parameter.empty
            assert free, f"{name}: {p.name} = {p.default} in an overload"
