"""Objects as trees of plain values and named tensors, and back: what a file says is checked before it is believed.

An object is ``{"class": name, "qualified": module.name, "fields": {...}}`` (``qualified`` for what users may define
too), a tensor ``{"tensor": key}``, a dictionary ``{"items": [[key, value], ...]}``, a tuple a list, and numbers and
text are themselves. Only the classes listed here, and imported subclasses of PMat, FMat and Block, are made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nngeom import checks
from nngeom.core.completed import CompletedBasis
from nngeom.core.container import REAL
from nngeom.core.errors import ArgumentError, FileError, NNGeomError, UnsupportedError
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.registry import qualified
from nngeom.fmat.expression import FMatSum
from nngeom.fmat.fmat import FMat
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.pmat.block import Block
from nngeom.pmat.expression import PMatProduct
from nngeom.pmat.pmat import PMat
from nngeom.pmat.sums import PMatSum
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

Tensors = dict[str, Tensor]

OPEN: tuple[type, ...] = (PMat, FMat, Block)  # users subclass them
# saved by themselves, as PMats and FMats are
WHOLE: list[type] = [PVector, FVector, PMatSum, PMatProduct, FMatSum, PushForwardDense, PullBackDense]
PARTS: list[type] = [LayerCollection, Layout, Piece, Arrangement, CompletedBasis]
_CLOSED = {cls.__name__: cls for cls in WHOLE + PARTS}


def is_whole(x: Any) -> bool:
    """Whether ``x`` is something that is saved by itself."""
    return type(x) in WHOLE or isinstance(x, (PMat, FMat))


# -- to a tree ---------------------------------------------------------------------------------------------------------


def encode(x: Any, key: str, tensors: Tensors) -> Any:
    """The tree of ``x``; its tensors are added to ``tensors``, their keys beginning with ``key``."""
    if isinstance(x, Tensor):
        if x.dtype not in REAL.values():
            raise ArgumentError(f"cannot save {key!r}: it is {x.dtype}; expected real floating-point numbers")
        t = x.detach().to("cpu").contiguous()
        shared = t.numel() and any(
            t.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in tensors.values()
        )
        tensors[key] = t.clone() if shared or t.untyped_storage().nbytes() != t.nbytes else t
        return {"tensor": key}
    if dataclasses.is_dataclass(x):
        named, dot = _named(type(x)), f"{key}." if key else ""
        return {
            **named,
            "fields": {f.name: encode(getattr(x, f.name), dot + f.name, tensors) for f in dataclasses.fields(x)},
        }
    if isinstance(x, dict):
        return {
            "items": [
                [encode(k, f"{key}.{j}", tensors), encode(v, f"{key}.{j}", tensors)]
                for j, (k, v) in enumerate(x.items())
            ]
        }
    if isinstance(x, tuple):
        return [encode(v, f"{key}.{j}", tensors) for j, v in enumerate(x)]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise UnsupportedError(
        f"cannot save a {type(x).__name__} in {key!r}; expected tensors, numbers, text, tuples and dictionaries"
    )


def _named(cls: type) -> dict[str, str]:
    if _CLOSED.get(cls.__name__) is cls:
        return {"class": cls.__name__}
    base = next((base for base in OPEN if issubclass(cls, base)), None)
    if base is None:
        raise holds_model(cls)
    if not base.kinds.is_known(cls):  # type: ignore[attr-defined]
        raise ArgumentError(
            f"cannot save a {qualified(cls)}: that class was defined anew since, and a file would be read as the new "
            "one; measure it again"
        )
    return {"class": cls.__name__, "qualified": qualified(cls)}


def holds_model(cls: type) -> UnsupportedError:
    """The error for objects that cannot be saved because they run a model."""
    return UnsupportedError(
        f"{cls.__name__} holds a model and data, or belongs to a group of processes, so it is not saved; save a "
        "PMatKFAC, PMatEKFAC, FMatDense, ... instead"
    )


# -- from a tree -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def believed(name: str) -> Iterator[None]:
    """Objects are made of what the file ``name`` says: what does not fit is a :class:`FileError`."""
    try:
        yield
    except (NNGeomError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, FileError) and name in str(error):
            raise
        what = str(error) if isinstance(error, FileError) else f"{type(error).__name__}: {error}"
        raise FileError(f"{name!r} does not describe a matrix or vector: {what}") from error


def decode(x: Any, tensors: Tensors) -> Any:
    """What a tree describes; raises :class:`FileError`, or what the objects themselves raise."""
    if isinstance(x, list):
        return tuple(decode(v, tensors) for v in x)
    if not isinstance(x, dict):
        return x
    if x.keys() == {"tensor"}:
        return tensors[x["tensor"]]
    if x.keys() == {"items"}:
        items = [(decode(k, tensors), decode(v, tensors)) for k, v in x["items"]]
        if len(dict(items)) < len(items):
            raise FileError("a dictionary has a key twice")
        return dict(items)
    cls = _class(x["class"], x.get("qualified"))
    fields = {key: decode(v, tensors) for key, v in x["fields"].items()}
    checks.require_types(cls, fields)
    if issubclass(cls, PMat):
        return checks.matrix(cls, **fields)
    out = cls(**fields)
    checks.require_fit(out)
    return out


def _class(name: Any, full: Any) -> Any:
    if not isinstance(name, str) or not (full is None or isinstance(full, str)):
        raise FileError(f"a class is called {name!r}")
    if full is None and name in _CLOSED:
        return _CLOSED[name]
    for base in OPEN if full is None or full.rpartition(".")[2] == name else ():
        try:
            return base.kinds.find(name, full)  # type: ignore[attr-defined]
        except KeyError:
            pass
    what = f"it holds a {name!r}" + (f", {full}" if full else "")
    raise FileError(f"{what}, which this version does not know; upgrade nngeom, or import the module that defines it")
