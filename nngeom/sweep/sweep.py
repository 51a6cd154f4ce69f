"""One pass over the data: batches in, LayerJacobians out, cut to the memory budget, checked against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nngeom.capture.network import Batch, as_batches, leading_size, require_finite, take
from nngeom.capture.recorder import Capture, record
from nngeom.core import memory
from nngeom.core.errors import LoaderError
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.proofs import Proof, keeps_apart, proof_of
from nngeom.pullback.separate import parts_make_the_whole
from nngeom.pullback.sizes import bytes_each_cotangent
from nngeom.sweep.chunk import Chunk as Chunk
from nngeom.sweep.columns import Columns, Cotangents
from nngeom.sweep.finite import require_finite_rows
from nngeom.sweep.narrow import narrowed
from nngeom.sweep.run import Run

START = (-1, -1)  # before the first chunk, which starts with example 0 and cotangent 0


@dataclass(frozen=True)
class Policy:
    """How a sweep makes its chunks."""

    label: str = "sweep"  # of the progress bar
    part_of: Callable[[str], object] | None = None  # parameters of different parts share no block
    reread: bool = True  # False: later sweeps must see the same batches and draws, so batches are kept
    reuse: bool = False  # the caller is done with a chunk when it asks for the next, which may overwrite it
    watch: bool = True  # False: the caller asks for :meth:`Sweep.raise_where_not_finite` when its result is not finite
    keep_graph: bool = False
    explicit: bool = False  # rows are used as they are, factors are not
    apart: bool = False  # rows are kept at every position where they could be summed over them
    divide: bool = False  # batches too large for one chunk of all cotangents, or too many examples, are run in parts
    most_examples: int | None = None  # of a chunk
    any_columns: bool = False  # only sums over cotangents within blocks are taken: any root of the metric will do
    shares: int = 2  # a chunk may take one of so many shares of the budget

    def but(self, **changes: Any) -> Policy:
        """The same with other fields, as ``replace`` in a third of the time."""
        if not changes.keys() <= self.__dataclass_fields__.keys():
            raise TypeError(f"a policy has no fields {sorted(changes.keys() - self.__dataclass_fields__.keys())}")
        other = object.__new__(Policy)
        other.__dict__.update(self.__dict__, **changes)
        return other


@dataclass(frozen=True)
class Sweep:
    """The LayerJacobians of a run for the cotangents of a metric, batch by batch."""

    run: Run
    cotangents: Cotangents
    policy: Policy = Policy()

    def but(self, **changes: Any) -> Sweep:
        """The same with another policy."""
        return Sweep(self.run, self.cotangents, self.policy.but(**changes))

    def chunks(self, after: tuple[int, int] = START) -> Iterator[Chunk]:
        """Every batch, cut over cotangents, under the budget in force.

        Those up to the one that starts with the example and the cotangent ``after`` are left out.
        """
        working = memory.Working() if self.policy.reuse else None
        start = 0
        for index, batch in enumerate(self.run.followed(self.policy.label), self.run.before):
            start = yield from self._batch(batch, index, start, after, working)

    def held(self) -> Sweep:
        """The same on batches that can be gone over once more: kept where a second reading might give others."""
        with self.run.team.together("batches"):
            source = as_batches(self.run.loader)
            if self.policy.reread and not isinstance(source, Iterator):
                return self
            return replace(self, run=self.run.on(list(self.run.watched(source))))

    def raise_where_not_finite(self) -> None:
        """Raise :class:`NonFiniteError` for the first batch with outputs or gradients that are not finite, if there is
        one.
        """
        quiet = replace(self, run=replace(self.run, check=False, progress=False))
        for _ in quiet.but(reuse=True, watch=True, any_columns=False).chunks():
            pass

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _captured(self, batch: Batch, index: int) -> Capture:
        keep_graph = self.policy.keep_graph
        capture = record(self.run.network, batch, keep_graph=keep_graph, exchange=not keep_graph)
        require_finite(capture.values, "outputs", index)
        if capture.outputs.shape[0] == 1:
            proof = proof_of(self.run.network, capture)
            in_step = self.run.in_turn or self.run.network.distributed is not None  # others may have no such batch
            if index == 0 or (proof.scattered is None and not in_step):
                left = self.run.left_to_fallback
                proof.scattered = self._learn_from_a_pair(batch, left if index == 0 else set(left))
                proof.groups = proof.groups if not proof.scattered else None
        return capture

    def _batch(
        self, batch: Batch, index: int, start: int, after: tuple[int, int], working: memory.Working | None
    ) -> Generator[Chunk, None, int]:
        """The chunks of a batch whose first example has the running index ``start``; returns that of the next batch."""
        capture = self._captured(batch, index)
        parts = self._parts(capture, start) if self.policy.divide else []
        if parts:
            del capture
        for part in parts:
            n = leading_size(part)
            if n is not None and start + n <= after[0]:
                start += n
            else:
                start = yield from self._batch(part, index, start, after, working)
        if parts:
            return start
        n = capture.outputs.shape[0]
        for chunk in self.cut(capture, start, after, working):
            if self.policy.watch:
                require_finite_rows(chunk.jacobians, self.run.network, index)
            yield chunk
        return start + n

    def _parts(self, capture: Capture, start: int) -> list[Batch]:
        """Parts of a batch, each of which leaves room for all its cotangents; none where the whole does, or runs
        differently in parts.
        """
        outputs, n = capture.values, capture.outputs.shape[0]
        count = self.cotangents.columns(outputs, capture.batch, start).count
        each = bytes_each_cotangent(capture, keep_graph=self.policy.keep_graph) * count // n
        size = memory.step(n, each, most=memory.budget() // self.policy.shares)
        size = min(size, self.policy.most_examples or n)
        if size >= n or leading_size(capture.batch) != n:
            return []
        parts = [take(capture.batch, slice(lo, lo + size), n) for lo in range(0, n, size)]
        network = self.run.network
        return (
            parts if parts_make_the_whole(network, capture, parts, gradients=not keeps_apart(network, capture)) else []
        )

    def cut(
        self,
        capture: Capture,
        start: int = 0,
        after: tuple[int, int] = START,
        working: memory.Working | None = None,
    ) -> Iterator[Chunk]:
        """The chunks of one captured forward pass, the first of them proved and checked unless a pass like this one
        was.

        ``start`` is the running index of its first example. Chunks up to the one that starts with the example and the
        cotangent ``after`` are left out.
        """
        # of all uses: cuts must not depend on which are left to the fallback by now
        each = bytes_each_cotangent(capture, keep_graph=self.policy.keep_graph)
        run, columns = self.begin(capture, start, working)
        size = memory.step(columns.count, each, "output of one batch", memory.budget() // self.policy.shares)
        self._resolve(run, pulled=True)
        if self.policy.any_columns and (narrow := narrowed(run, self.cotangents, columns)) is not None:
            yield from narrow.chunks(run, start)
            return
        for lo in range(0, columns.count, size):
            if (start, lo) <= after:
                continue
            hi = min(columns.count, lo + size)
            jacobians = run.pull(columns.make(lo, hi), last=hi == columns.count)
            yield Chunk(jacobians, run.n, start, (lo, columns.count))

    def begin(self, capture: Capture, start: int = 0, working: memory.Working | None = None) -> tuple[Pass, Columns]:
        """A pass to be differentiated, and its cotangents."""
        network, left, policy = self.run.network, self.run.left_to_fallback, self.policy
        options = {"keep_graph": policy.keep_graph, "explicit": policy.explicit, "check": self.run.check}
        options["apart"] = policy.apart
        run = Pass(network, capture, left, policy.part_of, working=working, **options)
        return run, self.cotangents.columns(capture.values, capture.batch, start)

    def _resolve(self, run: Pass, *, pulled: bool = False) -> None:
        """Find the blocks of a pass, and prove what is not known of its graph, where that is wanted and numbers can
        answer. ``pulled``: the rows of all blocks are asked for next.
        """
        check = self.run.check
        run.resolve(check=check)
        if check and not run.covered and math.isfinite(run.capture.values.sum().item()):
            run.prove(pulled=pulled)

    def one_batch(self) -> tuple[Pass, Tensor] | None:
        """The pass of the only batch and all its cotangents, to be pulled back layer by layer; ``None`` where there is
        no such batch, or no room.
        """
        batches, policy = list(self.run.batches()), self.policy
        if len(batches) != 1 or policy.keep_graph:
            return None
        capture = self._captured(batches[0], 0)
        if policy.most_examples is not None and capture.outputs.shape[0] > policy.most_examples:
            return None
        run, columns = self.begin(capture)
        room = memory.budget() // policy.shares
        proof = 2 * bytes_each_cotangent(run.capture, keep_graph=policy.keep_graph)
        if max(columns.count * capture.outputs.numel() * capture.outputs.element_size(), proof) > room:
            return None
        self._resolve(run)
        return (run, columns.make(0, columns.count)) if run.most_bytes(columns.count) <= memory.budget() else None

    def look(self, seen: Callable[[Pass, Columns], None] = lambda run, columns: None) -> None:
        """Raise now what products would only meet later: models that mix examples, outputs that are not finite, odd
        batches. What is asked of a batch does not depend on cotangents. ``seen`` is told of every pass.
        """
        start = 0
        for index, batch in enumerate(self.run.batches() if self.run.check else ()):
            capture = record(self.run.network, batch)
            require_finite(capture.values, "outputs", index)
            run, columns = self.begin(capture, start)
            self._resolve(run)
            seen(run, columns)
            start += run.n

    def proved(self, capture: Capture) -> Proof:
        """What is known of a pass, checked now if no pass like it was."""
        run, _ = self.begin(capture)
        self._resolve(run)
        return run.proof

    def _learn_from_a_pair(self, batch: Batch, left: set[str]) -> frozenset[str]:
        """One example alone hides which uses are shared by all examples, which are ``left`` to the fallback; two copies
        of it show them. Returns the parameters whose examples their graph does not place.
        """
        try:
            capture = record(self.run.network, take(batch, [0, 0], 1), exchange=not self.policy.keep_graph)
        except Exception:  # a model for one example at a time
            return frozenset()
        if capture.outputs.shape[0] != 2:
            return frozenset()
        pair = Pass(self.run.network, capture, left, self.policy.part_of)
        pair.resolve()
        return pair.proof.unplaced(capture.uses)


def require_examples(count: int) -> int:
    """``count``, or :class:`LoaderError` when nothing was seen."""
    if count == 0:
        raise LoaderError("no example was seen; expected a loader with at least one")
    return count
