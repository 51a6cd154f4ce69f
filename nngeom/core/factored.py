"""Rows that are sums of outer products over positions: of inputs ``a`` and output gradients ``g``, or of lookups."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from nngeom.core import contract, costs, linalg, memory, paths
from nngeom.core.completed import CompletedBasis
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.linalg import Basis

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class FactoredJacobian(LayerJacobian):
    """``J[k, n, s] = sum_t g[k, n, t, s] (x) a[n, t, s]``: every operation that is affine in its parameters.

    ``counted``: how many positions examples have is the data's, in this batch ``each`` on average, or ``each [s]`` in
    groups; others are zero. Means over positions then are over those of all batches.
    """

    a: Tensor  # [n t s i]
    g: Tensor  # [k n t s o]
    each: float | Tensor = 0.0
    counted: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        k, n, _, s, o = self.g.shape
        return k, n, s, o, self.a.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def device(self) -> torch.device:
        return self.g.device

    @property
    def positions(self) -> int:
        """Number of positions ``t`` that share the parameters."""
        return self.g.shape[2]

    @property
    def share(self) -> float:
        """Of a position in an example: 1 where they are counted, until all are."""
        return 1.0 if self.counted else 1 / max(1, self.positions)

    @property
    def spread(self) -> Tensor:
        """``[2, s]``, or ``[2, 1]`` where groups have as many: the positions of all examples, and how many these
        are.
        """
        n = self.g.shape[1]
        each = torch.as_tensor(self.each, dtype=linalg.accumulation_dtype(self.dtype), device=self.device).view(-1)
        return torch.stack([n * each, torch.full_like(each, n)])

    def examples(self, lo: int, hi: int) -> FactoredJacobian:
        return replace(self, a=self.a[lo:hi], g=self.g[:, lo:hi])

    def cotangents(self, lo: int, hi: int) -> FactoredJacobian:
        return replace(self, g=self.g[lo:hi])

    def matrix(self) -> Tensor:
        k, n, t, s, o = self.g.shape
        if t == 1:
            return self.g[:, :, 0].unsqueeze(-1) * self.a[:, 0].unsqueeze(-2)
        return contract.sum_positions(self.g, self.a)

    def jvp(self, v: Tensor) -> Tensor:
        vectors = v.reshape(-1, *v.shape[-3:])
        return paths.contract("kntso,ntsi,bsoi->bkn", self.g, self.a, vectors, along="n").view(
            *v.shape[:-3], *self.g.shape[:2]
        )

    def vjp(self, u: Tensor) -> Tensor:
        if u.ndim == 2:  # gradients first, whatever the sizes, and in the memory order that they have
            return contract.weight_gradient(contract.weighted_sum(u, self.g), self.a)
        weights = u.reshape(-1, *u.shape[-2:])
        return paths.contract("bkn,kntso,ntsi->bsoi", weights, self.g, self.a, along="n").view(
            *u.shape[:-2], *self.shape[2:]
        )

    def square(self) -> Tensor:
        if self.positions == 1:
            squares = contract.summed_squares(self.g)[:, 0].transpose(0, 1)  # [s n o]
            return squares.mT @ self.a[:, 0].square().transpose(0, 1)
        if costs.squares_by_positions(self.g.shape, self.shape[-1]):
            return contract.square_by_pairs(self.g, self.a)
        return contract.square_by_rows(self.g, self.a)

    def squared_norms(self) -> Tensor:
        if self.positions == 1:
            return (contract.squared_lengths(self.g) * contract.squared_lengths(self.a)).sum((2, 3))
        by_pairs = costs.norms_by_positions(self.g.shape, self.shape[-1])
        return contract.squared_norms(self.g, self.a, by_pairs=by_pairs)

    def gram(self, other: LayerJacobian) -> Tensor:
        if not isinstance(other, FactoredJacobian):
            return super().gram(other)
        if self.positions == other.positions == 1:
            return self._gram_of_one_position(other)
        if costs.products_by_positions(self.g.shape, other.g.shape, self.shape[-1], self.compared, same=False):
            return self._gram_by_positions(other)
        return super().gram(other)

    def _gram_of_one_position(self, other: FactoredJacobian) -> Tensor:
        """``sum_s (a a^T) * (g g^T)``."""
        (k, n, _, groups, _), (l, m) = self.g.shape, other.g.shape[:2]
        out = self.g.new_zeros(k, n, l, m)
        for s in range(groups):
            g, h = (z.g[:, :, 0, s].flatten(0, 1) for z in (self, other))
            out += (g @ h.T).view(k, n, l, m) * self.input_gram(other, s).view(n, 1, m)
        return out

    def _gram_by_positions(self, other: FactoredJacobian) -> Tensor:
        """``sum_stu (a_t . a_u) (g_t . g_u)``, a block of the other side's examples at a time."""
        (k, n, t, groups, o), (l, m) = self.g.shape, other.g.shape[:2]
        out = self.g.new_zeros(k, n, l, m)
        for s in range(groups):
            g = self.left_side(s)
            for lo, hi in memory.pieces(m, n * t * l * o * self.dtype.itemsize, most=memory.CACHE_BYTES):
                y = other.examples(lo, hi)
                out[..., lo:hi] += contract.products(g, y.input_gram(self, s), y.right_side(s)).permute(1, 0, 3, 2)
        return out

    def left_side(self, s: int) -> Tensor:
        """Output gradients of group ``s`` as the left side of :func:`contract.products`: ``[n, k, t, o]``."""
        return self.g[:, :, :, s].transpose(0, 1)

    def right_side(self, s: int) -> Tensor:
        """And as its right side: ``[n, (k o), t]``."""
        return self.g[:, :, :, s].permute(1, 0, 3, 2).flatten(1, 2)

    def rotate(self, ua: Basis | None, ug: Basis | None) -> FactoredJacobian:
        a = self.a if ua is None else contract.times(self.a, ua)
        return replace(self, a=a, g=self._rotated_gradients(ug))

    def _rotated_gradients(self, ug: Basis | None) -> Tensor:
        if ug is None:
            return self.g
        return contract.times(self.g, ug)

    @property
    def compared(self) -> int:
        """Operations to compare two input positions."""
        return self.a.shape[-1]

    def input_gram(self, other: FactoredJacobian, s: int) -> Tensor:
        """``[n, t, m, u]``: inner products of the input positions in group ``s``."""
        if isinstance(other, LookupJacobian):
            return other.input_gram(self, s).permute(2, 3, 0, 1)
        x, y = self.a[:, :, s], other.a[:, :, s]
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])


