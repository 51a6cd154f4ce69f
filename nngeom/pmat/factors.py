"""Kronecker factors of rows: sums of inputs and of output gradients whose product stands for ``sum J J^T``.

Functions that dispatch on the type of rows. Rows without Kronecker structure have an exact block where it is of inputs
alone (``o = 1``), and none else; a new type registers what it has.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nngeom.core import contract, linalg
from nngeom.core.errors import StructureError
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.head import HeadJacobian
from nngeom.core.jacobian import LayerJacobian, pieces
from nngeom.core.sketch import is_sketched, sketch_of_diagonal
from nngeom.core.statistic import Inputs, Moment
from nngeom.core.tied import SumJacobian, TiedJacobian, sum_of

Factors = dict[str, Tensor | Moment | Inputs]


@functools.singledispatch
def structure_of(j: LayerJacobian) -> str:
    """In a word, what Kronecker factors are of: ``kronecker`` where rows are sums of outer products, of one-hot inputs
    ``lookup``, of two orientations ``tied``; else there are none: ``exact``, ``unlike uses``.
    """
    return "exact"


structure_of.register(FactoredJacobian, lambda j: "kronecker")
structure_of.register(HeadJacobian, lambda j: "kronecker")
structure_of.register(LookupJacobian, lambda j: "lookup")
structure_of.register(TiedJacobian, lambda j: "tied")
structure_of.register(SumJacobian, lambda j: "unlike uses")


def is_kronecker(structure: str) -> bool:
    """Whether factors of this :func:`structure_of` are an approximation worth having."""
    return structure in ("kronecker", "lookup", "tied")


@functools.singledispatch
def factors(j: LayerJacobian, sharing: str, limit: int) -> Factors:
    """Sums over ``k, n`` of the rows ``j`` from which :func:`nngeom.pmat.kfac.kronecker_block` makes the factors of
    ``sum J J^T``, but for a division by numbers of positions where these are :func:`nngeom.pmat.counted.counted`.

    ``"a" [s, i, i]`` of :class:`Inputs` and ``"g" [s, o, o]`` of gradients; a factor that is exactly diagonal, or
    longer than ``limit``, as its diagonal. ``sharing``: positions as examples of their own (``"expand"``) or reduced to
    one first (``"reduce"``). Rows without Kronecker structure (``o = 1``) give the exact block as ``"a"`` and no
    ``"g"``; others raise :class:`StructureError`.
    """
    _, _, s, o, i = j.shape
    if o != 1:
        raise StructureError(
            f"{type(j).__name__} rows of {o} x {i} have no Kronecker structure, so no factors; use a "
            "representation of their second moments, such as PMatDiag or PMatBlockDiag"
        )
    total = torch.zeros(s, i, i, dtype=linalg.accumulation_dtype(j.dtype), device=j.device)
    for piece in pieces(j):
        m = piece.matrix().squeeze(3).flatten(0, 1).transpose(0, 1)  # [s, r, i]
        total += linalg.gram(m[0]) if s == 1 else m.mT @ m
    return {"a": total}


@factors.register
def _(j: FactoredJacobian, sharing: str, limit: int) -> Factors:
    share = j.share
    return {"g": of_gradients(j.g, sharing, limit, share), "a": Inputs(lambda: of_inputs(j.a, sharing, limit, share))}


@factors.register
def _(j: HeadJacobian, sharing: str, limit: int) -> Factors:
    share = j.share
    return {"g": of_columns(j, sharing, limit), "a": Inputs(lambda: of_inputs(j.a, sharing, limit, share))}


@factors.register
def _(j: LookupJacobian, sharing: str, limit: int) -> Factors:
    return {"g": of_gradients(j.g, sharing, limit, j.share), "a": Inputs(lambda: _of_lookups(j, sharing))}


@factors.register
def _(j: TiedJacobian, sharing: str, limit: int) -> Factors:
    """Those of every use by themselves, ``a0, g0, a1, g1, ...``; a transposed use has its inputs where outputs are."""
    sums: Factors = {}
    for q, (transposed, term) in enumerate(j.terms):
        names = {"a": f"g{q}", "g": f"a{q}"} if transposed else {"a": f"a{q}", "g": f"g{q}"}
        sums |= {names[side]: factor for side, factor in factors(term, sharing, limit).items()}
    return sums


Shape = tuple[int, ...]


@functools.singledispatch
def factor_shapes(j: LayerJacobian, limit: int) -> list[tuple[Shape, Shape]]:
    """The shapes of the factors ``a, g`` of every use in the rows ``j`` that :func:`factors` gives; none where it
    raises. A trivial ``g`` counts: blocks hold it.
    """
    _, _, s, o, i = j.shape
    return [((s, i, i), (s, 1, 1))] if o == 1 else []


@factor_shapes.register(FactoredJacobian)
@factor_shapes.register(HeadJacobian)
def _(j: FactoredJacobian | HeadJacobian, limit: int) -> list[tuple[Shape, Shape]]:
    _, _, s, o, i = j.shape
    return [(_factor_shape(s, i, limit), _factor_shape(s, o, limit))]


@factor_shapes.register
def _(j: LookupJacobian, limit: int) -> list[tuple[Shape, Shape]]:
    _, _, s, o, i = j.shape
    return [((s, i), _factor_shape(s, o, limit))]


@factor_shapes.register
def _(j: TiedJacobian, limit: int) -> list[tuple[Shape, Shape]]:
    pairs = [(transposed, *factor_shapes(term, limit)[0]) for transposed, term in j.terms]
    return [(g, a) if transposed else (a, g) for transposed, a, g in pairs]


def _factor_shape(s: int, p: int, limit: int) -> Shape:
    return (s, p) if p > limit else (s, p, p)


def of_gradients(g: Tensor, sharing: str, limit: int, share: float) -> Tensor | Moment:
    """``"g"`` of :func:`factors`, of ``g [k, n, t, s, o]``, times the ``share`` of a position where these are counted
    as examples.
    """
    g, share = (g, share) if sharing == "expand" else (g.sum(2, keepdim=True), 1.0)
    if g.shape[-1] > limit:
        return share * g.square().sum((0, 1, 2))
    return contract.second_moment(g, share)


def of_columns(j: HeadJacobian, sharing: str, limit: int) -> Tensor:
    """The same of the rows of a head."""
    share = j.share if sharing == "expand" else 1.0
    return share * (j.squared_columns() if j.shape[3] > limit else j.second_moment())


def of_inputs(a: Tensor, sharing: str, limit: int, share: float) -> Tensor | Moment:
    """``"a"`` of :func:`factors`, of ``a [n, t, s, i]``."""
    a = a if sharing == "expand" else share * a.sum(1, keepdim=True)
    return a.square().sum((0, 1)) if a.shape[-1] > limit else contract.second_moment(a)


def _of_lookups(j: LookupJacobian, sharing: str) -> Tensor:
    """Diagonal, exactly: how often each was looked up, or the squares of how much of an example it was."""
    n, t = j.a.shape
    if sharing == "expand":
        return torch.bincount(j.a.flatten(), minlength=j.size).to(j.g).unsqueeze(0)
    mean = j.g.new_zeros(n, j.size).scatter_add_(1, j.a, j.g.new_full((n, t), 1 / max(1, t)))
    return mean.square().sum(0, keepdim=True)


def product_of_marginals(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Kronecker product with the same partial traces as ``sum_j g_j (x) a_j``: exact when one side is the same in
    all.

    ``pairs`` are ``(a_j, g_j)``; ``a = sum_j a_j tr(g_j) / c``, ``g = sum_j g_j tr(a_j)`` with ``c`` the total trace.
    """
    traces = [(linalg.factor_diag(a).sum(), linalg.factor_diag(g).sum()) for a, g in pairs]
    total = torch.stack([a * g for a, g in traces]).sum()
    scale = torch.where(total > 0, total, torch.ones_like(total))
    a = _sum_factors([a * (tg / scale) for (a, _), (_, tg) in zip(pairs, traces)])
    return a, _sum_factors([g * ta for (_, g), (ta, _) in zip(pairs, traces)])


def _sum_factors(factors: list[Tensor]) -> Tensor:
    products = {f.shape[-1] - 1 for f in factors if is_sketched(f)}
    if products:
        return sum_of([sketch_of_diagonal(f, max(products)) if linalg.is_diagonal(f) else f for f in factors])
    if any(linalg.is_diagonal(f) for f in factors) and not all(linalg.is_diagonal(f) for f in factors):
        factors = [torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in factors]
    return sum_of(factors)
