"""Where tiles of kernels go: tensors in memory, or a ``.npy`` file that is resumed where it was begun.

While it grows, a kernel lies beside its place: the numbers in ``path + ".part"``, the finished tiles with their
checksums in ``path + ".tiles"``, and ``path + ".lock"`` is locked. Then it is moved to ``path``, whole, and nothing is
written there again: kernels that are read from it are not touched by later runs. The file says what it is a kernel of,
so that it is known again.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import files
from nngeom.core.errors import ArgumentError, ArgumentTypeError, FileError, NNGeomError
from nngeom.core.given_plainly import as_path
from nngeom.fmat import npy
from nngeom.fmat.fingerprint import Fingerprint

Place = tuple[slice, ...]


class Store:
    """Kernels in memory, one a name. With ``graph`` nothing is overwritten that autograd still needs."""

    def __init__(self, names: tuple[str, ...], *, graph: bool = False) -> None:
        self.names, self.graph = names, graph
        self.tensors: dict[str, Tensor] = {}
        self.shape: tuple[int, ...] = ()
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Say what the whole kernel looks like; again and again is fine."""
        self.shape, self.dtype, self.device = shape, dtype, device

    def has(self, place: Place) -> bool:
        """Whether the tile is there already."""
        return False

    def write(
        self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]
    ) -> None:
        """Keep a tile, and its mirror image where it has one. A tile that is the whole kernel is kept as it is."""
        for name, tile in tiles.items():
            if tile.shape == self.shape:
                self.tensors[name] = tile.to(self.dtype)
                continue
            if name not in self.tensors:
                self.tensors[name] = self._zeros()
            self.tensors[name][place] = tile.to(self.dtype)
            if mirror is not None:
                self.tensors[name][mirror] = flip(tile).to(self.dtype)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def result(self) -> dict[str, Tensor]:
        """``{name: kernel}``; zeros for a name without any tile."""
        return {name: self.tensors[name] if name in self.tensors else self._zeros() for name in self.names}