def at_one_position(jacobians: dict[Key, LayerJacobian]) -> dict[Key, LayerJacobian]:
    """The same rows; of those whose positions all have the same gradient (a mean over positions follows) with their
    inputs summed.

    All are asked at once, so that a device is waited for twice, not once a layer.
    """
    found = {key: j for key, j in jacobians.items() if type(j) is FactoredJacobian and j.positions > 1}
    for some in (1, None):  # one example first: it rules out nearly all
        if found:
            equal = torch.stack([(g == g[:, :, :1]).all() for g in (j.g[:some, :some] for j in found.values())])
            found = {key: j for (key, j), e in zip(found.items(), equal.tolist()) if e}
    return jacobians | {key: FactoredJacobian(j.a.sum(1, keepdim=True), j.g[:, :, :1]) for key, j in found.items()}


@dataclass(frozen=True, eq=False)
class LookupJacobian(FactoredJacobian):
    """A factored Jacobian whose inputs are one-hot, kept as indices: ``a[n, t] = e_index[n, t]``, ``s = 1``."""

    a: Tensor  # [n t], integer
    g: Tensor  # [k n t 1 o]
    size: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        k, n, _, s, o = self.g.shape
        return k, n, s, o, self.size

    def examples(self, lo: int, hi: int) -> LookupJacobian:
        return LookupJacobian(self.a[lo:hi], self.g[:, lo:hi], size=self.size)

    def cotangents(self, lo: int, hi: int) -> LookupJacobian:
        return LookupJacobian(self.a, self.g[lo:hi], size=self.size)

    def matrix(self) -> Tensor:
        k, n, t, _, o = self.g.shape
        rows = self.g.new_zeros(k, n, self.size, o)
        rows.scatter_add_(2, self.a[None, :, :, None].expand(k, n, t, o), self.g[:, :, :, 0])
        return rows.mT.unsqueeze(2)

    def square(self) -> Tensor:
        n, t = self.a.shape
        key = self.a + self.size * torch.arange(n, device=self.a.device)[:, None]
        pairs, slot = key.flatten().unique(return_inverse=True)
        total = torch.zeros(
            self.size, self.g.shape[-1], dtype=linalg.accumulation_dtype(self.dtype), device=self.device
        )
        for g in self.g:
            sums = g.new_zeros(len(pairs), g.shape[-1]).index_add_(0, slot, g.reshape(n * t, g.shape[-1]))
            total.index_add_(0, pairs % self.size, sums.square().to(total.dtype))
        return total.T.unsqueeze(0)

    def jvp(self, v: Tensor) -> Tensor:
        inputs = v[..., 0, :, :].mT[..., self.a, :].unsqueeze(-2)  # [*b n t s o]
        return torch.einsum("kntso,...ntso->...kn", self.g, inputs)

    def vjp(self, u: Tensor) -> Tensor:
        w = contract.weighted_sum(u, self.g)  # [*b n t s o]
        b = w.shape[:-4]
        w = w.reshape(b.numel(), self.a.numel(), w.shape[-1])
        rows = w.new_zeros(w.shape[0], self.size, w.shape[-1]).index_add_(1, self.a.flatten(), w)
        return rows.mT.reshape(*b, 1, rows.shape[-1], self.size)

    def squared_norms(self) -> Tensor:
        inner = (self.a[:, :, None] == self.a[:, None, :]).to(self.g)
        return paths.contract("ntu,kntso,knuso->kn", inner, self.g, self.g, along="n")

    def rotate(self, ua: Basis | None, ug: Basis | None) -> FactoredJacobian:
        if ua is not None:
            rows = ua.rows(self.a) if isinstance(ua, CompletedBasis) else ua[0][self.a]
            return FactoredJacobian(rows.unsqueeze(2), self._rotated_gradients(ug))
        return LookupJacobian(self.a, self._rotated_gradients(ug), size=self.size)

    @property
    def compared(self) -> int:
        return 1

    def input_gram(self, other: FactoredJacobian, s: int) -> Tensor:
        if not isinstance(other, LookupJacobian):
            return other.a[:, :, s][..., self.a].permute(2, 3, 0, 1)
        return (self.a[:, :, None, None] == other.a[None, None]).to(self.g)
