"""One forward pass, differentiated: the blocks of its parameters, proved to be autograd's, and their rows for given cotangents."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import CoverageError
from nngeom.generator import fallback
from nngeom.generator.axes import ExampleAxis, find_axes
from nngeom.generator.backward import pull_back
from nngeom.generator.capture import Capture
from nngeom.generator.descent import Descent, Rows
from nngeom.generator.proofs import proof_of
from nngeom.generator.stages import Stage
from nngeom.generator.task import Task
from nngeom.generator.units import Unit, build_units
from nngeom.generator.verify import align, few, mismatches, spread


class Pass:
    """A captured forward pass.

    ``demoted``: names of parameters that are left to the fallback, shared by the passes of a sweep and added to.
    ``explicit`` as for :class:`Descent`.
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
        self.descent = Descent(self.seen, self.units, self.keep_graph, self.explicit)
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

    def pull(self, v: Tensor, last: bool = False) -> Rows:
        """The rows of all blocks for cotangents ``v [k, n, *out]``; ``last``: the graph may go."""
        return self.descent.pull(v, not last or bool(self.rest), self.empty) | self._rest(v)

    def by_layers(self, v: Tensor) -> Iterator[Rows]:
        """As :meth:`pull`, some layers at a time: each part overwrites the one before, and the graph behind it goes."""
        yield from self.descent.by_layers(self._route(len(v)), v, bool(self.rest))
        if self.rest:
            yield self._rest(v)

    def most_bytes(self, count: int) -> int:
        """Bytes that :meth:`by_layers` holds at once for so many cotangents."""
        return self.descent.most_bytes(self._route(count), count)

    def _route(self, count: int) -> list[Stage]:
        """Without halts where these may change gradients, as where a hook does on the way."""
        route = self.descent.route(count)
        if len(route) > 1 and self.proof.halts is None:
            self.proof.halts = not self.seen.hooks and self.descent.halts(route)
        return route if len(route) == 1 or self.proof.halts else self.descent.whole

    def _rest(self, v: Tensor) -> Rows:
        if not self.rest:
            return {}
        v, parameters = v.to(self.seen.outputs.dtype), [self.task.parameters[name] for name in self.rest]
        rows = fallback.full_jacobians(self.task, self.seen.batch, self.seen.outputs, parameters, v, self.keep_graph)
        return {self.task.collection.span([name]): j for name, j in zip(self.rest, rows)}
