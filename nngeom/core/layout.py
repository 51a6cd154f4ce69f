"""Where the matrix ``[s, o, i]`` of a block lies in the flat parameter vector.

Letters, here and everywhere: ``s`` group, ``o`` out, ``i`` in. A layout lists pieces, one a parameter, placed side by
side along ``i``: a linear layer is its weight ``[1, out, in]`` and its bias ``[1, out, 1]``. No representation ever
hears of biases, transposed weights or convolution kernels; it sees ``[s, o, i]``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """How one parameter is read as a matrix: ``w.reshape(view).permute(order).reshape(sizes)``, ``sizes = (s, o, i)``.

    ``window``: of inputs ``(channel, place)``, how many places there are.
    """

    view: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    window: int = field(default=1, compare=False)  # i is (channel, place in a window) with so many places

    @staticmethod
    @functools.lru_cache(2**12)
    def plain(s: int, o: int, i: int, window: int = 1) -> Arrangement:
        """The parameter's own order, read as ``[s, o, i]``; ``window`` as in the class."""
        return Arrangement((s, o, i), (0, 1, 2), (s, o, i), window)

    def by_place(self) -> Arrangement:
        """The places of the window as groups of their own, ``[(s w), o, c]`` for ``i = (c w)``."""
        s, o, i = self.sizes
        view, order, w = self.view, self.order, self.window
        if self.is_plain():
            view, order = (s, o, i // w, w), (0, 1, 2, 3)
        return Arrangement(view, (order[0], order[-1], *order[1:-1]), (s * w, o, i // w))

    def is_plain(self) -> bool:
        """Whether reading is a reshape only."""
        return self.order == tuple(range(len(self.order)))

    def read(self, x: Tensor) -> Tensor:
        """``x [*b, numel] -> [*b, s, o, i]`` (a view where strides allow)."""
        b = x.shape[:-1]
        if not self.is_plain():
            x = x.reshape(*b, *self.view).permute(*range(len(b)), *(len(b) + j for j in self.order))
        return x.reshape(*b, *self.sizes)

    def write(self, m: Tensor) -> Tensor:
        """``m [*b, s, o, i] -> [*b, numel]``: the inverse of :meth:`read`."""
        b = m.shape[:-3]
        if not self.is_plain():
            m = m.reshape(*b, *(self.view[j] for j in self.order))
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            m = m.permute(*range(len(b)), *(len(b) + j for j in inverse))
        return m.reshape(*b, math.prod(self.view))

    def folded(self, x: Tensor) -> Tensor:
        """A view of ``x [numel]`` whose entries are in the order of :meth:`unfolded`."""
        return x.view(self.view).permute(self.order)

    def unfolded(self, m: Tensor) -> Tensor:
        """A view of ``m [s, o, i]`` that is no copy whatever its strides: its axes are only cut."""
        return m.view([self.view[j] for j in self.order])


@dataclass(frozen=True)
class Piece:
    """One parameter (or a run of neighbours) of a layout, starting at ``offset`` of the flat vector."""

    names: tuple[str, ...]
    offset: int
    arrangement: Arrangement

    @property
    def stop(self) -> int:
        """One past the last flat index."""
        return self.offset + math.prod(self.arrangement.view)


@dataclass(frozen=True)
class Layout:
    """The place of one block in the flat vector: ``pieces``, one a parameter, side by side along ``i``."""

    pieces: tuple[Piece, ...]

    def __hash__(self) -> int:  # of a key that is looked up for every block of every chunk
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.pieces)

    def __getstate__(self) -> dict[str, tuple[Piece, ...]]:
        return {"pieces": self.pieces}  # hashes of names differ from process to process

    @staticmethod
    def span(named: Sequence[tuple[str, int, int]]) -> Layout:
        """Whole parameters, ``named (name, offset, numel)``, as ``[1, 1, p]`` in a row; neighbours are merged."""
        runs: list[tuple[list[str], int, int]] = []
        for name, offset, numel in named:
            if runs and runs[-1][2] == offset:
                runs[-1] = (runs[-1][0] + [name], runs[-1][1], offset + numel)
            else:
                runs.append(([name], offset, offset + numel))
        return Layout(tuple(Piece(tuple(n), lo, Arrangement.plain(1, 1, hi - lo)) for n, lo, hi in runs))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters of this block."""
        return tuple(name for p in self.pieces for name in p.names)

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """``(s, o, i)``."""
        s, o, _ = self.pieces[0].arrangement.sizes
        return s, o, sum(p.arrangement.sizes[2] for p in self.pieces)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return math.prod(self.sizes)

    @property
    def is_span(self) -> bool:
        """Whether the block is plain flat parameters, ``[1, 1, p]`` in their own order."""
        return all(p.arrangement.sizes[:2] == (1, 1) and p.arrangement.is_plain() for p in self.pieces)

    def gather(self, flat: Tensor) -> Tensor:
        """``flat [*b, d] -> [*b, s, o, i]``."""
        parts = [p.arrangement.read(flat[..., p.offset : p.stop]) for p in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def gather_into(self, flat: Tensor, out: Tensor) -> None:
        """:meth:`gather` of ``flat [*b, d]`` into ``out [*b, s, o, i]``, of any strides."""
        lo = 0
        for p in self.pieces:
            i = p.arrangement.sizes[2]
            out[..., lo : lo + i] = p.arrangement.read(flat[..., p.offset : p.stop])
            lo += i

    def scatter_(self, flat: Tensor, m: Tensor) -> None:
        """Write ``m [*b, s, o, i]`` into ``flat [*b, d]``."""
        lo = 0
        for p in self.pieces:
            i = p.arrangement.sizes[2]
            flat[..., p.offset : p.stop] = p.arrangement.write(m[..., lo : lo + i])
            lo += i

    def add_(self, flat: Tensor, m: Tensor) -> None:
        """Add ``m [*b, s, o, i]`` to ``flat [*b, d]``."""
        lo = 0
        for p in self.pieces:
            i = p.arrangement.sizes[2]
            flat[..., p.offset : p.stop] += p.arrangement.write(m[..., lo : lo + i])
            lo += i

    def indices(self, device: torch.device | None = None) -> Tensor:
        """``[s, o, i]`` flat indices on a ``device``, for code that needs single coordinates."""
        stop = max(p.stop for p in self.pieces)
        return self.gather(torch.arange(stop, device=device))
