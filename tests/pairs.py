"""Checks of the tables on the pages for those who come from another library, by the rows that they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent.parent / "docs" / "coming_from"


class Pairs(dict[str, Callable[[Any], None]]):
    """Those of one ``page``, by how the first column of a row begins."""

    def __init__(self, page: str) -> None:
        self.page = page

    def of(self, row: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        """A decorator: what compares the numbers of a row."""

        def kept(f: Callable[[Any], None]) -> Callable[[Any], None]:
            self[row] = f
            return f

        return kept

    def require_all(self) -> None:
        """Every row has a check, and every check a row."""
        lines = (PAGES / f"{self.page}.md").read_text().splitlines()
        first = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
        rows = [cell for cell in first if cell not in ("there", "---")]
        assert [row for row in rows if not any(row.startswith(begin) for begin in self)] == []
        assert [begin for begin in self if not any(row.startswith(begin) for row in rows)] == []
