"""From uses of parameters to blocks: which parameters share a matrix ``[s, o, i]``, and their LayerJacobian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.jacobian import FactoredJacobian, FullJacobian, LayerJacobian, LookupJacobian, SumJacobian
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.generator.axes import ExampleAxis
from nngeom.layers.adapter import Use
from nngeom.space.collection import LayerCollection


@dataclass
class Unit:
    """One block: its layout, and the uses that its Jacobian sums, each with its example axis."""

    layout: Layout
    uses: list[tuple[int, Use, ExampleAxis]]  # index into the list of uses
    with_weight: bool
    with_bias: bool
    arrangements: tuple[Arrangement, ...] | None = None  # unlike uses: one arrangement a use

    def jacobian(self, gradients: list[Tensor], n: int) -> LayerJacobian:
        """The rows for output gradients ``[k, *out]`` of all uses."""
        if self.arrangements is not None:
            parts = [self._join([self._part(j, u, a, gradients, n, arr)]) for (j, u, a), arr in zip(self.uses, self.arrangements)]
            return SumJacobian(tuple(zip(self.arrangements, parts)))
        main = self.layout.pieces[0].arrangement
        return self._join([self._part(j, u, a, gradients, n, main) for j, u, a in self.uses])

    def _part(self, j: int, use: Use, axis: ExampleAxis, gradients: list[Tensor], n: int, full: Arrangement):
        for x, version in use.sources:
            if x._version != version:
                raise RuntimeError(f"the input of {use.operation} was overwritten in place after it was used")
        lead = len(use.lead)
        g = axis.split(use.gradients(gradients[j]), n, 1, lead)
        if not self.with_weight:
            slot = use.bias
            return None, _pad(g.sum(2, keepdim=True), slot.row, slot.arrangement.sizes[1]), use
        slot = use.weight
        g = _pad(g, slot.row, full.sizes[1])
        a = axis.split(use.inputs(), n, 0, lead)
        if use.lookup:
            return a, g, use
        width = full.sizes[2]
        if self.with_bias:
            a = _with_ones(a, slot.column, width)
        else:
            a = _pad(a, slot.column, width)
        return a, g, use

    def _join(self, parts) -> LayerJacobian:
        a0, g0, use = parts[0]
        if not self.with_weight:
            g = g0 if len(parts) == 1 else torch.stack([g for _, g, _ in parts]).sum(0)
            return FullJacobian(g[:, :, 0].flatten(2)[:, :, None, None])  # [k n 1 1 p]
        if use.elementwise:
            rows = sum(torch.einsum("knts,ntsi->knsi", g[..., 0], a) if g.shape[2] > 1 else g[:, :, 0] * a[:, 0] for a, g, _ in parts)
            return FullJacobian(rows.unsqueeze(3))
        a = a0 if len(parts) == 1 else torch.cat([a for a, _, _ in parts], 1)
        g = g0 if len(parts) == 1 else torch.cat([g for _, g, _ in parts], 2)
        if use.lookup:
            return LookupJacobian(a, g, self._lookup_size(use))
        return FactoredJacobian(a, g)

    @staticmethod
    def _lookup_size(use: Use) -> int:
        return use.weight.arrangement.sizes[2]


def _pad(x: Tensor, start: int, size: int) -> Tensor:
    """Zeros around the last axis, so that a part of a matrix becomes the whole."""
    if start == 0 and x.shape[-1] == size:
        return x
    return F.pad(x, (start, size - start - x.shape[-1]))


def _with_ones(a: Tensor, start: int, size: int) -> Tensor:
    """``a`` padded to ``size`` and followed by a column of ones, for the bias; one copy."""
    if a.requires_grad:
        return torch.cat([_pad(a, start, size), torch.ones_like(a[..., :1])], -1)
    out = a.new_zeros(*a.shape[:-1], size + 1) if a.shape[-1] != size else a.new_empty(*a.shape[:-1], size + 1)
    out[..., start : start + a.shape[-1]] = a
    out[..., -1] = 1
    return out


def build_units(
    uses: list[Use], axes: list[ExampleAxis | None], collection: LayerCollection, part_of: Callable[[str], object] | None = None
) -> tuple[list[Unit], set[str]]:
    """Group uses into units; parameters with a use without example axis go to the fallback (second result).

    A weight and a bias share a unit when they are always used together, belong to one layer and to one part of the
    representation (``part_of``); else each is a unit of its own.
    """
    rest = {s.name for use, axis in zip(uses, axes) if axis is None for s in use.slots}
    by_weight: dict[str, list[int]] = {}
    by_bias: dict[str, list[int]] = {}
    for j, use in enumerate(uses):
        if use.weight is not None and use.weight.name not in rest:
            by_weight.setdefault(use.weight.name, []).append(j)
        if use.bias is not None and use.bias.name not in rest:
            by_bias.setdefault(use.bias.name, []).append(j)
    both = set(by_weight) & set(by_bias)  # a parameter that scales here and shifts there
    rest |= both
    table, layer = collection.offsets(), dict(zip(collection.names, collection.layers))
    units: list[Unit] = []

    def uses_of(indices: list[int]) -> list[tuple[int, Use, ExampleAxis]]:
        return [(j, uses[j], axes[j]) for j in indices]  # type: ignore[misc]

    paired: set[str] = set()
    for name, indices in by_weight.items():
        if name in rest:
            continue
        slots = [uses[j].weight for j in indices]
        partner = {uses[j].bias.name if uses[j].bias is not None else None for j in indices}
        bias = next(iter(partner)) if len(partner) == 1 else None
        if bias is not None and (
            bias in rest
            or by_bias[bias] != indices
            or layer[bias] != layer[name]
            or (part_of is not None and part_of(bias) != part_of(name))
            or any(uses[j].bias.arrangement.sizes[:2] != uses[j].weight.arrangement.sizes[:2] for j in indices)
            or any(uses[j].bias.row != uses[j].weight.row for j in indices)
        ):
            bias = None
        kinds = {(s.arrangement, uses[j].lookup, uses[j].elementwise) for s, j in zip(slots, indices)}
        if len(kinds) > 1:
            numel = collection.span([name])
            units.append(Unit(numel, uses_of(indices), True, False, tuple(s.arrangement for s in slots)))
            continue
        pieces = [Piece((name,), table[name][0], slots[0].arrangement)]
        if bias is not None:
            pieces.append(Piece((bias,), table[bias][0], uses[indices[0]].bias.arrangement))
            paired.add(bias)
        units.append(Unit(Layout(tuple(pieces)), uses_of(indices), True, bias is not None))
    for name, indices in by_bias.items():
        if name in rest or name in paired:
            continue
        units.append(Unit(collection.span([name]), uses_of(indices), False, True))
    return units, rest
