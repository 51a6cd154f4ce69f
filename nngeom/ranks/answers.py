"""What processes ask of each other in the middle of their own work, which is done together.

Each goes its own way through its work, as long as that takes. Who needs something of the others asks and waits; who has
done his work, or failed in it, answers until all have. So there is a round whenever somebody asks, all processes take
part in each, and none needs to know what the others are at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Answer = Callable[[Sequence[Any]], None]  # to what was asked, by rank; ``None`` of those that ask for something else


class Answers:
    """The answers that are given, by the name of what is asked; ``exchange`` as :meth:`Team.exchange`."""

    def __init__(self, exchange: Callable[[str, Any], list[Any]]) -> None:
        self._exchange, self._given = exchange, dict[str, Answer]()

    @contextlib.contextmanager
    def given(self, what: str, answer: Answer) -> Iterator[None]:
        """Within: ``answer`` to all who ask for ``what``."""
        self._given[what] = answer
        try:
            yield
        finally:
            del self._given[what]

    def ask(self, what: str, content: Any) -> None:
        """Ask for ``what``: the answer is given when this returns."""
        self._round((what, content))

    def give(self) -> None:
        """Answer until nobody asks any more."""
        while self._given and self._round(None):
            pass

    def _round(self, mine: tuple[str, Any] | None) -> bool:
        """Whether somebody asked."""
        asked = self._exchange("what is asked in the middle of work", mine)
        for what, answer in self._given.items():
            contents = [x[1] if x is not None and x[0] == what else None for x in asked]
            if any(content is not None for content in contents):
                answer(contents)
        return any(x is not None for x in asked)
