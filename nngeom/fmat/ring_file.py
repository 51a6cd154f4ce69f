"""A kernel over several processes, written to a file as it is computed: no process holds more of it than a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places
from nngeom.fmat.products import EVERYTHING, products
from nngeom.fmat.ring import mean_over
from nngeom.fmat.side import Side
from nngeom.fmat.team_store import TeamStore
from nngeom.fmat.visits import first_half, has_examples, on, parts, piece_of, visiting
from nngeom.fmat.window import Window
from nngeom.pmat.metric import Metric

Make = Callable[[Side, "Side | None", tuple[int, int]], None]  # rows, columns, where they start


def fill(
    store: TeamStore,
    rows: Side,
    columns: Side | None,
    places: tuple[Places, Places],
    *,
    centered: bool,
    metric: Metric | None,
) -> None:
    """Every tile of the kernel of all processes, ``places`` of the rows and of the columns, but those that ``store``
    has.
    """
    own, across = places
    if centered:
        rows, columns = rows.widened(), columns if columns is None else columns.widened()
    mean = mean_over(rows, own, metric) if centered else None
    how: dict[str, Any] = {"explicit": not centered and metric is None, "on_disk": True}
    rows, columns = rows.for_tiles(**how), columns if columns is None else columns.for_tiles(**how)
    square = columns is None

    def make(left: Side, right: Side | None, at: tuple[int, int]) -> None:
        window = Window(store, FMatDense, at, mirrored=square and right is not None)
        products(FMatDense, left, right, EVERYTHING, window, mean=mean, metric=metric)

    if columns is None:
        _square(rows, own, make)
    else:
        _between(rows, columns, places, make)


def _square(rows: Side, own: Places, make: Make) -> None:
    team, n = own.team, own.counts
    here = own.mine.start
    with team.together("kernel") as note:
        note.mine = first_half(rows)
        if rows.examples:
            make(rows, None, (here, here))
    halves = note.all
    for step, batches in enumerate(visiting(team, rows, team.size // 2), 1):
        source = (team.rank - step) % team.size
        piece = piece_of(n, halves, team.rank, source)
        with team.together("kernel"):
            left, right = parts(rows, batches, piece, n)
            if has_examples(left, right, piece):
                make(left, right, (here + piece[0].start, own.of_rank(source).start + piece[1].start))


def _between(rows: Side, columns: Side, places: tuple[Places, Places], make: Make) -> None:
    own, across = places
    team, here = own.team, own.mine.start
    with team.together("kernel"):
        if rows.examples and columns.examples:
            make(rows, columns, (here, across.mine.start))
    for step, batches in enumerate(visiting(team, columns, team.size - 1), 1):
        source = (team.rank - step) % team.size
        with team.together("kernel"):
            if rows.examples and across.counts[source]:
                make(rows, on(columns, batches), (here, across.of_rank(source).start))
