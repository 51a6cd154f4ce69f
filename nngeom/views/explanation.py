"""What the engine sees in a model: for each parameter the operation, the structure, and what representations would
hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nngeom.capture.recorder import record
from nngeom.core.layout import Layout
from nngeom.cotangents.loss import EveryOutput
from nngeom.pmat.factors import is_kronecker, structure_of
from nngeom.pmat.kfac import FACTOR_LIMIT
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep
from nngeom.views.text import as_text


@dataclass(frozen=True)
class Row:
    """One parameter, its ``name`` and ``shape``: where it is used and what its Jacobian rows look like.

    ``operations``: every use, in order; ``structure``: see :func:`explain`; ``block``: ``(s, o, i)`` of the block it
    belongs to; ``numbers``: entries held by each representation for its whole block.
    """

    name: str
    shape: tuple[int, ...]
    operations: tuple[str, ...]  # every use, in order
    structure: str
    block: tuple[int, int, int]  # (s, o, i) of the block it belongs to
    numbers: dict[str, int]  # entries held by each representation for its whole block


@dataclass(frozen=True)
class Explanation:
    """A table, ``rows``, one a parameter; print it. ``outputs``: how many there are, of how many examples."""

    rows: tuple[Row, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        kinds = list(self.rows[0].numbers)
        head = ["parameter", "shape", "used in", "structure", "block s x o x i", *kinds]
        body = [
            [
                r.name,
                "x".join(map(str, r.shape)),
                _counted(r.operations),
                r.structure,
                "x".join(map(str, r.block)),
                *(f"{r.numbers[k]:,}" for k in kinds),
            ]
            for r in self.rows
        ]
        table = as_text([head, *body], numbers=len(kinds))
        slow = [r.name for r in self.rows if r.structure == "fallback"]
        note = (
            f"{len(slow)} of {len(self.rows)} parameters take one backward pass an example and output: "
            f"{', '.join(slow[:6])}"
            if slow
            else ""
        )
        return "\n".join([table, *([note] if note else [])])

    def __getitem__(self, name: str) -> Row:
        return {r.name: r for r in self.rows}[name]


def explain(
    model: nn.Module,
    batch: Any,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
) -> Explanation:
    """Look at one forward and backward pass of ``model`` on one ``batch`` (as a loader would give it) and report.

    Structures: ``kronecker`` (rows are sums of outer products), ``lookup`` (the same with one-hot inputs), ``tied`` (a
    matrix used as itself and transposed), ``exact`` (small blocks, exact under KFAC), ``unlike uses`` and ``fallback``
    (rows by one backward pass an example and output), ``unused``. The numbers are entries held for the whole block that
    the parameter shares with its bias. Raises as :func:`FIM` does.
    """
    run = Run.of(model, [batch], function=function, layer_collection=layer_collection)
    network = run.network
    chunk = next(Sweep(run, EveryOutput()).chunks())
    used: dict[str, list[str]] = {}
    capture = record(network, next(run.batches()))
    for use in (recorded.use for recorded in capture.uses):
        for slot in use.slots:
            used.setdefault(slot.name, []).append(use.operation)
    rows = {}
    for layout, jacobian in chunk.jacobians.items():
        for name in layout.names:
            operations = tuple(used.get(name, ()))
            rows[name] = _row(
                network.collection,
                name,
                layout,
                operations,
                "fallback" if name in run.left_to_fallback else structure_of(jacobian),
            )
    missing = [name for name in network.collection.names if name not in rows]
    for name in missing:
        rows[name] = _row(network.collection, name, network.collection.span([name]), (), "unused")
    return Explanation(tuple(rows[name] for name in network.collection.names), (chunk.cotangents[1], chunk.examples))


def _row(collection: LayerCollection, name: str, layout: Layout, operations: tuple[str, ...], structure: str) -> Row:
    s, o, i = layout.sizes
    kronecker = is_kronecker(structure)
    side = lambda p, diagonal=False: p if diagonal or p > FACTOR_LIMIT else p * p
    factors = s * (side(i, structure == "lookup") + side(o)) if kronecker else s * i * i
    numbers = {
        "Diag": layout.numel,
        "QuasiDiag": layout.numel + (s * o * (i - 1) if len(layout.pieces) == 2 else 0),
        "KFAC": factors,
        "EKFAC": factors + layout.numel,
        "Dense block": layout.numel**2,
    }
    shape = collection.shapes[collection.names.index(name)]
    return Row(name, shape, operations, structure, (s, o, i), numbers)


def _counted(operations: tuple[str, ...]) -> str:
    """``linear x2, embedding``."""
    if not operations:
        return "-"
    return ", ".join(f"{op} x{n}" if (n := operations.count(op)) > 1 else op for op in dict.fromkeys(operations))
