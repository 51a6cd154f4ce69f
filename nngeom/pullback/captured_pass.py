"""One forward pass, differentiated: the blocks of its parameters, proved to be autograd's, and their rows for given
cotangents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.capture.graph import require_differentiable
from nngeom.capture.known_factors import Factors
from nngeom.capture.looked import this_look
from nngeom.capture.network import Network
from nngeom.capture.program import made_up
from nngeom.capture.recorder import Capture
from nngeom.core import memory
from nngeom.core.errors import CoverageError
from nngeom.pullback import fallback
from nngeom.pullback.axes import ExampleAxis, Where, candidates, find_axes
from nngeom.pullback.backward import pull_back
from nngeom.pullback.halts import Stage
from nngeom.pullback.known_groups import KnownGroups
from nngeom.pullback.layer_by_layer import Descent, Jacobians
from nngeom.pullback.partial import require_whole_gradients
from nngeom.pullback.proofs import proof_of
from nngeom.pullback.safe import ASK, Unknown
from nngeom.pullback.separate import answers, require_separate
from nngeom.pullback.use_groups import UseGroup, build_units
from nngeom.pullback.verify import compare


class Pass:
    """A captured forward pass.

    ``left_to_fallback``: names of parameters that are left to the fallback, shared by the passes of a sweep and added
    to. ``explicit`` as for :class:`Descent`; ``apart``: rows are kept at every position.
    """

    def __init__(
        self,
        network: Network,
        capture: Capture,
        left_to_fallback: set[str],
        part_of: Callable[[str], object] | None = None,
        *,
        keep_graph: bool = False,
        working: memory.Working | None = None,
        explicit: bool = False,
        apart: bool = False,
        check: bool = True,
    ):
        if not capture.outputs.requires_grad:
            raise CoverageError(
                "the outputs do not depend on any selected parameter by differentiable operations (torch.no_grad "
                "or .detach() inside the model?)"
            )
        self.network, self.capture, self.left_to_fallback, self.part_of = network, capture, left_to_fallback, part_of
        self.keep_graph, self.empty, self.explicit, self.check = keep_graph, working or memory.fresh, explicit, check
        self.proof = proof_of(network, capture)
        self.left_to_fallback |= self.proof.left | network.hooked
        self.n, self.apart = capture.outputs.shape[0], apart
        self.groups: list[UseGroup] = []
        self.rest: list[str] = []  # parameters without structure that the outputs depend on
        self._bar()

    # -- structure, and what is proved of it ---------------------------------------------------------------------------

    def resolve(self, *, check: bool = False) -> None:
        """Find the blocks; with ``check`` every use whose examples the graph does not place is asked for them, in this
        batch.

        Without, those only whose shape leaves a choice, or none.
        """
        axes, asked = (
            self._placed(),
            [j for j, use in enumerate(self.capture.uses) if self.proof.place(use.place) is ASK],
        )
        open_ = [j for j in asked if check or len(candidates(self.capture.uses[j].use.lead, self.n)) != 1]
        if open_ and self.keep_graph and check:  # a row that is zero now tells nothing of its derivative
            axes = [None if j in asked else axis for j, axis in enumerate(axes)]
        elif open_:
            scatter = not (self.apart or self.keep_graph)  # rows have no order, and those that are zero no owner
            for j, axis in find_axes(self.capture.outputs, self.capture.uses, open_, scatter=scatter).items():
                axes[j] = axis
        for j in asked:
            axis = axes[j]
            axes[j] = replace(axis, asked=True) if isinstance(axis, ExampleAxis) else axis
        self.groups, self.rest = self._groups(axes, known=not open_)
        self.descent = Descent(self.capture, self.groups, keep_graph=self.keep_graph, explicit=self.explicit)

    def _placed(self) -> list[Where | None]:
        """The example axis of every use as the graph tells it, the likeliest by shape where it does not."""
        likely = lambda use: next(iter(candidates(use.lead, self.n)), None)
        known = ((recorded.use, self.proof.place(recorded.place)) for recorded in self.capture.uses)
        axes: list[Where | None] = [likely(use) if isinstance(place, Unknown) else place for use, place in known]
        return axes if not self.proof.scattered else self.proof.marked(axes, self.capture.uses)

    def prove(self, *, separate: bool = True, pulled: bool = False) -> None:
        """Ask what is not known of the graph yet: whether parts of the batch run as in the whole, and rows are
        autograd's. ``pulled``: :meth:`pull` comes next.
        """
        if separate:
            self.require_separate()
        if self.keep_graph:
            v = torch.ones_like(self.capture.outputs).unsqueeze(0)
            edges = [use.edge for use in self.capture.uses]
            require_differentiable(
                pull_back(
                    self.capture.outputs,
                    edges,
                    [use.shape for use in self.capture.uses],
                    v,
                    retain=True,
                    create_graph=True,
                )
            )
        require_whole_gradients(self.network, self.capture)
        compared, wrong = compare(self.network, self.capture, self.groups, keep_inputs=pulled and not self.keep_graph)
        self.proof.compared |= compared
        if wrong:
            self.proof.left |= wrong
            self.left_to_fallback |= wrong
            self._bar()
            self.resolve(check=True)

    def require_separate(self) -> None:
        """Raise where parts of the batch do not run as in the whole, unless that was seen of a pass like it."""
        if not self.proof.is_separate(self.as_what):
            asked = self.capture if self._asks_gradients else None
            batch, outputs = self.capture.batch, self.capture.outputs
            answered = require_separate(self.network, batch, outputs, placed=self._keeps_apart, capture=asked)
            if answers(self.capture.outputs) and self._is_finite:
                self.proof.separate[self.as_what] = Factors.of(self.network, answered=answered)
        self._lean_on_what_is_known()

    @functools.cached_property
    def as_what(self) -> int:
        """The program that runs of parts tell of."""
        return hash((this_look(self.network), made_up(self.capture.batch)))

    @property
    def covered(self) -> bool:
        """Whether nothing is left to prove that could be remembered."""
        if not self.capture.training:  # where examples need not be apart
            self._lean_on_what_is_known()
            if not self.proof.is_separate(self.as_what):
                return False
        return self.proof.has_compared(self.capture)

    def _lean_on_what_is_known(self) -> None:
        """A matrix that holds the model looks again when that does not hold any more."""
        known = self.proof.separate.get(self.as_what)
        if known is not None:
            self.network.looks.under(known)

    @property
    def _keeps_apart(self) -> bool:
        """Whether the graph tells that no example has a part in the rows of another, or that each is asked by itself
        for functions that are registered on gradients.
        """
        if self.capture.hooked or self.capture.graph().module_hooks:
            return True
        placed = all(isinstance(self.proof.place(use.place), ExampleAxis) for use in self.capture.uses)
        return placed and not (self.proof.left | self.capture.unstructured | self.network.hooked)

    @property
    def _asks_gradients(self) -> bool:
        """Whether gradients of parts may be added up: no function of the user's runs on them, parameters are whole."""
        hooked = self.capture.hooked or self.capture.graph().module_hooks or self.network.hooked
        return self._is_finite and not (hooked or self.network.distributed is not None or self.capture.leaves.exchanged)

    @functools.cached_property
    def _is_finite(self) -> bool:
        return math.isfinite(self.capture.values.sum().item())

    def _bar(self) -> None:
        """Forget the uses of parameters that are left to the fallback."""
        barred = self.capture.unstructured | self.left_to_fallback
        if not barred:
            return
        left = (recorded.without(barred) for recorded in self.capture.uses)
        self.capture = replace(self.capture, uses=[recorded for recorded in left if recorded.use.slots])

    def _groups(self, axes: list[Where | None], *, known: bool) -> tuple[list[UseGroup], list[str]]:
        """``known``: where the examples of all uses lie is told by the graph."""
        collection, before, asked = self.network.collection, self.proof.groups, self.part_of is not None or self.apart
        known = known and not (asked or self.left_to_fallback or self.capture.unstructured)
        uses = self.capture.uses
        if known and before is not None and before.are_of(collection, uses, axes):
            return before.within(uses), []
        groups, rest = build_units(uses, axes, collection, self.part_of)
        for group in groups:
            group.apart = self.apart
        covered = {name for group in groups for name in group.layout.names}
        others = [name for name in collection.names if name not in covered]
        if others:
            others = [name for name in others if name in self.proof.reached or name in rest]
        elif known:
            self.proof.groups = KnownGroups.of(collection, uses, axes, groups)
        self.left_to_fallback |= set(others)  # once in the fallback, always: one structure for all batches
        return groups, others

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def has_positions(self) -> bool:
        """Whether any parameter is shared by positions."""
        return any(recorded.use.lead != (self.n,) for recorded in self.capture.uses)

    def pull(self, v: Tensor, *, last: bool = False) -> Jacobians:
        """The rows of all blocks for cotangents ``v [k, n, *out]``; ``last``: the graph may go."""
        return self.descent.pull(v, retain=not last or bool(self.rest), empty=self.empty) | self._rest(v)

    def by_layers(self, v: Tensor) -> Iterator[Jacobians]:
        """As :meth:`pull`, some layers at a time: each part overwrites the one before, and the graph behind it goes."""
        yield from self.descent.by_layers(self._route(len(v)), v, retain=bool(self.rest))
        if self.rest:
            yield self._rest(v)

    def most_bytes(self, count: int) -> int:
        """Bytes that :meth:`by_layers` holds at once for so many cotangents."""
        return self.descent.most_bytes(self._route(count), count)

    def _route(self, count: int) -> list[Stage]:
        """Without halts where these may change gradients, as where a hook does on the way."""
        route = self.descent.route(count)
        if len(route) > 1 and self.proof.halts is None:
            self.proof.halts = False if self.capture.hooked else self.descent.halts(route)
        return route if len(route) == 1 or self.proof.halts else self.descent.whole

    def _rest(self, v: Tensor) -> Jacobians:
        if not self.rest:
            return {}
        v = v.to(self.capture.outputs.dtype)
        rows = fallback.full_jacobians(
            self.network,
            self.capture,
            self.rest,
            v,
            create_graph=self.keep_graph,
            apart=self.proof.apart,
            check=self.check,
        )
        return {self.network.collection.span([name]): j for name, j in zip(self.rest, rows)}
