"""Files: safetensors for the numbers, a versioned JSON header for the rest; loading runs no code.

The header (metadata key ``nngeom``) is a tree: an object is ``{"class": name, "fields": {...}}``, a tensor
``{"tensor": key}``, a dictionary ``{"items": [[key, value], ...]}``, a tuple a list, and numbers and text are
themselves. Only classes listed here (and subclasses of PMat and Block that are imported) are made again; a checksum
covers header and tensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import stat
import zlib
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, FileError, NNGeomError, StructureError, UnsupportedError
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.fmat.expression import FMatSum
from nngeom.fmat.fmat import FMat
from nngeom.fmat.operator import FunctionOperator
from nngeom.maps.pull_back import PullBackDense
from nngeom.maps.push_forward import JacobianMap, PushForwardDense
from nngeom.pmat.block import Block
from nngeom.pmat.expression import PMatProduct, PMatSum
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

FORMAT = 1
VALUES: list[type] = [LayerCollection, Layout, Piece, Arrangement]  # parts of what is saved
SAVED: list[type] = [PVector, FVector, PMatSum, PMatProduct, FMatSum, PushForwardDense, PullBackDense]  # what is saved, besides PMats and FMats


def save(M: Any, path: str | os.PathLike[str]) -> None:
    """Write a matrix or vector to ``path``, whole or not at all.

    Takes every PMat, FMat and Jacobian but the implicit ones, their sums and products, PVectors and FVectors. Raises
    :class:`FileError` where the path cannot be written, :class:`UnsupportedError` for what holds a model.
    """
    if type(M).__name__ not in _classes(SAVED):
        if isinstance(M, (ParameterOperator, FunctionOperator, JacobianMap)):
            raise _holds_model(M)
        raise ArgumentTypeError(f"cannot save {type(M).__name__}; expected one of {sorted(_classes(SAVED))}")
    tensors: dict[str, Tensor] = {}
    header = json.dumps({"format": FORMAT, "object": _encode(M, "", tensors)})
    metadata = {"nngeom": header, "checksum": _checksum(header, tensors)}
    target = os.path.abspath(os.fspath(path))
    part = f"{target}.{secrets.token_hex(6)}.part"
    try:
        with open(part, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode  # the permissions of any new file here
        safetensors.torch.save_file(tensors, part, metadata)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, stat.S_IMODE(mode))
        os.replace(part, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"cannot write {target!r}: {error}; expected a path in an existing folder that can be written") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read what :func:`save` wrote, with its tensors on the device ``map_location``; needs no model and runs no code.

    Raises :class:`FileError` when the file is missing, truncated, changed, foreign, or of a newer format.
    """
    try:
        device = torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"map_location is {map_location!r}; expected a device: {error}") from None
    name = os.fspath(path)
    try:
        out = _decode(*_read(name), name)
        if type(out).__name__ not in _classes(SAVED):
            raise FileError(f"{name!r} holds a {type(out).__name__}; expected a matrix, map or vector")
    except FileError:
        raise
    except (NNGeomError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FileError(f"the header of {name!r} does not describe a matrix or vector: {type(error).__name__}: {error}") from error
    try:
        return out if device.type == "cpu" else out.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"cannot move the contents of {name!r} to {device}: {error}") from None


def merge(a: PMat, b: PMat) -> PMat:
    """The matrix of two data sets together, from the matrix of each, weighted by their examples.

    Exact for Dense, Diag, BlockDiag, QuasiDiag, LowRank, Eye, and for KFAC, whose factors are averaged; the
    eigenvalues of two EKFACs only mean the same in equal bases. Raises :class:`StructureError` where the bases or
    the blocks differ, :class:`CollectionError` for other parameters.
    """
    for m in (a, b):
        if not isinstance(m, PMat):
            raise ArgumentTypeError(f"cannot merge {type(m).__name__}; expected two measured matrices of one representation (not implicit, no sums)")
    a.collection.require(b.collection, "the second matrix")
    if type(a) is not type(b) or a.blocks.keys() != b.blocks.keys():
        differ = f"{type(a).__name__} and {type(b).__name__}" if type(a) is not type(b) else f"two {type(a).__name__} with different blocks"
        raise StructureError(f"cannot merge {differ}; expected the same representation of the same model, with the same options")
    n = a.examples + b.examples
    if min(a.examples, b.examples) < 1:
        raise ArgumentError(f"cannot merge matrices of {a.examples} and {b.examples} examples; expected measured ones, with at least one example each")
    blocks = {}
    for layout, block in a.blocks.items():
        both = block.merged(b.blocks[layout], a.examples / n, b.examples / n)
        if both is None:
            raise StructureError(
                f"cannot merge the blocks of {list(layout.names)[:4]}: {type(block).__name__} and {type(b.blocks[layout]).__name__} have no common mean "
                "(eigenvalues in different bases are not comparable); measure both with M.rescaled in one basis, or on all data at once"
            )
        blocks[layout] = both
    return a._make(a.layer_collection, blocks, n)


