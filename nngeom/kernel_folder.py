"""Results in parts, as folders: a safetensors file for every process, and an index, written last, which names them.

Parts are the rows of a process. Their names differ from one ``save`` to the next, so that those of an older result stay
until the index is replaced; then they are removed. The index is the tree of the whole (:mod:`nngeom.tree`), its shape,
how many examples each process had, and a checksum of every part's header, which holds one of every row.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nngeom.core import container, files
from nngeom.core.errors import ArgumentError, FileError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places
from nngeom.fmat.sharded import FMatSharded
from nngeom.kernel_index import INDEX, PART, Index, crc
from nngeom.ranks.team import Team
from nngeom.tree import believed, decode, encode

KEY = "tensor"  # of the rows, in every part and in the tree


def save_parts(K: FMatSharded, path: str | os.PathLike[str]) -> None:
    """Write every process's rows of ``K`` to the folder ``path``, which is made, and then the index.

    Raises :class:`FileError` where one of them cannot, as for :func:`nngeom.save`; what was there is there then.
    """
    folder, team = os.path.abspath(os.fsdecode(path)), K.team
    with contextlib.ExitStack() as held:
        with team.together("save") as note, _writing(folder):
            note.mine = _begin(folder, held) if team.rank == 0 else None
        token = note.all[0]
        name = f"part-{team.rank:05d}-of-{team.size:05d}.{token}.safetensors"
        part = os.path.join(folder, name)
        try:
            with team.together("save") as note, _writing(folder):
                _require_shared(folder, token, team)
                tensors: dict[str, Tensor] = {}
                tree = encode(FMatDense(K.strip), "", tensors)
                note.mine = name, _write_part(part, tensors[KEY], token)
            with team.together("save"), _writing(folder):
                if team.rank == 0:
                    _finish(folder, Index.of(K, tree, note.all))
        except BaseException:
            if not _is_named(folder, name):
                _remove(part, part + ".part")
            raise


def _begin(folder: str, held: contextlib.ExitStack) -> str:
    """Make the folder, and be the only one who writes there; a word that no other call has, which it shows there."""
    made = not os.path.isdir(folder)
    if made:
        os.mkdir(folder)
        held.callback(_remove_if_empty, folder)
    if os.path.exists(os.path.join(folder, INDEX)):
        Index.read(folder)  # what is none of ours is not written over
    token = secrets.token_hex(6)
    try:
        lock = files.Lock(os.path.join(folder, "lock"))
    except BlockingIOError:
        raise FileError(f"another call is saving to {folder!r} now; wait for it, or choose another folder") from None
    held.callback(lock.release)
    os.write(lock.fd, token.encode())
    return token


def _remove(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.remove(path)


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _require_shared(folder: str, token: str, team: Team) -> None:
    try:
        with open(os.path.join(folder, "lock")) as file:
            seen = file.read(64)
    except OSError:
        seen = ""
    if seen != token:
        raise FileError(
            f"rank {team.rank} does not see the folder {folder!r} that rank 0 made; parts need a file system that all "
            "processes share, or gather(rank=0) and one file"
        )


@contextlib.contextmanager
def _writing(folder: str) -> Any:
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, (FileError, ArgumentError)):
            raise
        raise FileError(
            f"cannot write the folder {folder!r}: {error}; expected a path in an existing folder that can be written, "
            "on a disk with room for it"
        ) from error


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


def _finish(folder: str, index: Index) -> None:
    """The index in its place, and what it does not name, gone."""
    missing = [name for name, _ in index.parts if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise FileError(
            f"rank 0 does not see {missing[0]!r} in {folder!r}; expected a file system that all processes share"
        )
    with files.replaced(os.path.join(folder, INDEX)) as part, open(part, "w") as file:
        file.write(index.text())
    named = {name for name, _ in index.parts}
    left = (name for name in os.listdir(folder) if PART.fullmatch(name.removesuffix(".part")) and name not in named)
    _remove(*(os.path.join(folder, name) for name in left))


def _is_named(folder: str, name: str) -> bool:
    """Whether the index is about this part: then it is a result, whatever happened after."""
    try:
        return name in {other for other, _ in Index.read(folder).parts}
    except FileError:
        return False


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
    odd = [rank for rank, said in enumerate(note.all) if said != note.all[0]]
    if odd:
        raise FileError(
            f"rank {odd[0]} finds another result in {folder!r} than rank 0; expected a file system that all processes "
            "share, to which nothing is saved meanwhile"
        )
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
