"""One parameter used in unlike ways: as itself and transposed (an embedding tied to its decoder), or in any two
ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Arrangement
from nngeom.core.linalg import Basis


@dataclass(frozen=True, eq=False)
class TiedJacobian(LayerJacobian):
    """A matrix used as itself and transposed: the sum of factored rows, each in its own orientation, ``s = 1``."""

    terms: tuple[tuple[bool, FactoredJacobian], ...]  # (transposed, rows in the use's own orientation)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        transposed, j = self.terms[0]
        k, n, s, o, i = j.shape
        return (k, n, s, i, o) if transposed else (k, n, s, o, i)

    def _each(self, f: Callable[[FactoredJacobian], FactoredJacobian]) -> TiedJacobian:
        return TiedJacobian(tuple((transposed, f(j)) for transposed, j in self.terms))

    def examples(self, lo: int, hi: int) -> LayerJacobian:
        return self._each(lambda j: j.examples(lo, hi))

    def cotangents(self, lo: int, hi: int) -> LayerJacobian:
        return self._each(lambda j: j.cotangents(lo, hi))

    def matrix(self) -> Tensor:
        return sum_of([j.matrix().mT if transposed else j.matrix() for transposed, j in self.terms])

    def jvp(self, v: Tensor) -> Tensor:
        return sum_of([j.jvp(v.mT if transposed else v) for transposed, j in self.terms])

    def vjp(self, u: Tensor) -> Tensor:
        return sum_of([j.vjp(u).mT if transposed else j.vjp(u) for transposed, j in self.terms])

    def gram(self, other: LayerJacobian) -> Tensor:
        if not isinstance(other, TiedJacobian):
            return super().gram(other)
        parts = [x.gram(y) if p == q else crossed_gram(x, y) for p, x in self.terms for q, y in other.terms]
        return sum_of(parts)

    def squared_norms(self) -> Tensor:
        total = sum_of([j.squared_norms() for _, j in self.terms])
        for a, (p, x) in enumerate(self.terms):
            for q, y in self.terms[:a]:
                cross = [
                    (j.gram if p == q else lambda z, j=j: crossed_gram(j, z))(z)
                    for j, z in zip(_singles(x), _singles(y))
                ]
                total = total + 2 * torch.stack([c[:, 0, :, 0].diagonal() for c in cross], 1)
        return total

    def rotate(self, ua: Basis | None, ug: Basis | None) -> TiedJacobian:
        return TiedJacobian(tuple((t, j.rotate(ug, ua) if t else j.rotate(ua, ug)) for t, j in self.terms))


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _singles(j: FactoredJacobian) -> Iterator[FactoredJacobian]:
    return (j.examples(n, n + 1) for n in range(j.shape[1]))


def crossed_gram(x: FactoredJacobian, y: FactoredJacobian) -> Tensor:
    """``[k n l m]``: ``<x, y^T> = sum_tu (g_t . b_u) (a_t . h_u)`` for ``x = sum_t g a^T`` and ``y = sum_u h b^T``."""
    (k, n, t, _, _), (l, m, u, _, _) = x.g.shape, y.g.shape
    out = x.g.new_empty(k, n, l, m)
    each = n * t * u * (k + l) * x.g.element_size()
    for lo, hi in memory.pieces(m, each):
        z = y.examples(lo, hi)
        first = _meet(x.g[:, :, :, 0], z)  # [k n t m u]
        second = _meet(z.g[:, :, :, 0], x)  # [l m u n t]
        out[..., lo:hi] = torch.einsum("kntmu,lmunt->knlm", first, second)
    return out


def _meet(g: Tensor, j: FactoredJacobian) -> Tensor:
    """``[k n t o], inputs [m u o] -> [k n t m u]``."""
    if isinstance(j, LookupJacobian):
        return g[..., j.a]
    return torch.einsum("knto,muo->kntmu", g, j.a[:, :, 0])


@dataclass(frozen=True, eq=False)
class SumJacobian(LayerJacobian):
    """Any unlike uses: their sum, each in its own arrangement, as flat rows ``[1, 1, p]``."""

    terms: tuple[tuple[Arrangement, LayerJacobian], ...]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        k, n, s, o, i = self.terms[0][1].shape
        return k, n, 1, 1, s * o * i

    def matrix(self) -> Tensor:
        return sum_of([arrangement.write(j.matrix()) for arrangement, j in self.terms])[:, :, None, None]

    def jvp(self, v: Tensor) -> Tensor:
        return sum_of([j.jvp(a.read(v[..., 0, 0, :])) for a, j in self.terms])

    def vjp(self, u: Tensor) -> Tensor:
        return sum_of([a.write(j.vjp(u)) for a, j in self.terms])[..., None, None, :]

    def examples(self, lo: int, hi: int) -> SumJacobian:
        return SumJacobian(tuple((a, j.examples(lo, hi)) for a, j in self.terms))

    def cotangents(self, lo: int, hi: int) -> SumJacobian:
        return SumJacobian(tuple((a, j.cotangents(lo, hi)) for a, j in self.terms))
