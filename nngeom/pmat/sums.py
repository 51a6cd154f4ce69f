"""Sums of matrices of different kinds: lazy, with the same operations as any other, block by block where they can be.

Products with vectors, traces, diagonals and quadratic forms are those of the parts. Stored matrices are brought to
their common partition; within a block the sum is a block of a known kind, or is solved with by preconditioned conjugate
gradients, and else made dense up to a side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentError
from nngeom.pmat.arguments import is_spectral, require_frobenius
from nngeom.pmat.basis import Basis
from nngeom.pmat.damped import require_added
from nngeom.pmat.damped_sum import added
from nngeom.pmat.operands import V
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.partitioned import Partitioned
from nngeom.pmat.pmat import PMat
from nngeom.pmat.sum_block import BLOCK_LIMIT
from nngeom.pmat.sum_logdet import estimated_logdet, require_quadrature
from nngeom.pmat.sum_parts import SumParts
from nngeom.solve.hutchinson import Estimate
from nngeom.solve.log_trace import Quadrature
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False)
class PMatSum(SumParts):
    """``sum_j weight_j M_j`` of ``parts``; ``weights`` are 1 by default."""

    parts: tuple[ParameterOperator, ...]
    weights: tuple[float | Tensor, ...] | None = None

    def _weighted(self) -> Iterator[tuple[float | Tensor, ParameterOperator]]:
        return zip(self.weights or (1.0,) * len(self.parts), self.parts)

    @property
    def layer_collection(self) -> LayerCollection:
        return self.parts[0].layer_collection

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.parts[0].dtype
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def symmetric(self) -> bool:
        return all(getattr(p, "symmetric", True) for p in self.parts)

    def product(self, x: Tensor) -> Tensor:
        each = (w * part.product(x.to(part.dtype)).to(self.dtype) for w, part in self._weighted())
        return functools.reduce(torch.add, each)

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        return [(w * c, _in_dtype(f, p.dtype, self.dtype)) for w, p in self._weighted() for c, f in p.terms()]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return tuple(t for p in self.parts for t in p.held)

    def trace(self) -> Tensor:
        return torch.stack([(w * p.trace()).to(self.dtype) for w, p in self._weighted()]).sum()

    def diag(self) -> PVector:
        each = ((w * p.diag().flat()).to(self.dtype) for w, p in self._weighted())
        return PVector(self.layer_collection, functools.reduce(torch.add, each))

    @property
    def T(self) -> PMatSum:
        """The transpose: the sum of the parts' transposes."""
        return self if self.symmetric else PMatSum(tuple(p.T for p in self.parts), self.weights)

    def scaled(self, c: float | Tensor) -> PMatSum:
        return PMatSum(self.parts, tuple(c * w for w, _ in self._weighted()))

    # -- block by block ------------------------------------------------------------------------------------------------

    def partitioned(
        self, limit: int = BLOCK_LIMIT, tol: float | None = None, max_steps: int | None = None, *, wide: bool = False
    ) -> Partitioned | None:
        """The sum over the common partition of its parts; ``None`` where one of them is not stored.

        ``limit``: the longest side of a block that is made dense; ``tol``, ``max_steps``: of iterative solves;
        ``wide``: in float64 where the device has it, as entries of a dense block lose digits that parts have.
        """
        blocks = self._partitioned(limit, tol, max_steps, wide=wide and self.device.type != "mps")
        return None if blocks is None else blocks.together()

    def _partitioned(
        self, limit: int, tol: float | None = None, max_steps: int | None = None, *, wide: bool = False
    ) -> Partitioned | None:
        terms = list(self.flattened())
        flat = [(w, part) for w, part in terms if isinstance(part, PMat)]
        if len(flat) < len(terms):
            return None
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ArgumentError(f"limit is {limit!r}; expected the longest side of a dense block, an integer above 0")
        dtype = torch.float64 if wide else self.dtype
        one = [(w, part if part.dtype == dtype else part.to(dtype)) for w, part in flat]
        return Partitioned.of(self.layer_collection, one, limit, tol, max_steps)

    def flattened(self) -> Iterator[tuple[float | Tensor, ParameterOperator]]:
        """Weights and matrices, of sums inside of the sum too."""
        for w, part in self._weighted():
            if isinstance(part, PMatSum):
                yield from ((w * v, inner) for v, inner in part.flattened())
            else:
                yield w, part

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm (``kind="fro"``), by inner products of the parts, of the dense matrix with implicit ones;
        or the largest absolute eigenvalue (``kind=2``), of large blocks by Lanczos' method.
        """
        blocks = self._partitioned(BLOCK_LIMIT)
        if blocks is None:
            return super().norm(kind)
        if is_spectral(kind):
            return blocks.together().whole().matrix.norm(2)
        require_frobenius(kind)
        return blocks.norm()

    def with_damping(self, damping: Any, limit: int, *, indefinite: bool = False) -> tuple[PMatSum, Damping]:
        """With what a ``damping`` adds to the diagonal for parameters or blocks, and what is left to add; ``limit`` as
        for :meth:`inverse`, ``indefinite`` as for :meth:`solve`.
        """
        shift, rest = added(self, damping, limit, indefinite=indefinite)
        return self if shift is None else total(self, shift), rest

    def solve(
        self,
        b: V,
        damping: Any = 0.0,
        tol: float | None = None,
        max_steps: int | None = None,
        limit: int = BLOCK_LIMIT,
        *,
        indefinite: bool = False,
    ) -> V:
        """``(M + damping I)^-1 b``, block by block: in closed form, dense where a block is small, else by conjugate
        gradients.

        ``damping``: as for the solve of a stored matrix; :class:`Relative` is of the blocks of the common partition,
        and takes stored parts. ``tol``: the relative residual of iterations in every block (by default 1e-10 in
        float64, 1e-5 in float32; 1e-6 with implicit parts), in ``max_steps`` steps at most (by default ten times the
        side, at most 10 000). A block up to a side of ``limit`` is made dense where they do not converge, or where a
        part has negative eigenvalues: above it, an indefinite sum is solved with or raises. ``indefinite``: with
        negative eigenvalues, above the limit by MINRES. Raises :class:`SingularError`, :class:`ConvergenceError`.
        """
        m, d = self.with_damping(damping, limit, indefinite=indefinite)
        blocks = m.partitioned(limit, tol, max_steps)
        if blocks is None:
            return super(PMatSum, m).solve(b, d, 1e-6 if tol is None else tol, max_steps)
        return self._apply(lambda x: blocks.solve(x, d), b)

    def inverse(self, damping: Any = 0.0, limit: int = BLOCK_LIMIT, *, indefinite: bool = False) -> PMat:
        """``(M + damping I)^-1`` as blocks, ``damping`` and ``indefinite`` as for :meth:`solve`; raises
        :class:`SizeError` where one has no closed form and a side above ``limit``.
        """
        m, d = self.with_damping(damping, limit, indefinite=indefinite)
        blocks = m.partitioned(limit, wide=True)
        return super(PMatSum, m).inverse(d) if blocks is None else blocks.inverse(d).to(self.dtype)

    def logdet(  # type: ignore[override]
        self,
        damping: Any = 0.0,
        limit: int = BLOCK_LIMIT,
        *,
        estimator: str | None = None,
        steps: int = 32,
        samples: int = 64,
        tol: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> Tensor | Estimate:
        """``log det(M + damping I)``, ``-inf`` where that is singular; ``damping``: what :meth:`solve` adds to the
        diagonal; ``limit`` as for :meth:`inverse`.

        ``estimator``: ``"slq"``, an :class:`Estimate` of large blocks without a closed form, which are not made dense,
        by Lanczos steps from random signs that the ``generator`` draws (torch's global one by default): until the
        standard error is ``tol`` a parameter, after at most so many ``steps`` of at most so many ``samples``.
        """
        m, d = self.with_damping(damping, limit)
        t, blocks = require_added(d, "logdet"), m.partitioned(limit, wide=True)
        if estimator is not None:
            how = require_quadrature(estimator, Quadrature(steps, samples, generator, tol))
            return estimated_logdet(m, blocks, t, how)
        return super(PMatSum, m).logdet(t.value) if blocks is None else blocks.logdet(t).to(self.dtype)

    def eigh(self, limit: int = BLOCK_LIMIT) -> tuple[Tensor, Basis]:
        """Eigenvalues, ascending, and basis; ``limit`` as for :meth:`inverse`."""
        blocks = self.partitioned(limit)
        return super().eigh() if blocks is None else blocks.eigh()

    def sample(
        self, n: int, damping: Any = 0.0, generator: torch.Generator | None = None, limit: int = BLOCK_LIMIT
    ) -> PVector:
        """``n`` draws of ``N(0, (M + damping I)^-1)``; ``damping``: what :meth:`solve` adds to the diagonal;
        ``generator``: torch's global one by default.

        Large blocks of parts without negative eigenvalues take one iterative solve (Papandreou & Yuille 2010); others
        are made dense up to a side of ``limit``.
        """
        m, d = self.with_damping(damping, limit)
        t, blocks = require_added(d, "sample"), m.partitioned(limit)
        if blocks is None:
            return super(PMatSum, m).sample(n, t.value, generator)
        device = self.device if generator is None else generator.device

        def drawn() -> Tensor:
            noise = PVector.randn(self.layer_collection, n, generator=generator, dtype=self.dtype, device=device)
            return noise.flat().to(self.device)

        return PVector(self.layer_collection, blocks.draw(drawn, t))

    def to(self, *args: Any, **kwargs: Any) -> PMatSum:
        """Another dtype or device, as ``Tensor.to``."""
        return PMatSum(tuple(p.to(*args, **kwargs) for p in self.parts), self.weights)

    def __repr__(self) -> str:
        return "PMatSum(" + " + ".join(f"{w:g} * {p!r}" for w, p in self._weighted()) + ")"


def _in_dtype(f: Callable[[Tensor], Tensor], inside: torch.dtype, outside: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``f``, which works in one dtype, for vectors of another."""
    return f if inside == outside else lambda x: f(x.to(inside)).to(outside)


def total(x: ParameterOperator, y: ParameterOperator) -> PMatSum:
    """``x + y``, with the parts of sums beside each other."""
    weighted = [term for m in (x, y) for term in (m.flattened() if isinstance(m, PMatSum) else [(1.0, m)])]
    weights, parts = zip(*weighted)
    return PMatSum(parts, weights)


ParameterOperator.expressions.update(sum=total)