# -- the tree --------------------------------------------------------------------------------------------------------


def _classes(listed: list[type]) -> dict[str, type]:
    more = (*PMat.kinds.values(), *FMat.kinds.values()) if listed is SAVED else (*Block.kinds.values(),)
    return {cls.__name__: cls for cls in (*listed, *more)}


def _holds_model(x: Any) -> UnsupportedError:
    return UnsupportedError(f"{type(x).__name__} holds a model and data, so it is not saved; save a PMatKFAC, PMatEKFAC, FMatDense, ... instead")


def _encode(x: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, Tensor):
        t = x.detach().to("cpu").contiguous()
        shared = t.numel() and any(t.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in tensors.values())
        tensors[key] = t.clone() if shared or t.untyped_storage().nbytes() != t.nbytes else t
        return {"tensor": key}
    if dataclasses.is_dataclass(x):
        if type(x).__name__ not in {**_classes(VALUES), **_classes(SAVED)}:
            raise _holds_model(x)
        dot = f"{key}." if key else ""
        fields = {f.name: _encode(getattr(x, f.name), dot + f.name, tensors) for f in dataclasses.fields(x)}
        return {"class": type(x).__name__, "fields": fields}
    if isinstance(x, dict):
        return {"items": [[_encode(k, f"{key}.{j}", tensors), _encode(v, f"{key}.{j}", tensors)] for j, (k, v) in enumerate(x.items())]}
    if isinstance(x, tuple):
        return [_encode(v, f"{key}.{j}", tensors) for j, v in enumerate(x)]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise UnsupportedError(f"cannot save a {type(x).__name__} in {key!r}")


def _decode(x: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(x, list):
        return tuple(_decode(v, tensors, name) for v in x)
    if not isinstance(x, dict):
        return x
    if x.keys() == {"tensor"}:
        return tensors[x["tensor"]]
    if x.keys() == {"items"}:
        return {_decode(k, tensors, name): _decode(v, tensors, name) for k, v in x["items"]}
    cls = {**_classes(VALUES), **_classes(SAVED)}.get(x["class"])
    if cls is None:
        raise FileError(f"{name!r} holds a {x['class']!r}, which this version does not know; upgrade nngeom, or import the module that defines it")
    fields = {key: _decode(v, tensors, name) for key, v in x["fields"].items()}
    if issubclass(cls, PMat):
        return _matrix(cls, **fields)
    return cls(**fields)


def _matrix(cls: type[PMat], layer_collection: LayerCollection, blocks: dict[Layout, Block], examples: int) -> PMat:
    """A PMat whose blocks fit their places."""
    if not isinstance(layer_collection, LayerCollection) or not isinstance(blocks, dict) or not blocks or not isinstance(examples, int):
        raise FileError(f"the fields of a {cls.__name__} have the wrong types")
    for layout, block in blocks.items():
        if not isinstance(layout, Layout) or not isinstance(block, Block) or tuple(block.sizes) != layout.sizes:
            raise FileError(f"a block of {list(layout.names)[:4]} does not have the sizes of its parameters")
        if max(p.stop for p in layout.pieces) > layer_collection.numel:
            raise FileError(f"the block of {list(layout.names)[:4]} lies outside of the parameter vector")
        block.mv(block.diag().new_zeros(layout.sizes))  # its tensors fit each other
    return cls._make(layer_collection, blocks, examples)


# -- the file --------------------------------------------------------------------------------------------------------


def _read(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The tree and the tensors of a file, its format and checksum verified."""
    try:
        with safetensors.safe_open(name, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError as error:
        raise FileError(f"there is no file {name!r}") from error
    except OSError as error:
        raise FileError(f"cannot read {name!r}: {error}") from error
    except Exception as error:
        raise FileError(f"{name!r} is damaged, truncated, or no safetensors file: {error}") from error
    if "nngeom" not in metadata:
        raise FileError(f"{name!r} is a safetensors file without nngeom's header; expected one written by nngeom.save")
    try:
        tree = json.loads(metadata["nngeom"])
        form = int(tree["format"])
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileError(f"the header of {name!r} is damaged: {type(error).__name__}: {error}") from error
    if form > FORMAT:
        raise FileError(f"{name!r} has format {form}, this version reads up to {FORMAT}; upgrade nngeom")
    if metadata.get("checksum") != _checksum(metadata["nngeom"], tensors):
        raise FileError(f"{name!r} is damaged: its contents do not have the checksum they were saved with")
    return tree.get("object"), tensors


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(header.encode())
    for key in sorted(tensors):
        t = tensors[key]
        crc = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
