"""The rows a quantity is read from, and their products and norms."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import LoaderError, NonFiniteError
from nngeom.fmat.chunks import span
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.products import EVERYTHING, Grouping, build, products
from nngeom.fmat.products import squared_norms as norms_by_group
from nngeom.fmat.ring import gathered_kernels
from nngeom.fmat.side import Side
from nngeom.fmat.store import Store
from nngeom.fmat.tiles import matched, pairs
from nngeom.ranks.totals import gathered
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run


def require_finite_gradients(*gradients: Tensor) -> None:
    """Raise :class:`NonFiniteError` where gradients at hand contain NaN or infinity: they must not pass for zero
    ones.
    """
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise NonFiniteError("gradients contain NaN or infinity; check the inputs and the model they come from")


def require_labels(run: Run) -> Tensor:
    """The targets of a run that is held; raises :class:`LoaderError` where batches have none."""
    y = run.targets()
    if y is None:
        raise LoaderError(
            "this quantity needs labels but a batch has none; expected batches (inputs, targets) or dicts with 'labels'"
        )
    return y


def all_labels(run: Run) -> Tensor:
    """:func:`require_labels` of the examples of all processes."""
    with run.team.together("labels"):
        y = require_labels(run) if run.loader else None
    return gathered(run.team, "labels", lambda: y, run.network.device)


def all_targets(run: Run) -> Tensor | None:
    """The targets of a run that is held, of the examples of all processes; ``None`` where batches have none."""
    with run.team.together("targets") as note:
        y = run.targets() if run.loader else None
        note.mine = bool(run.loader), y is not None
    if any(has and not labelled for has, labelled in note.all):
        return None
    return gathered(run.team, "targets", lambda: y, run.network.device)


def row_products(rows: Side, columns: Side | None = None) -> Tensor:
    """``(k, n, k, m)``: inner products of the rows of two sides, or of one with itself, tile by tile; of the examples
    of all processes.
    """
    if rows.run.team.size > 1:
        kernel: FMatDense = gathered_kernels(FMatDense, rows, columns, EVERYTHING)[""]
        return kernel.tensor
    return build(FMatDense, rows, columns, EVERYTHING)[""].tensor


def wide_kernels(rows: Side, *, by_layer: bool = False) -> dict[str, Tensor]:
    """``{"": (c, n, c, n)}``, or one a layer, in float64 whatever the model's dtype.

    Products of float32 rows rounded to float32 tell eigenvalues from zero down to ``N eps`` of the largest only, the
    rows themselves down to ``(N eps)^2``: what a log-determinant needs.
    """
    network = rows.run.network
    grouping = Grouping(tuple(network.collection.by_layer()), network.layer_of) if by_layer else EVERYTHING
    return products(FMatDense, rows.widened(), None, grouping, Store(grouping.names))


def layer_kernel(rows: Side, layer: str, outputs: int) -> Tensor:
    """``(c, n, c, n)``: the kernel of one layer's parameters."""
    n = rows.examples
    out = torch.zeros(outputs, n, outputs, n, dtype=rows.dtype, device=rows.device)
    for x, y in pairs(rows, None):
        (k, i), (l, j) = span(x), span(y)
        blocks = [jx.gram(jy) for owner, jx, jy in matched(x, y, rows.run.network.layer_of) if owner == layer]
        if blocks:
            tile = torch.stack(blocks).sum(0) if len(blocks) > 1 else blocks[0]
            out[k, i, l, j] = tile
            out[l, j, k, i] = tile.permute(2, 3, 0, 1)
    return out


def row_norms(side: Side) -> Tensor:
    """``(n,)``: squared norms of the rows summed over cotangents, of this process's examples; rows are not formed where
    a factored form is cheaper.
    """
    return norms_by_group(side, EVERYTHING)[""].sum(0)


@torch.no_grad()
def squared_norms(run: Run, cotangents: Cotangents) -> Tensor:
    """:func:`row_norms` of the rows of a run for the cotangents of a metric, of the examples of all processes."""

    with run.within():
        with run.team.together("batches"):
            side = Side.of(run, cotangents)
        return all_row_norms(side, run)


def all_row_norms(side: Side, run: Run) -> Tensor:
    """:func:`row_norms` of the ``side`` of a ``run``, of the examples of all processes."""
    own = lambda: row_norms(side) if side.sizes else None
    return gathered(run.team, "norms of rows", own, run.network.device)
