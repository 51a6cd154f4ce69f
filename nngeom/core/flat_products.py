"""Products of the rows of a block with vectors over all parameters, read and written where they lie.

A block of a weight and a bias reads a vector as one matrix, for which both are copied side by side. For rows of one
outer product each, ``J[k, n] = g[k, n] (x) a[n]``, the products are taken parameter by parameter instead: of eight
vectors the copies took a quarter of the time of all products.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout, Piece


def times(layout: Layout, j: LayerJacobian, v: Tensor) -> Tensor:
    """``J v`` for the rows ``j`` of a block: ``[*b, d] -> [*b, k, n]``."""
    if not (isinstance(j, FactoredJacobian) and _reads_in_place(layout, j, v)):
        return j.jvp(layout.gather(v).to(j.dtype)).to(v.dtype)
    (first, a), *others = _inputs(layout, j)
    y = a.expand(len(v), -1, -1) @ _matrices(v, first).mT  # [b n o]
    for piece, a in others:
        w = _matrices(v, piece).mT
        if a.shape[-1] == 1:  # a product with one term took nine times as long
            y.addcmul_(a, w)
        else:
            y.baddbmm_(a.expand(len(v), -1, -1), w)
    return (j.g[:, :, 0, 0].transpose(0, 1) @ y.permute(1, 2, 0)).permute(2, 1, 0)


def add_transposed_(flat: Tensor, layout: Layout, j: LayerJacobian, u: Tensor) -> None:
    """Add ``J^T u`` for the rows ``j`` of a block and ``u [b, k, n]`` to ``flat [b, d]``."""
    if not (isinstance(j, FactoredJacobian) and _reads_in_place(layout, j, flat)):
        layout.add_(flat, j.vjp(u.to(j.dtype)).to(flat.dtype))
        return
    z = u.permute(2, 0, 1) @ j.g[:, :, 0, 0].transpose(0, 1)  # [n b o]
    for piece, a in _inputs(layout, j):
        if a.shape[-1] == 1:
            _matrices(flat, piece).add_((a.T @ z.flatten(1)).view(len(flat), -1, 1))
        else:
            rows = z.transpose(0, 1).contiguous()  # [b n o]: a tenth of the product, which is faster so by more
            _matrices(flat, piece).baddbmm_(rows.mT, a.expand(len(flat), -1, -1))


def _reads_in_place(layout: Layout, j: FactoredJacobian, v: Tensor) -> bool:
    """Whether rows are one outer product each, and the parameters matrices as they lie in ``v``."""
    plain = type(j) is FactoredJacobian and j.positions == 1 and layout.sizes[0] == 1
    return plain and v.ndim == 2 and j.a.dtype == v.dtype and all(p.arrangement.is_plain() for p in layout.pieces)


def _inputs(layout: Layout, j: FactoredJacobian) -> Iterator[tuple[Piece, Tensor]]:
    """Every parameter with its columns of the inputs, ``[n, i]``."""
    sizes = [p.arrangement.sizes[2] for p in layout.pieces]
    return zip(layout.pieces, j.a[:, 0, 0].split(sizes, -1))


def _matrices(flat: Tensor, piece: Piece) -> Tensor:
    """``[b, d] -> [b, o, i]``, a view."""
    return flat[:, piece.offset : piece.stop].view(len(flat), *piece.arrangement.sizes[1:])
