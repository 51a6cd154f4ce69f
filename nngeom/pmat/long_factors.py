"""Factors above a side limit: their diagonal, or diagonal blocks of them, and how much of their norm is dropped.

Diagonal blocks of a factor of gradients are groups of outputs, each with a factor of its own: a block ``[b, o / b, i]``
with the same input factor in every group. What is dropped is told by probes: of a factor ``G = mean g g^T`` and random
signs ``w``, ``|G w|**2`` is ``|G|_F**2`` in the mean, and ``|(G - kept) w|**2`` what of it is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout, Piece
from nngeom.core.statistic import Inputs
from nngeom.core.tied import TiedJacobian
from nngeom.pmat.block import Block

FACTOR_LIMIT = 10_000  # a factor with a longer side is cut
FORMS = ("diagonal", "block")
PROBES = 16
LEAST = 8  # the part of the limit below which sides of diagonal blocks are too short


@dataclass(frozen=True)
class Cut:
    """The ``limit`` of the sides of factors, and the ``form`` in which longer ones are kept."""

    limit: int = FACTOR_LIMIT
    form: str = "diagonal"

    @staticmethod
    def of(limit: int, form: str) -> Cut:
        """Raises :class:`ArgumentError` for a limit below 1 or an unknown form."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ArgumentError(f"factor_limit is {limit!r}; expected the longest side of a dense factor, 1 or more")
        if form not in FORMS:
            raise ArgumentError(f"factor_form is {form!r}; expected one of {list(FORMS)}")
        return Cut(limit, form)

    def groups(self, j: LayerJacobian) -> int:
        """Into how many groups the outputs of the rows ``j`` fall; raises :class:`StructureError` where none fit."""
        _, _, s, o, _ = j.shape
        if self.form != "block" or type(j) is not FactoredJacobian or s != 1 or o <= self.limit:
            return 1
        least = -(-o // self.limit)
        found = next(b for b in range(least, o + 1) if o % b == 0)
        if o // found < max(2, self.limit // LEAST):
            raise StructureError(
                f"{o} outputs do not fall into blocks of equal sides near to factor_limit={self.limit}; "
                "raise factor_limit, or use factor_form='diagonal'"
            )
        return found

    def notes(self, layout: Layout, j: LayerJacobian | None) -> tuple[str, ...]:
        """Which factors of the rows ``j`` are not kept whole."""
        terms = [term for _, term in j.terms] if isinstance(j, TiedJacobian) else [j]
        found = []
        for term in (term for term in terms if type(term) is FactoredJacobian):
            sides = (("A", term.shape[-1], 1), ("G", term.shape[-2], self.groups(term)))
            for factor, side, groups in (x for x in sides if x[1] > self.limit):
                kept = "its diagonal" if groups == 1 else f"{groups} diagonal blocks"
                above = f"above factor_limit={self.limit}"
                found.append(f"of the factor {factor} ({side}) of {layout.names[0]} {kept} is kept: {above}")
        return tuple(found)


def grouped(layout: Layout, groups: int) -> Layout:
    """The layout with its outputs in groups, ``[b, o / b, i]``: the same entries in the same order."""
    pieces = []
    for p in layout.pieces:
        _, o, i = p.arrangement.sizes
        pieces.append(Piece(p.names, p.offset, replace(p.arrangement, sizes=(groups, o // groups, i))))
    return Layout(tuple(pieces))


def rows_in_groups(j: FactoredJacobian, groups: int) -> FactoredJacobian:
    """The same rows, of a :func:`grouped` layout."""
    n, t, _, i = j.a.shape
    return FactoredJacobian(j.a.expand(n, t, groups, i), j.g[:, :, :, 0].unflatten(-1, (groups, -1)))


# -- what is dropped ---------------------------------------------------------------------------------------------------


def signs(p: int, like: Tensor) -> Tensor:
    """``[p, m]`` random signs, always the same."""
    generator = torch.Generator().manual_seed(p)
    drawn = torch.randint(0, 2, (p, PROBES), generator=generator)
    return (2 * drawn - 1).to(like)


def probed(x: Tensor, scale: float = 1.0) -> Tensor:
    """``[s, p, m]``: the sum of ``x x^T w`` over rows ``x [..., s, p]`` and probes ``w``."""
    rows = x.flatten(0, -3).transpose(0, 1).to(linalg.accumulation_dtype(x.dtype))  # [s r p]
    return scale * (rows.mT @ (rows @ signs(x.shape[-1], rows)))


def dropped(factor: Tensor, products: Tensor) -> Tensor:
    """``(share, standard error)`` of the Frobenius norm that is not kept, of a whole factor's ``products`` with probes.

    ``factor``: its diagonal ``[s, p]``, or diagonal blocks ``[b, q, q]`` with ``b q = p``.
    """
    w = signs(products.shape[1], products)
    if linalg.is_diagonal(factor):
        kept = factor.unsqueeze(-1) * w
    else:
        kept = (factor @ w.unflatten(0, factor.shape[:2])).flatten(0, 1).unsqueeze(0)
    lost, total = ((x.square().sum((0, 1))) for x in (products - kept, products))  # [m]
    if not bool(total.sum() > 0):
        return torch.zeros(2, dtype=factor.dtype, device=factor.device)
    ratio = lost.sum() / total.sum()
    spread = (lost - ratio * total).square().mean().sqrt() / total.mean() / (PROBES - 1) ** 0.5
    share = ratio.sqrt()
    return torch.stack([share, spread / (2 * share).clamp_min(torch.finfo(share.dtype).tiny)])


WHOLE = -1.0  # in place of a share: the factor is whole


def shares(means: dict[str, Tensor]) -> Tensor | None:
    """``[2, 2]``: of the factors ``a`` and ``g`` the share that was dropped and its standard error; ``None`` where both
    are whole. Of unlike uses that of the first that is not.
    """
    found = {name.removeprefix("probes "): t for name, t in means.items() if name.startswith("probes ")}
    if not found:
        return None
    like = next(iter(found.values()))
    rows = {"a": like.new_full((2,), WHOLE), "g": like.new_full((2,), WHOLE)}
    for name, products in reversed(found.items()):
        rows[name[0]] = dropped(means[name], products)
    return torch.stack([rows["a"], rows["g"]])


def probes_of(j: LayerJacobian, sharing: str, limit: int) -> dict[str, Tensor | Inputs]:
    """The products with probes of the factors of ``j`` that are longer than ``limit``, but for those of lookups."""
    if isinstance(j, TiedJacobian):
        return {
            f"{_turned(name) if transposed else name}{q}": t
            for q, (transposed, term) in enumerate(j.terms)
            for name, t in probes_of(term, sharing, limit).items()
        }
    if type(j) is not FactoredJacobian:
        return {}
    sums: dict[str, Tensor | Inputs] = {}
    a, g = (j.a, j.g) if sharing == "expand" else (j.a.mean(1, keepdim=True), j.g.sum(2, keepdim=True))
    if a.shape[-1] > limit:
        sums["probes a"] = Inputs(lambda: probed(a))
    if g.shape[-1] > limit:
        sums["probes g"] = probed(g, 1 / max(1, g.shape[2]))
    return sums


def _turned(name: str) -> str:
    return name[:-1] + ("g" if name[-1] == "a" else "a")


@dataclass(frozen=True)
class Dropped:
    """Of a factor ``"A"`` or ``"G"`` of these ``parameters``, with ``side`` rows, what is not kept: ``share`` of its
    Frobenius norm, estimated from probes with a ``standard_error``; ``form``: what is.
    """

    parameters: tuple[str, ...]
    factor: str
    side: int
    form: str
    share: float
    standard_error: float

    def __str__(self) -> str:
        what = "its diagonal" if self.form == "diagonal" else "diagonal blocks"
        return (
            f"of {self.factor} ({self.side}) of {self.parameters[0]} {what}, without "
            f"{self.share:.2f} +- {self.standard_error:.2f} of its norm"
        )


def all_dropped(blocks: dict[Layout, Block]) -> Iterator[Dropped]:
    """What was dropped of the factors of all blocks."""
    for layout, block in blocks.items():
        found = getattr(block, "dropped", None)
        for row, name, width in zip(() if found is None else found.tolist(), "AG", (layout.sizes[2], layout.sizes[1])):
            if row[0] != WHOLE:
                form = "block" if name == "G" and layout.sizes[0] > 1 else "diagonal"
                side = width * layout.sizes[0] if form == "block" else width
                yield Dropped(layout.names, name, side, form, *row)
