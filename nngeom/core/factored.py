"""Rows that are sums of outer products over positions: of inputs ``a`` and output gradients ``g``, or of lookups."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from nngeom.core import contract, gram, linalg
from nngeom.core.gram import Tile
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.statistic import Inputs, Moment

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class FactoredJacobian(LayerJacobian):
    """``J[k, n, s] = sum_t g[k, n, t, s] (x) a[n, t, s]``: every operation that is affine in its parameters."""

    a: Tensor  # [n t s i]
    g: Tensor  # [k n t s o]

    @property
    def shape(self):
        k, n, _, s, o = self.g.shape
        return k, n, s, o, self.a.shape[-1]

    @property
    def dtype(self):
        return self.g.dtype

    @property
    def device(self):
        return self.g.device

    @property
    def kronecker(self):
        return True

    @property
    def positions(self) -> int:
        """Number of positions ``t`` that share the parameters."""
        return self.g.shape[2]

    def examples(self, lo, hi):
        return FactoredJacobian(self.a[lo:hi], self.g[:, lo:hi])

    def joins(self, other):
        return type(other) is type(self) and self.a.shape[1:] == other.a.shape[1:]

    def joined(self, others):
        a, g = torch.cat([self.a, *(j.a for j in others)]), torch.cat([self.g, *(j.g for j in others)], 1)
        return replace(self, a=a, g=g)

    def outputs(self, lo, hi):
        return FactoredJacobian(self.a, self.g[lo:hi])

    @property
    def writes_columns(self):
        t, s = self.g.shape[2:4]
        return (s == 1 or t == 1) and self.a.is_floating_point() and not (self.g.requires_grad or self.a.requires_grad)

    def write_columns(self, out, lo, hi):
        if self.g.shape[2] == 1:
            torch.mul(self.g[:, :, 0].unsqueeze(-1), self.a[:, 0, :, lo:hi].unsqueeze(-2), out=out)
            return
        for g, rows in zip(self.g, out):
            torch.bmm(g[:, :, 0].mT, self.a[:, :, 0, lo:hi], out=rows[:, 0])

    def matrix(self):
        k, n, t, s, o = self.g.shape
        if t == 1:
            return self.g[:, :, 0].unsqueeze(-1) * self.a[:, 0].unsqueeze(-2)
        return contract.sum_positions(self.g, self.a)

    def jvp(self, v):
        return torch.einsum("kntso,...ntso->...kn", self.g, self.inputs_times(v))

    def vjp(self, u):
        return self.gradients_times_inputs(contract.weighted_sum(u, self.g))

    def square(self):
        if self.positions == 1:
            squares = contract.summed_squares(self.g)[:, 0].transpose(0, 1)  # [s n o]
            return squares.mT @ self.a[:, 0].square().transpose(0, 1)
        if contract.pairs_are_cheaper(self.g.shape, self.a.shape[-1]):
            return contract.square_by_pairs(self.g, self.a)
        return contract.square_by_rows(self.g, self.a)

    def squared_norms(self):
        if self.positions == 1:
            return (contract.squared_lengths(self.g) * contract.squared_lengths(self.a)).sum((2, 3))
        return gram.squared_norms(self.g, self.a)

    def add_gram(self, tile, other):
        if not isinstance(other, FactoredJacobian):
            return super().add_gram(tile, other)
        gram.add_factored(tile, self, other)

    def features(self, lo, hi):
        if self.g.shape[3] > 1:
            return FactoredJacobian(self.a[:, :, lo:hi], self.g[:, :, :, lo:hi])
        return replace(self, g=self.g[..., lo:hi])

    @property
    def cuts_inputs(self):
        return True

    def inputs(self, lo, hi):
        return FactoredJacobian(self.a[..., lo:hi], self.g)

    def all_rows(self, tile, name):
        k, n, t, s, o = self.g.shape
        if s > 1:
            return super().all_rows(tile, name)
        rows = tile.working(name, *((n, k) if tile.by_examples else (k, n)), o, self.a.shape[-1])
        own = rows.transpose(0, 1) if tile.by_examples else rows
        if t == 1:
            torch.mul(self.g[:, :, 0, 0].unsqueeze(-1), self.a[:, 0, 0].unsqueeze(-2), out=own)
        elif tile.by_examples:
            torch.bmm(self._stacked(tile, name).mT, self.a[:, :, 0], out=rows.view(n, k * o, -1))
        else:
            for g, part in zip(self.g, own):
                torch.bmm(g[:, :, 0].mT, self.a[:, :, 0], out=part)
        return rows.view(k * n, -1)

    def _stacked(self, tile: Tile, name: str) -> Tensor:
        """``[n, t, (k o)]``: the output gradients of all cotangents side by side, a copy where they do not lie so."""
        g = self.g[:, :, :, 0].permute(1, 2, 0, 3)
        n, t, k, o = g.shape
        if g.stride(2) != o * g.stride(3):
            copy = (
                tile.working(f"{name} gradients", n, t, k, o)
                if g.stride(3) == 1
                else tile.working(f"{name} gradients", n, k, o, t).permute(0, 3, 1, 2)
            )
            g = copy.copy_(g)
        return g.flatten(2)

    def gram(self, other):
        if not isinstance(other, FactoredJacobian):
            return super().gram(other)
        if not contract.gram_positions_are_cheaper(self.g.shape, other.g.shape, self.a_width):
            return super().gram(other)
        return contract.gram_by_positions(self, other)

    def kronecker_sums(self, sharing, limit):
        return {"g": self.gradient_factor(sharing, limit), "a": Inputs(lambda: self.input_factor(sharing, limit))}

    def input_factor(self, sharing, limit):
        a = self.a if sharing == "expand" else self.a.mean(1, keepdim=True)
        if a.shape[-1] > limit:
            return a.square().sum((0, 1))
        return contract.second_moment(a)

    def gradient_factor(self, sharing: str, limit: int) -> Tensor | Moment:
        """``"g"`` of :meth:`kronecker_sums`: divided by the number of positions that are counted as examples."""
        g = self.g if sharing == "expand" else self.g.sum(2, keepdim=True)
        if g.shape[-1] > limit:
            return g.square().sum((0, 1, 2)) / g.shape[2]
        return contract.second_moment(g, 1 / max(1, g.shape[2]))

    def rotate(self, ua, ug):
        a = self.a if ua is None else contract.times(self.a, ua)
        return FactoredJacobian(a, self._rotated_gradients(ug))

    def _rotated_gradients(self, ug: Tensor | None) -> Tensor:
        if ug is None:
            return self.g
        return contract.times(self.g, ug)

    # -- the input side, all that a lookup changes ---------------------------------------------------------------------

    @property
    def a_width(self) -> int:
        """Operations to compare two input positions."""
        return self.a.shape[-1]

    def inputs_times(self, v: Tensor) -> Tensor:
        """``[*b, s, o, i] -> [*b, n, t, s, o]``."""
        return torch.einsum("ntsi,...soi->...ntso", self.a, v)

    def gradients_times_inputs(self, w: Tensor) -> Tensor:
        """``[*b, n, t, s, o] -> [*b, s, o, i]``."""
        return contract.weight_gradient(w, self.a)

    def input_gram(self, other: FactoredJacobian, s: int) -> Tensor:
        """``[n, t, m, u]``: inner products of the input positions in group ``s``."""
        if isinstance(other, LookupJacobian):
            return other.input_gram(self, s).permute(2, 3, 0, 1)
        x, y = self.a[:, :, s], other.a[:, :, s]
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).unflatten(1, y.shape[:2]).unflatten(0, x.shape[:2])


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
    def shape(self):
        k, n, _, s, o = self.g.shape
        return k, n, s, o, self.size

    def examples(self, lo, hi):
        return LookupJacobian(self.a[lo:hi], self.g[:, lo:hi], self.size)

    def outputs(self, lo, hi):
        return LookupJacobian(self.a, self.g[lo:hi], self.size)

    @property
    def cuts_inputs(self):
        return False

    def inputs(self, lo, hi):
        return LayerJacobian.inputs(self, lo, hi)

    def all_rows(self, tile, name):
        return LayerJacobian.all_rows(self, tile, name)

    def matrix(self):
        k, n, t, _, o = self.g.shape
        rows = self.g.new_zeros(k, n, self.size, o)
        rows.scatter_add_(2, self.a[None, :, :, None].expand(k, n, t, o), self.g[:, :, :, 0])
        return rows.mT.unsqueeze(2)

    def square(self):
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

    def squared_norms(self):
        h = torch.einsum("nstu,knuso->kntso", self.own_input_gram(), self.g)
        return (h * self.g).sum((2, 3, 4))

    def input_factor(self, sharing, limit):
        n, t = self.a.shape
        if sharing == "expand":
            return torch.bincount(self.a.flatten(), minlength=self.size).to(self.g).unsqueeze(0)
        mean = self.g.new_zeros(n, self.size).scatter_add_(1, self.a, self.g.new_full((n, t), 1 / max(1, t)))
        return mean.square().sum(0, keepdim=True)

    def rotate(self, ua, ug):
        if ua is not None:
            return FactoredJacobian(ua[0][self.a].unsqueeze(2), self._rotated_gradients(ug))
        return LookupJacobian(self.a, self._rotated_gradients(ug), self.size)

    @property
    def a_width(self):
        return 1

    def inputs_times(self, v):
        return v[..., 0, :, :].mT[..., self.a, :].unsqueeze(-2)

    def gradients_times_inputs(self, w):
        b = w.shape[:-4]
        w = w.reshape(-1, self.a.numel(), w.shape[-1])
        rows = w.new_zeros(w.shape[0], self.size, w.shape[-1]).index_add_(1, self.a.flatten(), w)
        return rows.mT.reshape(*b, 1, -1, self.size)

    def input_gram(self, other, s):
        if not isinstance(other, LookupJacobian):
            return other.a[:, :, s][..., self.a].permute(2, 3, 0, 1)
        return (self.a[:, :, None, None] == other.a[None, None]).to(self.g)

    def own_input_gram(self):
        return (self.a[:, :, None] == self.a[:, None, :]).to(self.g).unsqueeze(1)
