"""Chunks of rows taken apart into positions: every position of an example is an example of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nngeom.core.errors import OutputError, StructureError
from nngeom.core.positions import at_positions, positions
from nngeom.sweep.sweep import Chunk


@dataclass
class Positions:
    """The number of positions of all examples, as chunks of rows are taken apart into them."""

    count: int | None = field(default=None)

    def taken_apart(self, chunk: Chunk) -> Chunk:
        """A chunk of which every position is an example.

        Raises :class:`StructureError` where parameters have no positions or others than the rest, and
        :class:`OutputError` where batches differ in their number.
        """
        found = {layout: positions(j) for layout, j in chunk.jacobians.items()}
        most = max((t for t in found.values() if t is not None), default=1)
        other = {name: t for layout, t in found.items() if t != most for name in layout.names}
        if other:
            raise StructureError(
                f"by_position=True: the rows of parameters {list(other)[:4]} are sums over "
                f"{'positions that are not kept' if None in other.values() else 'others than the rest'}, where others "
                f"have {most} positions; leave parameters used several times and what is behind a pooling out, "
                "LayerCollection.from_model(model, exclude=...)"
            )
        if self.count is not None and self.count != most:
            raise OutputError(
                f"batches have {self.count} and {most} positions; expected as many in all: pad them to one length"
            )
        self.count = most
        jacobians = {layout: at_positions(j) for layout, j in chunk.jacobians.items()}
        return replace(chunk, jacobians=jacobians, examples=chunk.examples * most, start=chunk.start * most)
