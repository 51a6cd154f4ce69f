"""Tables as text, as HTML in notebooks, as pandas frames: what a result is made of, written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from nngeom.core.html import table
from nngeom.core.optional import optional


@dataclass(frozen=True)
class Frame:
    """``rows`` of cells under a ``head``; the last columns are ``numbers``; ``rule``: a line below the head."""

    head: list[str]
    rows: list[list[str]]
    numbers: int = 0
    rule: bool = False

    def text(self) -> str:
        """The table in characters, its columns aligned."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[j]) for line in lines) for j in range(len(self.head))]
        words = len(widths) - self.numbers
        aligned = lambda line: [
            cell.ljust(w) if j < words else cell.rjust(w) for j, (cell, w) in enumerate(zip(line, widths))
        ]
        head, *body = ["  ".join(aligned(line)).rstrip() for line in lines]
        return "\n".join([head, *(["-" * len(head)] if self.rule else []), *body])

    def html(self) -> str:
        """The table for a notebook."""
        return table(self.head, self.rows, self.numbers)


class Shown(ABC):
    """A result that is read as tables."""

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """The tables."""

    def note(self) -> str:
        """A line below them; empty where there is nothing to say."""
        return ""

    def __str__(self) -> str:
        text = "\n\n".join(frame.text() for frame in self.frames())
        return "\n".join(filter(None, [text, self.note()]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(frame.html() for frame in self.frames()) + (
            f"<p>{escape(self.note())}</p>" if self.note() else ""
        )


def pandas() -> Any:
    """The library; raises :class:`MissingExtraError` where it is missing."""
    return optional("pandas")
