"""Nothing stored but the data: products by one forward-mode and one backward pass over the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.capture.network import Batch, Network
from nngeom.core import memory
from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.linear import identity, solution, symmetric
from nngeom.pmat.implicit_inverse import ImplicitInverse
from nngeom.pmat.operator import ParameterOperator, V, require_frobenius
from nngeom.pmat.pmat import PMat
from nngeom.pmat.tangents import are_adjoint, tangents_or_rows, times_rows
from nngeom.pullback.linearization import Linearization
from nngeom.solve.cg import conjugate_gradient
from nngeom.solve.hutchinson import Estimate, hutchinson, hutchpp
from nngeom.solve.lanczos import lanczos
from nngeom.solve.slq import SpectralDensity, spectral_density
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.columns import Columns
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Sweep

FEW_BYTES = 2**26  # of the cotangents of the first look


@dataclass(frozen=True, eq=False)
class PMatImplicit(ParameterOperator):
    """A matrix known by its products, exact and without storage; it keeps the model and the batches, and is not
    picklable.

    ``sweep``: the model, the batches and what is measured of them; ``scale``: a factor.
    """

    sweep: Sweep
    scale: float | Tensor = 1.0

    @property
    def run(self) -> Run:
        """The model on its batches."""
        return self.sweep.run

    @property
    def network(self) -> Network:
        """The model and its function."""
        return self.run.network

    @property
    def layer_collection(self) -> LayerCollection:
        """The parameters this matrix acts on."""
        return self.network.collection

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.network.dtype)

    @property
    def device(self) -> torch.device:
        return self.network.device

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        v = PVector(self.layer_collection, x)
        return {name: v[name].to(p.dtype) for name, p in self.network.parameters.items()}

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What products depend on."""
        return tuple(self.network.parameters.values())

    def product(self, x: Tensor) -> Tensor:
        return self.scale * symmetric(self._unscaled, x, self.held)

    def _unscaled(self, x: Tensor) -> Tensor:
        """Products ``[*b, d] -> [*b, d]`` before scaling; no graph is kept."""
        flat = x.reshape(-1, x.shape[-1])
        with self.run.within():
            rows = [self._product(row) for row in flat]
        return (torch.stack(rows) if rows else flat).reshape(x.shape)

    def _product(self, x: Tensor) -> Tensor:
        raise UnsupportedError("an implicit operator defines its product")

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        return [(self.scale, self._unscaled)]

    # -- what it solves and estimates ----------------------------------------------------------------------------------

    def solve(
        self,
        b: V,
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_iter: int | None = None,
        preconditioner: PMat | None = None,
    ) -> V:
        """``(M + damping I)^-1 b`` by conjugate gradients to a relative residual ``tol``.

        ``max_iter``: steps at most (by default ten times the side, at most 10 000). ``preconditioner``: a PMat whose
        ``solve`` with the same damping approximates this one. Raises :class:`ConvergenceError` when ``tol`` is not
        reached. Differentiable in ``b`` and ``damping``: another solve.
        """
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError(
                "an implicit matrix takes a number as damping: Cutoff and FactoredTikhonov need a factorisation"
            )
        apply = None
        if preconditioner is not None:
            inverse = preconditioner.inverse(d)
            apply = lambda r: inverse.product(r.to(inverse.dtype)).to(r.dtype)
        solver = lambda matrix, x: conjugate_gradient(matrix, x, tol, max_iter, apply)
        return self._apply(lambda x: solution(solver, [*self.terms(), (d.value, identity)], x, self.held), b)

    def inverse(self, damping: float | Tensor | Damping = 0.0, **options: Any) -> ParameterOperator:
        """``(M + damping I)^-1`` as an operator: every product is a :meth:`solve` with these ``options``."""
        return ImplicitInverse(self, as_damping(damping), options)

    def _estimate(self, estimator: str, samples: int, generator: torch.Generator | None) -> Estimate:
        estimators = {"hutchinson": hutchinson, "hutch++": hutchpp}
        if estimator not in estimators:
            raise ArgumentError(
                f"estimator is {estimator!r}; expected one of {sorted(estimators)}, or None for the exact trace"
            )
        like = torch.empty((), dtype=self.dtype, device=self.device)
        return estimators[estimator](self.product, self.shape[0], samples, like, generator)

    def trace(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """``tr M``: exact by default, or an :class:`Estimate` with a standard error.

        ``estimator``: ``"hutchinson"`` or ``"hutch++"``, of ``samples`` random vectors by ``generator`` (torch's global
        one by default).
        """
        if estimator is None:
            return self._exact_trace()
        return self._estimate(estimator, samples, generator)

    def _exact_trace(self) -> Tensor:
        return self.to_dense().trace()

    def diag(self) -> PVector:
        """The exact diagonal."""
        return PVector(self.layer_collection, self.to_dense().diagonal())

    def norm(self, kind: str = "fro", samples: int | None = None, generator: torch.Generator | None = None) -> Any:
        """The Frobenius norm (``kind="fro"``): exact on the dense matrix, or with ``samples`` an :class:`Estimate` from
        products.

        ``generator``: of the random vectors (torch's global one by default).
        """
        require_frobenius(kind)
        if samples is None:
            return self.to_dense().norm()
        like = torch.empty((), dtype=self.dtype, device=self.device)
        square = hutchinson(lambda z: self.product(self.product(z)), self.shape[0], samples, like, generator)
        root = square.value.clamp_min(0).sqrt()
        return Estimate(root, square.standard_error / (2 * root))

    def lanczos(
        self, k: int, steps: int | None = None, tol: float = 1e-6, generator: torch.Generator | None = None
    ) -> tuple[Tensor, PVector]:
        """The ``k`` largest eigenvalues, descending ``(k,)``, and their vectors, a batch of PVectors.

        It goes on until residuals relative to the largest eigenvalue are below ``tol``, or for ``steps`` products where
        given. ``generator``: of the first vector (torch's global one by default).
        """
        start = PVector.randn(
            self.layer_collection,
            generator=generator,
            dtype=self.dtype,
            device=self.device if generator is None else generator.device,
        )
        values, vectors = lanczos(self.product, start.flat().to(self.device), k, steps, tol)
        return values, PVector(self.layer_collection, vectors)

    def spectral_density(
        self, steps: int = 64, samples: int = 8, generator: torch.Generator | None = None
    ) -> SpectralDensity:
        """The distribution of eigenvalues by stochastic Lanczos quadrature: ``steps`` products from each of ``samples``
        random vectors, drawn by ``generator`` (torch's global one by default).
        """
        like = torch.empty((), dtype=self.dtype, device=self.device)
        return spectral_density(self.product, self.shape[0], like, steps, samples, generator)

    def _refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"an implicit matrix has no {what}; lanczos(k) and spectral_density() estimate its spectrum, or "
            "build a PMatDense, PMatKFAC or PMatEKFAC"
        )

    def eigh(self) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise self._refuse("eigh()")

    def logdet(self, damping: float | Tensor = 0.0) -> Any:
        """Not offered, whatever the ``damping``; raises :class:`UnsupportedError`."""
        raise self._refuse("logdet()")

    def sample(self, n: int, damping: float | Tensor = 0.0, generator: torch.Generator | None = None) -> Any:
        """Not offered, whatever ``n``, ``damping`` and ``generator``; raises :class:`UnsupportedError`."""
        raise self._refuse("sample()")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise UnsupportedError(
            "an implicit matrix follows its model; move the model with model.to(...) and build it again"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "an implicit matrix holds a model and data, so it is not pickled; save a PMatKFAC, PMatEKFAC, ... instead"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device='{self.device}')"


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitFisher(PMatImplicit):
    """``1/n sum_i J_i^T L_i J_i`` with the metric ``L_i`` of the outputs, by ``J v``, then ``L``, then ``J^T``."""

    def _chunks(self) -> Iterator[Chunk]:
        """The rows, batch by batch."""
        return self.sweep.chunks()

    def _product(self, x: Tensor) -> Tensor:
        return tangents_or_rows(lambda: self._by_tangents(x), lambda: self._by_rows(x))

    def _by_rows(self, x: Tensor) -> Tensor:
        """The product by explicit cotangents, as every stored representation has them."""
        total, count = torch.zeros_like(x), 0
        for chunk in self._chunks():
            inner = times_rows(chunk, x)
            for layout, j in chunk.jacobians.items():
                part = torch.zeros_like(x)
                layout.scatter_(part, j.vjp(inner.to(j.dtype)).to(x.dtype))
                total += part
            count = chunk.start + chunk.examples
        return total / count

    def _by_tangents(self, x: Tensor) -> Tensor:
        linear, v = Linearization(self.network), self._split(x)
        total, count = torch.zeros_like(x), 0
        for batch in self.run.batches():
            outputs, tangent = linear.jvp(batch, v, ask=False)
            u = self._metric_times(outputs.detach(), tangent, batch, count)
            pulled = linear.vjp(outputs, u)
            if not are_adjoint(u, tangent, pulled, x) or not bool(tangent.any()):  # else that is the proof
                outputs, tangent = linear.jvp(batch, v)
                u = self._metric_times(outputs.detach(), tangent, batch, count)
                pulled = linear.vjp(outputs, u)
                if not are_adjoint(u, tangent, pulled, x):
                    raise RuntimeError("forward and reverse mode disagree at these numbers")
            total += pulled
            count += outputs.shape[0]
        return total / count

    def _metric_times(self, outputs: Tensor, tangent: Tensor, batch: Batch, start: int) -> Tensor:
        times = getattr(self.sweep.cotangents, "times", None)
        if times is not None:
            return times(outputs, tangent, batch, start)
        columns: Columns = self.sweep.cotangents.columns(outputs, batch, start)
        total = torch.zeros_like(tangent)
        for lo, hi in memory.pieces(columns.count, outputs.numel() * outputs.element_size()):
            v = columns.make(lo, hi)
            inner = (v * tangent).flatten(2).sum(-1)
            total += (inner.view(*inner.shape, *[1] * (v.ndim - 2)) * v).sum(0)
        return total

    def _exact_trace(self) -> Tensor:
        total, count = torch.zeros((), dtype=self.dtype, device=self.device), 0
        with self.run.within():
            for chunk in self._chunks():
                total += sum(j.squared_norms().sum() for j in chunk.jacobians.values())
                count = chunk.start + chunk.examples
        return self.scale * total / count

    def diag(self) -> PVector:
        out = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        count = 0
        with self.run.within():
            for chunk in self._chunks():
                part = torch.zeros_like(out)
                for layout, j in chunk.jacobians.items():
                    layout.scatter_(part, j.square().to(out.dtype))
                out += part
                count = chunk.start + chunk.examples
        return PVector(self.layer_collection, self.scale * out / count)


def implicit(sweep: Sweep) -> ImplicitFisher:
    """The implicit matrix of a sweep, after a look at every batch, checked."""
    sweep = replace(sweep, run=sweep.run.held().silent())
    sweep.look()
    return ImplicitFisher(sweep)
