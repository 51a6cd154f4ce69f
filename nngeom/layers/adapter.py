"""How an operation uses its parameters: the registry of adapters, and what an adapter reports.

An adapter is one function, registered for the torch functions it understands and called with their own arguments. It
returns a :class:`Use`: which (parts of) parameters were used as which matrix, and how inputs and output gradients are
read as ``a [*lead, s, i]`` and ``g [*lead, s, o]``. ``lead`` are the axes among which the examples lie; which of them
it is, is found out later (:mod:`nngeom.generator.axes`), so that no adapter has to guess.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nngeom.core.errors import CoverageError
from nngeom.core.layout import Arrangement


@dataclass(frozen=True)
class Slot:
    """A parameter, by ``name``, read by ``arrangement`` as a matrix ``[s, o, i]``, of which one use sees the part
    starting at ``(row, column)``.
    """

    name: str
    arrangement: Arrangement
    row: int = 0
    column: int = 0


@dataclass
class Use:
    """One call of one operation with parameters: what an adapter reports, and what is noted of it afterwards.

    Args:
        operation: its name, such as ``"linear"``.
        weight: the parameter that multiplies the inputs, ``None`` without one.
        bias: the parameter that is added, ``None`` without one.
        lead: sizes of the axes of the output that hold examples and positions.
        gradients: ``[k, *out] -> [k, *lead, s, o]``, the gradients of the output as the rows need them.
        inputs: ``() -> [*lead, s, i]``, integer ``[*lead]`` for lookups; ``None`` without weight.
        copied: ``(empty, ones)`` to a copy of the inputs in memory that ``empty(sizes, like)`` gives, with the ones of
            the bias.
        channels: the axis of the output that holds features.
        lookup: inputs are indices, one-hot rows.
        elementwise: ``o = 1`` by nature: rows are formed at once, blocks are exact.
        edge: where the gradient of the output is read; with ``shape``, that of the output, noted by :meth:`finish`.
        shape: see ``edge``.
        sources: inputs kept for later, with their versions.
        since: number of the first node of the graph that may belong to the call.
        origin: the edge of the output itself, where this is seen through an addition.
        moved: replaced by copies behind a broadcast addition.
        place: among the uses of one forward pass.
    """

    operation: str
    weight: Slot | None
    bias: Slot | None
    lead: tuple[int, ...]  # sizes of the axes of the output that hold examples and positions
    gradients: Callable[[Tensor], Tensor]  # [k, *out] -> [k, *lead, s, o]
    inputs: Callable[[], Tensor] | None = None  # () -> [*lead, s, i]; integer [*lead] for lookups; None without weight
    copied: Callable[[Callable, bool], Tensor] | None = (
        None  # (empty, ones) -> copies of inputs, in ``empty(sizes, like)``, and the ones of the bias
    )
    channels: int = -1  # axis of the output that holds features
    lookup: bool = False
    elementwise: bool = False  # o = 1 by nature: rows are formed at once, blocks are exact
    edge: GradientEdge | None = None
    shape: torch.Size = field(default_factory=lambda: torch.Size(()))
    sources: tuple[tuple[Tensor, int], ...] = ()  # inputs kept for later, with their versions
    since: int = 0  # number of the first node of the graph that may belong to the call
    origin: GradientEdge | None = None  # of the output itself, where this is seen through an addition
    moved: bool = False  # replaced by copies behind a broadcast addition
    place: int = 0  # among the uses of one forward pass

    def finish(self, out: Tensor) -> Use:
        """Take the gradient edge of the output ``out``, before anything in place overwrites it."""
        self.edge, self.shape = get_gradient_edge(out), out.shape
        return self

    def forget(self) -> None:
        """Let go of the inputs: they were read."""
        self.inputs = self.copied = None
        self.sources = ()

    def broadcast(self, out: Tensor, extra: int) -> Use:
        """This use as seen through an addition whose result ``out`` copies its output along ``extra`` new axes (or a
        first axis of one).
        """
        added = tuple(out.shape[: max(extra, 1)])
        lead = added + (self.lead if extra else self.lead[1:])
        inputs = self.inputs

        def expanded() -> Tensor:
            x = inputs() if inputs is not None else None
            if x is None:
                raise CoverageError(f"{self.operation} was recorded without its input")
            return x.expand(*added, *(x.shape if extra else x.shape[1:]))

        def gradients(g: Tensor) -> Tensor:
            k, shape = g.shape[0], g.shape[1 + len(added) :]
            unit = () if extra else (1,)
            out = self.gradients(g.reshape(k * math.prod(added), *unit, *shape))
            return out.reshape(k, *added, *out.shape[1 + len(unit) :])

        copy = dataclasses.replace(
            self,
            lead=lead,
            gradients=gradients,
            inputs=None if inputs is None else expanded,
            copied=None,
            origin=self.origin or self.edge,
        )
        return copy.finish(out)

    def read_inputs(self, empty: Callable[..., Tensor] | None = None, ones: bool = False) -> Tensor:
        """``[*lead, s, i]`` (integer ``[*lead]`` for lookups), with ``empty`` and ``ones`` as :attr:`copied` takes
        them; raises where the input was overwritten since.
        """
        for x, version in self.sources:
            if x._version != version:
                raise CoverageError(
                    f"the input of {self.operation} was overwritten in place after it was used; use an "
                    "out-of-place operation there"
                )
        if self.inputs is None:
            raise CoverageError(f"{self.operation} was recorded without its input")
        return self.inputs() if empty is None or self.copied is None else self.copied(empty, ones)

    @property
    def features(self) -> int:
        """The axis of the output before which cotangents lie best in memory, so that with its features they are one
        axis.
        """
        return self.channels % max(1, len(self.shape))

    @property
    def size(self) -> int:
        """Number of rows of the table of a lookup."""
        return self.weight.arrangement.sizes[2] if self.weight is not None else 0

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters used."""
        return tuple(s for s in (self.weight, self.bias) if s is not None)


