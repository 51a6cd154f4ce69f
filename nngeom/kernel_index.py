"""The index of a folder of parts: what the whole is, and which files hold it, all of it checked when it is read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nngeom.core import container
from nngeom.core.errors import FileError
from nngeom.fmat.sharded import FMatSharded
from nngeom.parts_folder import INDEX, PART

FORMAT = 1
LONGEST = 2**26  # bytes


def crc(text: str) -> str:
    """A checksum."""
    return f"{zlib.crc32(text.encode()):08x}"


@dataclass(frozen=True)
class Index:
    """``tree`` of the whole; ``parts``, the name and the checksum of the header of each, with ``counts`` examples along
    the rows; ``across``, those along the columns; ``outputs``; ``dtype`` as the format calls it; ``between``: two sets
    of examples.
    """

    tree: Any
    parts: tuple[tuple[str, str], ...]
    counts: tuple[int, ...]
    across: tuple[int, ...]
    outputs: int
    dtype: str
    between: bool

    @staticmethod
    def of(K: FMatSharded, tree: Any, parts: Sequence[tuple[str, str]]) -> Index:
        """That of a sharded kernel whose parts are written."""
        dtype = next(name for name, dtype in container.REAL.items() if dtype == K.dtype)
        sizes = (K.places.counts, K.across.counts, K.outputs)
        return Index(tree, tuple(parts), *sizes, dtype, K.between)

    @property
    def rows(self) -> int:
        """The examples of all parts."""
        return sum(self.counts)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        own = {"object": self.tree, "parts": [list(part) for part in self.parts], "counts": list(self.counts)}
        own |= {"across": list(self.across), "outputs": self.outputs, "dtype": self.dtype, "between": self.between}
        return {"format": FORMAT, **own}

    @property
    def checksum(self) -> str:
        """Of all that it says."""
        return crc(json.dumps(self.plain(), sort_keys=True))

    def text(self) -> str:
        """The file."""
        return json.dumps({"nngeom": self.plain(), "checksum": self.checksum}, indent=1)

    @staticmethod
    def read(folder: str) -> Index:
        """That of a folder; raises :class:`FileError` where there is none, or it is damaged, foreign or newer."""
        path = os.path.join(folder, INDEX)
        try:
            if os.path.getsize(path) > LONGEST:
                raise ValueError(f"it is longer than {LONGEST} bytes")
            with open(path, "rb") as file:
                found = container.json_of(file.read())
        except FileNotFoundError as error:
            raise FileError(
                f"there is no {INDEX} in the folder {folder!r}: nothing was saved there to its end"
            ) from error
        except (OSError, ValueError) as error:
            raise FileError(f"{path!r} is damaged, or no index of this library: {error}") from error
        plain = found.get("nngeom")
        if not isinstance(plain, dict) or not isinstance(plain.get("format"), int):
            raise FileError(f"{path!r} is no index of this library; expected one written by nngeom.save")
        if plain["format"] > FORMAT:
            raise FileError(f"{path!r} has format {plain['format']}, this version reads up to {FORMAT}; upgrade nngeom")
        if found.get("checksum") != crc(json.dumps(plain, sort_keys=True)):
            raise FileError(f"{path!r} is damaged: it has not the checksum it was saved with")
        if not _fits(plain):
            raise FileError(f"{path!r} does not say what a result in parts is; expected one written by nngeom.save")
        lists = (tuple(map(tuple, plain["parts"])), tuple(plain["counts"]), tuple(plain["across"]))
        return Index(plain["object"], *lists, plain["outputs"], plain["dtype"], plain["between"])


def _fits(plain: dict[str, Any]) -> bool:
    """Whether an index has what it needs, of the right types, and numbers that memory can be counted in."""
    keys = {"format", "object", "parts", "counts", "across", "outputs", "dtype", "between"}
    if plain.keys() != keys or not isinstance(plain["parts"], list):
        return False
    named = all(
        isinstance(part, list) and len(part) == 2 and all(isinstance(x, str) for x in part) and PART.fullmatch(part[0])
        for part in plain["parts"]
    )
    sizes = [plain["counts"], plain["across"], [plain["outputs"]]]
    counted = all(map(_are_counts, sizes)) and len(plain["counts"]) == len(plain["parts"]) > 0
    kinds = isinstance(plain["between"], bool) and plain["dtype"] in list(container.REAL)
    square = plain["between"] or plain["counts"] == plain["across"]
    return bool(named and counted and kinds and square and len(set(map(tuple, plain["parts"]))) == len(plain["parts"]))


def _are_counts(x: Any) -> bool:
    return isinstance(x, list) and all(type(v) is int and 0 <= v < 2**62 for v in x)
