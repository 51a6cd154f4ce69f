"""Where tiles of kernels go: tensors in memory, or a memory-mapped ``.npy`` that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, FileError

Place = tuple[slice, ...]


class Store:
    """Kernels in memory, one a name. With ``graph`` nothing is overwritten that autograd still needs."""

    def __init__(self, names: tuple[str, ...], graph: bool = False):
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

    def write(self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]) -> None:
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
    """One kernel in ``path``, a ``.npy`` written tile by tile, with the finished tiles listed in ``path + ".tiles"``.

    ``fingerprint`` stands for everything the numbers depend on: resuming with another one raises :class:`ArgumentError`,
    a file that cannot be written or read :class:`FileError`. The list is removed when the kernel is complete.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str):
        super().__init__(("",))
        self.path = os.path.abspath(os.fspath(path))
        self.journal = self.path + ".tiles"
        self.fingerprint = fingerprint
        self.done: list[list[list[int]]] = []
        self.map: Any = None

    def open(self, shape, dtype, device):
        if self.map is not None:
            return
        super().open(shape, dtype, device)
        numpy_dtype = torch.empty((), dtype=dtype).numpy().dtype
        try:
            resumed = self._resume(shape, numpy_dtype) if os.path.exists(self.journal) else False
            self.map = np.lib.format.open_memmap(self.path, mode="r+" if resumed else "w+", dtype=numpy_dtype, shape=shape)
            if not resumed:
                self._record()
        except (OSError, ValueError) as error:
            if isinstance(error, ArgumentError):
                raise
            raise FileError(f"cannot write the kernel to {self.path!r}: {error}; expected a path in an existing folder that can be written") from error

    def _resume(self, shape: tuple[int, ...], dtype: np.dtype) -> bool:
        with open(self.journal) as f:
            state = json.load(f)
        if state["fingerprint"] != self.fingerprint or tuple(state["shape"]) != tuple(shape) or state["dtype"] != dtype.str:
            raise ArgumentError(
                f"{self.path!r} holds an unfinished kernel of other inputs, parameters or options, shape {tuple(state['shape'])}; "
                f"resume with the same ones, or delete {self.journal!r} to start anew"
            )
        self.done = state["done"]
        return os.path.exists(self.path)

    def _record(self) -> None:
        state = {"fingerprint": self.fingerprint, "shape": list(self.shape), "dtype": self.map.dtype.str, "done": self.done}
        part = self.journal + ".part"
        with open(part, "w") as f:
            json.dump(state, f)
        os.replace(part, self.journal)

    def has(self, place):
        return _listed(place) in self.done

    def write(self, place, tiles, mirror, flip):
        tile = tiles[""].detach().to(self.dtype).cpu().numpy() if tiles else 0
        self.map[place] = tile
        if mirror is not None:
            self.map[mirror] = flip(tiles[""].detach().to(self.dtype)).cpu().numpy() if tiles else 0
        self.map.flush()
        self.done.append(_listed(place))
        self._record()

    def result(self):
        os.remove(self.journal)
        return {"": torch.from_numpy(self.map)}


def _listed(place: Place) -> list[list[int]]:
    return [[s.start, s.stop] for s in place]


def fingerprint(batches: Iterable[Any], state: Mapping[str, Any], *options: Any) -> str:
    """A hash of all tensors of some batches, of a model's state, and of options."""
    digest = hashlib.sha256(repr(options).encode())
    for item in (*batches, dict(state)):
        for x in _leaves(item):
            if isinstance(x, Tensor):
                digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
                digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
            else:
                digest.update(repr(x).encode())
    return digest.hexdigest()


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, Mapping):
        for name, value in x.items():
            yield name
            yield from _leaves(value)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _leaves(item)
    else:
        yield x
