"""A representation of which every process keeps the blocks of its own layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nngeom.core.errors import UnsupportedError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection
from nngeom.pmat.representation import M_co, Representation
from nngeom.space.collection import LayerCollection


@dataclass(frozen=True, eq=False)
class InParts(Representation[M_co]):
    """``whole`` as a representation of which every process keeps a part; measured some layers a sweep, or ``streamed``
    to who keeps them.
    """

    whole: Representation[PMat]
    streamed: bool = False

    def within(self, collection: LayerCollection) -> InParts[M_co]:
        return replace(self, whole=self.whole.within(collection))

    passes = property(lambda self: self.whole.passes)
    any_columns = property(lambda self: self.whole.any_columns)
    centred = projects = blocks_in_layers = property(lambda self: False)

    def entries_of(self, layout: Layout, rows: LayerJacobian | None, selection: Selection) -> int | None:
        return self.whole.entries_of(layout, rows, selection)

    def notes_of(self, layout: Layout, rows: LayerJacobian | None) -> tuple[str, ...]:
        return self.whole.notes_of(layout, rows)

    def takes(self, rows: LayerJacobian) -> bool:
        return self.whole.takes(rows)

    def recipe(self, selection: Selection) -> Recipe:
        name = self.whole.kind.__name__
        raise UnsupportedError(
            f"PMatSharded of {name} is measured by FIM, FIM_MonteCarlo, EmpiricalFIM and GGN, exactly and not centred; "
            f"elsewhere pass {name}"
        )
