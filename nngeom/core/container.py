"""The safetensors format, read: a length, a JSON header, the bytes of the tensors, and nothing besides.

Tensors are read into memory of their own, so that they stay what they are when the file changes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nngeom.core.errors import FileError

REAL = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LONGEST_HEADER = 100_000_000  # of the format


@dataclass(frozen=True)
class Contents:
    """An open file: its ``metadata``, and where its tensors lie, ``places {key: (start, shape, dtype)}`` in bytes."""

    file: BinaryIO
    metadata: dict[str, str]
    places: dict[str, tuple[int, tuple[int, ...], torch.dtype]]

    def tensor(self, key: str) -> Tensor:
        """All of a tensor."""
        start, shape, dtype = self.places[key]
        out = torch.empty(shape, dtype=dtype)
        self._fill(out, start)
        return out

    def rows(self, key: str, lo: int, hi: int) -> Iterator[Tensor]:
        """``[hi - lo, ...]`` for every entry of the first axis: the part ``lo`` to ``hi`` of the second one."""
        start, (count, n, *rest), dtype = self.places[key]
        row = math.prod(rest) * dtype.itemsize
        for k in range(count):
            out = torch.empty([hi - lo, *rest], dtype=dtype)
            self._fill(out, start + (k * n + lo) * row)
            yield out

    def _fill(self, out: Tensor, start: int) -> None:
        self.file.seek(start)
        view = out.reshape(-1).view(torch.uint8).numpy().data
        while len(view):
            read = self.file.readinto(view)  # type: ignore[attr-defined]
            if not read:
                raise ValueError("it ends before its last tensor")
            view = view[read:]


def read(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """``(metadata, tensors)`` of a file of real tensors; errors as for :func:`opened`."""
    with opened(path) as contents:
        return contents.metadata, {key: contents.tensor(key) for key in contents.places}


@contextlib.contextmanager
def opened(path: str) -> Iterator[Contents]:
    """What is in a file of real tensors; raises :class:`FileError` where it is none.

    Every tensor is as large as its shape says, so that nothing is allocated that is not there.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError(f"cannot read {path!r}: it is no regular file")
        with open(path, "rb") as file:
            yield _contents(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise FileError(f"there is no file {path!r}") from error
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path!r}: {error}") from error
    except ValueError as error:
        raise FileError(f"{path!r} is damaged, truncated, or no safetensors file: {error}") from error


def _contents(file: BinaryIO, size: int) -> Contents:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(size - 8, LONGEST_HEADER):
        raise ValueError(f"it has {size} bytes, too few for a header of {length}, or for any")
    header = json_of(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    places = sorted(_places(header))
    stop = 0
    for lo, hi, key, _, _ in places:
        if lo != stop:
            raise ValueError(f"tensor {key!r} starts at byte {lo} of the data; expected {stop}")
        stop = hi
    if stop != size - 8 - length:
        raise ValueError(f"its tensors have {stop} bytes, the file holds {size - 8 - length}")
    data = 8 + length
    return Contents(file, metadata, {key: (data + lo, shape, REAL[dtype]) for lo, _, key, shape, dtype in places})


def json_of(text: bytes) -> dict[str, Any]:
    """The JSON object of a ``text``; raises :class:`ValueError` for what is none, and for a key that is there twice."""
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"its header is a {type(found).__name__}")
    return found


def _places(header: dict[str, Any]) -> Iterator[tuple[int, int, str, tuple[int, ...], str]]:
    """``(start, stop, key, shape, dtype)`` of every tensor, its bytes as many as its shape says."""
    for key, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of tensor {key!r} is not understood")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {key!r} has the shape {str(shape)[:80]} and the offsets {str(offsets)[:80]}")
        if not isinstance(dtype, str) or dtype not in REAL:
            raise ValueError(
                f"tensor {key!r} has the dtype {str(dtype)[:20]}; expected real floating-point numbers, one of "
                f"{', '.join(REAL)}"
            )
        if math.prod(shape) * REAL[dtype].itemsize != offsets[1] - offsets[0]:
            raise ValueError(f"tensor {key!r} of shape {tuple(shape)} has {offsets[1] - offsets[0]} bytes")
        yield offsets[0], offsets[1], key, tuple(shape), dtype


def _are_sizes(x: Any) -> bool:
    """A list of whole numbers that memory can be counted in."""
    return isinstance(x, list) and len(x) <= 64 and all(type(v) is int and 0 <= v < 2**62 for v in x)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("its header has a key twice")
    return out


def checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """Of a header and the ``tensors`` of a file, ``{key: tensor}`` on the cpu."""
    crc = zlib.crc32(header.encode())
    for key in sorted(tensors):
        t = tensors[key]
        crc = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
