"""Sums over the first batches of a sweep, in a file: what is added up so far, and of what."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nngeom.core import container, files
from nngeom.core.block_names import block_of, plain
from nngeom.core.errors import FileError
from nngeom.core.kept import Kept, Key
from nngeom.core.outline import Sketch, alike, outline
from nngeom.core.statistic import Sums

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a sweep has come: after so many ``batches``, whose contents make the ``digest``.

    ``about``: of what measure. ``finished``: there are no more. ``left``: parameters that were left to the fallback
    before it, and by now. ``first``: what the first batch added, see :func:`sketch`; ``met``: its digest.
    """

    about: str
    batches: int = 0
    digest: str = ""
    finished: bool = False
    left: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    first: tuple[Sketch, ...] = ()
    met: str | None = None

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Progress:
        """From JSON."""
        before, now = tree["left"]
        first = tuple((float(a), float(b), float(c)) for a, b, c in tree["first"])
        read = Progress(**{**tree, "left": (tuple(before), tuple(now)), "first": first})
        if type(read.batches) is not int or read.batches < 0 or not isinstance(read.finished, bool):
            raise ValueError(f"it says {read.batches!r} batches")
        return read


def write(path: str, progress: Progress, sums: Sums) -> None:
    """Replace the file at ``path``; the one before stays beside it, ``path + ".older"``. Raises :class:`FileError`."""
    listed = [[plain(block), name, *_plain(k)] for (block, name), k in sums.kept().items()]
    header = json.dumps({"format": FORMAT, "progress": asdict(progress), "examples": sums.count, "kept": listed})
    tensors = {f"{j:06d}": t.detach().cpu().contiguous() for j, t in enumerate(numbers(sums))}
    metadata = {"nngeom": header, "checksum": container.checksum(header, tensors)}
    try:
        safetensors.torch.save_file(tensors, path + ".part", metadata)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path + ".older")
        files.move(path + ".part", path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(
            f"cannot write {path!r}: {error}; expected a folder that can be written, on a disk with room for the sums"
        ) from error


def read(path: str, device: torch.device) -> tuple[Progress, Sums] | None:
    """The newer of the two that is whole; ``None`` where there is none, :class:`FileError` where none is whole."""
    bad: list[FileError] = []
    for name in (path, path + ".older"):
        if os.path.exists(name):
            try:
                return _read(name, device)
            except FileError as error:
                bad.append(error)
    if bad:
        raise bad[0]
    return None


def _read(path: str, device: torch.device) -> tuple[Progress, Sums]:
    metadata, tensors = container.read(path)
    header = metadata.get("nngeom", "")
    if metadata.get("checksum") != container.checksum(header, tensors):
        raise FileError(
            f"{path!r} is damaged, or holds no sums: its contents have not the checksum they were saved with"
        )
    try:
        tree = json.loads(header)
        if tree["format"] > FORMAT:
            raise FileError(f"{path!r} has format {tree['format']}, this version reads up to {FORMAT}; upgrade nngeom")
        return Progress.of(tree["progress"]), _sums(tree, tensors, device)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path!r} does not describe sums of a sweep: {type(error).__name__}: {error}") from error


def _sums(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Sums:
    kept = {_key(item): _kept(*item[2:]) for item in tree["kept"]}
    sums = Sums(tree["examples"])
    sums.adopt(kept, device)
    found = [tensors[key] for key in sorted(tensors)]
    addends, stacks = sums.addends(), sums.stacks()
    if len(found) != len(addends) + len(stacks):
        raise ValueError(f"it has {len(found)} tensors; expected {len(addends) + len(stacks)}")
    for into, t in zip(addends, found):
        if into.shape != t.shape or into.dtype != t.dtype:
            raise ValueError(f"a sum is {tuple(t.shape)} {t.dtype}; expected {tuple(into.shape)} {into.dtype}")
        into.copy_(t)
    for stack, t in zip(stacks, found[len(addends) :]):
        stack.parts = [t.to(device)]
    return sums


def numbers(sums: Sums) -> list[Tensor]:
    """All that is summed, and all that is stacked, in order."""
    return [*sums.addends(), *(torch.cat(stack.parts) for stack in sums.stacks())]


def sketch(sums: Sums) -> tuple[Sketch, ...]:
    """Of every sum, what :func:`nngeom.core.outline.outline` says."""
    return tuple(map(outline, numbers(sums)))


def differs(sums: Sums, first: tuple[Sketch, ...]) -> str | None:
    """The first statistic whose sketch is not that of ``first``, but for rounding, where there is one."""
    found, mine = sketch(sums), numbers(sums)
    if len(found) != len(first):
        return f"{len(found)} sums instead of {len(first)}"
    for t, then, now in zip(mine, first, found):
        if not alike(then, now, torch.finfo(t.dtype).eps, max(then[2], now[2])):
            return f"a sum of shape {tuple(t.shape)}"
    return None


def _plain(k: Kept) -> list[Any]:
    dtype = next(name for name, dtype in container.REAL.items() if dtype == k.dtype)
    return [list(k.shape), dtype, k.stacked, k.half, k.inputs]


def _kept(shape: Any, dtype: str, stacked: Any, half: Any, inputs: Any) -> Kept:
    return Kept(tuple(shape), container.REAL[dtype], stacked=stacked, half=half, inputs=inputs)


def _key(item: Any) -> Key:
    return block_of(item[0]), item[1]
