"""The waist: the Jacobian rows of one block of parameters, as a small algebra over tensors.

Letters: ``k`` cotangent, ``n`` example, ``t`` position (weight sharing), ``s`` group, ``o`` out, ``i`` in. An operation
that is affine in its parameters has rows ``J[k, n, s] = sum_t g[k, n, t, s, :] (x) a[n, t, s, :]``.

Everything follows from one primitive, :meth:`LayerJacobian.matrix`; members override what their structure makes cheap.
Where contracting positions first and forming the rows first give the same number, :mod:`nngeom.core.contract` counts
operations and chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.errors import StructureError, UnsupportedError
from nngeom.core.gram import Tile, by_rows
from nngeom.core.statistic import Inputs, Moment


class LayerJacobian(ABC):
    """Rows ``J[k, n]`` of one block, each a matrix ``[s, o, i]``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(k, n, s, o, i)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the rows."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The rows themselves, ``[k, n, s, o, i]``."""

    @abstractmethod
    def examples(self, lo: int, hi: int) -> LayerJacobian:
        """Rows of examples ``lo .. hi - 1``."""

    @abstractmethod
    def outputs(self, lo: int, hi: int) -> LayerJacobian:
        """Rows of cotangents ``lo .. hi - 1``."""

    # -- derived -------------------------------------------------------------------------------------------------------

    def joins(self, other: LayerJacobian) -> bool:
        """Whether the examples of ``other`` can follow these in one Jacobian."""
        return False

    def joined(self, others: Sequence[LayerJacobian]) -> LayerJacobian:
        """These examples followed by those of ``others``, all of which it :meth:`joins`."""
        raise UnsupportedError(f"{type(self).__name__} keeps batches apart")

    def bytes_each(self) -> int:
        """Bytes of the rows of one example."""
        k, _, s, o, i = self.shape
        return k * s * o * i * self.dtype.itemsize

    @property
    def writes_columns(self) -> bool:
        """Whether :meth:`write_columns` writes in place, without the rows in between."""
        return False

    def write_columns(self, out: Tensor, lo: int, hi: int) -> None:
        """Write the input columns ``lo .. hi - 1`` of the rows into ``out [k, n, s, o, hi - lo]``."""
        out.copy_(self.matrix()[..., lo:hi])

    def to(self, dtype: torch.dtype) -> LayerJacobian:
        """The same rows in another ``dtype``."""
        fields = {
            name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()
        }
        return replace(self, **fields)  # type: ignore[type-var]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors held."""
        return (t for t in vars(self).values() if isinstance(t, Tensor))

    def rows(self) -> Tensor:
        """``[k, n, p]``: the rows, flattened."""
        return self.matrix().flatten(2)

    def blocks(self, most: int | None = None):
        """This Jacobian cut over examples so that its explicit rows fit the memory budget and ``most`` bytes."""
        for lo, hi in memory.pieces(self.shape[1], self.bytes_each(), most=most):
            yield self.examples(lo, hi)

    def jvp(self, v: Tensor) -> Tensor:
        """``[*b, s, o, i] -> [*b, k, n]``: ``<J[k, n], v>``."""
        flat = v.flatten(-3)
        return torch.cat([torch.einsum("knp,...p->...kn", j.rows(), flat) for j in self.blocks()], -1)

    def vjp(self, u: Tensor) -> Tensor:
        """``[*b, k, n] -> [*b, s, o, i]``: ``sum_kn u[k, n] J[k, n]``."""
        _, _, s, o, i = self.shape
        total, lo = u.new_zeros(*u.shape[:-2], s * o * i), 0
        for j in self.blocks():
            hi = lo + j.shape[1]
            total, lo = total + torch.einsum("knp,...kn->...p", j.rows(), u[..., lo:hi]), hi
        return total.unflatten(-1, (s, o, i))

    def square(self) -> Tensor:
        """``[s, o, i]``: ``sum_kn J[k, n]**2``."""
        total = torch.zeros(self.shape[2:], dtype=linalg.accumulation_dtype(self.dtype), device=self.device)
        for j in self.blocks(memory.CACHE_BYTES):
            total += j.matrix().square().sum((0, 1))
        return total

    def outer(self) -> Tensor:
        """``[p, p]``: ``sum_kn J[k, n] J[k, n]^T`` over the flattened block."""
        _, _, s, o, i = self.shape
        p = s * o * i
        total = torch.zeros(p, p, dtype=linalg.accumulation_dtype(self.dtype), device=self.device)
        for j in self.blocks():
            linalg.add_gram_(total, j.rows().flatten(0, 1).to(total.dtype))
        return linalg.mirror_(total)

    def gram(self, other: LayerJacobian) -> Tensor:
        """``[k, n, l, m]``: ``<J[k, n], J'[l, m]>`` with the rows ``J'`` of ``other``, of the same block."""
        x, y = self.rows(), other.rows()
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).unflatten(1, y.shape[:2]).unflatten(0, x.shape[:2])

    def add_gram(self, tile: Tile, other: LayerJacobian) -> None:
        """``tile.out[k, n, l, m] += <J[k, n], J'[l, m]>`` in place, with the rows ``J'`` of ``other``."""
        by_rows(tile, self, other)

    def features(self, lo: int, hi: int) -> LayerJacobian:
        """The part of the block in groups ``lo .. hi - 1``, or for one group in rows ``lo .. hi - 1`` of ``o``."""
        m = self.matrix()
        return FullJacobian(m[:, :, lo:hi] if m.shape[2] > 1 else m[:, :, :, lo:hi])

    @property
    def cuts_inputs(self) -> bool:
        """Whether :meth:`inputs` costs no more than its part of the rows."""
        return False

    def inputs(self, lo: int, hi: int) -> LayerJacobian:
        """The part of the block in columns ``lo .. hi - 1`` of ``i``."""
        return FullJacobian(self.matrix()[..., lo:hi])

    def all_rows(self, tile: Tile, name: str) -> Tensor:
        """``[r, p]``: the rows in the order of ``tile``, in its working memory called ``name`` where that saves fresh
        memory.
        """
        return tile.rows(self.matrix())

    def squared_norms(self) -> Tensor:
        """``[k, n]``: ``|J[k, n]|**2``."""
        return torch.cat([j.rows().square().sum(-1) for j in self.blocks(memory.CACHE_BYTES)], 1)

    def kronecker_sums(self, sharing: str, limit: int) -> dict[str, Tensor | Moment | Inputs]:
        """Sums over ``k, n`` from which :func:`nngeom.pmat.kfac.kronecker_block` makes the factors of ``sum J J^T``.

        ``sharing``: as for :class:`~nngeom.PMatKFAC`. ``"a" [s, i, i]`` of :class:`Inputs` and ``"g" [s, o, o]`` of
        gradients; a factor that is exactly diagonal, or longer than ``limit``, as its diagonal. Rows without Kronecker
        structure (``o = 1``) give the exact block as ``"a"`` and no ``"g"``.
        """
        return {"a": self.input_factor(sharing, limit)}

    def input_factor(self, sharing: str, limit: int) -> Tensor | Moment:
        """``"a"`` of ``kronecker_sums(sharing, limit)``; for rows without Kronecker structure the exact block ``[s, i,
        i]``.
        """
        _, _, s, o, i = self.shape
        if o != 1:
            raise StructureError(
                f"{type(self).__name__} rows of {o} x {i} have no Kronecker structure, so no factors; use a "
                "representation of their second moments, such as PMatDiag or PMatBlockDiag"
            )
        total = torch.zeros(s, i, i, dtype=linalg.accumulation_dtype(self.dtype), device=self.device)
        for j in self.blocks():
            m = j.matrix().squeeze(3).flatten(0, 1).transpose(0, 1)  # [s, r, i]
            total += linalg.gram(m[0]) if s == 1 else m.mT @ m
        return total

    def rotate(self, ua: Tensor | None, ug: Tensor | None) -> LayerJacobian:
        """Rows in the bases ``ua [s, i, i]`` and ``ug [s, o, o]``: ``ug^T J ua`` (``None``: the identity)."""
        return FullJacobian(linalg.right(linalg.left(ug, self.matrix(), transpose=True), ua))

    @property
    def kronecker(self) -> bool:
        """Whether rows are sums of outer products, so that Kronecker factors are an approximation worth having."""
        return False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors are."""


@dataclass(frozen=True, eq=False)
class FullJacobian(LayerJacobian):
    """No structure: the rows themselves."""

    m: Tensor  # [k n s o i]

    @property
    def shape(self):
        return tuple(self.m.shape)

    @property
    def dtype(self):
        return self.m.dtype

    @property
    def device(self):
        return self.m.device

    def matrix(self):
        return self.m

    def examples(self, lo, hi):
        return FullJacobian(self.m[:, lo:hi])

    def joins(self, other):
        return type(other) is FullJacobian

    def joined(self, others):
        return FullJacobian(torch.cat([self.m, *(j.m for j in others)], 1))

    def outputs(self, lo, hi):
        return FullJacobian(self.m[lo:hi])