class Call:
    """What an adapter may ask about the call it is looking at.

    ``find``: ``(name, parameter)`` of a tensor that is a selected parameter or a view of one, else ``None``; ``out``:
    the output of the call; ``keep_graph``: inputs are to keep theirs.
    """

    def __init__(self, find: Callable[[Tensor], tuple[str, Tensor] | None], out: Tensor, keep_graph: bool):
        self._find, self.out, self.keep_graph = find, out, keep_graph
        self.sources: list[tuple[Tensor, int]] = []

    def is_parameter(self, x: Any) -> bool:
        """Whether ``x`` is a selected parameter or a view of one."""
        return isinstance(x, Tensor) and self._find(x) is not None

    def parameters_in(self, arguments: Iterable[Any]) -> int:
        """How many of these ``arguments``, and of those in their lists, are selected parameters or views of one."""
        count = 0
        for x in arguments:
            if isinstance(x, Tensor):
                count += self._find(x) is not None
            elif isinstance(x, (tuple, list)):
                count += self.parameters_in(x)
        return count

    def _parameter(self, x: Tensor | None) -> tuple[str, Tensor] | None:
        """``(name, parameter)`` of a parameter or view; empty ones and unusual outputs have no structure."""
        found = None if x is None else self._find(x)
        if found is not None and (not found[1].numel() or self.out.is_complex() or self.out.is_nested):
            raise NotStructured
        return found

    def keep(self, x: Tensor) -> Tensor:
        """An input ``x`` to be read later: detached unless the kernel is to be differentiated."""
        if x.is_complex() or x.is_nested or x.layout is not torch.strided:
            raise NotStructured  # rows of complex products are sums of two; the others have no strides
        x = x if self.keep_graph else x.detach()
        self.sources.append((x, x._version))
        return x

    def whole(self, x: Tensor | None, arrangement: Arrangement) -> Slot | None:
        """The slot of a parameter used whole, read by ``arrangement``; ``None`` where ``x`` is no selected parameter. A
        partial view raises.
        """
        found = self._parameter(x)
        if x is None or found is None:
            return None
        name, base = found
        if x.numel() != base.numel() or (x is not base and not _same_order(x, base)):
            raise NotStructured
        return Slot(name, arrangement)

    def matrix(self, x: Tensor | None) -> Slot | None:
        """The slot of a 2-D tensor ``x [o, i]``: a parameter, its transpose, or a rectangular part of either."""
        found = self._parameter(x)
        if x is None or found is None:
            return None
        name, base = found
        o, i = x.shape
        if x is base:
            return Slot(name, Arrangement.plain(1, o, i))
        if not base.is_contiguous() or x.numel() == 0:
            raise NotStructured
        last = base.shape[-1] if base.ndim > 1 else base.numel()
        rs, cs = x.stride()
        if i == 1 and cs != 1:
            cs = 1 if rs >= last else last
        if o == 1 and cs == 1:
            rs = last
        offset, total = int(x.storage_offset() - base.storage_offset()), base.numel()
        if cs == 1 and rs >= i and total % rs == 0:
            row, column = divmod(offset, rs)
            if column + i <= rs:
                return Slot(name, Arrangement.plain(1, total // rs, rs), row, column)
        if (rs == 1 or o == 1) and cs >= o and total % cs == 0:
            column, row = divmod(offset, cs)
            if row + o <= cs:
                return Slot(name, Arrangement((1, total // cs, cs), (0, 2, 1), (1, cs, total // cs)), row, column)
        raise NotStructured

    def vector(self, x: Tensor | None, s: int = 1) -> Slot | None:
        """The slot of a bias ``x`` of ``s * o`` entries: a parameter, or for ``s = 1`` a run of neighbours of one, of
        any shape.
        """
        found = self._parameter(x)
        if x is None or found is None:
            return None
        name, base = found
        if s != 1 or x is base:
            return self.whole(x, Arrangement.plain(s, base.numel() // s, 1))
        return Slot(name, Arrangement.plain(1, base.numel(), 1), self.run(x, base))

    def run(self, x: Tensor, base: Tensor) -> int:
        """Where ``x``, a run of neighbours, starts in its parameter ``base``; raises where the entries are not
        neighbours in order.
        """
        if not x.is_contiguous() or not base.is_contiguous():
            raise NotStructured
        return int(x.storage_offset() - base.storage_offset())

    def table(self, x: Tensor) -> tuple[Slot, int]:
        """The slot of ``[i, o]`` for rows ``x`` of a parameter table, ``o`` its last axis, and the first row."""
        found = self._parameter(x)
        if found is None:
            raise NotStructured
        name, base = found
        width = x.shape[-1]
        first, inside = divmod(self.run(x, base), width)
        if base.shape[-1] != width or inside:
            raise NotStructured
        rows = base.numel() // width
        return Slot(name, Arrangement((1, rows, width), (0, 2, 1), (1, width, rows))), first


class NotStructured(Exception):
    """Raised inside adapters only: this use has no Kronecker structure, the fallback takes it."""


def _same_order(x: Tensor, base: Tensor) -> bool:
    """Whether a view that holds all of ``base`` keeps its order of elements."""
    return x.is_contiguous() and base.is_contiguous() and x.storage_offset() == base.storage_offset()


Adapter = Callable[..., Use | None]
ADAPTERS: dict[Any, Adapter] = {}


def adapts(*functions: Any) -> Callable[[Adapter], Adapter]:
    """Register an adapter for torch ``functions``, at its definition.

    A use explains each parameter that was given to the call once, where it was given: of ``F.linear(w, w)`` it explains
    one of two, so that the call has no structure.
    """

    def register(adapter: Adapter) -> Adapter:
        @functools.wraps(adapter)
        def explained(call: Call, *args: Any, **kwargs: Any) -> Use | None:
            use, given = adapter(call, *args, **kwargs), call.parameters_in((*args, *kwargs.values()))
            return use if use is None or given == len(use.slots) else None

        for function in functions:
            ADAPTERS[function] = explained
        return adapter

    return register
