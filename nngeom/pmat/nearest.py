"""The Kronecker product nearest to a block in Frobenius norm, from its rows: the block itself is never formed.

Of a block ``M = mean sum_k J J^T`` with rows ``J [o, i]``, the nearest ``G (x) A`` is the leading singular pair of its
entries rearranged as ``[(o o'), (i i')]`` (Van Loan & Pitsianis 1993). Power iterations on that alternate ::

    A = sum J^T G J / |G|**2        G = sum J A J^T / |A|**2

each the best for the other side, so that no step goes away from the block, and one sweep over the rows. A factor that
is kept diagonal stays so: the nearest of those.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, FitWarning
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import LayerJacobian, pieces
from nngeom.core.layout import Layout
from nngeom.core.sandwich import sandwiched
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.recipe import Means, Recipe, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.sweep.sweep import Chunk

Blocks = dict[Layout, KroneckerBlock]
FITS = ("moments", "nearest")


def require_fit(fit: str, steps: int, *, sua: bool) -> None:
    """Raise :class:`ArgumentError` for an unknown ``fit``, a number of ``steps`` below two, or the two options that do
    not go together.
    """
    if fit not in FITS:
        raise ArgumentError(f"fit is {fit!r}; expected one of {list(FITS)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ArgumentError(f"fit_steps is {steps!r}; expected how many sweeps at most, an integer of 2 or more")
    if fit == "nearest" and sua:
        raise ArgumentError("fit='nearest' is of whole factors; expected sua=False and factor_form='diagonal' with it")


@dataclass
class Fit:
    """One block: its factors, and the squared norm of its product so far ``[s]``."""

    block: KroneckerBlock
    energy: Tensor | None = None
    done: bool = False

    def update(self, total: Tensor, *, inputs: bool) -> None:
        """Take a new factor from the ``total`` of its step: it is done when that explains no more."""
        other = self.block.g if inputs else self.block.a
        norm = linalg.factor_norm2(other).view(-1, *[1] * (total.ndim - 1))
        factor = torch.where(norm > 0, total / norm.where(norm > 0, torch.ones_like(norm)), torch.zeros_like(total))
        self.block = KroneckerBlock(factor, other) if inputs else KroneckerBlock(other, factor)
        energy = linalg.factor_norm2(self.block.a) * linalg.factor_norm2(self.block.g)
        if self.energy is not None:
            room = 64 * torch.finfo(energy.dtype).eps * energy
            self.done = bool((energy - self.energy <= room).all())
        self.energy = energy


def nearest(blocks: Blocks, steps: int) -> Generator[Statistic, Means, Blocks]:
    """The nearest Kronecker products, begun at ``blocks``, after at most so many ``steps``, one sweep each.

    Warns with :class:`FitWarning` where they were not enough.
    """
    fits = {layout: Fit(KroneckerBlock(block.a, block.g)) for layout, block in blocks.items()}
    for step in range(steps):
        open_ = {layout: fit.block for layout, fit in fits.items() if not fit.done}
        if not open_:
            break
        inputs = step % 2 == 0
        means = yield _statistic(open_, inputs=inputs)
        for layout, named in means.items():
            fits[layout].update(named["f"].to(fits[layout].block.a.dtype), inputs=inputs)
    warn_of_open(fits, steps)
    return {layout: fit.block for layout, fit in fits.items()}


def warn_of_open(fits: dict[Layout, Fit], steps: int) -> None:
    """Warn with :class:`FitWarning` of fits that are not done after so many ``steps``."""
    left = [name for layout, fit in fits.items() if not fit.done for name in layout.names]
    if left:
        warnings.warn(
            f"the nearest Kronecker products of {left[:4]} still move after fit_steps={steps} sweeps; they are nearer "
            "than those of fit='moments', raise fit_steps for the nearest",
            FitWarning,
            stacklevel=3,
        )


def _statistic(blocks: Blocks, *, inputs: bool) -> Statistic:
    def statistic(chunk: Chunk) -> Named:
        step = of_inputs if inputs else of_outputs
        return {layout: {"f": step(j, blocks[layout])} for layout, j in chunk.jacobians.items() if layout in blocks}

    return statistic


def of_inputs(j: LayerJacobian, block: KroneckerBlock) -> Tensor:
    """``[s, i, i]``: the sum of ``J^T G J``, or its diagonal where ``A`` is one."""
    g = block.g.to(j.dtype)
    if linalg.is_diagonal(block.a):
        return j.rotate(None, _root(g)).square().sum(-2)
    return _inner(j, g)


def of_outputs(j: LayerJacobian, block: KroneckerBlock) -> Tensor:
    """``[s, o, o]``: the sum of ``J A J^T``, or its diagonal where ``G`` is one."""
    a = block.a.to(j.dtype)
    if linalg.is_diagonal(block.g):
        return j.rotate(_root(a), None).square().sum(-1)
    return _outer(j, a)


def _root(factor: Tensor) -> Tensor:
    """``R [s, p, p]`` with ``R R^T`` the positive part of a factor."""
    values, u = linalg.factor_eigh(factor)
    roots = values.clamp_min(0).sqrt()
    return u * roots.unsqueeze(-2) if isinstance(u, Tensor) else torch.diag_embed(roots)


@functools.singledispatch
def _inner(j: LayerJacobian, g: Tensor) -> Tensor:
    """``sum J^T g J``."""
    _, _, s, _, i = j.shape
    total = torch.zeros(s, i, i, dtype=linalg.accumulation_dtype(j.dtype), device=j.device)
    for piece in pieces(j):
        m = piece.matrix().flatten(0, 1)  # [r s o i]
        total += m.transpose(0, 1).flatten(1, 2).mT @ linalg.left(g, m).transpose(0, 1).flatten(1, 2)
    return total


@functools.singledispatch
def _outer(j: LayerJacobian, a: Tensor) -> Tensor:
    """``sum J a J^T``."""
    _, _, s, o, _ = j.shape
    total = torch.zeros(s, o, o, dtype=linalg.accumulation_dtype(j.dtype), device=j.device)
    for piece in pieces(j):
        m = piece.matrix().flatten(0, 1)
        left, right = (x.permute(1, 2, 0, 3).flatten(2) for x in (m, linalg.right(m, a)))  # [s o (r i)]
        total += left @ right.mT
    return total


@_inner.register
def _(j: FactoredJacobian, g: Tensor) -> Tensor:
    if j.positions != 1:
        return _inner.dispatch(LayerJacobian)(j, g)
    gradients = j.g[:, :, 0]  # [k n s o]
    times = gradients * g if linalg.is_diagonal(g) else torch.einsum("knso,sop->knsp", gradients, g)
    weights = (gradients * times).sum((0, 3))  # [n s]
    a = j.a[:, 0]
    return torch.einsum("nsi,nsj->sij", weights.unsqueeze(-1) * a, a)


@_outer.register
def _(j: FactoredJacobian, a: Tensor) -> Tensor:
    if j.positions != 1:
        return _outer.dispatch(LayerJacobian)(j, a)
    inputs, gradients = j.a[:, 0], j.g[:, :, 0]
    times = inputs * a if linalg.is_diagonal(a) else torch.einsum("nsi,sij->nsj", inputs, a)
    weights = (inputs * times).sum(-1).unsqueeze(-1)  # [n s 1]
    return torch.einsum("knso,knsp->sop", weights * gradients, gradients)


@_outer.register
def _(j: LookupJacobian, a: Tensor) -> Tensor:
    """Positions of one example that look up the same are one."""
    if not linalg.is_diagonal(a):
        return _outer.dispatch(LayerJacobian)(j, a)
    n, t = j.a.shape
    pairs, slot = (j.a + j.size * torch.arange(n, device=j.device)[:, None]).flatten().unique(return_inverse=True)
    weighted = sandwiched(j, a.clamp_min(0).sqrt(), j.g.new_ones(1, j.g.shape[-1]))
    total = torch.zeros(1, *[j.g.shape[-1]] * 2, dtype=linalg.accumulation_dtype(j.dtype), device=j.device)
    for g in weighted.g:  # type: ignore[attr-defined]
        rows = g.new_zeros(len(pairs), g.shape[-1]).index_add_(0, slot, g.reshape(n * t, -1))
        total[0] += rows.T @ rows
    return total


@dataclass(frozen=True, eq=False)
class Fitting(Representation[Any]):
    """The nearest Kronecker products of other rows than those that the ``blocks`` to begin at came from."""

    blocks: dict[Layout, Block] = field(default_factory=dict)
    steps: int = 50

    def recipe(self, selection: Selection) -> Recipe:
        """The recipe for the parameters of a ``selection``."""
        mine = set(selection.names)
        begun = {k: b for k, b in self.blocks.items() if isinstance(b, KroneckerBlock) and mine.issuperset(k.names)}
        return (yield from nearest(begun, self.steps))

    @property
    def passes(self) -> int:
        return 2

    @property
    def layerwise(self) -> bool:
        return False

    @property
    def centred(self) -> bool:
        return True
