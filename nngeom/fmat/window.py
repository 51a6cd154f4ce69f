"""A part of a kernel, written as if it were one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nngeom.fmat.store import Place, Store


class Window(Store):
    """Rows and columns of a kernel of a ``kind`` that start ``at`` a place of it; ``mirrored``: what is written is
    written with rows and columns exchanged too.
    """

    def __init__(self, store: Store, kind: Any, at: tuple[int, int], *, mirrored: bool) -> None:
        super().__init__(store.names)
        self.store, self.kind, self.at, self.mirrored = store, kind, at, mirrored

    def has(self, place: Place) -> bool:
        return self.store.has(self._moved(place))

    def write(
        self, place: Place, tiles: Mapping[str, Tensor], mirror: Place | None, flip: Callable[[Tensor], Tensor]
    ) -> None:
        k, n, l, m = here = self._moved(place)
        there = self.kind.place(l, m, k, n) if self.mirrored else None if mirror is None else self._moved(mirror)
        self.store.write(here, tiles, there, flip)

    def _moved(self, place: Place) -> Place:
        k, n, l, m = place
        rows, columns = self.at
        return self.kind.place(k, slice(n.start + rows, n.stop + rows), l, slice(m.start + columns, m.stop + columns))

    def result(self) -> dict[str, Tensor]:
        """Nothing: a kernel is finished as a whole."""
        return {}
