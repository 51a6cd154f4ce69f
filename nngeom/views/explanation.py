"""What the engine sees in a model: for each parameter the operation, the structure, and what representations would
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nngeom.capture.batch import one_batch
from nngeom.capture.recorder import record
from nngeom.core.errors import ArgumentError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.registry import qualified
from nngeom.cotangents.loss import EveryOutput
from nngeom.pmat.factors import structure_of
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Measured, Representation, as_representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep
from nngeom.views.shown import Frame, Shown, pandas


@dataclass(frozen=True)
class Row:
    """One parameter, its ``name`` and ``shape``: where it is used and what its Jacobian rows look like.

    ``operations``: every use, in order; ``structure``: see :func:`explain`; ``block``: ``(s, o, i)`` of the block it
    belongs to; ``numbers``: entries held by each representation for its whole block, ``None`` where it does not tell.
    """

    name: str
    shape: tuple[int, ...]
    operations: tuple[str, ...]  # every use, in order
    structure: str
    block: tuple[int, int, int]  # (s, o, i) of the block it belongs to
    numbers: dict[str, int | None]  # entries held by each representation for its whole block, None: not told


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """A table, ``rows``, one a parameter; print it. ``outputs``: how many there are, of how many examples; ``notes``:
    what representations keep in part only.
    """

    rows: tuple[Row, ...]
    outputs: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def frames(self) -> Iterator[Frame]:
        """The one table, a row a parameter."""
        kinds = list(self.rows[0].numbers)
        head = ["parameter", "shape", "used in", "structure", "block s x o x i", *kinds]
        body = [
            [
                r.name,
                "x".join(map(str, r.shape)),
                _counted(r.operations),
                r.structure,
                "x".join(map(str, r.block)),
                *("-" if (count := r.numbers[k]) is None else f"{count:,}" for k in kinds),
            ]
            for r in self.rows
        ]
        yield Frame(head, body, numbers=len(kinds))

    def note(self) -> str:
        """Which parameters are slow, where some are, and the other notes."""
        slow = [r.name for r in self.rows if r.structure == "fallback"]
        passes = (
            f"{len(slow)} of {len(self.rows)} parameters take one backward pass an example and output: "
            f"{', '.join(slow[:6])}"
        )
        return "\n".join([*([passes] if slow else []), *self.notes])

    def to_pandas(self) -> Any:
        """One row a parameter as a ``pandas.DataFrame``; raises :class:`MissingExtraError` without pandas."""
        named = ("shape", "operations", "structure", "block")
        rows = [{**{key: getattr(r, key) for key in named}, **r.numbers} for r in self.rows]
        return pandas().DataFrame(rows, index=[r.name for r in self.rows])

    def __getitem__(self, name: str) -> Row:
        return {r.name: r for r in self.rows}[name]


def explain(
    model: nn.Module,
    batch: Any,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    representations: Iterable[Any] | Mapping[str, Any] | None = None,
) -> Explanation:
    """Look at one forward and backward pass of ``model`` on one ``batch`` (as a loader would give it) and report.

    Structures: ``kronecker`` (rows are sums of outer products), ``lookup`` (the same with one-hot inputs), ``tied`` (a
    matrix used as itself and transposed), ``exact`` (small blocks, exact under KFAC), ``unlike uses`` and ``fallback``
    (rows by one backward pass an example and output), ``unused``. The numbers are entries held for the whole block that
    the parameter shares with its bias, as each of ``representations`` says of itself; by default all that are defined
    and say it, your own too, the leanest first. A dict gives them headings.

    ``function`` and ``layer_collection`` as for :func:`FIM`. Raises as :func:`FIM` does.
    """
    run = Run.of(model, one_batch(batch), function=function, layer_collection=layer_collection)
    collection, asked = run.network.collection, _asked(representations)
    chunk = next(Sweep(run, EveryOutput()).chunks())
    used: dict[str, list[str]] = {}
    for use in (recorded.use for recorded in record(run.network, next(run.batches())).uses):
        for slot in use.slots:
            used.setdefault(slot.name, []).append(use.operation)
    unused = set(collection.names).difference(*(layout.names for layout in chunk.jacobians))
    blocks: dict[Layout, LayerJacobian | None] = {**chunk.jacobians, **{collection.span([n]): None for n in unused}}
    selection, shapes = Selection.of(collection), dict(zip(collection.names, collection.shapes))
    named = {}
    for layout, j in blocks.items():
        numbers = {heading: r.entries_of(layout, j, selection) for heading, r in asked.items()}
        for name in layout.names:
            structure = "unused" if j is None else "fallback" if name in run.left_to_fallback else structure_of(j)
            named[name] = Row(name, shapes[name], tuple(used.get(name, ())), structure, layout.sizes, numbers)
    notes = [note for layout, j in blocks.items() for r in asked.values() for note in r.notes_of(layout, j)]
    rows = [named[name] for name in collection.names]
    rows = _told(asked, rows) if representations is None else rows
    return Explanation(tuple(rows), (chunk.cotangents[1], chunk.examples), tuple(dict.fromkeys(notes)))


def _asked(representations: Any) -> dict[str, Representation]:
    """``{heading: representation}``."""
    if isinstance(representations, Mapping):
        return {name: as_representation(r) for name, r in representations.items()}
    listed = Measured.kinds.classes() if representations is None else representations
    asked: dict[str, Representation] = {}
    for r in map(as_representation, [listed] if isinstance(listed, (type, Representation)) else listed):
        heading = r.kind.__name__.removeprefix("PMat")
        heading += f"({', '.join(f'{key}={value}' for key, value in r.settings.items())})" if r.settings else ""
        if heading in asked:
            heading = qualified(r.kind)
        if heading in asked and representations is not None:  # of the registry the one defined last is meant
            raise ArgumentError(
                f"two representations are both called {heading}; pass a dict {{heading: representation}}"
            )
        asked[heading] = r
    return asked


def _told(asked: dict[str, Representation], rows: list[Row]) -> list[Row]:
    """The rows with those numbers alone that some representation told, the leanest first."""
    sizes = {name: [r.numbers[name] for r in rows] for name in asked}
    told = {name: sum(x or 0 for x in column) for name, column in sizes.items() if any(column)}
    return [replace(r, numbers={name: r.numbers[name] for name in sorted(told, key=told.__getitem__)}) for r in rows]


def _counted(operations: tuple[str, ...]) -> str:
    """``linear x2, embedding``."""
    if not operations:
        return "-"
    return ", ".join(f"{op} x{n}" if (n := operations.count(op)) > 1 else op for op in dict.fromkeys(operations))
