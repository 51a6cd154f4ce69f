"""Several matrices of blocks over one partition of the parameters: the finest that all of them respect.

Diagonal blocks fall apart into any partition; rows of low rank reach over everything and are kept beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block, BlockBasis, EyeBlock
from nngeom.pmat.closed import Weighted
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.group import GroupBlock
from nngeom.pmat.low_rank import LowRankBlock
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True, eq=False)
class MovedBlock(Block):
    """A block at some places of a larger one ``[1, 1, p]``, zero elsewhere."""

    block: Block
    places: Tensor  # [s o i] of the block, in the larger one
    p: int

    def tensors(self) -> Iterator[Tensor]:
        yield from self.block.tensors()

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, block=self.block.map_tensors(f))

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((1, 1, self.p))

    def mv(self, x: Tensor) -> Tensor:
        return self._put(self.block.mv(x[..., 0, 0, self.places]), torch.zeros_like(x))

    def _put(self, y: Tensor, out: Tensor) -> Tensor:
        flat = self.places.flatten().expand(*y.shape[:-3], -1)
        return out.flatten(-3).scatter(-1, flat, y.flatten(-3)).view(out.shape)

    def diag(self) -> Tensor:
        d = self.block.diag()
        return self._put(d, d.new_zeros(self.sizes))

    def trace(self) -> Tensor:
        return self.block.trace()

    def squared_norm(self) -> Tensor:
        return self.block.squared_norm()

    def scaled(self, c: float | Tensor) -> MovedBlock:
        return MovedBlock(self.block.scaled(c), self.places, self.p)

    def inverse(self, damping: Damping) -> Block:
        return GroupBlock(self.dense()[None], 1, 1, self.p).inverse(damping)

    def eigh(self) -> tuple[Tensor, BlockBasis]:
        values, basis = self.block.eigh()
        return self._put(values, values.new_zeros(self.sizes)), MovedBasis(basis, self.places)


@dataclass(frozen=True, eq=False)
class MovedBasis(BlockBasis):
    """A basis of some places, and the other places themselves."""

    basis: BlockBasis
    places: Tensor  # [s o i]

    def mv(self, x: Tensor) -> Tensor:
        return self._inside(x, self.basis.mv)

    def tmv(self, x: Tensor) -> Tensor:
        return self._inside(x, self.basis.tmv)

    def _inside(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        out = x.clone()
        out[..., 0, 0, self.places] = f(x[..., 0, 0, self.places])
        return out


@dataclass(frozen=True, eq=False)
class Rows:
    """Of the matrices of low rank in a sum: ``sum_j sign_j r_j r_j^T``."""

    r: Tensor  # [m d]
    signs: Tensor  # [m]


def regroup(
    collection: LayerCollection, parts: Sequence[tuple[float | Tensor, PMat]]
) -> tuple[dict[Layout, list[Weighted]], Rows | None]:
    """The terms of every block of the common partition, each over its own layout, and the rows of low rank beside."""
    blocks = [(w, layout, block) for w, part in parts for layout, block in part.blocks.items()]
    coupled = [(w, layout, block) for w, layout, block in blocks if not is_diagonal(block)]
    low = [(w, layout, block) for w, layout, block in coupled if isinstance(block, LowRankBlock)]
    coupled = [t for t in coupled if not isinstance(t[2], LowRankBlock)]
    table: dict[Layout, list[Weighted]] = {}
    home: dict[str, Layout] = {}
    for layout in partition(collection, [layout for _, layout, _ in coupled]):
        table[layout] = []
        home |= dict.fromkeys(layout.names, layout)
    for w, layout, block in coupled:
        key = home[layout.names[0]]
        table[key].append((w, block if key == layout else moved(block, layout, key)))
    for w, part in parts:
        for key, block in diagonals(collection, part, list(table)).items():
            table[key].append((w, block))
    for w, layout, block in low:
        for key, terms in table.items():
            if block.is_shifted and not set(key.names).isdisjoint(layout.names):
                terms.append((w, _shift(block, layout, key)))
    return table, _rows(collection, low)


def is_diagonal(block: Block) -> bool:
    """Whether a block falls apart into single parameters."""
    return isinstance(block, (DiagBlock, EyeBlock))


def partition(collection: LayerCollection, layouts: Iterable[Layout]) -> list[Layout]:
    """The finest partition of the parameters that no layout crosses; one block of those that are in none."""
    components: list[tuple[set[str], set[Layout]]] = []
    for layout in dict.fromkeys(layouts):
        mine, names = {layout}, set(layout.names)
        touching = [c for c in components if not c[0].isdisjoint(names)]
        components = [c for c in components if c[0].isdisjoint(names)]
        components.append((names.union(*(c[0] for c in touching)), mine.union(*(c[1] for c in touching))))
    named = set().union(*(names for names, _ in components))
    rest = [name for name in collection.names if name not in named]
    spans = [collection.span(rest)] if rest else []
    for names, inside in components:
        alone = next(iter(inside)) if len(inside) == 1 else None
        spans.append(alone or collection.span([name for name in collection.names if name in names]))
    return spans


def moved(block: Block, layout: Layout, key: Layout) -> MovedBlock:
    """A block of ``layout`` inside of the larger one of ``key``."""
    places = _places(layout, key).to(block.diag().device)
    return MovedBlock(block, places, key.numel)


def _places(layout: Layout, key: Layout) -> Tensor:
    own = key.indices().flatten()
    table = torch.full((max(piece.stop for piece in (*key.pieces, *layout.pieces)),), -1)
    table[own] = torch.arange(len(own))
    return table[layout.indices()]


def diagonals(collection: LayerCollection, part: PMat, keys: Sequence[Layout]) -> dict[Layout, Block]:
    """What the diagonal blocks of a matrix are in each block of a partition."""
    own = {layout: block for layout, block in part.blocks.items() if is_diagonal(block)}
    flat: Tensor | None = None
    found: dict[Layout, Block] = {}
    for key in keys:
        here = [layout for layout in own if not set(layout.names).isdisjoint(key.names)]
        if len(here) == 1 and isinstance(own[here[0]], EyeBlock) and set(key.names) <= set(here[0].names):
            found[key] = EyeBlock(own[here[0]].c, *key.sizes)  # type: ignore[attr-defined]
        elif here == [key]:
            found[key] = own[key]
        elif here:
            flat = _flat_diagonal(part, own, collection.numel) if flat is None else flat
            found[key] = DiagBlock(key.gather(flat))
    return found


def _flat_diagonal(part: PMat, own: dict[Layout, Block], d: int) -> Tensor:
    flat = torch.zeros(d, dtype=part.dtype, device=part.device)
    for layout, block in own.items():
        layout.scatter_(flat, block.diag())
    return flat


def _shift(block: LowRankBlock, layout: Layout, key: Layout) -> Block:
    c = torch.as_tensor(block.shift, dtype=block.r.dtype, device=block.r.device)
    if set(key.names) <= set(layout.names):
        return EyeBlock(c, *key.sizes)
    inside = torch.zeros(max(p.stop for p in (*key.pieces, *layout.pieces)), dtype=c.dtype, device=c.device)
    layout.scatter_(inside, c.expand(layout.sizes))
    return DiagBlock(key.gather(inside))


def _rows(collection: LayerCollection, low: Sequence[tuple[float | Tensor, Layout, LowRankBlock]]) -> Rows | None:
    if not low:
        return None
    rows, signs = [], []
    for w, layout, block in low:
        scaled = block if isinstance(w, float) and w == 1 else block.by_rows(w)
        flat = scaled.r
        if layout != collection.span():
            flat = scaled.r.new_zeros(len(scaled.r), collection.numel)
            layout.scatter_(flat, scaled.r[:, None, None])
        rows.append(flat)
        signs.append(torch.full((len(flat),), scaled.sign, dtype=flat.dtype, device=flat.device))
    return Rows(torch.cat(rows) if len(rows) > 1 else rows[0], torch.cat(signs))
