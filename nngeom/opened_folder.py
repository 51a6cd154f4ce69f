"""A folder of the parts of a matrix, read: its index, and the matrix that reads a part when it is used."""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

import torch

from nngeom.core.errors import FileError
from nngeom.parts_folder import INDEX, PART
from nngeom.pmat.in_files import PMatInFiles
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection
from nngeom.tree import decode

FORMAT = 1
Load = Callable[..., Any]


def file_of(folder: str, part: int) -> str:
    """Where a part lies."""
    return os.path.join(folder, f"part-{part:05d}.safetensors")


def index_of(folder: str) -> dict[str, Any]:
    """What a folder says of itself; raises :class:`FileError` where it says nothing that can be read."""
    try:
        with open(os.path.join(folder, INDEX)) as file:
            index: dict[str, Any] = json.load(file)
        form, names = int(index["format"]), [str(name) for part in index["parts"] for name in part]
        known = index["asked"].items() and len(names) == len(set(names))
        if "files" in index:
            require_whole(index)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{folder!r} has no {INDEX} that can be read: {type(error).__name__}: {error}; expected a folder that "
            "nngeom.to_folder or nngeom.save wrote"
        ) from error
    if form > FORMAT or not known:
        raise FileError(f"{folder!r} has format {form}, this version reads up to {FORMAT}; upgrade nngeom")
    return index


def require_whole(index: dict[str, Any]) -> None:
    """Raise :class:`ValueError` unless an index that names its files, by :func:`nngeom.save`, is as it was written."""
    files, ranks, count = index["files"], index["ranks"], len(index["parts"])
    if index["checksum"] != checksum_of(index):
        raise ValueError("it has not the checksum it was saved with")
    if not all(isinstance(name, str) and PART.fullmatch(name) for name in files) or len(set(files)) != count:
        raise ValueError("its files are not those of its parts")
    if not all(type(rank) is int and 0 <= rank < index["processes"] for rank in ranks) or len(ranks) != count:
        raise ValueError("its processes are not those of its parts")


def checksum_of(index: dict[str, Any]) -> str:
    """Of all that an index says."""
    text = json.dumps({name: x for name, x in index.items() if name != "checksum"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def files_of(folder: str, index: dict[str, Any]) -> list[str]:
    """Where the parts lie."""
    if "files" in index:
        return [os.path.join(folder, name) for name in index["files"]]
    return [file_of(folder, j) for j in range(len(index["parts"]))]


def opened(folder: str, load: Load, device: torch.device | None = None) -> PMatInFiles:
    """The matrix of a ``folder``, whose files are read by ``load``, onto a ``device``; raises :class:`FileError` where
    parts are missing.
    """
    index = index_of(folder)
    lying = files_of(folder, index)
    missing = [file for file in lying if not os.path.exists(file)]
    if missing:
        remedy = "save it again" if "files" in index else "call to_folder as before to measure the others"
        raise FileError(f"{folder!r} lacks {len(missing)} of {len(lying)} parts; {remedy}")
    place = torch.device("cpu") if device is None else device
    try:
        whole = decode(index["collection"], {})
        if not isinstance(whole, LayerCollection) or sorted(n for p in index["parts"] for n in p) != sorted(
            whole.names
        ):
            raise ValueError("its parts are not those of its parameters")
        kind, dtype = PMat.kinds.find(*index["kind"]), getattr(torch, index["dtype"])
        examples = int(index["examples"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"the {INDEX} of {folder!r} is damaged: {type(error).__name__}: {error}") from error
    parts = []
    for file, names in zip(lying, index["parts"], strict=True):
        lc = whole.only(names)
        parts.append((lc, functools.partial(_read, file, lc, load, place)))
    return PMatInFiles(whole, tuple(parts), kind, examples, dtype, place)


def _read(file: str, collection: LayerCollection, load: Load, device: torch.device) -> PMat:
    part = load(file, device)
    if not isinstance(part, PMat) or part.layer_collection != collection:
        raise FileError(f"{file!r} is not the part of the matrix that the {INDEX} beside it says")
    return part
