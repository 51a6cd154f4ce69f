"""The report from a shell: a model and data named by files, ``python -m nngeom report FILE.py:NAME --data ...``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nngeom.core.errors import ArgumentError, ArgumentTypeError, FileError, NNGeomError
from nngeom.measures.kernels import GramMatrix
from nngeom.measures.second_moments import FIM
from nngeom.page.report import report
from nngeom.pmat.representation import Measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these ``arguments`` (those of the process by default); the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _report(given)
    except NNGeomError as error:
        parser.exit(2, f"{parser.prog} report: {error}\n")
    print(f"wrote {given.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nngeom", description="The matrices of deep learning.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("report", help="write an interactive page about a model").add_argument
    add("model", metavar="FILE.py:NAME", help="a model, or a function that makes one")
    add("--data", required=True, metavar="FILE.py:NAME|FILE.pt", help="a loader, a function that makes one, or tensors")
    add("--out", default="report.html", metavar="FILE.html", help="the page (report.html)")
    add("--weights", metavar="FILE.pt", help="a state dict that is loaded into the model")
    add("--batch-size", type=int, default=128, help="of tensors from a .pt file (128)")
    add(
        "--matrix",
        action="append",
        default=[],
        metavar="KIND",
        help="a Fisher matrix, as KFAC, EKFAC, Dense; may repeat",
    )
    add("--likelihood", default="categorical", help="of the Fisher matrix: categorical, bernoulli, gaussian")
    add("--kernel", action="store_true", help="the tangent kernel of the first batch")
    add("--history", metavar="FILE.json", help="what a tracker saved")
    add("--title", help="above the page")
    return parser


def _report(given: argparse.Namespace) -> None:
    model = _made(given.model, "model")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{given.model} is {type(model).__name__}; expected a torch.nn.Module or a function")
    if given.weights is not None:
        _load_weights(model, given.weights)
    model.eval()
    loader = _loader(given.data, given.batch_size)
    matrices = {name: FIM(model, loader, _kind(name), likelihood=given.likelihood) for name in given.matrix}
    kernel = GramMatrix(model, [next(iter(loader))]) if given.kernel else None
    history = None if given.history is None else _history(given.history)
    report(given.out, model, loader, matrix=matrices, kernel=kernel, tracker=history, title=given.title)


def _made(place: str, what: str) -> Any:
    """The object of ``FILE.py:NAME``, called where it is a function."""
    path, _, name = place.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ArgumentError(f"{what} is {place!r}; expected FILE.py:NAME, a file and what it defines")
    if not Path(path).is_file():
        raise FileError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path!r} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ArgumentError(f"{path} defines no {name!r}; it has {[n for n in vars(module) if not n.startswith('_')]}")
    found = getattr(module, name)
    return found() if callable(found) and not isinstance(found, nn.Module) else found


def _loader(place: str, batch_size: int) -> Any:
    """Batches that can be read several times."""
    if not place.endswith(".pt"):
        data = _made(place, "--data")
        return list(data) if hasattr(data, "__next__") else data
    data = _tensors(place)
    parts = data if isinstance(data, (tuple, list)) else (data,)
    if batch_size < 1 or not parts or not all(isinstance(t, torch.Tensor) and t.ndim for t in parts):
        raise ArgumentTypeError(f"{place} does not hold tensors (inputs, targets), or --batch-size is below 1")
    return list(zip(*(t.split(batch_size) for t in parts)))


def _tensors(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{path!r} cannot be read: {str(error).splitlines()[0]}") from error


def _load_weights(model: nn.Module, path: str) -> None:
    try:
        model.load_state_dict(_tensors(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{path} does not fit the model: {error}") from error


def _kind(name: str) -> Any:
    """The representation that is called ``KFAC`` or ``PMatKFAC``, in any case."""
    known = {kind.__name__.removeprefix("PMat").lower(): kind for kind in Measured.kinds.classes()}
    found = known.get(name.lower().removeprefix("pmat"))
    if found is None:
        raise ArgumentError(f"--matrix is {name!r}; expected one of {', '.join(sorted(known))}")
    return found


def _history(path: str) -> dict[str, list[float]]:
    try:
        return dict(json.loads(Path(path).read_text())["history"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is no file of a tracker: {error}") from error
