"""One pass over the data: batches in, LayerJacobians out, cut to the memory budget, checked against autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from nngeom.core import memory
from nngeom.core.errors import CoverageError, LoaderError, NonFiniteError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.generator import fallback
from nngeom.generator.axes import ExampleAxis, find_axes
from nngeom.generator.backward import gains_from_batching, one_by_one_pays, pull_back
from nngeom.generator.capture import Capture, capture
from nngeom.generator.proofs import Proof, proof_of
from nngeom.generator.task import Batch, Task, as_batches, leading_size, require_finite, take
from nngeom.generator.units import Unit, build_units
from nngeom.generator.verify import align, few, mismatches, same_outputs, spread

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
        new = {t.untyped_storage().data_ptr(): t for j in self.jacobians.values() for t in j.tensors()}
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
    divide: bool = False  # batches of which one chunk cannot hold all cotangents are run in parts
    count: int = 0
    _demoted: set[str] = field(default_factory=set)
    _kept: list | None = None
    _working: memory.Working | None = None

    def chunks(self, keep: bool = False, reuse: bool = False, watch: bool = True, after: tuple[int, int] = START) -> Iterator[Chunk]:
        """Every batch, cut over cotangents. ``keep``: hold the chunks for :meth:`again` while they fit the budget.

        ``reuse``: the caller is done with a chunk when it asks for the next, which may overwrite it. ``watch=False``: gradients
        are not searched for NaN and infinity; the caller calls :meth:`blame` when its result is not finite. ``after``: chunks
        up to the one that starts with this example and cotangent are left out.
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
        """A second pass: from memory where the first one fitted, else over the data, each chunk overwriting the one before; not searched."""
        if self._kept is not None:
            yield from self._kept
        else:
            yield from self.chunks(reuse=True, watch=False)

    def blame(self) -> None:
        """Raise :class:`NonFiniteError` for the first batch with outputs or gradients that are not finite, if there is one."""
        for _ in replace(self, check=False, progress=False).chunks(reuse=True):
            pass

    @property
    def fallback_names(self) -> set[str]:
        """Parameters whose rows came from the per-example fallback so far."""
        return set(self._demoted)

    # -- one batch -------------------------------------------------------------------------------------------------

    def _batch(self, batch: Batch, index: int, watch: bool, after: tuple[int, int]) -> Iterator[Chunk]:
        seen = capture(self.task, batch, self.keep_graph)
        require_finite(seen.outputs.detach(), "outputs", index)
        if index == 0 and seen.outputs.shape[0] == 1:
            self._learn_from_a_pair(batch)
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
        """Parts of a batch, each of which leaves room for all its cotangents; none where the whole does, or runs differently in parts."""
        outputs, n = seen.outputs.detach(), seen.outputs.shape[0]
        count = self.metric.columns(outputs, seen.batch, self.count).count
        size = memory.step(n, self._bytes_each_cotangent(seen) * count // n, most=memory.budget() // self.shares)
        if size >= n or leading_size(seen.batch) != n:
            return []
        parts = [take(seen.batch, slice(lo, lo + size), n) for lo in range(0, n, size)]
        try:
            with torch.no_grad():
                alone = self.task.run(parts[-1])
        except Exception:  # a model for one size of batch
            return []
        return parts if same_outputs(alone, outputs[-len(alone) :], outputs) else []

    def cut(self, seen: Capture, after: tuple[int, int] = START) -> Iterator[Chunk]:
        """The chunks of one captured forward pass, the first of them proved and checked unless a pass like this one was.

        Those up to the one that starts with the example and the cotangent ``after`` are left out.
        """
        n = seen.outputs.shape[0]
        if not seen.outputs.requires_grad:
            raise CoverageError(
                "the outputs do not depend on any selected parameter by differentiable operations (torch.no_grad or .detach() inside the model?)"
            )
        proof = self._recall(seen)
        columns = self.metric.columns(seen.outputs.detach(), seen.batch, self.count)
        self._bar(seen)
        size = memory.step(columns.count, self._bytes_each_cotangent(seen), "output of one batch", memory.budget() // self.shares)
        proving = self.check and (proof.moves or not proof.covers(seen)) and bool(torch.isfinite(seen.outputs.detach().sum()))
        units, rest = ([], []) if proving else self._structure(seen, proof)
        for lo in range(0, columns.count, size):
            if (self.count, lo) <= after:
                continue
            hi = min(columns.count, lo + size)
            v, last = columns.make(lo, hi), hi == columns.count
            if proving:
                units, rest, jacobians = self._pull_verified(seen, v, proof)
                proving = False
            else:
                jacobians = self._pull(seen, units, rest, v, last)
            yield Chunk(jacobians, n, self.count, (lo, columns.count))
            del jacobians
        self.count += n

    def proved(self, seen: Capture) -> Proof:
        """What is known of a pass, checked now if no pass like it was."""
        proof = self._recall(seen)
        if not proof.covers(seen):
            next(self.cut(seen))
        return proof

    def _learn_from_a_pair(self, batch: Batch) -> None:
        """One example alone hides which uses are shared by all examples; two copies of it show them."""
        try:
            seen = capture(self.task, take(batch, [0, 0], 1))
        except Exception:  # a model for one example at a time
            return
        if seen.outputs.shape[0] == 2:
            self._structure(seen, self._recall(seen))

    def _recall(self, seen: Capture) -> Proof:
        """What is known of a pass; parameters known to be captured wrongly go to the fallback."""
        proof = proof_of(self.task, seen)
        self._demoted |= proof.wrong
        return proof

    def _structure(self, seen: Capture, proof: Proof) -> tuple[list[Unit], list[str]]:
        """Units of structured parameters, and names of the others that the outputs depend on."""
        self._bar(seen)
        return self._units(seen, find_axes(seen.outputs, seen.uses, proof.axes))

    def _bar(self, seen: Capture) -> None:
        """Forget the uses of parameters that are left to the fallback."""
        barred = seen.unstructured | self._demoted
        for use in seen.uses:
            if use.weight is not None and use.weight.name in barred:
                use.weight = None
            if use.bias is not None and use.bias.name in barred:
                use.bias = None
        seen.uses = [use for use in seen.uses if use.slots]

    def _units(self, seen: Capture, axes: list[ExampleAxis | None]) -> tuple[list[Unit], list[str]]:
        units, rest = build_units(seen.uses, axes, self.task.collection, self.part_of)
        covered = {name for unit in units for name in unit.layout.names}
        others = [name for name in self.task.collection.names if name not in covered]
        if others:
            present = fallback.used(seen.outputs, [self.task.parameters[name] for name in others])
            others = [name for name, p in zip(others, present) if p or name in rest]
        self._demoted |= set(others)  # once in the fallback, always: one structure for all batches
        return units, others

    def _pull(self, seen: Capture, units: list[Unit], rest: list[str], v: Tensor, last: bool) -> dict[Layout, LayerJacobian]:
        done = last and not rest and not self.keep_graph
        return self._jacobians(seen, units, rest, v, self._gradients(seen, v, retain=not done))

    def _gradients(self, seen: Capture, v: Tensor, retain: bool = True) -> list[Tensor]:
        """Cotangents pulled back to the outputs of all uses."""
        edges, shapes, v = [u.edge for u in seen.uses], [u.shape for u in seen.uses], v.to(seen.outputs.dtype)
        products = gains_from_batching(seen.uses, self.keep_graph)
        return pull_back(seen.outputs, edges, shapes, v, retain, self.keep_graph, self._working, products)

    def _jacobians(self, seen: Capture, units: list[Unit], rest: list[str], v: Tensor, gradients: list[Tensor]) -> dict[Layout, LayerJacobian]:
        with torch.set_grad_enabled(self.keep_graph):
            jacobians = {unit.layout: unit.jacobian(gradients, seen.outputs.shape[0], self._working or memory.fresh) for unit in units}
            gradients.clear()
        if rest:
            parameters = [self.task.parameters[name] for name in rest]
            rows = fallback.full_jacobians(self.task, seen.batch, seen.outputs, parameters, v.to(seen.outputs.dtype), self.keep_graph)
            jacobians.update({self.task.collection.span([name]): j for name, j in zip(rest, rows)})
        return jacobians

    def _bytes_each_cotangent(self, seen: Capture) -> int:
        """Gradients of all uses; where cotangents are pulled back together, what lies between as well."""
        size = (sum(use.shape.numel() for use in seen.uses) + seen.outputs.numel()) * seen.outputs.element_size()
        looped = one_by_one_pays(size, seen.outputs.device, gains_from_batching(seen.uses, self.keep_graph))
        return size if looped and not self.keep_graph else 2 * size

    # -- guarantees ------------------------------------------------------------------------------------------------

    def _pull_verified(self, seen: Capture, v: Tensor, proof: Proof) -> tuple[list[Unit], list[str], dict[Layout, LayerJacobian]]:
        """The rows of some cotangents, proved to belong to their examples and to be autograd's; parameters that fail go to the fallback."""
        gradients = self._gradients(seen, v)
        axes = find_axes(seen.outputs, seen.uses, proof.axes, v, gradients)
        units, rest = self._units(seen, axes)
        wrong = [] if proof.covers(seen) else self._wrong_for_a_few(seen, axes, units, v)
        if wrong is None:
            return self._verify(seen, v, proof)
        proof.complete(seen)
        if wrong:
            return self._without(wrong, seen, v, proof)
        return units, rest, self._jacobians(seen, units, rest, v, gradients)

    def _wrong_for_a_few(self, seen: Capture, axes: list[ExampleAxis | None], units: list[Unit], v: Tensor) -> list[str] | None:
        """Parameters whose rows differ from autograd's for a few examples of the batch; ``None`` where these do not stand for it."""
        index = spread(seen.outputs.shape[0])
        small = few(self.task, seen, index)
        if small is None or not align(small, seen):
            return None
        ours, _ = build_units(small.uses, axes, self.task.collection, self.part_of)
        if [unit.layout for unit in ours] != [unit.layout for unit in units]:
            return None
        u = torch.randn(len(v), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(small.outputs)
        w = torch.tensordot(u, v[:, index].to(u.dtype), 1).unsqueeze(0)
        sweep = replace(self, keep_graph=False, _working=None)
        return mismatches(self.task, small, ours, sweep._pull(small, ours, [], w, last=False), w)

    def _verify(self, seen: Capture, v: Tensor, proof: Proof) -> tuple[list[Unit], list[str], dict[Layout, LayerJacobian]]:
        """The rows of some cotangents, compared with autograd on the whole batch."""
        units, rest = self._structure(seen, proof)
        jacobians = self._pull(seen, units, rest, v, last=False)
        wrong = mismatches(self.task, seen, units, jacobians, v)
        proof.complete(seen)
        return self._without(wrong, seen, v, proof) if wrong else (units, rest, jacobians)

    def _without(self, wrong: list[str], seen: Capture, v: Tensor, proof: Proof) -> tuple[list[Unit], list[str], dict[Layout, LayerJacobian]]:
        """The rows of some cotangents once more, those of wrong parameters by the fallback, in this pass and all like it."""
        proof.wrong |= set(wrong)
        self._demoted |= proof.wrong
        units, rest = self._structure(seen, proof)
        return units, rest, self._pull(seen, units, rest, v, last=False)

    def _require_finite(self, jacobians: dict[Layout, LayerJacobian], index: int) -> None:
        tensors = {layout: getattr(j, "g", getattr(j, "m", None)) for layout, j in jacobians.items()}
        sums = [t.detach().sum() for t in tensors.values() if t is not None]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return
        for layout, t in tensors.items():
            if t is not None and not bool(torch.isfinite(t).all()):
                bad = (~torch.isfinite(t)).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
                raise NonFiniteError(
                    f"gradients of layer {self.task.layer_of(layout.names[0])!r} contain NaN or infinity in batch {index}, examples {bad[:8]}"
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
