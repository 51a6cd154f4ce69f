"""What a page is made of: facts, tables, charts of lines and of bars, gathered in sections; each knows its HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, ClassVar

from nngeom.views.shown import Frame

MOST_ROWS, MOST_SERIES, MOST_POINTS, MOST_CELLS = 1000, 24, 1000, 12_000


@dataclass(frozen=True)
class Series:
    """One line: ``name``, and numbers ``x``, ``y`` of equal length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def thinned(self, most: int) -> Series:
        """At most ``most`` points, the first and the last among them."""
        n = len(self.x)
        if n <= most:
            return self
        keep = sorted({round(j * (n - 1) / (most - 1)) for j in range(most)})
        return Series(self.name, [self.x[j] for j in keep], [self.y[j] for j in keep])


@dataclass(frozen=True)
class Group:
    """One choice of a chart of bars: ``labels`` and ``values`` of equal length under a ``name``."""

    name: str
    labels: list[str]
    values: list[float]


@dataclass(frozen=True)
class Lines:
    """A chart of ``series``, axes called ``x`` and ``y``, logarithmic or not; ``caption`` above."""

    kind: ClassVar[str] = "lines"
    caption: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False

    def html(self, name: str) -> str:
        """The place where it is drawn, and its numbers."""
        return chart(self, name)


@dataclass(frozen=True)
class Bars:
    """A chart of bars with several ``groups`` to choose from; ``caption`` above."""

    kind: ClassVar[str] = "bars"
    caption: str
    groups: list[Group]

    def html(self, name: str) -> str:
        """The place where it is drawn, and its numbers."""
        return chart(self, name)


@dataclass(frozen=True)
class Listing:
    """A table, which can be sorted and filtered; ``caption`` above."""

    caption: str
    frame: Frame

    def html(self, name: str) -> str:
        """The table, cut where it is very long."""
        words = len(self.frame.head) - self.frame.numbers
        mark = lambda j: ' class="number"' if j >= words else ""
        line = lambda cells, tag: "".join(f"<{tag}{mark(j)}>{escape(x)}</{tag}>" for j, x in enumerate(cells))
        most = min(MOST_ROWS, max(20, MOST_CELLS // len(self.frame.head)))
        rows = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in self.frame.rows[:most])
        more = len(self.frame.rows) - most
        below = f"<p>and {more} more rows</p>" if more > 0 else ""
        head = f"<thead><tr>{line(self.frame.head, 'th')}</tr></thead>"
        table = f'<div class="scroll" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>'
        return f"<h3>{escape(self.caption)}</h3>{table}{below}"


Block = Lines | Bars | Listing


@dataclass(frozen=True)
class Section:
    """A ``title``, what there is to know in ``text``, and ``blocks``."""

    title: str
    text: str
    blocks: list[Block] = field(default_factory=list)


def chart(block: Lines | Bars, name: str) -> str:
    """A chart as JSON inside the page, with numbers that are not finite as ``null``."""
    data = json.dumps(plain({"kind": block.kind, **asdict(block)}), separators=(",", ":"), allow_nan=False)
    safe = data.replace("<", "\\u003c").replace("&", "\\u0026")  # so that nothing in it ends the script
    head = f'<h3>{escape(block.caption)}</h3><div data-chart="{name}"></div>'
    return f'{head}<script type="application/json" id="{name}">{safe}</script>'


def plain(x: Any) -> Any:
    """Numbers in six digits, ``None`` where they are not finite."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x
