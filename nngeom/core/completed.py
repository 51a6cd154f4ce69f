"""An orthonormal basis of a long side that begins with few given vectors: products with it, never ``p x p``.

With ``U [p, r]`` of orthonormal columns, ``U_1`` its first ``r`` rows and ``U_1 = X S Y^T``, the block reflector
(Schreiber & Parlett 1988) that takes the first ``r`` coordinates to the span of ``U`` completes it: coordinates ``x =
(x_1, x_2)`` are

    Q x = U (x_1 - K z) + (C z, 0) + (0, x_2),    z = U_2^T x_2,    K = Y (1 + S)^-1 Y^T,    C = -X (1 + S)^-1 Y^T

"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import memory


@dataclass(frozen=True, eq=False)
class CompletedBasis:
    """Orthonormal vectors ``[s, p, p]``, the first ``r`` of which are the columns of ``u``; ``k``, ``c`` as above."""

    u: Tensor  # [s p r]
    k: Tensor  # [s r r]
    c: Tensor  # [s r r]

    @staticmethod
    def of(u: Tensor) -> CompletedBasis:
        """The basis that begins with the orthonormal columns of ``u [s, p, r]``, ``r < p``."""
        x, values, yt = torch.linalg.svd(u[:, : u.shape[-1]].double())
        scaled = yt.mT / (1 + values.unsqueeze(-2))
        return CompletedBasis(u, (scaled @ yt).to(u), (-x @ scaled.mT).to(u))

    @property
    def shape(self) -> torch.Size:
        """``(s, p, p)``."""
        s, p, _ = self.u.shape
        return torch.Size((s, p, p))

    @property
    def rank(self) -> int:
        """How many vectors were given."""
        return self.u.shape[-1]

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> CompletedBasis:
        """The same with ``f`` of every tensor."""
        return CompletedBasis(f(self.u), f(self.k), f(self.c))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors held."""
        yield from (self.u, self.k, self.c)

    def equals(self, other: CompletedBasis) -> bool:
        """Whether both are the same basis."""
        return torch.equal(self.u, other.u)

    def vectors_of(self, x: Tensor) -> Tensor:
        """``Q x`` of coordinates ``x [*b, s, m, p]``, a row each."""
        r = self.rank
        head, tail = x[..., :r], x[..., r:]
        z = tail @ self.u[:, r:]
        out = (head - z @ self.k) @ self.u.mT
        out[..., :r] += z @ self.c.mT
        out[..., r:] += tail
        return out

    def coordinates_of(self, y: Tensor) -> Tensor:
        """``Q^T y`` of vectors ``y [*b, s, m, p]``, a row each."""
        r = self.rank
        head = y @ self.u
        rest = y[..., r:] + (y[..., :r] @ self.c - head @ self.k) @ self.u[:, r:].mT
        return torch.cat([head, rest], -1)

    def columns(self, lo: int, hi: int) -> Tensor:
        """``[s, p, hi - lo]``: vectors ``lo .. hi - 1``."""
        s, p, _ = self.u.shape
        units = self.u.new_zeros(s, hi - lo, p)
        at = torch.arange(hi - lo, device=units.device)
        units[:, at, at + lo] = 1
        return self.vectors_of(units).mT

    def rows(self, index: Tensor) -> Tensor:
        """``[*index, p]``: the entries of all vectors at some places, in one group."""
        head, r = self.u[0][index], self.rank
        rest = -(head @ self.k[0]) @ self.u[0, r:].T
        first = index < r
        rest[first] += self.c[0][index[first]] @ self.u[0, r:].T
        out = torch.cat([head, rest], -1)
        out[~first] += torch.nn.functional.one_hot(index[~first], out.shape[-1]).to(out)
        return out

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """All vectors, so many at a time as fit a processor cache, ``(which, [s, p, m])``."""
        s, p, _ = self.u.shape
        for lo, hi in memory.pieces(p, 4 * s * p * self.u.element_size(), most=8 * memory.CACHE_BYTES):
            yield slice(lo, hi), self.columns(lo, hi)

    def squares_times(self, d: Tensor) -> Tensor:
        """``[s, p, m]``: the squares of all entries times ``d [s, p, m]``."""
        total = torch.zeros_like(d)
        for some, q in self.pieces():
            total += q.square() @ d[:, some]
        return total

    def times_squares(self, d: Tensor) -> Tensor:
        """``[s, m, p]``: ``d [s, m, p]`` times the squares of all entries."""
        return torch.cat([d @ q.square() for _, q in self.pieces()], -1)
