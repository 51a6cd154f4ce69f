"""A use of parameters in its place: what the adapter said of the call, and what the recorder keeps of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nngeom.core.errors import CoverageError
from nngeom.layers.call import Call
from nngeom.layers.use import Use

Sources = tuple[tuple[Tensor, int], ...]
NOWHERE = get_gradient_edge(torch.zeros((), requires_grad=True))  # in the place of an edge that is not needed any more


@dataclass(frozen=True, eq=False)
class Recorded:
    """One use in one forward pass."""

    use: Use
    edge: GradientEdge  # of the output, taken before anything in place overwrites it
    shape: torch.Size
    sources: Sources = ()  # inputs kept for later, with their versions
    since: int = 0  # number of the first node of the graph that may belong to the call
    origin: GradientEdge | None = None  # of the output itself, where this is seen through an addition
    place: int = 0  # among the uses of the pass
    entry: GradientEdge | None = None  # of the input that was kept, where it has one

    @staticmethod
    def of(use: Use, out: Tensor, call: Call, since: int, place: int) -> Recorded:
        """A use whose output is ``out``."""
        return Recorded(
            use, get_gradient_edge(out), out.shape, tuple(call.sources), since, place=place, entry=call.entry
        )

    def at(self, place: int) -> Recorded:
        """The same in this place."""
        return self if place == self.place else dataclasses.replace(self, place=place)

    @property
    def features(self) -> int:
        """The axis of the output before which cotangents lie best in memory, so that with its features they are one
        axis.
        """
        return self.use.channels % max(1, len(self.shape))

    def without(self, names: Collection[str]) -> Recorded:
        """The use of the other parameters."""
        if not any(slot.name in names for slot in self.use.slots):
            return self
        weight, bias = (None if s is None or s.name in names else s for s in (self.use.weight, self.use.bias))
        return dataclasses.replace(self, use=dataclasses.replace(self.use, weight=weight, bias=bias))

    def forgotten(self) -> Recorded:
        """This without its inputs, which were read."""
        return dataclasses.replace(self, use=dataclasses.replace(self.use, inputs=None, copied=None), sources=())

    def off_the_graph(self) -> Recorded:
        """This without its edges, so that it does not hold its own graph."""
        return Recorded(self.use, NOWHERE, self.shape, self.sources, self.since, place=self.place, entry=self.entry)

    def broadcast(self, out: Tensor, extra: int) -> Recorded:
        """This use as seen through an addition that copies its output along ``extra`` new axes (or a first axis of
        one).
        """
        added = tuple(out.shape[: max(extra, 1)])
        inputs, gradients = self.use.inputs, self.use.gradients

        def expanded(read: Callable[[], Tensor]) -> Tensor:
            x = read()
            return x.expand(*added, *(x.shape if extra else x.shape[1:]))

        def pulled(g: Tensor) -> Tensor:
            k, shape = g.shape[0], g.shape[1 + len(added) :]
            unit = () if extra else (1,)
            rows = gradients(g.reshape(k * math.prod(added), *unit, *shape))
            return rows.reshape(k, *added, *rows.shape[1 + len(unit) :])

        use = dataclasses.replace(
            self.use,
            lead=added + (self.use.lead if extra else self.use.lead[1:]),
            gradients=pulled,
            inputs=None if inputs is None else functools.partial(expanded, inputs),
            copied=None,
        )
        return dataclasses.replace(
            self, use=use, edge=get_gradient_edge(out), shape=out.shape, origin=self.origin or self.edge
        )

    def read_inputs(self, empty: Callable[..., Tensor] | None = None, *, ones: bool = False) -> Tensor:
        """``[*lead, s, i]`` (integer ``[*lead]`` for lookups), with ``empty`` as :attr:`Use.copied`; raises where the
        input was overwritten since.
        """
        use = self.use
        for x, version in self.sources:
            if x._version != version:
                raise CoverageError(
                    f"the input of {use.operation} was overwritten in place after it was used; use an "
                    "out-of-place operation there"
                )
        if use.inputs is None:
            raise CoverageError(f"{use.operation} was recorded without its input")
        return use.inputs() if empty is None or use.copied is None else use.copied(empty, ones=ones)
