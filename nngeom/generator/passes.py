"""One forward pass, differentiated: the blocks of its parameters, proved to be autograd's, and their rows for given
cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import CoverageError
from nngeom.generator import fallback
from nngeom.generator.axes import ExampleAxis, candidates, find_axes
from nngeom.generator.backward import pull_back
from nngeom.generator.capture import Capture
from nngeom.generator.descent import Descent, Rows
from nngeom.generator.graph import require_differentiable
from nngeom.generator.proofs import proof_of
from nngeom.generator.safe import ASK, Unknown
from nngeom.generator.separate import answers, require_separate, require_separate_gradients
from nngeom.generator.stages import Stage
from nngeom.generator.task import Task
from nngeom.generator.units import Unit, build_units
from nngeom.generator.verify import compare


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
        check: bool = True,
    ):
        if not seen.outputs.requires_grad:
            raise CoverageError(
                "the outputs do not depend on any selected parameter by differentiable operations (torch.no_grad "
                "or .detach() inside the model?)"
            )
        self.task, self.seen, self.demoted, self.part_of = task, seen, demoted, part_of
        self.keep_graph, self.empty, self.explicit, self.check = keep_graph, working or memory.fresh, explicit, check
        self.proof = proof_of(task, seen)
        self.demoted |= self.proof.left | task.hooked
        self.n = seen.outputs.shape[0]
        self.units: list[Unit] = []
        self.rest: list[str] = []  # parameters without structure that the outputs depend on
        self._bar()

    # -- structure, and what is proved of it ---------------------------------------------------------------------------

    def resolve(self, check: bool = False) -> None:
        """Find the blocks; with ``check`` every use whose examples the graph does not place is asked for them, in this
        batch.

        Without, those only whose shape leaves a choice.
        """
        axes, asked = self._placed(), [j for j, use in enumerate(self.seen.uses) if self.proof.place(use.place) is ASK]
        open_ = [j for j in asked if check or len(candidates(self.seen.uses[j].use.lead, self.n)) > 1]
        if open_ and self.keep_graph and check:  # a row that is zero now tells nothing of its derivative
            axes = [None if j in asked else axis for j, axis in enumerate(axes)]
        elif open_:
            for j, axis in find_axes(self.seen.outputs, self.seen.uses, open_).items():
                axes[j] = axis
        self.units, self.rest = self._units(axes)
        self.descent = Descent(self.seen, self.units, self.keep_graph, self.explicit)

    def _placed(self) -> list[ExampleAxis | None]:
        """The example axis of every use as the graph tells it, the likeliest by shape where it does not."""
        likely = lambda use: next(iter(candidates(use.lead, self.n)), None)
        known = ((recorded.use, self.proof.place(recorded.place)) for recorded in self.seen.uses)
        return [likely(use) if isinstance(place, Unknown) else place for use, place in known]

    def prove(self, separate: bool = True) -> None:
        """Ask what is not known of the graph yet: whether parts of the batch run as in the whole, and rows are
        autograd's.
        """
        if separate:
            self.require_separate()
        else:
            self.proof.separate = True
        if self.keep_graph:
            v = torch.ones_like(self.seen.outputs).unsqueeze(0)
            edges = [use.edge for use in self.seen.uses]
            require_differentiable(
                pull_back(
                    self.seen.outputs, edges, [use.shape for use in self.seen.uses], v, retain=True, create_graph=True
                )
            )
        compared, wrong = compare(self.task, self.seen, self.units)
        self.proof.compared |= compared
        if wrong:
            self.proof.left |= wrong
            self.demoted |= wrong
            self._bar()
            self.resolve(check=True)

    def require_separate(self) -> None:
        """Raise where parts of the batch do not run as in the whole, unless that was seen of a pass like it."""
        if not self.proof.separate:
            require_separate(self.task, self.seen.batch, self.seen.outputs)
            self.proof.separate = answers(self.seen.outputs)
            if not self.proof.separate:
                require_separate_gradients(self.task, self.seen)

    def _bar(self) -> None:
        """Forget the uses of parameters that are left to the fallback."""
        barred = self.seen.unstructured | self.demoted
        left = (recorded.without(barred) for recorded in self.seen.uses)
        self.seen = replace(self.seen, uses=[recorded for recorded in left if recorded.use.slots])

    def _units(self, axes: list[ExampleAxis | None]) -> tuple[list[Unit], list[str]]:
        units, rest = build_units(self.seen.uses, axes, self.task.collection, self.part_of)
        covered = {name for unit in units for name in unit.layout.names}
        others = [name for name in self.task.collection.names if name not in covered]
        if others:
            others = [name for name in others if name in self.proof.reached or name in rest]
        self.demoted |= set(others)  # once in the fallback, always: one structure for all batches
        return units, others

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def has_positions(self) -> bool:
        """Whether any parameter is shared by positions."""
        return any(recorded.use.lead != (self.n,) for recorded in self.seen.uses)

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
            self.proof.halts = False if self.seen.hooked else self.descent.halts(route)
        return route if len(route) == 1 or self.proof.halts else self.descent.whole

    def _rest(self, v: Tensor) -> Rows:
        if not self.rest:
            return {}
        v, parameters = v.to(self.seen.outputs.dtype), [self.task.parameters[name] for name in self.rest]
        rows = fallback.full_jacobians(
            self.task, self.seen, parameters, v, create_graph=self.keep_graph, apart=self.proof.apart, check=self.check
        )
        return {self.task.collection.span([name]): j for name, j in zip(self.rest, rows)}
