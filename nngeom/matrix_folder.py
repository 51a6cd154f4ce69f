"""Matrices of which processes keep parts, as folders: a file a layer, written by its owner, and an index.

The folder is read as one of :func:`nngeom.to_folder`, whose parts are the layers; or by several processes, each of
which reads its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nngeom.core.errors import ArgumentError, FileError
from nngeom.core.registry import qualified
from nngeom.opened_folder import FORMAT, Load, checksum_of, files_of, index_of, opened
from nngeom.parts_folder import part_of, require_same_index, write_parts
from nngeom.pmat.pmat import PMat
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.made import assigned
from nngeom.ranks.team import Team
from nngeom.tree import encode

ASKED = {"the measure": "nngeom.save"}  # what nngeom.to_folder compares: no measure of its own


def save_layers(M: PMatSharded, path: str | os.PathLike[str], write: Callable[[PMat, str], None]) -> None:
    """Write every process's layers of ``M`` to the folder ``path`` with ``write(matrix, file)``, and then the index.

    Raises :class:`FileError` where one process cannot; what was there is there then.
    """
    team, layers = M.team, list(M.layer_collection.by_layer())
    own = [layer for part in M.parts for layer in part.layer_collection.by_layer()]

    def written(paths: Sequence[str], token: str) -> dict[str, Any]:
        for file, part in zip(paths, _by_layer(M), strict=True):
            write(part, file)
        sizes = {layer: (os.path.basename(file), os.path.getsize(file)) for layer, file in zip(own, paths)}
        return {"layers": sizes, "kinds": {(type(part).__name__, qualified(type(part))) for part in M.parts}}

    names = lambda token: [part_of(layers.index(layer), len(layers), token) for layer in own]
    write_parts(path, team, names, written, lambda said: json.dumps(_index(M, said)), _named)


def _by_layer(M: PMatSharded) -> Iterator[PMat]:
    for part in M.parts:
        layers = part.layer_collection.by_layer()
        yield from (part if len(layers) == 1 else part[list(names)] for names in layers.values())


def _index(M: PMatSharded, said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the folder says of itself."""
    kinds = set[tuple[str, str]]().union(*(mine["kinds"] for mine in said))
    if len(kinds) != 1:
        raise ArgumentError(
            f"the parts are of kinds {sorted(name for name, _ in kinds)}; gather() the matrix to save it"
        )
    owned = {layer: (rank, *file) for rank, mine in enumerate(said) for layer, file in mine["layers"].items()}
    layers = M.layer_collection.by_layer()
    index: dict[str, Any] = {
        "format": FORMAT,
        "collection": encode(M.layer_collection, "", {}),
        "asked": ASKED,
        "parts": [list(names) for names in layers.values()],
        "files": [owned[layer][1] for layer in layers],
        "bytes": [owned[layer][2] for layer in layers],
        "ranks": [owned[layer][0] for layer in layers],
        "processes": M.team.size,
        "kind": list(kinds.pop()),
        "dtype": str(M.dtype).removeprefix("torch."),
        "examples": M.examples,
    }
    return {**index, "checksum": checksum_of(index)}


def _named(folder: str) -> list[str]:
    """The files of a matrix in parts."""
    index = index_of(folder)
    if "files" not in index:
        raise FileError(f"{folder!r} holds a matrix that nngeom.to_folder measured; choose another folder")
    return [os.path.basename(file) for file in files_of(folder, index)]


def is_saved(folder: str) -> bool:
    """Whether the matrix in a folder was saved by the processes that kept it in parts."""
    return "files" in index_of(folder)


def load_layers(folder: str, load: Load, team: Team, device: torch.device) -> PMatSharded:
    """The matrix of a folder over the processes of a ``team``: each has the layers that it had where there are as many
    processes as wrote it, else some, by size.
    """
    with team.together("load") as note:
        index = index_of(folder)
        note.mine = index["checksum"]
    require_same_index(folder, note.all)
    count = len(index["parts"])
    owners = index["ranks"]
    if team.size != index["processes"]:
        chosen = assigned({j: float(index["bytes"][j]) for j in range(count)}, team.size)
        owners = [chosen[j] for j in range(count)]
    with team.together("load"):
        found = opened(folder, load, device)
        parts = tuple(read() for (_, read), rank in zip(found.parts, owners, strict=True) if rank == team.rank)
        owned = [
            tuple(name for (lc, _), owner in zip(found.parts, owners) if owner == rank for name in lc.names)
            for rank in range(team.size)
        ]
    like = torch.empty(0, dtype=found.dtype, device=found.device)
    return PMatSharded(found.layer_collection, parts, tuple(owned), found.examples, team, like)
