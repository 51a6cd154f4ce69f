"""The sums of one sweep, kept every few minutes, and taken up where an earlier call of the same measure left them.

Nothing is taken up unchecked: what was gone over is read again, without being differentiated, and its contents are
compared; the first batch is, and adds what it had added.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from nngeom.capture.network import Batch, as_batches
from nngeom.core.contents import digest
from nngeom.core.errors import ArgumentError, FileError, LoaderError
from nngeom.core.statistic import Named, Sums
from nngeom.core.stream import Numbers
from nngeom.sweep import sums_file
from nngeom.sweep.checkpoint import Checkpoint
from nngeom.sweep.chunk import Chunk, added
from nngeom.sweep.sums_file import Progress
from nngeom.sweep.sweep import Sweep

Statistic = Callable[[Chunk], Named]


@dataclass
class Resumed:
    """One ``sweep`` for a ``statistic``, whose sums are kept at ``path`` in the folder of a ``checkpoint``."""

    checkpoint: Checkpoint
    path: str
    sweep: Sweep
    statistic: Statistic

    def sums(self) -> Sums:
        """Those of all batches of this process.

        Raises :class:`LoaderError` where the batches are not those of before, :class:`ArgumentError` where the first
        one adds something else, :class:`FileError` where nothing of what was kept is whole, or nothing can be.
        """
        run = self.sweep.run
        found = sums_file.read(self.path, run.network.device)
        before = tuple(sorted(run.left_to_fallback))
        batches = iter(run.watched(as_batches(run.loader)))
        if found is None:
            return self._gone_on(Progress(self.checkpoint.about, left=(before, before)), Sums(), batches)
        progress, sums = found
        if progress.about != self.checkpoint.about:
            raise FileError(f"{self.path!r} holds sums of another measure; delete the folder to measure anew")
        self._read_again(progress, batches)
        run.left_to_fallback.update(progress.left[1])
        if progress.met is not None:
            run.met.setdefault(0, progress.met)
        if progress.finished:
            if next(batches, None) is not None:
                raise self._other_data(f"there are more than {progress.batches}")
            return sums
        return self._gone_on(progress, sums, batches)

    # -- what was done -------------------------------------------------------------------------------------------------

    def _read_again(self, progress: Progress, batches: Iterator[Batch]) -> None:
        """The batches that ``progress`` is over, but for the first of them only read."""
        seen = ""
        for index in range(progress.batches):
            batch = next(batches, None)
            if batch is None:
                raise self._other_data(f"there are {index} now and were {progress.batches} at least")
            seen = chained(seen, batch)
            if index == 0:
                first = batch
        if seen != progress.digest:
            raise self._other_data(f"the first {progress.batches} have other contents")
        if progress.batches:
            self._require_same_first(first, progress)

    def _require_same_first(self, batch: Batch, progress: Progress) -> None:
        left = self.sweep.run.left_to_fallback
        left.clear()
        left.update(progress.left[0])
        sums = Sums()
        added(sums, self.statistic, replace(self.sweep, run=self.sweep.run.on([batch])).but(reuse=True).chunks())
        odd = sums_file.differs(sums, progress.first)
        if odd is not None:
            raise ArgumentError(
                f"the first batch adds something else ({odd}) than when the sums in {self.path!r} were begun: what is "
                "in no parameter has changed (an attribute, the function, the loss, a mode), or eigenvectors came out "
                "otherwise on this machine; use what was used then, or delete the folder to measure anew"
            )

    def _other_data(self, what: str) -> LoaderError:
        return LoaderError(
            f"the batches are not those that the sums in {self.path!r} are over: {what}; expected the same batches in "
            "the same order, from a loader with shuffle=False or a generator with a seed; delete the folder to measure "
            "anew"
        )

    # -- what is to be done --------------------------------------------------------------------------------------------

    def _gone_on(self, progress: Progress, sums: Sums, batches: Iterator[Batch]) -> Sums:
        first = next(batches, None)
        rest = batches if first is None else chain([first], batches)
        feed = Feed(rest, progress, lambda p, due: self._done(p, sums, due=due), 60 * self.checkpoint.asked.every)
        if first is not None:
            run = replace(self.sweep.run.on(feed), before=progress.batches)
            sweep = replace(self.sweep, run=run, cotangents=_further(self.sweep.cotangents, sums.count))
            added(sums, self.statistic, sweep.but(reuse=True).chunks())
        self._done(replace(feed.progress, finished=True), sums, due=True)
        return sums

    def _done(self, progress: Progress, sums: Sums, *, due: bool) -> Progress:
        """Write what there is, if it is time; the same with what the first batch added, if that is all of it."""
        if progress.batches == 1 and not progress.first:
            progress = replace(progress, first=sums_file.sketch(sums))
        if due:
            run = self.sweep.run
            now = tuple(sorted(run.left_to_fallback))
            progress = replace(progress, left=(progress.left[0], now), met=run.met.get(0))
            sums_file.write(self.path, progress, sums)
        return progress


class Feed:
    """Batches that are handed out, and then are done with when the next is asked for: all that was made of them is
    added up.

    ``progress``: after those that are; ``done(progress, due)`` is called after each and returns what is to be known of
    it from then on; it is ``due`` to be kept every so many ``seconds``.
    """

    def __init__(
        self, batches: Iterator[Batch], progress: Progress, done: Callable[[Progress, bool], Progress], seconds: float
    ) -> None:
        self.batches, self.progress, self.done, self.seconds = batches, progress, done, seconds
        self._last = time.monotonic()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            seen = chained(self.progress.digest, batch)
            after = replace(self.progress, batches=self.progress.batches + 1, digest=seen)
            yield batch
            due = time.monotonic() - self._last >= self.seconds
            self.progress = self.done(after, due)
            if due:
                self._last = time.monotonic()


def chained(before: str, batch: Batch) -> str:
    """The digest of all batches up to this one, of that of those ``before``."""
    return hashlib.sha256(f"{before}{digest(batch)}".encode()).hexdigest()[:32]


def _further(cotangents: Any, examples: int) -> Any:
    """The same with draws for examples that come after so many."""
    numbers = getattr(cotangents, "numbers", None)
    if not isinstance(numbers, Numbers) or not examples:
        return cotangents
    return replace(cotangents, numbers=replace(numbers, offset=numbers.offset + examples))
