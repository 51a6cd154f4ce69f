"""Small pieces of HTML for notebooks: tables and cards without scripts, styles or requests of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MOST = 40  # lines of a table that are shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0, most: int = MOST) -> str:
    """A table with ``head`` above ``rows`` of cells, the last ``numbers`` columns aligned to the right, cut after
    ``most`` rows. Cells are text; what they hold is escaped.
    """
    words = len(head) - numbers
    body = "".join(f"<tr>{_line(cells, 'td', words)}</tr>" for cells in rows[:most])
    if len(rows) > most:
        body += f'<tr><td colspan="{len(head)}" style="text-align:left">and {len(rows) - most} more</td></tr>'
    return f'<table class="dataframe"><thead><tr>{_line(head, "th", words)}</tr></thead><tbody>{body}</tbody></table>'


def _line(cells: Sequence[str], tag: str, words: int) -> str:
    side = ("left", "right")
    return "".join(f'<{tag} style="text-align:{side[j >= words]}">{escape(x)}</{tag}>' for j, x in enumerate(cells))


def card(title: str, facts: Mapping[str, str], *below: str) -> str:
    """A ``title`` with ``facts`` in one line, and pieces of HTML ``below``."""
    told = ", ".join(f"{escape(name)} {escape(value)}" for name, value in facts.items())
    return f"<div><b>{escape(title)}</b> <span>{told}</span>{''.join(below)}</div>"
