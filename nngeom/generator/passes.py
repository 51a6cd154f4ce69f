"""One forward pass, differentiated: the blocks of its parameters, proved to be autograd's, and their rows for given cotangents."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import CoverageError
from nngeom.core.factored import at_one_position
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.generator import fallback
from nngeom.generator.axes import ExampleAxis, find_axes
from nngeom.generator.backward import Pile, gains_from_batching, one_by_one_pays, pull_back
from nngeom.generator.capture import Capture
from nngeom.generator.proofs import proof_of
from nngeom.generator.stages import Stage, stages
from nngeom.generator.task import Task
from nngeom.generator.units import Empty, Unit, build_units
from nngeom.generator.verify import align, few, mismatches, spread

STAGE_BYTES = 2**24  # gradients of all cotangents that are held at once, where layers may come one after the other
SMALLER = 4  # rows that take so many times less memory than the gradients they are made of are kept instead


class Pass:
    """A captured forward pass.

    ``demoted``: names of parameters that are left to the fallback, shared by the passes of a sweep and added to.
    ``explicit``: only the rows matter, not their factors: they are formed at once where they are much smaller, and
    positions that share a gradient are summed.
    """

    def __init__(
        self,
        task: Task,
        seen: Capture,
        demoted: set[str],
        part_of: Callable[[str], object] | None = None,
        keep_graph: bool = False,
        working: memory.Working | None = None,
        explicit: bool = False,
    ):
        if not seen.outputs.requires_grad:
            raise CoverageError(
                "the outputs do not depend on any selected parameter by differentiable operations (torch.no_grad or .detach() inside the model?)"
            )
        self.task, self.seen, self.demoted, self.part_of = task, seen, demoted, part_of
        self.keep_graph, self.empty, self.explicit = keep_graph, working or memory.fresh, explicit
        self.proof = proof_of(task, seen)
        self.demoted |= self.proof.wrong
        self.n = seen.outputs.shape[0]
        self.units: list[Unit] = []
        self._runs: dict[int, list[Stage]] = {}
        self.rest: list[str] = []  # parameters without structure that the outputs depend on
        self._bar()

    # -- structure, and what is proved of it ---------------------------------------------------------------------------

    @property
    def unproved(self) -> bool:
        """Whether no pass like it was proved, or its examples may be placed by the data."""
        return self.proof.moves or not self.proof.covers(self.seen)

    def resolve(self, v: Tensor | None = None) -> None:
        """Find the blocks; with cotangents ``v [k, n, *out]`` that every row belongs to its example, and is autograd's, is proved."""
        axes = find_axes(self.seen.outputs, self.seen.uses, self.proof.axes, v)
        self.units, self.rest = self._units(axes)
        if v is None or self.proof.covers(self.seen):
            return
        wrong = self._wrong_for_a_few(axes, v)
        if wrong is None:
            self.compare(v)
        else:
            self._complete(wrong)

    def compare(self, v: Tensor) -> None:
        """Prove on the whole batch that rows are autograd's."""
        self.resolve()
        self._complete(mismatches(self.task, self.seen, self.units, self.pull(v), v))

    def _complete(self, wrong: list[str]) -> None:
        """Everything was proved but for parameters that are ``wrong``: these go to the fallback, in this pass and all like it."""
        self.proof.complete(self.seen)
        if wrong:
            self.proof.wrong |= set(wrong)
            self.demoted |= self.proof.wrong
            self._bar()
            self.resolve()

    def _wrong_for_a_few(self, axes: list[ExampleAxis | None], v: Tensor) -> list[str] | None:
        """Parameters whose rows differ from autograd's for a few examples of the batch; ``None`` where these do not stand for it."""
        index = spread(self.n)
        small = few(self.task, self.seen, index)
        if small is None or not align(small, self.seen):
            return None
        ours, _ = build_units(small.uses, axes, self.task.collection, self.part_of)
        if [unit.layout for unit in ours] != [unit.layout for unit in self.units]:
            return None
        u = torch.randn(len(v), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(small.outputs)
        w = torch.tensordot(u, v[:, index].to(u.dtype), 1).unsqueeze(0)
        gradients = pull_back(small.outputs, [use.edge for use in small.uses], [use.shape for use in small.uses], w, retain=True)
        with torch.no_grad():
            rows = {unit.layout: unit.jacobian(gradients, len(index)) for unit in ours}
        return mismatches(self.task, small, ours, rows, w)

    def _bar(self) -> None:
        """Forget the uses of parameters that are left to the fallback."""
        barred = self.seen.unstructured | self.demoted
        for use in self.seen.uses:
            if use.weight is not None and use.weight.name in barred:
                use.weight = None
            if use.bias is not None and use.bias.name in barred:
                use.bias = None
        self.seen.uses = [use for use in self.seen.uses if use.slots]

    def _units(self, axes: list[ExampleAxis | None]) -> tuple[list[Unit], list[str]]:
        units, rest = build_units(self.seen.uses, axes, self.task.collection, self.part_of)
        covered = {name for unit in units for name in unit.layout.names}
        others = [name for name in self.task.collection.names if name not in covered]
        if others:
            present = fallback.used(self.seen.outputs, [self.task.parameters[name] for name in others])
            others = [name for name, p in zip(others, present) if p or name in rest]
        self.demoted |= set(others)  # once in the fallback, always: one structure for all batches
        return units, others

    # -- rows ------------------------------------------------------------------------------------------------------------

    @property
    def has_positions(self) -> bool:
        """Whether any parameter is shared by positions."""
        return any(use.lead != (self.n,) for use in self.seen.uses)

    @functools.cached_property
    def _looped(self) -> bool:
        """Whether cotangents are pulled back one by one."""
        return _looped(self.seen, self.keep_graph)

    def pull(self, v: Tensor, last: bool = False) -> dict[Layout, LayerJacobian]:
        """The rows of all blocks for cotangents ``v [k, n, *out]``; ``last``: the graph may go."""
        whole = Stage([list(range(len(self.seen.uses)))])
        return {layout: j for part in self._staged([whole], v, last, self.empty, self.empty) for layout, j in part.items()}

    def by_layers(self, v: Tensor) -> Iterator[dict[Layout, LayerJacobian]]:
        """As :meth:`pull`, some layers at a time: each part overwrites the one before, and the graph behind it goes."""
        yield from self._staged(self._run(len(v)), v, True, memory.Working(), memory.fresh, release=True)

    def most_bytes(self, count: int) -> int:
        """Bytes that :meth:`by_layers` holds at once for so many cotangents."""
        sizes, most, before = self._sizes(count), 0, 0
        for stage in self._run(count):
            waist = max((sizes[j] for j in stage.uses), default=0) if stage.end is not None else 0
            most, before = max(most, before + waist + max(sum(sizes[j] for j in turn) for turn in stage.turns)), waist
        return most if self._looped else 2 * most

    def _edges(self) -> list[Any]:
        return [use.edge for use in self.seen.uses]

    def _sizes(self, count: int) -> list[int]:
        """Bytes kept of each use for so many cotangents."""
        early = self._early(count)
        each = [early[j].layout.numel * self.n if j in early else use.shape.numel() for j, use in enumerate(self.seen.uses)]
        return [count * self.seen.outputs.element_size() * size for size in each]

    def _run(self, count: int) -> list[Stage]:
        """The stages of :meth:`by_layers`; one where a halted pass may give other gradients, as where a hook changes them on the way."""
        if count not in self._runs:
            run = stages(self.seen.outputs, self.seen.uses, self._sizes(count), STAGE_BYTES)
            if len(run) > 1 and self.proof.halts is None:
                self.proof.halts = not self.seen.hooks and self._halts(run)
            self._runs[count] = run if self.proof.halts or len(run) == 1 else [Stage([list(range(len(self.seen.uses)))])]
        return self._runs[count]

    def _halts(self, run: list[Stage]) -> bool:
        """Whether one random cotangent arrives the same at all uses when the pass halts at every waist."""
        outputs, uses = self.seen.outputs, self.seen.uses
        v = torch.randn(1, *outputs.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(outputs)
        whole = pull_back(outputs, self._edges(), [use.shape for use in uses], v, retain=True)
        start: Any = outputs
        for stage in run:
            ends = [stage.end] if stage.end is not None else []
            edges, shapes = self._edges(), [uses[j].shape for j in stage.uses]
            pulled = pull_back(start, [*(edges[j] for j in stage.uses), *ends], [*shapes, *(torch.Size() for _ in ends)], v, retain=True)
            if not all(_same(g, whole[j]) for g, j in zip(pulled, stage.uses)):
                return False
            start, v = stage.end, pulled[-1]
        return True

    def _early(self, count: int) -> dict[int, Unit]:
        """Uses whose rows are formed as their gradients come, by index, with their block."""
        if not self.explicit or self.keep_graph or count == 1 or not self._looped:
            return {}
        several = Counter(j for unit in self.units for j, _, _ in unit.uses)
        single = {unit.uses[0][0]: unit for unit in self.units if unit.with_weight and unit.arrangements is None and len(unit.uses) == 1}
        pays = lambda unit, use: not use.lookup and SMALLER * unit.layout.numel * self.n <= use.shape.numel()
        return {j: unit for j, unit in single.items() if several[j] == 1 and pays(unit, self.seen.uses[j])}

    def _staged(
        self, run: list[Stage], v: Tensor, last: bool, gradients_in: Empty, inputs_in: Empty, release: bool = False
    ) -> Iterator[dict[Layout, LayerJacobian]]:
        """Blocks as soon as the gradients of all their uses are there; ``release``: nothing of them is kept for other cotangents."""
        v, early, waiting = v.to(self.seen.outputs.dtype), self._early(len(v)), list(self.units)
        gradients: dict[int, Tensor] = {}
        for turn in self._turns(run, v, early, last, gradients_in, inputs_in):
            gradients.update(turn)
            ready = [unit for unit in waiting if all(j in gradients for j, _, _ in unit.uses)]
            waiting = [unit for unit in waiting if unit not in ready]
            if release:
                for j in early.keys() & turn.keys():
                    early[j].inputs.clear()
            del turn
            one_by_one = release and v.device.type == "cpu"  # elsewhere asking each by itself whether its positions differ would make the host wait
            for units in [[unit] for unit in ready] if one_by_one else [ready]:
                yield self._rows(units, gradients, early, inputs_in)
                if release:
                    for unit in units:
                        unit.inputs.clear()
            needed = {j for unit in waiting for j, _, _ in unit.uses}
            done = [j for j in gradients if j not in needed]
            for j in done:
                del gradients[j]
                if release:
                    self.seen.uses[j].forget()
        if self.rest:
            parameters = [self.task.parameters[name] for name in self.rest]
            rows = fallback.full_jacobians(self.task, self.seen.batch, self.seen.outputs, parameters, v, self.keep_graph)
            yield {self.task.collection.span([name]): j for name, j in zip(self.rest, rows)}

    def _turns(
        self, run: list[Stage], v: Tensor, early: dict[int, Unit], last: bool, gradients_in: Empty, inputs_in: Empty
    ) -> Iterator[dict[int, Tensor]]:
        """``{use: what is kept of its gradients [k, ...]}``, turn after turn, each in the memory of the one before."""
        uses, edges, count = self.seen.uses, self._edges(), len(v)
        joint = {j for unit in self.units if len(unit.uses) > 1 for j, _, _ in unit.uses}  # kept until the other uses come
        waist_in = _Waists(gradients_in)
        start: Any = self.seen.outputs
        for stage in run:
            for turn in stage.turns:
                closing = turn is stage.turns[-1]
                end = stage.end if closing else None
                at_end = next((j for j in turn if end is not None and j not in early and j not in joint and edges[j][:2] == end[:2]), None)
                turn = sorted(turn, key=lambda j: (j == at_end, -uses[j].shape.numel()))  # a waist comes last: others may be views of what it overwrites
                piles = []
                for rank, j in enumerate(turn):
                    name = ("joint", j) if j in joint else ("gradients", rank)
                    piles.append(self._pile(j, count, early.get(j), waist_in if j == at_end else functools.partial(gradients_in, name), inputs_in))
                inputs, shapes = [edges[j] for j in turn], [uses[j].shape for j in turn]
                if end is not None and at_end is None:
                    inputs, shapes, piles = [*inputs, end], [*shapes, torch.Size()], [*piles, Pile(count, 0, waist_in)]
                retain = not (last and closing) or bool(self.rest)
                pulled = pull_back(start, inputs, shapes, v, retain, self.keep_graph, self._looped, piles)
                if end is not None:
                    start, v = end, pulled[-1]
                found = dict(zip(turn, pulled))
                del pulled, piles
                yield found
                del found

    def _pile(self, j: int, count: int, unit: Unit | None, empty: Callable[..., Tensor], inputs_in: Empty) -> Pile:
        if unit is None:
            return Pile(count, self.seen.uses[j].features if self.explicit else 0, empty)

        def rows(g: Tensor) -> Tensor:
            with torch.no_grad():
                return unit.jacobian({j: g.unsqueeze(0)}, self.n, inputs_in).matrix()[0]

        return Pile(count, 1, empty, rows)

    def _rows(self, units: list[Unit], gradients: dict[int, Tensor], early: dict[int, Unit], inputs_in: Empty) -> dict[Layout, LayerJacobian]:
        formed = {unit.layout: FullJacobian(gradients[j]) for j, unit in early.items() if unit in units}
        with torch.set_grad_enabled(self.keep_graph):
            rows = {unit.layout: formed.get(unit.layout) or unit.jacobian(gradients, self.n, inputs_in) for unit in units}
        return at_one_position(rows) if self.explicit and not self.keep_graph else rows


class _Waists:
    """Memory for gradients at one waist after the other; of the same sizes in the same place, for a cotangent comes when the one before was pulled on."""

    def __init__(self, empty: Empty):
        self._empty, self._which = empty, 0
        self._sizes: tuple[int, ...] = ()

    def __call__(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        if sizes != self._sizes:
            self._sizes, self._which = sizes, 1 - self._which
        return self._empty(("waist", self._which), sizes, like)


def bytes_each_cotangent(seen: Capture, keep_graph: bool) -> int:
    """Gradients of all uses; where cotangents are pulled back together, what lies between as well."""
    size = _gradient_bytes(seen) + seen.outputs.numel() * seen.outputs.element_size()
    return size if _looped(seen, keep_graph) and not keep_graph else 2 * size


def _looped(seen: Capture, keep_graph: bool) -> bool:
    return one_by_one_pays(_gradient_bytes(seen), seen.outputs.device, gains_from_batching(seen.uses, keep_graph))


def _gradient_bytes(seen: Capture) -> int:
    return sum(use.shape.numel() for use in seen.uses) * seen.outputs.element_size()


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-3, atol=1e-5 * float(y.abs().max()) if y.numel() else 0.0)
