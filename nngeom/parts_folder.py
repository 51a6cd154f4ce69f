"""Folders that several processes write: each its own files, then an index, which makes them a result.

Names differ from one ``save`` to the next, so that the files of an older result stay until the index is replaced; then
they are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors

from nngeom.core import files
from nngeom.core.errors import ArgumentError, FileError
from nngeom.core.given_plainly import as_path
from nngeom.ranks.team import Team

INDEX = "index.json"
PART = re.compile(r"part-\d{5}-of-\d{5}\.[0-9a-f]{12}\.safetensors")


def part_of(j: int, count: int, token: str) -> str:
    """The name of a part, one of ``count``, in the ``save`` that has this ``token``."""
    return f"part-{j:05d}-of-{count:05d}.{token}.safetensors"


def write_parts(
    path: str | os.PathLike[str],
    team: Team,
    names: Callable[[str], Sequence[str]],
    write: Callable[[Sequence[str], str], Any],
    index: Callable[[list[Any]], str],
    named: Callable[[str], Sequence[str]],
) -> None:
    """Write the files of all processes to the folder ``path``, which is made, and then the index.

    ``names(token)``: those of this process's files, which ``write(paths, token)`` writes; ``index`` is made of what
    that returned everywhere. ``named(folder)``: the files that the index there is about; it raises :class:`FileError`
    where that is of something else. Raises :class:`FileError` where one process cannot write; what was there is there
    then.
    """
    folder = os.path.abspath(as_path(path))
    with contextlib.ExitStack() as held:
        with team.together("save") as note, _writing(folder):
            note.mine = _begin(folder, held, named) if team.rank == 0 else None
        token, made = note.all[0]
        own = names(token)
        paths = [os.path.join(folder, name) for name in own]
        try:
            with team.together("save") as note, _writing(folder):
                _require_shared(folder, token, team)
                note.mine = own, write(paths, token)
            with team.together("save"), _writing(folder):
                if team.rank == 0:
                    every = [name for theirs, _ in note.all for name in theirs]
                    finish(folder, every, index([said for _, said in note.all]))
        except BaseException:
            if not _are_named(folder, own, named):
                _remove(*paths, *(path + ".part" for path in paths))
            if made:
                _remove_if_empty(folder)  # by the last one
            raise


def _begin(folder: str, held: contextlib.ExitStack, named: Callable[[str], Sequence[str]]) -> tuple[str, bool]:
    """Make the folder, and be the only one who writes there.

    A word that no other call has, which it shows there, and whether there was no folder.
    """
    made = not os.path.isdir(folder)
    if made:
        os.mkdir(folder)
        held.callback(_remove_if_empty, folder)
    if os.path.exists(os.path.join(folder, INDEX)):
        named(folder)  # what is none of ours is not written over
    token = secrets.token_hex(6)
    try:
        lock = files.Lock(os.path.join(folder, "lock"))
    except BlockingIOError:
        raise FileError(f"another call is saving to {folder!r} now; wait for it, or choose another folder") from None
    held.callback(lock.release)
    os.write(lock.fd, token.encode())
    return token, made


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
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, (FileError, ArgumentError)):
            raise
        raise FileError(
            f"cannot write the folder {folder!r}: {error}; expected a path in an existing folder that can be written, "
            "on a disk with room for it"
        ) from error


def finish(folder: str, names: Sequence[str], text: str) -> None:
    """The index, a ``text`` about the files ``names``, in its place, and what it does not name, gone."""
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise FileError(
            f"rank 0 does not see {missing[0]!r} in {folder!r}; expected a file system that all processes share"
        )
    with files.replaced(os.path.join(folder, INDEX)) as part, open(part, "w") as file:
        file.write(text)
    left = (name for name in os.listdir(folder) if PART.fullmatch(name.removesuffix(".part")) and name not in names)
    _remove(*(os.path.join(folder, name) for name in left))


def _are_named(folder: str, names: Sequence[str], named: Callable[[str], Sequence[str]]) -> bool:
    """Whether the index is about these files: then they are a result, whatever happened after."""
    try:
        return set(names) <= set(named(folder))
    except FileError:
        return False


def require_same_index(folder: str, checksums: Sequence[str]) -> None:
    """Raise :class:`FileError` unless all processes read an index of the same ``checksum``."""
    odd = [rank for rank, said in enumerate(checksums) if said != checksums[0]]
    if odd:
        raise FileError(
            f"rank {odd[0]} finds another result in {folder!r} than rank 0; expected a file system that all processes "
            "share, to which nothing is saved meanwhile"
        )
