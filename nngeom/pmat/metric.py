"""A matrix over the parameters between two sets of rows, ``J M J'^T``, block by block in the structure of both.

Where rows come in the blocks of the matrix, or it is diagonal there, the product of two rows is that of a *left* and a
*right* half which both stay factored: ``<g x a, y>`` under Kronecker factors, ``<d * U^T x, U^T y>`` in an eigenbasis.
Elsewhere ``M x`` is formed, a few examples at a time. Functions that dispatch on the type of block; a new type
registers what it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, StructureError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.sandwich import sandwiched, scaled
from nngeom.core.weighted import WeightedJacobian
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.implicit_inverse import ImplicitInverse
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.placed import AppliedJacobian, PlacedJacobian, within
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection

Rows = Mapping[Layout, LayerJacobian]
ByBlock = dict[int, dict[Layout, LayerJacobian]]  # rows of every block of a matrix


@functools.singledispatch
def left(block: Block, x: LayerJacobian) -> LayerJacobian:
    """Rows ``x'`` with ``<x'[k, n], right(block, y)[l, m]> = x[k, n]^T M y[l, m]``."""
    return AppliedJacobian(x, block.mv)


@functools.singledispatch
def right(block: Block, y: LayerJacobian) -> LayerJacobian:
    """The other half of the product, see :func:`left`: the rows ``y``, or their coordinates."""
    return y


left.register(EyeBlock, lambda block, x: scaled(x, block.c))
left.register(DiagBlock, lambda block, x: WeightedJacobian(x, block.d))
left.register(KroneckerBlock, lambda block, x: sandwiched(x, block.a, block.g))
left.register(EigenBlock, lambda block, x: WeightedJacobian(right(block, x), block.d))
right.register(EigenBlock, lambda block, y: y.rotate(block.ua, block.ug))


@functools.singledispatch
def both(block: Block, x: LayerJacobian) -> tuple[LayerJacobian, LayerJacobian]:
    """:func:`left` and :func:`right` of the same rows."""
    return left(block, x), right(block, x)


@both.register
def _(block: EigenBlock, x: LayerJacobian) -> tuple[LayerJacobian, LayerJacobian]:
    coordinates = right(block, x)
    return WeightedJacobian(coordinates, block.d), coordinates


@dataclass(frozen=True)
class OperatorBlock:
    """All parameters of a matrix that is known by its products alone."""

    matrix: ParameterOperator

    def mv(self, x: Tensor) -> Tensor:
        """``M x``, ``[*b, 1, 1, d]``."""
        return self.matrix.product(x[..., 0, 0, :].to(self.matrix.dtype))[..., None, None, :].to(x.dtype)


class Metric:
    """A matrix as a metric of rows that are computed in ``dtype``: held in that or in its own, whichever is wider.

    Raises :class:`ArgumentTypeError`, :class:`CollectionError`, :class:`DeviceError` for what is no matrix over the
    parameters ``collection`` on this ``device``.
    """

    def __init__(
        self, matrix: ParameterOperator, collection: LayerCollection, dtype: torch.dtype, device: torch.device
    ):
        require_matrix(matrix, "metric")
        collection.require(matrix.layer_collection, "the metric")
        if matrix.device != device:
            raise DeviceError(f"the metric is on {matrix.device} and the model on {device}; move one with .to(device)")
        self.collection = collection
        self.dtype = torch.promote_types(dtype, matrix.dtype)
        self.matrix = matrix.to(self.dtype) if isinstance(matrix, PMat) else matrix
        if isinstance(self.matrix, PMat):
            self.blocks: list[tuple[Layout, Any]] = list(self.matrix.blocks.items())
        else:
            require_symmetric(matrix)
            self.blocks = [(collection.span(), OperatorBlock(matrix))]
        self._block_of = {name: b for b, (layout, _) in enumerate(self.blocks) for name in layout.names}
        self._by_layout: dict[Layout, Block | None] = {}

    def part_of(self, name: str) -> int:
        """The block of a parameter: rows of two blocks must not come as one."""
        return self._block_of[name]

    @property
    def spans_layers(self) -> bool:
        """Whether a block has entries between layers."""
        owner = dict(zip(self.collection.names, self.collection.layers))
        across = [lay for lay, block in self.blocks if not isinstance(block, (DiagBlock, EyeBlock))]
        return any(len({owner[name] for name in layout.names}) > 1 for layout in across)

    @property
    def stored(self) -> PMat:
        """The matrix, which a file knows again by what it holds; raises :class:`ArgumentError` if that is nothing."""
        if isinstance(self.matrix, PMat):
            return self.matrix
        raise ArgumentError(
            f"out= knows a matrix again by what it holds, and a {type(self.matrix).__name__} holds nothing; expected "
            "a stored matrix, or no out="
        )

    def times(self, flat: Tensor) -> Tensor:
        """``M x``, ``[*b, d]``."""
        return self.matrix.product(flat.to(self.matrix.dtype)).to(flat.dtype)

    def by_block(self, rows: Rows) -> ByBlock:
        """The rows of every block, in the dtype of the metric."""
        found: ByBlock = {}
        for layout, j in rows.items():
            wide = j if j.dtype == self.dtype else j.to(self.dtype)
            found.setdefault(self._block_of[layout.names[0]], {})[layout] = wide
        return found

    def own(self, layout: Layout) -> Block | None:
        """The block of rows that come in this layout; ``None`` where they meet those of others, or are cut
        otherwise.
        """
        if layout not in self._by_layout:
            place, block = self.blocks[self._block_of[layout.names[0]]]
            own: Block | None = None
            if place == layout and isinstance(block, Block):
                own = block
            elif isinstance(block, EyeBlock):
                own = EyeBlock(block.c, *layout.sizes)
            elif isinstance(block, DiagBlock):
                local = within(place)
                flat = block.d.new_zeros(place.numel)
                local(place).scatter_(flat, block.d)
                own = DiagBlock(local(layout).gather(flat))
            self._by_layout[layout] = own
        return self._by_layout[layout]

    def meet(self, x: Rows, y: Rows) -> bool:
        """Whether the rows of one block, on both sides, are matched layout by layout."""
        if any(self.own(layout) is None for layout in (*x, *y)):
            return False
        rest = [{name for lay in a for name in lay.names if lay not in b} for a, b in ((x, y), (y, x))]
        return not rest[0] & rest[1]

    def left(self, layout: Layout, x: LayerJacobian) -> LayerJacobian:
        """:func:`left` under the block of this layout."""
        return left(self.own(layout), x)  # type: ignore[arg-type]

    def right(self, layout: Layout, y: LayerJacobian) -> LayerJacobian:
        """:func:`right` under the block of this layout."""
        return right(self.own(layout), y)  # type: ignore[arg-type]

    def both(self, layout: Layout, x: LayerJacobian) -> tuple[LayerJacobian, LayerJacobian]:
        """:func:`both` under the block of this layout."""
        return both(self.own(layout), x)  # type: ignore[arg-type]

    def whole_left(self, b: int, x: Rows) -> LayerJacobian:
        """``M x`` over all parameters of block ``b``, flat."""
        place, block = self.blocks[b]
        local = within(place)(place)

        def product(flat: Tensor) -> Tensor:
            if place.is_span:
                result: Tensor = block.mv(flat)
                return result
            out = torch.empty_like(flat[..., 0, 0, :])
            local.scatter_(out, block.mv(local.gather(flat[..., 0, 0, :])))
            return out[..., None, None, :]

        return AppliedJacobian(self.whole_right(b, x), product)

    def whole_right(self, b: int, y: Rows) -> LayerJacobian:
        """The rows over all parameters of block ``b``, flat."""
        place = self.blocks[b][0]
        local = within(place)
        return PlacedJacobian(tuple((local(layout), j) for layout, j in y.items()), place.numel)

    def pairs(
        self, x: Rows, y: Rows, group_of: Callable[[str], str]
    ) -> Iterator[tuple[str, LayerJacobian, LayerJacobian]]:
        """``(group, left, right)`` whose products sum to ``x M y^T``; ``group_of`` a parameter on the right."""
        theirs = self.by_block(y)
        for b, mine in self.by_block(x).items():
            yours = theirs.get(b, {})
            if self.meet(mine, yours):
                for layout in (layout for layout in mine if layout in yours):
                    one, other = mine[layout], yours[layout]
                    same = one is other
                    halves = self.both(layout, one) if same else (self.left(layout, one), self.right(layout, other))
                    yield group_of(layout.names[0]), *halves
                continue
            whole, groups = self.whole_left(b, mine), {group_of(layout.names[0]): None for layout in yours}
            for group in groups:
                some = {layout: j for layout, j in yours.items() if group_of(layout.names[0]) == group}
                yield group, whole, self.whole_right(b, some)


def require_symmetric(matrix: ParameterOperator) -> None:
    """Raise :class:`StructureError` for a product of matrices, or what is made of one, that is not symmetric: asked of
    two random vectors.
    """
    if isinstance(matrix, (PMatImplicit, ImplicitInverse)):
        return
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, matrix.shape[0], generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    mu, mv = matrix.product(u), matrix.product(v)
    room = torch.finfo(matrix.dtype).eps ** (1 / 3) * torch.maximum(u.norm() * mv.norm(), v.norm() * mu.norm())
    if bool((u @ mv - v @ mu).abs() > room):
        raise StructureError(
            f"the metric, a {type(matrix).__name__}, is not symmetric; expected a symmetric matrix, such as the sum or "
            "the inverse of one"
        )


def require_matrix(matrix: object, what: str) -> None:
    """Raise :class:`ArgumentTypeError`, which calls it ``what``, unless ``matrix`` is one over the parameters."""
    if not isinstance(matrix, ParameterOperator):
        raise ArgumentTypeError(
            f"{what} is {getattr(matrix, '__name__', type(matrix).__name__)}; expected a matrix over the parameters, "
            "such as FIM(model, loader, PMatEKFAC)"
        )
