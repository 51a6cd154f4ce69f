"""Running averages of statistics, and their plain form for ``state_dict``."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.core.finite import all_finite
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.registry import qualified
from nngeom.core.statistic import Stacked, Sums, names_of
from nngeom.pmat.block import Block


@dataclass
class Averages:
    """``m <- decay m + (1 - decay) x`` a block, divided on reading by the weight of what was seen (bias correction)."""

    entries: dict[Layout, tuple[float, dict[str, Tensor]]] = field(default_factory=dict)

    def take(self, sums: Sums, examples: int, c: float, decay: float) -> None:
        """Take in :func:`scaled_means`; raises :class:`ArgumentError` for rows under a past: they are not added up."""
        stacked = [block for block, named in sums.sums.items() if any(isinstance(t, Stacked) for t in named.values())]
        if decay and stacked:
            raise ArgumentError(
                f"the statistics of {names_of(stacked[0])[:2]} are rows of single examples, which have no running "
                "average; use statistics_decay=0, or another representation than one of low rank"
            )
        self.update(scaled_means(sums, examples, c), decay)

    def update(self, means: dict[Layout, dict[str, Tensor]], decay: float) -> None:
        """One more step; blocks that were not seen stay as they are."""
        held: list[Tensor] = []
        new: list[Tensor] = []
        for layout, tensors in means.items():
            weight, mine = self.entries.get(layout, (0.0, {}))
            if decay == 0 or not mine:
                self.entries[layout] = (
                    1 - decay,
                    dict(zip(tensors, torch._foreach_mul(list(tensors.values()), 1 - decay))),
                )
                continue
            for name, t in tensors.items():
                if mine[name].shape != t.shape:
                    raise ArgumentError(
                        f"the statistic {name!r} of {names_of(layout)[:2]} changed its shape from "
                        f"{tuple(mine[name].shape)} to {tuple(t.shape)} and has no running average; use "
                        "statistics_decay=0, or another representation"
                    )
                held.append(mine[name])
                new.append(t)
            self.entries[layout] = (decay * weight + 1 - decay, mine)
        if held:
            torch._foreach_lerp_(held, new, 1 - decay)

    def read(self) -> dict[Layout, dict[str, Tensor]]:
        """The averages, unbiased."""
        held = [(t, weight) for weight, tensors in self.entries.values() for t in tensors.values()]
        divided = iter(torch._foreach_div([t for t, _ in held], [weight for _, weight in held]) if held else [])
        return {layout: {name: next(divided) for name in tensors} for layout, (_, tensors) in self.entries.items()}

    def plain(self) -> list[Any]:
        """Tensors, numbers, strings and lists only."""
        return [[plain_block(block), weight, dict(tensors)] for block, (weight, tensors) in self.entries.items()]

    @staticmethod
    def restored(plain: list[Any]) -> Averages:
        """The inverse of :meth:`plain`; copies."""
        return Averages({restored_block(b): (w, {k: t.clone() for k, t in ts.items()}) for b, w, ts in plain})


def scaled_means(sums: Sums, examples: int, c: float) -> dict[Layout, dict[str, Tensor]]:
    """Means over ``examples``, as if every gradient had been ``c`` times as large; those of inputs do not change."""
    tensors: list[Tensor] = []
    factors: list[float] = []
    for layout, named in sums.sums.items():
        for name, t in named.items():
            if isinstance(t, Stacked):
                tensors.append(torch.cat(t.parts))
                factors.append(c / examples**0.5)
            else:
                tensors.append(t)
                factors.append((1.0 if (layout, name) in sums.inputs else c * c) / examples)
    scaled = iter(torch._foreach_mul(tensors, factors) if tensors else [])
    return {layout: {name: next(scaled) for name in named} for layout, named in sums.sums.items()}


def are_finite(sums: Sums) -> bool:
    """Whether no sum is NaN or infinite."""
    held = [t for tensors in sums.sums.values() for t in tensors.values()] if sums.sums else []
    return all_finite([part for t in held for part in (t.parts if isinstance(t, Stacked) else [t])])


def plain_block(block: Any) -> Any:
    """What a statistic calls a block as strings, numbers and lists: a layout, or a name of any kind."""
    if isinstance(block, Layout):
        return ["layout", plain_layout(block)]
    return ["tuple", *map(plain_block, block)] if isinstance(block, tuple) else ["name", block]


def restored_block(plain: list[Any]) -> Any:
    """The inverse of :func:`plain_block`."""
    kind, *parts = plain
    if kind == "tuple":
        return tuple(map(restored_block, parts))
    return restored_layout(parts[0]) if kind == "layout" else parts[0]


def plain_layout(layout: Layout) -> list[Any]:
    """A layout as nested lists."""
    return [
        [list(p.names), p.offset, [list(x) if isinstance(x, tuple) else x for x in astuple(p.arrangement)]]
        for p in layout.pieces
    ]


def restored_layout(plain: list[Any]) -> Layout:
    """The inverse of :func:`plain_layout`."""
    frozen: Any = lambda x: tuple(x) if isinstance(x, list) else x
    return Layout(
        tuple(Piece(tuple(names), at, Arrangement(*map(frozen, arrangement))) for names, at, arrangement in plain)
    )


def plain_blocks(blocks: dict[Layout, Block]) -> list[Any]:
    """Blocks as nested lists of names, tensors and numbers."""
    return [[plain_layout(layout), qualified(type(b)), b.fields()] for layout, b in blocks.items()]


def restored_blocks(plain: list[Any]) -> dict[Layout, Any]:
    """The inverse of :func:`plain_blocks`; copies."""
    found = lambda kind: Block.kinds.find(kind.rpartition(".")[2], kind)
    copies = lambda fields: {name: _copied(value) for name, value in fields.items()}
    return {restored_layout(lay): found(kind)(**copies(fields)) for lay, kind, fields in plain}


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else tuple(map(_copied, x)) if isinstance(x, (tuple, list)) else x
