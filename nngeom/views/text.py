"""Tables as text."""

from __future__ import annotations


def as_text(lines: list[list[str]], numbers: int = 0) -> str:
    """Lines of cells as a table whose last columns are ``numbers``."""
    widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
    words = len(widths) - numbers
    aligned = lambda line: [
        cell.ljust(w) if j < words else cell.rjust(w) for j, (cell, w) in enumerate(zip(line, widths))
    ]
    return "\n".join("  ".join(aligned(line)).rstrip() for line in lines)
