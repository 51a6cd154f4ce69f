"""Objects as bytes for other processes, their tensors apart from the rest."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

SIZE = 1024  # bytes of a message that goes in one piece, its length included
_PREFIX = 8


def message(x: Any) -> Tensor:
    """An object as uint8, its length in front."""
    data = pickle.dumps(x)
    return torch.frombuffer(bytearray(len(data).to_bytes(_PREFIX, "little") + data), dtype=torch.uint8)


def padded(m: Tensor, size: int) -> Tensor:
    """The first ``size`` bytes of a message, filled up with zeros."""
    out = torch.zeros(size, dtype=torch.uint8)
    out[: min(size, len(m))] = m[:size]
    return out


def length(m: Tensor) -> int:
    """How many bytes a message has in all, of its first ones."""
    return _PREFIX + int.from_bytes(bytes(m[:_PREFIX].tolist()), "little")


def content(m: Tensor) -> Any:
    """The object of a message."""
    return pickle.loads(bytes(m[_PREFIX : length(m)].tolist()))


class _Apart(pickle.Pickler):
    """Leaves tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, x: Any) -> int | None:
        if not isinstance(x, Tensor):
            return None
        self.tensors.append(x.detach())
        return len(self.tensors) - 1


class _Joined(pickle.Unpickler):
    """Puts tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        return self.tensors[place]


def taken_apart(x: Any) -> tuple[bytes, list[Tensor]]:
    """An object without its tensors, and these."""
    file = io.BytesIO()
    pickler = _Apart(file)
    pickler.dump(x)
    return file.getvalue(), pickler.tensors


def put_together(rest: bytes, tensors: list[Tensor]) -> Any:
    """The inverse of :func:`taken_apart`."""
    return _Joined(io.BytesIO(rest), tensors).load()
