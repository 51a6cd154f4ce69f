"""The blocks of passes with one graph, found once: what :func:`build_units` tells is the same for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nngeom.capture.recorded import Recorded
from nngeom.core.layout import Arrangement, Layout
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.use_groups import UseGroup
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True)
class _Kept:
    """A block without the uses of one pass."""

    layout: Layout
    places: tuple[tuple[int, ExampleAxis], ...]
    with_weight: bool
    with_bias: bool
    arrangements: tuple[Arrangement, ...] | None


@dataclass(frozen=True)
class KnownGroups:
    """The blocks that all parameters of a ``collection`` have in passes whose uses are read by adapters, every one."""

    collection: LayerCollection
    kept: tuple[_Kept, ...]

    @staticmethod
    def of(collection: LayerCollection, groups: Sequence[UseGroup]) -> KnownGroups:
        """Those of one pass."""
        kept = (
            _Kept(g.layout, tuple((j, axis) for j, _, axis in g.uses), g.with_weight, g.with_bias, g.arrangements)
            for g in groups
        )
        return KnownGroups(collection, tuple(kept))

    def are_of(self, collection: LayerCollection) -> bool:
        """Whether they are those of this ``collection``."""
        mine = self.collection
        return mine is collection or (mine == collection and mine.layers == collection.layers)

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
