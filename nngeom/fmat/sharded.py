"""A kernel whose rows are kept by the processes that hold their examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ConvergenceError, UnsupportedError
from nngeom.core.linear import identity, linear, solution
from nngeom.fmat.columns import C, HasColumns, by_columns, has_columns
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.estimated import EstimatedKernel, told_of
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.places import Places
from nngeom.ranks.fingerprint import bits
from nngeom.ranks.team import Team
from nngeom.ranks.totals import require_same_vectors, totals
from nngeom.solve.hutchinson import Estimate, mean_estimate
from nngeom.solve.iterative import iterative
from nngeom.solve.slq import quadrature, tridiagonal
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMatSharded(EstimatedKernel):
    """``strip[k, n, l, m]``, the rows ``n`` of this process's examples and all columns ``m``: ``(c, n, c, m)``.

    ``places``, ``across``: how many examples each process has along the rows and the columns; ``between``: two sets of
    examples. Every product is a collective: all processes call it, in the same order, with the same vectors.
    """

    strip: Tensor  # [c n c m]
    places: Places
    across: Places
    between: bool = False

    @property
    def team(self) -> Team:
        return self.places.team

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the examples of each process start among the rows."""
        return tuple(self.places.of_rank(rank).start for rank in range(self.team.size))

    @property
    def outputs(self) -> int:
        return self.strip.shape[0]

    @property
    def rows(self) -> int:
        return self.places.total

    @property
    def columns(self) -> int:
        return self.across.total

    @property
    def dtype(self) -> torch.dtype:
        return self.strip.dtype

    @property
    def device(self) -> torch.device:
        return self.strip.device

    @property
    def is_symmetric(self) -> bool:
        return not self.between

    def to(self, *args: Any, **kwargs: Any) -> Self:
        return replace(self, strip=self.strip.to(*args, **kwargs))

    # -- products ------------------------------------------------------------------------------------------------------

    def product(self, f: Tensor) -> Tensor:
        return linear(self._forth, self._back, f)

    def _flat(self) -> Tensor:
        """``[c n, c m]``."""
        c, n = self.strip.shape[:2]
        return self.strip.reshape(c * n, c * self.columns)

    def _forth(self, f: Tensor) -> Tensor:
        with self.team.together("product") as note:
            note.mine = bits([f])
            own = (f.flatten(-2) @ self._flat().T).reshape(math.prod(f.shape[:-1]), self.strip.shape[1])
        require_same_vectors("product", note.all)
        return self.places.whole(own).view(*f.shape[:-1], self.rows)

    def _back(self, u: Tensor) -> Tensor:
        """``K^T u``."""
        own = lambda: u[..., self.places.mine].flatten(-2) @ self._flat()
        return totals(self.team, "product", lambda: ([own()], 1), [u])[0][0].unflatten(-1, (self.outputs, self.columns))

    @property
    def T(self) -> Self:
        if self.between:
            raise self._refuse("transpose of a kernel between two sets of examples")
        return self

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, strip=c * self.strip)

    def added(self, other: FunctionOperator) -> FunctionOperator:
        if not isinstance(other, FMatSharded):
            return super().added(other)
        if (other.team.ranks, other.places.counts) != (self.team.ranks, self.places.counts):
            raise ArgumentError(
                f"kernels with {self.places.counts} and {other.places.counts} examples on the processes do not add; "
                "expected the same split"
            )
        return replace(self, strip=self.strip + other.strip, between=self.between or other.between)

    # -- exact numbers -------------------------------------------------------------------------------------------------

    def exact_diagonal(self) -> Tensor:
        own = torch.arange(self.strip.shape[1], device=self.device)
        entries = self.strip[:, own, :, own + self.places.mine.start]  # [n c c]
        return self.places.whole(entries.diagonal(dim1=1, dim2=2).T)

    def norm(
        self, kind: str | int = "fro", samples: int | None = None, generator: torch.Generator | None = None
    ) -> Any:
        """The Frobenius norm, exact without ``samples``; others as for implicit kernels.

        ``kind``: ``"fro"``, or ``2``, the largest singular value, by Lanczos with vectors of the ``generator``.
        """
        if kind != "fro" or samples is not None:
            return super().norm(kind, samples, generator)
        scale = max(self.team.exchange("norm", float(self.strip.abs().max()) if self.strip.numel() else 0.0))
        total = (self.strip / (scale or 1.0)).square().sum()
        self.team.sum_([total])
        return total.sqrt() * scale

    def gather(self, rank: int | None = None) -> FMatDense | None:
        """All rows on every process, or on ``rank`` alone and ``None`` elsewhere."""
        if rank is None:
            return FMatDense(self.places.whole(self.strip))
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.team.size:
            raise ArgumentError(f"rank is {rank!r}; expected one of 0 to {self.team.size - 1}, or None for all")
        here = rank == self.team.rank
        out = self.strip.new_empty(self.outputs, self.rows if here else 0, *self.strip.shape[2:])
        if here:
            out[:, self.places.mine] = self.strip
        for step in range(1, self.team.size):
            source = (rank - step) % self.team.size
            part = self.strip.new_empty(self.outputs, self.places.counts[source] if here else 0, *self.strip.shape[2:])
            self.team.pass_on([self.strip] if source == self.team.rank else [], [part] if here else [], step)
            if here:
                out[:, self.places.of_rank(source)] = part
        return FMatDense(out) if here else None

    def materialize(self) -> FMatDense:
        """All rows on every process."""
        return cast(FMatDense, self.gather())

    # -- what it solves and estimates ----------------------------------------------------------------------------------

    def solve(
        self,
        f: HasColumns[C],
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        *,
        strict: bool = True,
        indefinite: bool = False,
    ) -> C:
        """``(K + damping I)^-1 f`` by conjugate gradients, preconditioned by the diagonal, to a relative residual
        ``tol``.

        ``max_steps``: products at most (by default ten times the side, at most 10 000). ``indefinite``: by MINRES, for
        kernels with negative eigenvalues. Raises :class:`ConvergenceError` when ``tol`` is not reached, whose
        ``iterate`` and ``residual`` hold what was; ``strict=False`` returns that instead.
        """
        if has_columns(f):
            options: dict[str, Any] = {"strict": strict, "indefinite": indefinite}
            return cast(C, by_columns(self, f, lambda u: self.solve(u, damping, tol, max_steps, **options)))
        self.require_symmetric("solve")
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError("a sharded kernel takes a number as damping: Cutoff needs a factorisation, gather()")
        given = self.operand(f, self.columns)
        scales = (self.exact_diagonal().flatten() + torch.as_tensor(d.value).detach()).to(given)
        by_diagonal = None if indefinite or not bool((scales > 0).all()) else lambda z: z / scales
        solver = iterative(tol, max_steps, by_diagonal, None, strict=strict, indefinite=indefinite)
        try:
            x = solution(solver, [(1.0, self.flat_product()), (d.value, identity)], given.flatten(-2))
        except ConvergenceError as error:
            error.iterate = FVector(error.iterate.view(given.shape))
            raise
        return cast(C, FVector(x.view(given.shape)))

    def logdet(  # type: ignore[override]
        self,
        damping: float | Tensor = 0.0,
        estimator: str | None = "slq",
        steps: int = 64,
        samples: int = 32,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """``log det(K + damping I)`` as an :class:`Estimate`, by stochastic Lanczos quadrature.

        ``estimator``: ``"slq"``, of ``steps`` products from each of ``samples`` random signs, drawn by rank 0's
        ``generator`` (torch's global one by default).
        """
        return super().logdet(damping, estimator, steps, samples, generator)

    def effective_rank(self, steps: int = 64, samples: int = 32, generator: torch.Generator | None = None) -> Estimate:
        """The exponential of the entropy of the eigenvalues over their sum, by stochastic Lanczos quadrature.

        ``steps`` products from each of ``samples`` random signs, drawn by rank 0's ``generator`` (torch's global one by
        default). Source: Roy and Vetterli 2007.
        """
        self.require_symmetric("effective_rank")
        d, trace = self.shape[0], float(self.trace())
        if not trace > 0:
            raise ArgumentError(f"effective_rank needs a positive trace; that of this kernel is {trace:g}")
        nodes, weights = quadrature(
            tridiagonal(self.flat_product(), d, self._like, steps, samples, self._draws(generator))
        )
        shares = (nodes / trace).clamp_min(0)
        entropy = mean_estimate(-d * (weights * torch.special.xlogy(shares, shares)).sum(-1))
        rank = math.exp(float(entropy.value))
        return Estimate(self._like.new_tensor(rank), (rank * entropy.standard_error).to(self._like))

    def inverse(self, damping: float | Tensor | Damping = 0.0) -> FMatDense:
        """Not offered; raises :class:`UnsupportedError`. ``damping``: as for :meth:`solve`, which is."""
        raise self._refuse(f"inverse({damping!r})")

    def _refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"a sharded kernel has no {what}; solve(f, damping) and lanczos(k) work on its rows, and gather(rank=0) "
            "gives the whole FMatDense to one process"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError("a sharded kernel belongs to its processes and is not pickled; gather() it first")

    def __repr__(self) -> str:
        return f"{super().__repr__()}, {self.strip.shape[1]} rows here{told_of(self.team)}"
