"""One kernel in a ``.npy`` file that several processes write, each the tiles that it computes, with a list of its own.

The bytes of two tiles are never the same, and are written where they lie, not through a map: what one process writes
does not carry its copy of a neighbour's along. When all is there each process reads what another one wrote.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from nngeom.core.errors import FileError, NNGeomError
from nngeom.fmat import npy
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.store import FileStore, Place, ranges
from nngeom.ranks.team import Team


class TeamStore(FileStore):
    """The file ``path`` for a ``team``, for the time of a ``with``; all its processes call everything, together.

    Errors as for :class:`FileStore`, on all of them; :class:`FileError` where one does not see what another wrote.
    """

    def __init__(self, path: str | os.PathLike[str], team: Team) -> None:
        self.team, self.fd, self.start = team, -1, 0
        with team.together("out") as note:
            super().__init__(path)
            self.tiles = self.journal
            self.journal = f"{self.tiles}.{team.rank}"
            note.mine = self._show()
        self.token = note.all[0]

    def _lock(self) -> None:
        if self.team.rank == 0:
            super()._lock()

    def _show(self) -> str:
        """A word of this call, which those who see the same files find in the lock."""
        token = secrets.token_hex(8)
        if self.lock is not None:
            os.write(self.lock.fd, token.encode())
        return token

    def __exit__(self, *_: object) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        super().__exit__()

    def _remove_begun(self) -> None:
        """All that was begun, unless another process has something to resume."""
        if self.team.rank == 0 and not any(len(npy.read_lines(journal)) > 1 for journal in self._journals()):
            for begun in (*self._journals(), self.part):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(begun)

    def _journals(self) -> list[str]:
        return glob.glob(glob.escape(self.tiles) + ".*[0-9]")

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype, about: Fingerprint) -> dict[str, Tensor] | None:
        self.shape, self.dtype, self.about = shape, dtype, about.plain()
        with self.team.together("out") as note:
            note.mine = self._is_there()
        if note.all[0]:
            with self.team.together("out"):
                return self._finished(about) if self.team.rank == 0 else self._seen(about)
        with self.team.together("out"), self.writing():
            if self.team.rank == 0:
                self._begin(about)
        with self.team.together("out"), self.writing():
            self._require_shared()
            if self.team.rank:
                self._take_up(about)
            self.fd = os.open(self.part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            self.start = npy.start(self.part, shape, dtype)
        return None

    def _begin(self, about: Fingerprint) -> None:
        """Space for all, or what was begun of it."""
        if not self._resume(about):
            for begun in (*self._journals(), self.part):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(begun)
            try:
                self.map = npy.create(self.part, self.shape, self.dtype)
                npy.write_lines(self.journal, [self.about])
            except BaseException:
                self.map = None
                self._remove_begun()
                raise

    def _take_up(self, about: Fingerprint) -> None:
        """What this process had written, which is not rank 0."""
        if not self._resume(about):
            npy.write_lines(self.journal, [self.about])
        self.map = None

    def _require_shared(self) -> None:
        try:
            with open(self.path + ".lock") as file:
                seen = file.read(64)
        except OSError:
            seen = ""
        if seen != self.token:
            raise self._unseen("the file that rank 0 made")

    def _unseen(self, what: str) -> FileError:
        return FileError(
            f"rank {self.team.rank} does not see {what}, for {self.path!r}; out= over several processes needs a file "
            "system that all share"
        )

    def _seen(self, about: Fingerprint) -> dict[str, Tensor]:
        """The finished kernel that rank 0 verifies."""
        try:
            self._require_same(about, npy.description(self.path))
            return {"": npy.mapped(self.path)}
        except NNGeomError:
            raise
        except (OSError, ValueError) as error:
            raise self._unseen("the finished kernel of rank 0") from error

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """What the whole looks like is known already."""

    def write(
        self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]
    ) -> None:
        found = []
        with self.writing():
            for where, turned in ((place, lambda tile: tile), (mirror, flip)):
                if where is not None:
                    found.append((ranges(where), self._put(where, turned(tiles[""].detach().to(self.dtype)))))
            npy.add_line(self.journal, found)
        self.done[ranges(place)] = found

    def _put(self, where: Place, tile: Tensor) -> int:
        """Write a tile where it lies; its checksum."""
        numbers = np.ascontiguousarray(tile.cpu().numpy())
        for index in np.ndindex(numbers.shape[:-1]):
            at = 0
            for size, s, j in zip(self.shape, where, (*index, 0)):
                at = at * size + s.start + j
            _put(self.fd, numbers[index], self.start + at * numbers.itemsize)
        return npy.checksum(numbers)

    def result(self) -> dict[str, Tensor]:
        with self.team.together("out"), self.writing():
            os.fsync(self.fd)
        with self.team.together("out"), self.writing():
            self._verify((self.team.rank + 1) % self.team.size)
        with self.team.together("out"), self.writing():
            if self.team.rank == 0:
                journals = self._journals()
                out = super().result()
                for journal in journals:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(journal)
        with self.team.together("out"), self.writing():
            return out if self.team.rank == 0 else {"": npy.mapped(self.path)}

    def _verify(self, rank: int) -> None:
        """Raise :class:`FileError` unless what ``rank`` wrote is what is read here."""
        numbers = np.lib.format.open_memmap(self.part, mode="r")
        for tiles in npy.read_lines(f"{self.tiles}.{rank}")[1:]:
            for where, crc in tiles:
                if npy.checksum(numbers[tuple(slice(*ends) for ends in where)]) != crc:
                    raise FileError(
                        f"rank {self.team.rank} finds other numbers at {where} of {self.part!r} than rank {rank} "
                        "wrote: the file system does not keep what several processes write to one file; use another "
                        "one, or sharded=True and nng.save. The same call computes such tiles anew"
                    )


def _put(fd: int, numbers: np.ndarray, at: int) -> None:
    view = numbers.data.cast("B")
    os.lseek(fd, at, os.SEEK_SET)
    while len(view):
        view = view[os.write(fd, view) :]
