"""The waist: the Jacobian rows of one block of parameters, as a small algebra over tensors.

Letters: ``k`` cotangent, ``n`` example, ``t`` position (weight sharing), ``s`` group, ``o`` out, ``i`` in. An operation
that is affine in its parameters has rows ``J[k, n, s] = sum_t g[k, n, t, s, :] (x) a[n, t, s, :]``.

Few members, open operations. A member says its rows, :meth:`LayerJacobian.matrix`, and how they are cut, and overrides
what its structure makes cheap. What else is asked of rows is a function that dispatches on their type, where it is
needed: products of pairs in :mod:`nngeom.core.pairs`, Kronecker factors in :mod:`nngeom.pmat.factors`. Where several
ways give the same number, :mod:`nngeom.core.costs` chooses.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.completed import CompletedBasis
from nngeom.core.linalg import Basis


class LayerJacobian(ABC):
    """Rows ``J[k, n]`` of one block, each a matrix ``[s, o, i]``: a frozen dataclass of tensors and other Jacobians."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The rows themselves, ``[k, n, s, o, i]``."""

    @abstractmethod
    def examples(self, lo: int, hi: int) -> LayerJacobian:
        """Rows of examples ``lo .. hi - 1``."""

    @abstractmethod
    def cotangents(self, lo: int, hi: int) -> LayerJacobian:
        """Rows of cotangents ``lo .. hi - 1``."""

    # -- derived -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(k, n, s, o, i)``; of the rows themselves where a member does not know it without them."""
        k, n, s, o, i = self.matrix().shape
        return k, n, s, o, i

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the rows: the widest held."""
        return functools.reduce(torch.promote_types, (t.dtype for t in tensors(self) if t.is_floating_point()))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(tensors(self)).device

    def to(self, dtype: torch.dtype) -> LayerJacobian:
        """The same rows in another ``dtype``."""
        result: LayerJacobian = _mapped(self, lambda t: t.to(dtype) if t.is_floating_point() else t)
        return result

    def jvp(self, v: Tensor) -> Tensor:
        """``[*b, s, o, i] -> [*b, k, n]``: ``<J[k, n], v>``."""
        flat = v.flatten(-3)
        return torch.cat([torch.einsum("knp,...p->...kn", rows(j), flat) for j in pieces(self)], -1)

    def vjp(self, u: Tensor) -> Tensor:
        """``[*b, k, n] -> [*b, s, o, i]``: ``sum_kn u[k, n] J[k, n]``."""
        _, _, s, o, i = self.shape
        total, lo = u.new_zeros(*u.shape[:-2], s * o * i), 0
        for j in pieces(self):
            hi = lo + j.shape[1]
            total, lo = total + torch.einsum("knp,...kn->...p", rows(j), u[..., lo:hi]), hi
        result: Tensor = total.unflatten(-1, (s, o, i))
        return result

    def square(self) -> Tensor:
        """``[s, o, i]``: ``sum_kn J[k, n]**2``."""
        total = torch.zeros(self.shape[2:], dtype=linalg.accumulation_dtype(self.dtype), device=self.device)
        for j in pieces(self, memory.CACHE_BYTES):
            total += j.matrix().square().sum((0, 1))
        return total

    def squared_norms(self) -> Tensor:
        """``[k, n]``: ``|J[k, n]|**2``."""
        return torch.cat([rows(j).square().sum(-1) for j in pieces(self, memory.CACHE_BYTES)], 1)

    def gram(self, other: LayerJacobian) -> Tensor:
        """``[k, n, l, m]``: ``<J[k, n], J'[l, m]>`` with the rows ``J'`` of ``other``, of the same block."""
        x, y = rows(self), rows(other)
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])

    def rotate(self, ua: Basis | None, ug: Basis | None) -> LayerJacobian:
        """Rows in the bases ``ua [s, i, i]`` and ``ug [s, o, o]``: ``ug^T J ua`` (``None``: the identity)."""
        return FullJacobian(linalg.right(linalg.left(ug, self.matrix(), transpose=True), ua))


def rows(j: LayerJacobian) -> Tensor:
    """``[k, n, p]``: the rows, flattened."""
    return j.matrix().flatten(2)


def pieces(j: LayerJacobian, most: int | None = None) -> Iterator[LayerJacobian]:
    """``j`` cut over examples so that its explicit rows fit the memory budget, and ``most`` bytes."""
    k, n, s, o, i = j.shape
    for lo, hi in memory.pieces(n, k * s * o * i * j.dtype.itemsize, most=most):
        yield j.examples(lo, hi)


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors that a Jacobian, or a tuple of what it holds, is made of."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from tensors(part)
    elif isinstance(x, CompletedBasis):
        yield from x.tensors()
    elif isinstance(x, LayerJacobian):
        for f in fields(x):  # type: ignore[arg-type]
            yield from tensors(getattr(x, f.name))


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        return tuple(_mapped(part, change) for part in x)
    if isinstance(x, CompletedBasis):
        return x.map_tensors(change)
    if isinstance(x, LayerJacobian):
        return replace(x, **{f.name: _mapped(getattr(x, f.name), change) for f in fields(x)})  # type: ignore
    return x


@dataclass(frozen=True, eq=False)
class FullJacobian(LayerJacobian):
    """No structure: the rows themselves."""

    m: Tensor  # [k n s o i]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        k, n, s, o, i = self.m.shape
        return k, n, s, o, i

    @property
    def dtype(self) -> torch.dtype:
        return self.m.dtype

    @property
    def device(self) -> torch.device:
        return self.m.device

    def matrix(self) -> Tensor:
        return self.m

    def examples(self, lo: int, hi: int) -> FullJacobian:
        return FullJacobian(self.m[:, lo:hi])

    def cotangents(self, lo: int, hi: int) -> FullJacobian:
        return FullJacobian(self.m[lo:hi])
