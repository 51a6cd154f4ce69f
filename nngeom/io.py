"""Files: safetensors for the numbers, a versioned JSON header for the rest; loading runs no code.

The header (metadata key ``nngeom``) is a tree of plain values, see :mod:`nngeom.tree`; a checksum covers header and
tensors.
"""

from __future__ import annotations

import json
import os
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nngeom.core import container, files
from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, FileError
from nngeom.core.given_plainly import as_path
from nngeom.fmat.fmat import FMat
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.sharded import FMatSharded
from nngeom.kernel_folder import holds_kernel, load_parts, load_whole, save_parts
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.matrix_folder import is_saved, load_layers, save_layers
from nngeom.opened_folder import opened
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.team import Team
from nngeom.tree import WHOLE, believed, decode, encode, holds_model, is_whole

FORMAT = 1


def save(M: Any, path: str | os.PathLike[str], *, process_group: Any = None) -> None:
    """Write a matrix or vector to ``path``, whole or not at all: after a crash there is the old file or the new one.

    Takes every PMat, FMat and Jacobian but the implicit ones, their sums and products, PVectors and FVectors, with
    real floating-point entries. With a ``process_group`` all its processes call it with the same matrix, rank 0 writes,
    and all return when it is written or raise when it is not. An :class:`FMatSharded` or :class:`PMatSharded` is saved
    by all of its processes, each its own rows or layers, to a folder ``path`` that all see. Raises :class:`FileError`
    where the path cannot be written, :class:`UnsupportedError` for what holds a model, :class:`ArgumentError` for other
    entries, and for an ``M`` whose class was defined anew.
    """
    team = Team.of(process_group)
    if isinstance(M, (FMatSharded, PMatSharded)):
        if process_group is not None and team is not M.team:
            what = "kernel" if isinstance(M, FMatSharded) else "matrix"
            raise ArgumentError(f"the {what} is sharded over other processes than process_group; leave it out")
        return save_parts(M, path) if isinstance(M, FMatSharded) else save_layers(M, path, _write)
    with team.together("save"):
        if team.rank == 0:
            _write(M, path)


def _write(M: Any, path: str | os.PathLike[str]) -> None:
    if not is_whole(M):
        if isinstance(M, (ParameterOperator, FunctionOperator, JacobianMap)):
            raise holds_model(type(M))
        known = sorted({cls.__name__ for cls in WHOLE}.union(PMat.kinds, FMat.kinds))
        raise ArgumentTypeError(f"cannot save {type(M).__name__}; expected one of {known}")
    tensors: dict[str, Tensor] = {}
    header = json.dumps({"format": FORMAT, "object": encode(M, "", tensors)})
    metadata = {"nngeom": header, "checksum": container.checksum(header, tensors)}
    target = os.path.abspath(as_path(path))
    try:
        with files.replaced(target) as part:
            safetensors.torch.save_file(tensors, part, metadata)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(
            f"cannot write {target!r}: {error}; expected a path in an existing folder that can be written"
        ) from error


def load(path: str | os.PathLike[str], map_location: Any = "cpu", *, process_group: Any = None) -> Any:
    """Read what :func:`save` wrote to ``path``, with its tensors on the device ``map_location``; needs no model and
    runs no code.

    Of the folder of a sharded kernel it gives the whole, an ``FMatDense``; with a ``process_group``, whose processes
    all call it, an ``FMatSharded`` over these, as many as they are: each reads its own rows, those it had where as many
    saved it, else neighbours as by :func:`shard`. Of the folder of a sharded matrix it gives one that reads layers when
    it uses them; with a ``process_group`` a :class:`PMatSharded` over its processes. Other files are read by each.

    Everything the file says is checked against what it holds before memory is taken for it; the tensors do not follow
    the file when it changes. Of a folder of :func:`to_folder` the matrix reads its parts when it uses them. Raises
    :class:`FileError` when the file is missing, truncated, changed, foreign, of a newer format, or holds a class that
    is not imported or shares its name with another.
    """
    try:
        device = torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"map_location is {map_location!r}; expected a device: {error}") from None
    name = as_path(path)
    team = Team.of(process_group)
    with team.together("load") as note:
        note.mine = None if not os.path.isdir(name) else "kernel" if holds_kernel(name) else "matrix"
    if note.all[0] == "kernel":
        out = load_whole(name) if process_group is None else load_parts(name, team)
    elif note.all[0] == "matrix":
        folder = os.path.abspath(name)
        with team.together("load") as note:
            note.mine = is_saved(folder)
        if process_group is not None and note.all[0]:
            return load_layers(folder, load, team, device)
        with team.together("load"):
            return opened(folder, load, device)
    else:
        with team.together("load"), believed(name):
            out = decode(*_read(name))
            if not is_whole(out):
                raise FileError(f"it holds a {type(out).__name__}; expected a matrix, map or vector")
    try:
        return out if device.type == "cpu" else out.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"cannot move the contents of {name!r} to {device}: {error}") from None


def _read(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The tree and the tensors of a file, its format and checksum verified."""
    metadata, tensors = container.read(name)
    if "nngeom" not in metadata:
        raise FileError(f"{name!r} is a safetensors file without nngeom's header; expected one written by nngeom.save")
    try:
        tree = json.loads(metadata["nngeom"])
        form = int(tree["format"])
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileError(f"the header of {name!r} is damaged: {type(error).__name__}: {error}") from error
    if form > FORMAT:
        raise FileError(f"{name!r} has format {form}, this version reads up to {FORMAT}; upgrade nngeom")
    if metadata.get("checksum") != container.checksum(metadata["nngeom"], tensors):
        raise FileError(f"{name!r} is damaged: its contents do not have the checksum they were saved with")
    return tree.get("object"), tensors
