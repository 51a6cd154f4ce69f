"""The blocks of passes with one graph, found once: :func:`build_units` tells the same of the same uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nngeom.capture.recorded import Recorded
from nngeom.core.layout import Arrangement, Layout
from nngeom.pullback.axes import Where
from nngeom.pullback.use_groups import UseGroup
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True)
class _Kept:
    """A block without the uses of one pass."""

    layout: Layout
    places: tuple[tuple[int, Where], ...]
    with_weight: bool
    with_bias: bool
    arrangements: tuple[Arrangement, ...] | None


@dataclass(frozen=True)
class KnownGroups:
    """The blocks that all parameters of a ``collection`` have in passes whose uses are read by adapters, every one."""

    collection: LayerCollection
    asked: tuple[object, ...]  # what they follow from, besides the collection
    kept: tuple[_Kept, ...]

    @staticmethod
    def of(
        collection: LayerCollection,
        uses: Sequence[Recorded],
        axes: Sequence[Where | None],
        groups: list[UseGroup],
    ) -> KnownGroups:
        """Those of one pass, found of its ``uses`` and where their examples lie, ``axes``."""
        kept = (
            _Kept(g.layout, tuple((j, axis) for j, _, axis in g.uses), g.with_weight, g.with_bias, g.arrangements)
            for g in groups
        )
        return KnownGroups(collection, _asked(uses, axes), tuple(kept))

    def are_of(self, collection: LayerCollection, uses: Sequence[Recorded], axes: Sequence[Where | None]) -> bool:
        """Whether they are those of this ``collection``, of these ``uses`` and ``axes``."""
        mine = self.collection
        same = mine is collection or (mine == collection and mine.layers == collection.layers)
        return same and self.asked == _asked(uses, axes)

    def within(self, uses: Sequence[Recorded]) -> list[UseGroup]:
        """Those of another pass with the same graph."""
        return [
            UseGroup(
                k.layout,
                [(j, uses[j], axis) for j, axis in k.places],
                with_weight=k.with_weight,
                with_bias=k.with_bias,
                arrangements=k.arrangements,
            )
            for k in self.kept
        ]


def _asked(uses: Sequence[Recorded], axes: Sequence[Where | None]) -> tuple[object, ...]:
    """All of the uses that blocks follow from."""
    read = (recorded.use for recorded in uses)
    return tuple((use.weight, use.bias, use.lookup, use.elementwise, axis) for use, axis in zip(read, axes))
