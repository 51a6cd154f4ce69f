"""Kernels in parts, as folders: a safetensors file of the rows of every process, and an index, which names them.

The index is the tree of the whole (:mod:`nngeom.tree`), its shape,
how many examples each process had, and a checksum of every part's header, which holds one of every row.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence

import safetensors.torch
import torch
from torch import Tensor

from nngeom.core import container, files
from nngeom.core.errors import FileError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places
from nngeom.fmat.sharded import FMatSharded
from nngeom.kernel_index import Index, crc
from nngeom.parts_folder import INDEX, part_of, require_same_index, write_parts
from nngeom.ranks.team import Team
from nngeom.tree import believed, decode, encode

KEY = "tensor"  # of the rows, in every part and in the tree


def save_parts(K: FMatSharded, path: str | os.PathLike[str]) -> None:
    """Write every process's rows of ``K`` to the folder ``path``, which is made, and then the index.

    Raises :class:`FileError` where one of them cannot, as for :func:`nngeom.save`; what was there is there then.
    """
    team = K.team
    trees = []

    def write(paths: Sequence[str], token: str) -> tuple[str, str]:
        tensors: dict[str, Tensor] = {}
        trees.append(encode(FMatDense(K.strip), "", tensors))
        return os.path.basename(paths[0]), _write_part(paths[0], tensors[KEY], token)

    names = lambda token: [part_of(team.rank, team.size, token)]
    write_parts(path, team, names, write, lambda said: Index.of(K, trees[0], said).text(), _named)


def _named(folder: str) -> list[str]:
    """The files of a kernel in parts."""
    return [name for name, _ in Index.read(folder).parts]


def _write_part(path: str, rows: Tensor, token: str) -> str:
    """The checksum of the header that a part has."""
    c, n = rows.shape[:2]
    sums = "".join(f"{_checksum(row):08x}" for k in range(c) for row in rows[k])
    header = json.dumps({"token": token, "shape": [c, n, *rows.shape[2:]], "rows": sums})
    safetensors.torch.save_file({KEY: rows}, path + ".part", {"nngeom": header})
    files.move(path + ".part", path)
    return crc(header)


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.reshape(-1).view(torch.uint8).numpy().data)


# -- read --------------------------------------------------------------------------------------------------------------


def holds_kernel(folder: str) -> bool:
    """Whether what is in a folder is not of :func:`nngeom.to_folder`, whose indices say what was asked."""
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            return "asked" not in container.json_of(file.read())
    except (OSError, ValueError):
        return True


def load_whole(folder: str) -> FMatDense:
    """The whole of what is in parts, in this process."""
    with believed(folder):
        index = Index.read(folder)
        return _kernel(index, _rows(folder, index, range(index.rows)))


def load_parts(folder: str, team: Team) -> FMatSharded:
    """The same with every process its own rows: those it had where there are as many processes as wrote it, else
    neighbours, as by :func:`nngeom.shard`.
    """
    with team.together("load") as note:
        index = Index.read(folder)
        note.mine = index.checksum
    require_same_index(folder, note.all)
    own, across = (Places(team, _split(counts, team.size), index.outputs) for counts in (index.counts, index.across))
    with team.together("load"), believed(folder):
        strip = _kernel(index, _rows(folder, index, range(index.rows)[own.mine])).tensor
    return FMatSharded(strip, own, across, index.between)


def _kernel(index: Index, rows: Tensor) -> FMatDense:
    found = decode(index.tree, {KEY: rows})
    if not isinstance(found, FMatDense):
        raise FileError(f"it holds a {type(found).__name__}; expected an FMatDense")
    return found


def _split(counts: Sequence[int], size: int) -> tuple[int, ...]:
    n = sum(counts)
    return tuple(counts) if len(counts) == size else tuple(n * (r + 1) // size - n * r // size for r in range(size))


def _rows(folder: str, index: Index, wanted: range) -> Tensor:
    """The rows of these examples, from the parts that hold some; all is checked before memory is taken."""
    c, columns = index.outputs, sum(index.across)
    places, start = [], 0
    for (name, header), count in zip(index.parts, index.counts):
        lo, hi = max(wanted.start, start), min(wanted.stop, start + count)
        if lo < hi:
            places.append((name, header, count, lo - start, hi - start))
            _part(folder, index, places[-1])
        start += count
    out = torch.empty(c, len(wanted), c, columns, dtype=container.REAL[index.dtype])
    at = 0
    for place in places:
        at += _part(folder, index, place, out[:, at:])
    return out


def _part(folder: str, index: Index, place: tuple[str, str, int, int, int], out: Tensor | None = None) -> int:
    """Check a part, and copy its rows ``lo`` to ``hi``, if there is where; how many these are."""
    (name, header, count, lo, hi), shape = place, (index.outputs, place[2], index.outputs, sum(index.across))
    path = os.path.join(folder, name)
    with container.opened(path) as contents:
        text = contents.metadata.get("nngeom", "")
        if crc(text) != header:
            raise FileError(f"{path!r} is damaged, or no part of the result that the index of {folder!r} is about")
        if contents.places.keys() != {KEY} or contents.places[KEY][1:] != (shape, container.REAL[index.dtype]):
            raise FileError(f"{path!r} holds {contents.places}; expected rows of shape {shape}, {index.dtype}")
        sums = json.loads(text)["rows"]
        for k, rows in enumerate(contents.rows(KEY, lo, hi) if out is not None else ()):
            for j, row in enumerate(rows):
                at = 8 * (k * count + lo + j)
                if sums[at : at + 8] != f"{_checksum(row):08x}":
                    raise FileError(f"{path!r} is damaged: row {lo + j} of output {k} has not the checksum it had")
            out[k, : hi - lo] = rows  # type: ignore[index]
    return hi - lo
