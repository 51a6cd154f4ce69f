"""One pass over the data: batches in, LayerJacobians out, cut to the memory budget, checked against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from nngeom.core import memory
from nngeom.core.errors import LoaderError, NonFiniteError
from nngeom.core.jacobian import LayerJacobian, tensors
from nngeom.core.layout import Layout
from nngeom.generator.capture import Capture, capture
from nngeom.generator.descent import bytes_each_cotangent
from nngeom.generator.passes import Pass
from nngeom.generator.proofs import Proof, keeps_apart
from nngeom.generator.separate import parts_make_the_whole
from nngeom.generator.task import Batch, Task, as_batches, leading_size, require_finite, take

START = (-1, -1)  # before the first chunk, which starts with example 0 and cotangent 0


@dataclass(frozen=True)
class Columns:
    """Cotangents ``v[k, n, *out]``, made in slices: ``make(lo, hi) -> [hi - lo, n, *out]``."""

    count: int
    make: Callable[[int, int], Tensor]


class Metric(Protocol):
    """Axis 2: which cotangents are pulled back."""

    def columns(self, outputs: Tensor, batch: Batch, start: int) -> Columns:
        """Cotangents for the outputs ``(n, *out)`` of a batch whose first example has the running index ``start``."""


@dataclass(frozen=True)
class Chunk:
    """What a statistic sees: the LayerJacobians of one batch, for some of its cotangents."""

    jacobians: dict[Layout, LayerJacobian]
    examples: int  # n
    start: int  # running index of the first example
    outputs: tuple[int, int]  # which cotangents of how many: (lo, total)

    @property
    def first(self) -> bool:
        """Whether these are the first cotangents of the batch: statistics of inputs alone are taken once."""
        return self.outputs[0] == 0

    def nbytes(self, held: set[int]) -> int:
        """Bytes beyond those of the storages in ``held``, which these join: chunks of one batch share its inputs."""
        new = {t.untyped_storage().data_ptr(): t for j in self.jacobians.values() for t in tensors(j)}
        new = {place: t for place, t in new.items() if place not in held}
        held.update(new)
        return sum(t.numel() * t.element_size() for t in new.values())


@dataclass
class Sweep:
    """The LayerJacobians of a data set, batch by batch."""

    task: Task
    loader: Any
    metric: Metric
    memory_budget: int | None = None
    check: bool = True
    progress: bool = False
    part_of: Callable[[str], object] | None = None
    reread: bool = True  # False: later passes must see the same batches and draws, so they are kept
    keep_graph: bool = False
    label: str = "sweep"
    shares: int = 2  # a chunk may take one of so many shares of the budget
    explicit: bool = False  # rows are used as they are, factors are not
    divide: bool = (
        False  # batches of which one chunk cannot hold all cotangents, or of too many examples, are run in parts
    )
    most_examples: int | None = None  # of a chunk
    count: int = 0
    _demoted: set[str] = field(default_factory=set)
    _kept: list | None = None
    _working: memory.Working | None = None

    def chunks(
        self, keep: bool = False, reuse: bool = False, watch: bool = True, after: tuple[int, int] = START
    ) -> Iterator[Chunk]:
        """Every batch, cut over cotangents. ``keep``: hold the chunks for :meth:`again` while they fit the budget.

        ``reuse``: the caller is done with a chunk when it asks for the next, which may overwrite it. ``watch=False``:
        gradients are not searched for NaN and infinity; the caller calls :meth:`blame` when its result is not finite.
        ``after``: chunks up to the one that starts with this example and cotangent are left out.
        """
        self._working = memory.Working() if reuse and not keep else None
        source = as_batches(self.loader)
        if not self.reread or isinstance(source, Iterator):
            source = self.loader = list(source)
        kept: list[Chunk] | None = [] if keep else None
        room, held = memory.budget(), set[int]()
        self.count = 0
        total = _length(source)
        bar = tqdm(self.task.batches(source), total=total, desc=self.label, disable=not self.progress)
        for index, batch in enumerate(bar):
            for chunk in self._batch(batch, index, watch, after):
                if kept is not None:
                    room -= chunk.nbytes(held)
                    kept = None if room < 0 else [*kept, chunk]
                yield chunk
        self._kept, self._working = kept, None

    def again(self) -> Iterator[Chunk]:
        """A second pass: from memory where the first one fitted, else over the data, each chunk overwriting the one
        before; not searched.
        """
        if self._kept is not None:
            yield from self._kept
        else:
            yield from self.chunks(reuse=True, watch=False)

    def blame(self) -> None:
        """Raise :class:`NonFiniteError` for the first batch with outputs or gradients that are not finite, if there is
        one.
        """
        for _ in replace(self, check=False, progress=False).chunks(reuse=True):
            pass

    @property
    def fallback_names(self) -> set[str]:
        """Parameters whose rows came from the per-example fallback so far."""
        return set(self._demoted)

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _captured(self, batch: Batch, index: int) -> Capture:
        seen = capture(self.task, batch, self.keep_graph)
        require_finite(seen.outputs.detach(), "outputs", index)
        if index == 0 and seen.outputs.shape[0] == 1:
            self._learn_from_a_pair(batch)
        return seen

    def _batch(self, batch: Batch, index: int, watch: bool, after: tuple[int, int]) -> Iterator[Chunk]:
        seen = self._captured(batch, index)
        parts = self._parts(seen) if self.divide else []
        if parts:
            del seen
        for part in parts:
            n = leading_size(part)
            if n is not None and self.count + n <= after[0]:
                self.count += n
            else:
                yield from self._batch(part, index, watch, after)
        if parts:
            return
        for chunk in self.cut(seen, after):
            if watch:
                self._require_finite(chunk.jacobians, index)
            yield chunk

    def _parts(self, seen: Capture) -> list[Batch]:
        """Parts of a batch, each of which leaves room for all its cotangents; none where the whole does, or runs
        differently in parts.
        """
        outputs, n = seen.outputs.detach(), seen.outputs.shape[0]
        count = self.metric.columns(outputs, seen.batch, self.count).count
        size = memory.step(
            n, bytes_each_cotangent(seen, self.keep_graph) * count // n, most=memory.budget() // self.shares
        )
        size = min(size, self.most_examples or n)
        if size >= n or leading_size(seen.batch) != n:
            return []
        parts = [take(seen.batch, slice(lo, lo + size), n) for lo in range(0, n, size)]
        return parts if parts_make_the_whole(self.task, seen, parts, gradients=not keeps_apart(self.task, seen)) else []

    def cut(self, seen: Capture, after: tuple[int, int] = START) -> Iterator[Chunk]:
        """The chunks of one captured forward pass, the first of them proved and checked unless a pass like this one
        was.

        Those up to the one that starts with the example and the cotangent ``after`` are left out.
        """
        each = bytes_each_cotangent(
            seen, self.keep_graph
        )  # of all uses: cuts must not depend on which are left to the fallback by now
        run, columns = self.begin(seen)
        size = memory.step(columns.count, each, "output of one batch", memory.budget() // self.shares)
        self._resolve(run)
        for lo in range(0, columns.count, size):
            if (self.count, lo) <= after:
                continue
            hi = min(columns.count, lo + size)
            yield Chunk(
                run.pull(columns.make(lo, hi), last=hi == columns.count), run.n, self.count, (lo, columns.count)
            )
        self.count += run.n

    def begin(self, seen: Capture) -> tuple[Pass, Columns]:
        """A pass to be differentiated, and its cotangents."""
        run = Pass(
            self.task, seen, self._demoted, self.part_of, self.keep_graph, self._working, self.explicit, self.check
        )
        return run, self.metric.columns(seen.outputs.detach(), seen.batch, self.count)

    def _resolve(self, run: Pass) -> None:
        """Find the blocks of a pass, and prove what is not known of its graph, where that is wanted and numbers can
        answer.
        """
        run.resolve(self.check)
        if self.check and not run.proof.covers(run.seen) and bool(torch.isfinite(run.seen.outputs.detach().sum())):
            run.prove()

    def alone(self) -> tuple[Pass, Tensor] | None:
        """The pass of the only batch and all its cotangents, to be pulled back layer by layer; ``None`` where there is
        no such batch, or no room.
        """
        batches = list(self.task.batches(self.loader))
        if len(batches) != 1 or self.keep_graph:
            return None
        seen = self._captured(batches[0], 0)
        if self.most_examples is not None and seen.outputs.shape[0] > self.most_examples:
            return None
        run, columns = self.begin(seen)
        room = memory.budget() // self.shares
        proof = 2 * bytes_each_cotangent(seen, self.keep_graph)
        if max(columns.count * seen.outputs.numel() * seen.outputs.element_size(), proof) > room:
            return None
        self._resolve(run)
        return (run, columns.make(0, columns.count)) if run.most_bytes(columns.count) <= memory.budget() else None

    def look(self, batch: Batch, index: int) -> None:
        """Raise what a sweep would raise of this batch, number ``index``: what is asked of it does not depend on
        cotangents.
        """
        seen = capture(self.task, batch)
        require_finite(seen.outputs.detach(), "outputs", index)
        self.proved(seen)

    def proved(self, seen: Capture) -> Proof:
        """What is known of a pass, checked now if no pass like it was."""
        run, _ = self.begin(seen)
        self._resolve(run)
        return run.proof

    def _learn_from_a_pair(self, batch: Batch) -> None:
        """One example alone hides which uses are shared by all examples; two copies of it show them."""
        try:
            seen = capture(self.task, take(batch, [0, 0], 1))
        except Exception:  # a model for one example at a time
            return
        if seen.outputs.shape[0] == 2:
            Pass(self.task, seen, self._demoted, self.part_of).resolve()

    def _require_finite(self, jacobians: dict[Layout, LayerJacobian], index: int) -> None:
        tensors = {layout: getattr(j, "g", getattr(j, "m", None)) for layout, j in jacobians.items()}
        sums = [t.detach().sum() for t in tensors.values() if t is not None]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return
        for layout, t in tensors.items():
            if t is not None and not bool(torch.isfinite(t).all()):
                bad = (~torch.isfinite(t)).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
                raise NonFiniteError(
                    f"gradients of layer {self.task.layer_of(layout.names[0])!r} contain NaN or infinity in "
                    f"batch {index}, examples {bad[:8]}"
                    f"{'...' if len(bad) > 8 else ''}; check those inputs, or use a wider dtype"
                )


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # a generator, or an iterable data set
        return None


def require_examples(count: int) -> int:
    """``count``, or :class:`LoaderError` when nothing was seen."""
    if count == 0:
        raise LoaderError("no example was seen; expected a loader with at least one")
    return count
