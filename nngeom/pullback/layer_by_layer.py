"""Cotangents pulled back through one captured forward pass, and the rows of its blocks: all at once, or layer by
layer.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nngeom.capture.recorder import Capture
from nngeom.core import memory
from nngeom.core.factored import at_one_position
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.widened import widened
from nngeom.pullback.backward import Pile, pull_back
from nngeom.pullback.halts import Stage, stages
from nngeom.pullback.sizes import looped
from nngeom.pullback.use_groups import Empty, UseGroup

Jacobians = dict[Layout, LayerJacobian]
# Both save memory at no cost in time: kernels of seven nets (29 November 2026, one thread, torch 2.13.0, float32) took
# as long within the noise, a quarter, for 2**20 to 2**28 bytes, and for 4 or 8 times or never; for 1 time up to 1.5.
STAGE_BYTES = 2**24  # gradients of all cotangents that are held at once, where layers may come one after the other
FORGOTTEN_BYTES = 2**18  # gradients of a pass whose inputs are let go of as soon as they were read
SMALLER = 4  # rows that take so many times less memory than the gradients they are made of are kept instead


class Descent:
    """The way back from the outputs of a captured pass to the uses of its parameters.

    ``explicit``: only the rows matter, not their factors: they are formed at once where they are much smaller, and
    positions that share a gradient are summed.
    """

    def __init__(self, capture: Capture, groups: list[UseGroup], *, keep_graph: bool, explicit: bool) -> None:
        self.capture, self.uses, self.groups = capture, capture.uses, groups
        self.keep_graph, self.explicit = keep_graph, explicit
        self.n = capture.outputs.shape[0]
        self.edges: list[Any] = [use.edge for use in self.uses]
        self.start: Any = capture.outputs
        self.asked = list(range(len(self.uses)))
        self.looped = looped(capture, keep_graph=keep_graph)  # whether cotangents are pulled back one by one

    @property
    def whole(self) -> list[Stage]:
        """A route without a halt."""
        return [Stage([self.asked])]

    def behind(self, entry: GradientEdge, head: int) -> Descent:
        """The way back from ``entry``, the inputs of the use ``head``, to all other uses."""
        other = copy.copy(self)
        other.start, other.asked = entry, [j for j in self.asked if j != head]
        other.groups = [group for group in self.groups if all(j != head for j, _, _ in group.uses)]
        return other

    def route(self, count: int) -> list[Stage]:
        """Where to halt so that little is held at once for ``count`` cotangents."""
        return stages(self.capture.outputs, self.uses, self._sizes(count), STAGE_BYTES)

    def halts(self, route: list[Stage]) -> bool | None:
        """Whether one random cotangent arrives the same at all uses with and without halts; ``None`` where it arrives
        nowhere.
        """
        outputs = self.capture.outputs
        v = torch.randn(1, *outputs.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(outputs)
        expected = pull_back(outputs, self.edges, [use.shape for use in self.uses], v, retain=True)
        start: Any = outputs
        for stage in route:
            inputs, shapes = [self.edges[j] for j in stage.uses], [self.uses[j].shape for j in stage.uses]
            if stage.end is not None:
                inputs, shapes = [*inputs, stage.end], [*shapes, torch.Size()]
            pulled = pull_back(start, inputs, shapes, v, retain=True)
            if not all(_same(g, expected[j]) for g, j in zip(pulled, stage.uses)):
                return False
            start, v = stage.end, pulled[-1]
        return True if all(bool(g.any()) for g in expected) else None

    def most_bytes(self, route: list[Stage], count: int) -> int:
        """Bytes that ``count`` cotangents take at once on a route."""
        sizes, most, before = self._sizes(count), 0, 0
        for stage in route:
            halt = max((sizes[j] for j in stage.uses), default=0) if stage.end is not None else 0
            most, before = max(most, before + halt + max(sum(sizes[j] for j in turn) for turn in stage.turns)), halt
        return most if self.looped else 2 * most

    def pull(self, v: Tensor, *, retain: bool, empty: Empty = memory.fresh) -> Jacobians:
        """The rows of all blocks for cotangents ``v [k, n, *out]``; large copies lie in ``empty(name, sizes,
        like)``.
        """
        early = self._early(len(v))
        (gradients,) = self._turns(self.whole, v, early, retain=retain, gradients_in=empty, inputs_in=empty)
        return self._rows(self.groups, gradients, early, empty)

    def by_layers(self, route: list[Stage], v: Tensor, *, retain: bool) -> Iterator[Jacobians]:
        """The same some layers at a time, on a route: each part overwrites the one before. To be asked for once."""
        early, waiting = self._early(len(v)), list(self.groups)
        large = sum(self._sizes(len(v))) > FORGOTTEN_BYTES
        gradients: dict[int, Tensor] = {}
        working = memory.Working()
        for turn in self._turns(route, v, early, retain=retain, gradients_in=working, inputs_in=memory.fresh):
            gradients.update(turn)
            for j in early.keys() & turn.keys():
                early[j].inputs.clear()
            del turn
            ready = [group for group in waiting if all(j in gradients for j, _, _ in group.uses)]
            waiting = [group for group in waiting if group not in ready]
            one_by_one = (
                v.device.type == "cpu"
            )  # elsewhere asking each by itself whether its positions differ would make the host wait
            for groups in [[group] for group in ready] if one_by_one else [ready]:
                yield self._rows(groups, gradients, early, memory.fresh)
                for group in groups if large else ():
                    group.forget()
            needed = {j for group in waiting for j, _, _ in group.uses}
            for j in [j for j in gradients if j not in needed]:
                del gradients[j]
                if large:
                    self.uses[j] = self.uses[j].forgotten()

    def _sizes(self, count: int) -> list[int]:
        """Bytes kept of each use for so many cotangents."""
        early = self._early(count)
        each = [early[j].layout.numel * self.n if j in early else use.shape.numel() for j, use in enumerate(self.uses)]
        return [count * self.capture.outputs.element_size() * size for size in each]

    def _early(self, count: int) -> dict[int, UseGroup]:
        """Uses whose rows are formed as their gradients come, by index, with their block."""
        if not self.explicit or self.keep_graph or count == 1 or not self.looped:
            return {}
        several = Counter(j for group in self.groups for j, _, _ in group.uses)
        single = {
            group.uses[0][0]: group
            for group in self.groups
            if group.with_weight and group.arrangements is None and len(group.uses) == 1
        }
        smaller = lambda j, group: SMALLER * group.layout.numel * self.n <= self.uses[j].shape.numel()
        pays = lambda j, group: not self.uses[j].use.lookup and smaller(j, group)
        return {j: group for j, group in single.items() if several[j] == 1 and pays(j, group)}

    def _turns(
        self,
        route: list[Stage],
        v: Tensor,
        early: dict[int, UseGroup],
        *,
        retain: bool,
        gradients_in: Empty,
        inputs_in: Empty,
    ) -> Iterator[dict[int, Tensor]]:
        """``{use: what is kept of its gradients [k, ...]}``, turn after turn, each in the memory of the one before."""
        uses, edges, count, v = self.uses, self.edges, len(v), widened(v, self.capture.outputs.dtype)
        joint = {
            j for group in self.groups if len(group.uses) > 1 for j, _, _ in group.uses
        }  # kept until the other uses come
        halt_in = _Halts(gradients_in)
        start: Any = self.start
        for stage in route:
            for turn in stage.turns:
                closing = turn is stage.turns[-1]
                end = stage.end if closing else None
                at_end = next(
                    (
                        j
                        for j in turn
                        if end is not None and j not in early and j not in joint and edges[j][:2] == end[:2]
                    ),
                    None,
                )
                turn = sorted(
                    turn, key=lambda j: (j == at_end, -uses[j].shape.numel())
                )  # a halt comes last: others may be views of what it overwrites
                piles = []
                for rank, j in enumerate(turn):
                    name = ("joint", j) if j in joint else ("gradients", rank)
                    piles.append(
                        self._pile(
                            j,
                            count,
                            early.get(j),
                            halt_in if j == at_end else functools.partial(gradients_in, name),
                            inputs_in,
                        )
                    )
                inputs, shapes = [edges[j] for j in turn], [uses[j].shape for j in turn]
                if end is not None and at_end is None:
                    inputs, shapes, piles = [*inputs, end], [*shapes, torch.Size()], [*piles, Pile(count, 0, halt_in)]
                pulled = pull_back(
                    start,
                    inputs,
                    shapes,
                    v,
                    retain=retain or not closing,
                    create_graph=self.keep_graph,
                    large=self.looped,
                    piles=piles,
                )
                if end is not None:
                    start, v = end, pulled[-1]
                gradients = dict(zip(turn, pulled))
                del pulled, piles
                yield gradients
                del gradients

    def _pile(self, j: int, count: int, group: UseGroup | None, empty: Callable[..., Tensor], inputs_in: Empty) -> Pile:
        if group is None:
            return Pile(count, self.uses[j].features if self.explicit else 0, empty)

        def rows(g: Tensor) -> Tensor:
            with torch.no_grad():
                return group.jacobian({j: g.unsqueeze(0)}, self.n, inputs_in).matrix()[0]

        return Pile(count, 1, empty, rows)

    def _rows(
        self, groups: list[UseGroup], gradients: dict[int, Tensor], early: dict[int, UseGroup], inputs_in: Empty
    ) -> dict[Layout, LayerJacobian]:
        formed = {group.layout: FullJacobian(gradients[j]) for j, group in early.items() if group in groups}
        with torch.set_grad_enabled(self.keep_graph):
            rows = {
                group.layout: formed.get(group.layout) or group.jacobian(gradients, self.n, inputs_in)
                for group in groups
            }
        return at_one_position(rows) if self.explicit and not self.keep_graph else rows


class _Halts:
    """Memory for gradients at one halt after the other; of the same sizes in the same place, for a cotangent comes
    when the one before was pulled on.
    """

    def __init__(self, empty: Empty) -> None:
        self._empty, self._which = empty, 0
        self._sizes: tuple[int, ...] = ()

    def __call__(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        if sizes != self._sizes:
            self._sizes, self._which = sizes, 1 - self._which
        return self._empty(("halt", self._which), sizes, like)


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-3, atol=1e-5 * float(y.abs().max()) if y.numel() else 0.0)
