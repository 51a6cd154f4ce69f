"""From uses of parameters to blocks: which parameters share a matrix ``[s, o, i]``, and their LayerJacobian."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.capture.recorded import Recorded
from nngeom.core import contract, memory
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.positions import PositionedJacobian
from nngeom.core.tied import SumJacobian, TiedJacobian
from nngeom.core.widened import widened
from nngeom.layers.use import Slot, Use
from nngeom.pullback.axes import Where
from nngeom.pullback.scattered import Scattered
from nngeom.space.collection import LayerCollection

Gradients = Sequence[Tensor] | Mapping[int, Tensor]  # of the outputs of uses, by index
Empty = Callable[[Hashable, Sequence[int], Tensor], Tensor]  # as memory.fresh
FEW = 2**12  # inputs whose copies are made anew: the calls take longer than the memory
Rows = tuple[float | Tensor, bool]  # those of an example on average, and whether that is the data's
Part = tuple[Any, Tensor, Use, Rows]  # inputs of one use, None: a bias alone; gradients
PlacedUse = tuple[int, Recorded, Where]  # index into the list of uses, and where its examples lie


@dataclass
class UseGroup:
    """One block: its layout, and the uses that its Jacobian sums, each with its example axis."""

    layout: Layout
    uses: list[PlacedUse]
    with_weight: bool
    with_bias: bool
    arrangements: tuple[Arrangement, ...] | None = None  # unlike uses: one arrangement a use
    apart: bool = False  # rows are kept at every position where they could be summed over them
    inputs: dict[int, Tensor] = field(default_factory=dict)  # read once, for all cotangents of the batch

    def jacobian(self, gradients: Gradients, n: int, empty: Empty = memory.fresh) -> LayerJacobian:
        """The rows for output gradients ``[k, *out]`` of all uses; copies of inputs are made in ``empty(name, sizes,
        like)``.
        """
        if self.arrangements is not None:
            return self._unlike(gradients, n, empty)
        main = self.layout.pieces[0].arrangement
        return self._join([self._part(use, gradients, n, main, empty) for use in self.uses])

    def off_the_graph(self) -> UseGroup:
        """This without the edges of its uses, which would hold their graph."""
        uses: list[PlacedUse] = [(j, recorded.off_the_graph(), axis) for j, recorded, axis in self.uses]
        options = {"with_weight": self.with_weight, "with_bias": self.with_bias, "apart": self.apart}
        return UseGroup(self.layout, uses, arrangements=self.arrangements, inputs=self.inputs, **options)

    def forget(self) -> None:
        """Let go of the inputs: they were read."""
        self.inputs.clear()
        self.uses = [(j, recorded.forgotten(), axis) for j, recorded, axis in self.uses]

    def _unlike(self, gradients: Gradients, n: int, empty: Empty) -> LayerJacobian:
        """Like uses joined, unlike ones summed."""
        groups: dict[tuple[Arrangement, bool], list[Part]] = {}
        for placed, arrangement in zip(self.uses, self.arrangements or ()):
            like = arrangement, placed[1].use.lookup
            groups.setdefault(like, []).append(self._part(placed, gradients, n, arrangement, empty))
        if not self.layout.is_span:
            main = self.layout.pieces[0].arrangement
            return TiedJacobian(tuple((a != main, self._factored(parts)) for (a, _), parts in groups.items()))
        return SumJacobian(tuple((a, self._join(parts)) for (a, _), parts in groups.items()))

    def _part(self, placed: PlacedUse, gradients: Gradients, n: int, full: Arrangement, empty: Empty) -> Part:
        j, recorded, axis = placed
        use, lead = recorded.use, len(recorded.use.lead)
        g = widened(axis.split(use.gradients(gradients[j]), n, 1, lead))
        slot = use.weight if self.with_weight else use.bias
        if slot is None:
            raise RuntimeError(f"a unit of {use.operation} was built from a use without its parameter")
        if not self.with_weight:
            g = g if self.apart else g.sum(2, keepdim=True)
            return None, _pad(g, slot.row, slot.arrangement.sizes[1]), use, (1.0, False)
        g = _pad(g, slot.row, full.sizes[1])
        if j not in self.inputs:
            kept_in = functools.partial(empty, ("inputs", j))
            self.inputs[j] = self._read(recorded, axis, n, full.sizes[2], g.dtype, kept_in)
        each = axis.each if isinstance(axis, Scattered) else float(g.shape[2])
        rows = (each, axis.asked) if use.counts is None else (use.counts().to(g) / n, True)
        return self.inputs[j], g, use, rows

    def _read(
        self, recorded: Recorded, axis: Where, n: int, width: int, dtype: torch.dtype, empty: Callable[..., Tensor]
    ) -> Tensor:
        """``a [n, t, s, i]``, the ones of the bias included; ``[n, t]`` for lookups."""
        use, lead = recorded.use, len(recorded.use.lead)
        if use.copied is not None:
            return axis.split(recorded.read_inputs(empty, ones=self.with_bias), n, 0, lead).to(dtype)
        a = recorded.read_inputs()
        if use.lookup:
            return axis.split(a, n, 0, lead)
        column = use.weight.column if use.weight is not None else 0
        ones = self.with_bias and not use.elementwise
        if ones and isinstance(axis, Scattered):  # rows that are not there have no one either
            return axis.split(_with_ones(widened(a, dtype), column, width, empty), n, 0, lead)
        a = widened(axis.split(a, n, 0, lead), dtype)
        if use.elementwise:
            return a
        return _with_ones(a, column, width, empty) if ones else _pad(a, column, width)

    def _join(self, parts: list[Part]) -> LayerJacobian:
        use = parts[0][2]
        if self.apart and (use.elementwise or not self.with_weight):
            return self._at_positions(parts)
        if not self.with_weight:
            rows = [g[:, :, 0].flatten(2) for _, g, *_ in parts]  # [k n p], of groups or of outputs
            return FullJacobian((rows[0] if len(rows) == 1 else torch.stack(rows).sum(0))[:, :, None, None])
        if use.elementwise:
            rows = [contract.scaled_sums(g[..., 0], a, ones=self.with_bias) for a, g, *_ in parts]
            return FullJacobian((rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)).unsqueeze(3))
        return self._factored(parts)

    def _at_positions(self, parts: list[Part]) -> PositionedJacobian:
        """The rows of every position, of norms, scales and shifts: ``[k n t 1 1 p]`` or ``[k n t s 1 i]``."""
        if not self.with_weight:
            return PositionedJacobian(torch.cat([g.flatten(3)[:, :, :, None, None] for _, g, *_ in parts], 2))
        rows = [torch.cat([g * a] + [g] * self.with_bias, -1).unsqueeze(-2) for a, g, *_ in parts]
        return PositionedJacobian(torch.cat(rows, 2))

    def _factored(self, parts: list[Part]) -> FactoredJacobian:
        a0, g0, use, _ = parts[0]
        a = a0 if len(parts) == 1 else torch.cat([a for a, *_ in parts], 1)
        g = g0 if len(parts) == 1 else torch.cat([g for _, g, *_ in parts], 2)
        if use.lookup:
            return LookupJacobian(a, g, size=self.layout.sizes[2] if self.arrangements is None else use.size)
        each, counted = zip(*(rows for *_, rows in parts))
        return FactoredJacobian(a, g, sum(each), any(counted))


def _pad(x: Tensor, start: int, size: int) -> Tensor:
    """Zeros around the last axis, so that a part of a matrix becomes the whole."""
    if start == 0 and x.shape[-1] == size:
        return x
    return F.pad(x, (start, size - start - x.shape[-1]))


def _with_ones(a: Tensor, start: int, size: int, empty: Callable[..., Tensor]) -> Tensor:
    """``a`` padded to ``size`` and followed by a column of ones, for the bias; one copy."""
    if a.requires_grad:
        return torch.cat([_pad(a, start, size), torch.ones_like(a[..., :1])], -1)
    if a.numel() < FEW and a.shape[-1] == size:
        if a.is_contiguous():
            return torch.constant_pad_nd(a, (0, 1), 1.0)
        out = a.new_ones(*a.shape[:-1], size + 1)
        out[..., :size] = a
        return out
    out = empty((*a.shape[:-1], size + 1), a)
    if a.shape[-1] != size:
        out.zero_()
    out.narrow(-1, start, a.shape[-1]).copy_(a)
    out.select(-1, size).fill_(1)
    return out


def build_units(
    uses: list[Recorded],
    axes: list[Where | None],
    collection: LayerCollection,
    part_of: Callable[[str], object] | None = None,
) -> tuple[list[UseGroup], set[str]]:
    """Group uses into units; parameters with a use without example axis go to the fallback (second result).

    A weight and a bias share a unit when they are always used together, belong to one layer and to one part of the
    representation (``part_of``); else each is a unit of its own.
    """
    rest = {s.name for recorded, axis in zip(uses, axes) if axis is None for s in recorded.use.slots}
    weights: dict[str, list[tuple[int, Slot]]] = {}
    biases: dict[str, list[tuple[int, Slot]]] = {}
    for j, use in enumerate(recorded.use for recorded in uses):
        for slot, table in ((use.weight, weights), (use.bias, biases)):
            if slot is not None and slot.name not in rest:
                table.setdefault(slot.name, []).append((j, slot))
    rest |= set(weights) & set(biases)  # a parameter that scales here and shifts there
    offset = {name: lo for name, (lo, _) in collection.offsets().items()}
    layer = dict(zip(collection.names, collection.layers))

    def uses_of(slots: list[tuple[int, Slot]]) -> list[PlacedUse]:
        return [(j, uses[j], axis) for j, _ in slots if (axis := axes[j]) is not None]

    def partner(name: str, slots: list[tuple[int, Slot]]) -> tuple[str, Slot] | None:
        """The bias that is always and only used with this weight, in the same rows."""
        pairs = [(slot, uses[j].use.bias) for j, slot in slots]
        bias = pairs[0][1]
        if bias is None or bias.name in rest or [j for j, _ in biases[bias.name]] != [j for j, _ in slots]:
            return None
        if layer[bias.name] != layer[name] or (part_of is not None and part_of(bias.name) != part_of(name)):
            return None
        fits = all(
            b is not None and b.row == w.row and b.arrangement.sizes[:2] == w.arrangement.sizes[:2] for w, b in pairs
        )
        return (bias.name, bias) if fits else None

    groups: list[UseGroup] = []
    for name, slots in weights.items():
        if name in rest:
            continue
        if len({(slot.arrangement, uses[j].use.lookup, uses[j].use.elementwise) for j, slot in slots}) > 1:
            layout = _tied_layout(name, offset[name], [(slot, uses[j].use) for j, slot in slots]) or collection.span(
                [name]
            )
            arrangements = tuple(slot.arrangement for _, slot in slots)
            groups.append(
                UseGroup(layout, uses_of(slots), with_weight=True, with_bias=False, arrangements=arrangements)
            )
            continue
        pieces = [Piece((name,), offset[name], slots[0][1].arrangement)]
        bias = partner(name, slots)
        if bias is not None:
            pieces.append(Piece((bias[0],), offset[bias[0]], bias[1].arrangement))
            del biases[bias[0]]
        layout = Layout(tuple(pieces))
        groups.append(UseGroup(layout, uses_of(slots), with_weight=True, with_bias=bias is not None))
    for name, slots in biases.items():
        if name not in rest:
            groups.append(UseGroup(collection.span([name]), uses_of(slots), with_weight=False, with_bias=True))
    return groups, rest


def _tied_layout(name: str, offset: int, slots: list[tuple[Slot, Use]]) -> Layout | None:
    """The layout of a matrix that is used only as itself and transposed; the orientation of a product rather than a
    lookup.
    """
    main = next((slot.arrangement for slot, use in slots if not use.lookup), slots[0][0].arrangement)
    s, o, i = main.sizes
    turned = Arrangement(main.view, (0, 2, 1) if main.is_plain() else (0, 1, 2), (s, i, o))
    fits = all(slot.arrangement in (main, turned) and not use.elementwise for slot, use in slots)
    return (
        Layout((Piece((name,), offset, main),))
        if fits and len(main.view) == 3 and main.view[0] == 1 and (o, i) != (1, 1)
        else None
    )
