"""Kernels as ``.npy`` files: space for one that grows, a list of its tiles, and a foot that says what it is of.

The foot lies behind the numbers, where readers of ``.npy`` do not look: a description in JSON, and its checksum, length
and a mark. Lists have one JSON value a line, each with its checksum, so that a line that was cut off is none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nngeom.core import files

Ranges = tuple[tuple[int, int], ...]  # where a tile lies
Parts = list[tuple[Ranges, int]]  # a tile and its mirror image, with their checksums

FOOT = struct.Struct("<IQ8s")
MARK = b"nngeomK1"


def _numpy(dtype: torch.dtype) -> np.dtype:
    return torch.empty((), dtype=dtype).numpy().dtype


def create(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    """A new file of zeros, mapped, all of it on the disk: raises :class:`OSError` where that has no room."""
    with open(path, "wb") as file:
        header = {"descr": _numpy(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start = file.tell()
        files.reserve(file.fileno(), start, start + math.prod(shape) * dtype.itemsize)
    return np.lib.format.open_memmap(path, mode="r+")


def _opened(path: str) -> np.memmap:
    """The numbers of a file, for reading: nothing is allocated that it does not hold; raises :class:`ValueError` for
    another one, whatever its head makes NumPy say.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"it does not begin as a .npy file: {type(error).__name__}: {error}") from error


def begun(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap | None:
    """A file made by :func:`create`, mapped; ``None`` where there is none or it is cut off."""
    try:
        found = _opened(path)
    except (FileNotFoundError, ValueError):
        return None
    if found.shape != tuple(shape) or found.dtype != _numpy(dtype):
        return None
    numbers = np.lib.format.open_memmap(path, mode="r+")
    with open(path, "rb+") as file:
        files.reserve(file.fileno(), numbers.offset, numbers.offset + numbers.nbytes, new=False)
    return numbers


def start(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where the numbers of a file made by :func:`create` begin; raises :class:`ValueError` for another one."""
    numbers = _opened(path)
    if numbers.shape != tuple(shape) or numbers.dtype != _numpy(dtype):
        raise ValueError(f"it has {numbers.dtype} numbers of shape {numbers.shape}; expected {_numpy(dtype)}, {shape}")
    return int(numbers.offset)


def finish(numbers: np.memmap, path: str, about: dict[str, Any]) -> None:
    """Write the foot; all of the file is on the disk then."""
    numbers.flush()
    stop = numbers.offset + numbers.nbytes
    text = json.dumps({"about": about, "checksum": _checksum_of_file(path, stop)}).encode()
    with open(path, "rb+") as file:
        file.truncate(stop)
        file.seek(stop)
        file.write(text + FOOT.pack(zlib.crc32(text), len(text), MARK))
        file.flush()
        os.fsync(file.fileno())


def _foot(path: str) -> tuple[dict[str, Any], int]:
    """What the foot says, and where it begins; raises :class:`ValueError` where there is none."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < FOOT.size:
            raise ValueError(f"it has {size} bytes")
        file.seek(size - FOOT.size)
        crc, length, mark = FOOT.unpack(file.read())
        start = size - FOOT.size - length
        if mark != MARK or start < 0:
            raise ValueError("it does not say what it is a kernel of")
        file.seek(start)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        raise ValueError("what it says of itself was changed")
    return json.loads(text), start


def description(path: str) -> dict[str, Any]:
    """What a finished file was said to be about."""
    return _foot(path)[0]["about"]


def require_whole(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`ValueError` unless the numbers of a finished file are those that were written; reads all of it."""
    foot, start = _foot(path)
    numbers = _opened(path)
    if numbers.shape != tuple(shape) or numbers.dtype != _numpy(dtype) or numbers.offset + numbers.nbytes != start:
        raise ValueError(
            f"it has {numbers.dtype} numbers of shape {numbers.shape}; expected {_numpy(dtype)}, {tuple(shape)}"
        )
    if _checksum_of_file(path, start) != foot["checksum"]:
        raise ValueError("its numbers do not have the checksum they were saved with")


def mapped(path: str) -> Tensor:
    """The numbers as memory of this process alone: what is written to it does not reach the file."""
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except OSError:  # more than the system promises to one process: for reading only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(np.lib.format.open_memmap(path, mode="r"))


def checksum(block: np.ndarray) -> int:
    """Of the numbers of a tile, in their order."""
    crc = 0
    for index in np.ndindex(block.shape[:2]):
        crc = zlib.crc32(np.ascontiguousarray(block[index]).data, crc)
    return crc


def _checksum_of_file(path: str, stop: int) -> int:
    crc = 0
    with open(path, "rb") as file:
        while stop and (piece := file.read(min(stop, 2**20))):
            crc, stop = zlib.crc32(piece, crc), stop - len(piece)
    return crc


# -- lists -------------------------------------------------------------------------------------------------------------


def _line(item: Any) -> bytes:
    text = json.dumps(item).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def add_line(path: str, item: Any) -> None:
    """One more at the end."""
    with open(path, "ab") as file:
        file.write(_line(item))


def write_lines(path: str, items: Iterable[Any]) -> None:
    """A new list in place of an old one, whole or not at all."""
    part = path + ".part"
    with open(part, "wb") as file:
        file.writelines(map(_line, items))
    os.replace(part, path)


def read_lines(path: str) -> list[Any]:
    """The items of a list, up to the first line that is not whole; none where there is no list."""
    items: list[Any] = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            crc, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
                break
            items.append(json.loads(text))
    return items