class FileStore(Store):
    """One kernel in the ``.npy`` file ``path``, for the time of a ``with``.

    Raises :class:`FileError` where the file cannot be written, is damaged or foreign, or is being written by another
    process, before anything is computed; :class:`ArgumentError` where it is a kernel of other inputs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(("",))
        try:
            self.path = os.path.realpath(as_path(path))
        except TypeError:
            raise ArgumentTypeError(f"out is {path!r}; expected the path of a file") from None
        except ValueError as error:
            raise ArgumentError(f"out is {path!r}; expected the path of a file: {error}") from None
        self.part, self.journal = self.path + ".part", self.path + ".tiles"
        self.done: dict[npy.Ranges, npy.Parts] = {}
        self.map: Any = None
        self.about: dict[str, Any] = {}
        self.lock: files.Lock | None = None
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise FileError(
                f"cannot write the kernel to {self.path!r}: it is no regular file; expected the path of a file"
            )
        if not self._is_there():
            with self.writing():
                self._lock()

    def _is_there(self) -> bool:
        """Whether there is something at ``path``; an empty file is nothing."""
        return os.path.isfile(self.path) and os.path.getsize(self.path) > 0

    def _lock(self) -> None:
        """Be the only one who writes."""
        try:
            self.lock = files.Lock(self.path + ".lock")
        except BlockingIOError:
            raise FileError(
                f"another process (or thread) is writing the kernel {self.path!r} now; wait for it, or choose another "
                "path as out="
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        begun = self.map is not None
        self.map = None
        if self.lock is not None:
            if begun and not self.done:  # nothing to resume
                self._remove_begun()
            self.lock.release()
            self.lock = None

    def _remove_begun(self) -> None:
        for begun in (self.journal, self.part):
            with contextlib.suppress(FileNotFoundError):
                os.remove(begun)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What the system raises is a :class:`FileError`."""
        try:
            yield
        except NNGeomError:
            raise
        except (OSError, ValueError) as error:
            raise FileError(
                f"cannot write the kernel to {self.path!r}: {error}; expected a path in an existing folder that can be "
                "written, on a disk with room for it"
            ) from error

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype, about: Fingerprint) -> dict[str, Tensor] | None:
        """The kernel, if ``path`` holds it; else ``None``: tiles go to what was begun of it, or to new space.

        ``shape`` and ``dtype`` are those of the whole kernel, ``about`` says of which inputs.
        """
        super().open(shape, dtype, torch.device("cpu"))
        self.about = about.plain()
        if self._is_there():
            return self._finished(about)
        with self.writing():
            if not self._resume(about):
                self._remove_begun()
                try:
                    self.map = npy.create(self.part, shape, dtype)
                    npy.write_lines(self.journal, [self.about])
                except BaseException:
                    self.map = None
                    self._remove_begun()
                    raise
        return None

    def _finished(self, about: Fingerprint) -> dict[str, Tensor]:
        try:
            plain = npy.description(self.path)
            self._require_same(about, plain)
            npy.require_whole(self.path, self.shape, self.dtype)
            with contextlib.suppress(OSError):  # of a process that was killed when all was done
                files.Lock(self.path + ".lock", create=False).release()
            return {"": npy.mapped(self.path)}
        except NNGeomError:
            raise
        except (OSError, ValueError) as error:
            raise FileError(
                f"{self.path!r} is no finished kernel of this library, or is damaged: {error}; delete it to compute "
                "the kernel anew, or choose another path as out="
            ) from error

    def _require_same(self, about: Fingerprint, plain: dict[str, Any]) -> None:
        odd = about.differs(plain)
        if odd:
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            raise ArgumentError(
                f"{self.path!r} holds a kernel of other inputs, parameters or options, which differ in: "
                f"{', '.join(odd[:4])}{more}; use the same ones, choose another path as out=, or delete the file"
                + ("" if self._is_there() else f" {self.part!r} to start anew")
            )

    def _resume(self, about: Fingerprint) -> bool:
        """Take up what was begun with the same inputs, but for damaged tiles; whether there is any."""
        lines = npy.read_lines(self.journal)
        if not os.path.exists(self.part):
            return False
        if not lines:
            self._require_none_elsewhere(about)
            return False
        self._require_same(about, lines[0])
        numbers = npy.begun(self.part, self.shape, self.dtype)
        if numbers is None:
            return False
        self.map = numbers
        for parts in lines[1:]:
            places = [tuple(slice(*ends) for ends in ranges) for ranges, _ in parts]
            if all(npy.checksum(numbers[place]) == crc for place, (_, crc) in zip(places, parts)):
                self.done[ranges(places[0])] = parts
        npy.write_lines(self.journal, [self.about, *self.done.values()])
        return True

    def _require_none_elsewhere(self, about: Fingerprint) -> None:
        """Raise where the kernel was begun by another number of processes, which have lists of other names."""
        for journal in glob.glob(glob.escape(self.path + ".tiles") + "*"):
            lines = npy.read_lines(journal)
            if lines:
                self._require_same(about, lines[0])

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        if self.map is None or tuple(shape) != tuple(self.shape) or dtype != self.dtype:
            raise FileError(
                f"the kernel {self.path!r} was begun as {self.shape} {self.dtype}, and is {shape} {dtype} now"
            )

    def has(self, place: Place) -> bool:
        return ranges(place) in self.done

    def write(
        self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]
    ) -> None:
        parts = []
        for where, turned in ((place, lambda tile: tile), (mirror, flip)):
            if where is not None:
                self.map[where] = turned(tiles[""].detach().to(self.dtype)).cpu().numpy() if tiles else 0
                parts.append((ranges(where), npy.checksum(self.map[where])))
        with self.writing():
            npy.add_line(self.journal, parts)
        self.done[ranges(place)] = parts

    def result(self) -> dict[str, Tensor]:
        """The kernel, moved to its place."""
        with self.writing():
            npy.finish(self.map, self.part, self.about)
            self.map = None
            os.remove(self.journal)
            files.move(self.part, self.path)
            return {"": npy.mapped(self.path)}


def ranges(place: Place) -> npy.Ranges:
    """A place as it is written down."""
    return tuple((s.start, s.stop) for s in place)
