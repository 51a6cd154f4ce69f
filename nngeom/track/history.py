"""What was measured: columns of numbers of equal length, read as a table."""

from __future__ import annotations

from typing import Any

from nngeom.core.html import table
from nngeom.core.optional import optional


class History(dict[str, list[float]]):
    """``{column: numbers}``, ``"step"`` first; a dictionary that notebooks show and pandas takes."""

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the steps as its index; raises :class:`MissingExtraError` without pandas."""
        frame = optional("pandas").DataFrame(dict(self))
        return frame.set_index("step") if "step" in self else frame

    def html(self) -> str:
        """The last measurements as a table."""
        rows = [[f"{x:.6g}" for x in row] for row in zip(*self.values())]
        return table(list(self), rows[-20:], numbers=len(self))

    def _repr_html_(self) -> str:
        return self.html()
