"""A kernel known by its products, ``K f = J (J'^T f)``: nothing stored but the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.network import gradients_on
from nngeom.core import memory
from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.core.linalg import flat_rows
from nngeom.core.linear import identity, linear, solution
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.operator import FunctionOperator, HasColumns
from nngeom.fmat.products import EVERYTHING, Mean, build, squared_norms
from nngeom.fmat.tiles import Side, span
from nngeom.pmat.tangents import tangents_or_rows, times_rows
from nngeom.pullback.backward import pull_back
from nngeom.pullback.linearization import Linearization
from nngeom.solve.cg import conjugate_gradient
from nngeom.solve.hutchinson import Estimate, hutchinson, hutchpp
from nngeom.solve.lanczos import lanczos
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


def push(side: Side, v: Tensor) -> Tensor:
    """``J v``: ``[*b, d] -> [*b, c, n]``, a forward-mode pass a vector, or by rows; differentiable in ``v``."""
    return linear(lambda x: _push(side, x), lambda u: _pull(side, u), v, side.parameters)


def pull(side: Side, u: Tensor) -> Tensor:
    """``J^T u``: ``[*b, c, n] -> [*b, d]``, differentiable in ``u``.

    One forward pass a batch, and one backward pass for all vectors that fit the budget.
    """
    return linear(lambda x: _pull(side, x), lambda v: _push(side, v), u, side.parameters)


def _push(side: Side, v: Tensor) -> Tensor:
    flat = v.reshape(-1, v.shape[-1])
    with side.within():
        if not len(flat):
            return v.new_zeros(*v.shape[:-1], side.outputs, side.examples)
        pushed = tangents_or_rows(lambda: _by_tangents(side, flat), lambda: _by_rows(side, flat))
    return pushed.view(*v.shape[:-1], *pushed.shape[1:])


def _by_tangents(side: Side, v: Tensor) -> Tensor:
    """``[b, d] -> [b, c, n]``."""
    network = side.run.network
    linearization, rows = Linearization(network), []
    for x in v:
        named = PVector(network.collection, x)
        tangents = {name: named[name].to(p.dtype) for name, p in network.parameters.items()}
        pushed = [linearization.jvp(batch, tangents)[1].flatten(1).T for batch in side.run.loader]
        rows.append(torch.cat(pushed, 1).to(v.dtype))
    return torch.stack(rows)


def _by_rows(side: Side, v: Tensor) -> Tensor:
    """As :func:`_by_tangents`, from the rows as every stored representation has them."""
    out = v.new_zeros(len(v), side.outputs, side.examples)
    for chunk in side.chunks(reuse=True):
        k, n = span(chunk)
        out[:, k, n] = times_rows(chunk, v)
    return out


def _pull(side: Side, u: Tensor) -> Tensor:
    network, flat = side.run.network, u.reshape(-1, *u.shape[-2:])
    total = torch.zeros(flat.shape[0], network.collection.numel, dtype=u.dtype, device=u.device)
    parameters = list(network.parameters.values())
    shapes, at = [p.shape for p in parameters], 0
    with side.within():
        for batch, n in zip(side.run.loader, side.sizes):
            with gradients_on():
                outputs = network.run(batch)
            cotangents = flat[..., at : at + n].transpose(1, 2).reshape(-1, *outputs.shape).to(outputs.dtype)
            for lo, hi in memory.pieces(len(flat), 2 * network.collection.numel * u.element_size()):
                grads = pull_back(outputs, parameters, shapes, cotangents[lo:hi], retain=hi < len(flat))
                total[lo:hi] += torch.cat([flat_rows(g) for g in grads], 1).to(u.dtype)
            at += n
    return total.view(*u.shape[:-2], -1)


@dataclass(frozen=True, eq=False, repr=False)
class FMatImplicit(FunctionOperator):
    """``scale * J J'^T`` by products; keeps the model and the batches, and is not picklable.

    ``left``, ``right``: the examples that are its rows and columns; ``centered``: the mean gradient of ``reference``
    (by default the left side) is subtracted from both.
    """

    left: Side
    right: Side
    centered: bool = False
    scale: float | Tensor = 1.0
    reference: Side | None = None  # whose mean gradient is subtracted; the left side by default

    @property
    def outputs(self):
        return self.left.outputs

    @property
    def rows(self):
        return self.left.examples

    @property
    def columns(self):
        return self.right.examples

    @property
    def dtype(self):
        return self.left.dtype

    @property
    def device(self):
        return self.left.device

    @property
    def T(self):
        return FMatImplicit(self.right, self.left, self.centered, self.scale, self._reference)

    @property
    def _reference(self) -> Side:
        return self.reference or self.left

    def scaled(self, c):
        return FMatImplicit(self.left, self.right, self.centered, c * self.scale, self.reference)

    def product(self, f):
        return self.scale * self._unscaled(f)

    def _unscaled(self, f: Tensor) -> Tensor:
        """With centring, ``(J - 1 mu)(J' - 1 mu)^T f``, the mean gradient by one more product with the reference
        examples.
        """
        pulled = pull(self.right, f)
        if not self.centered:
            return push(self.left, pulled)
        base = self._reference
        mean = f.sum(-1, keepdim=True).expand(*f.shape[:-1], base.examples) / base.examples
        pulled = pulled - pull(base, mean)
        pushed = push(self.left, pulled)
        over = pushed if base is self.left else push(base, pulled)
        return pushed - over.mean(-1, keepdim=True)

    # -- exact numbers -------------------------------------------------------------------------------------------------

    def vTMv(self, f: FVector) -> Tensor:
        """``f^T K f = |J^T f|**2``, by the pull-back alone."""
        if self.left is not self.right or self.centered:
            return super().vTMv(f)
        return self.scale * pull(self.left, self.operand(f, self.columns)).square().sum(-1)

    def diag(self) -> FVector:
        """The exact diagonal, without products."""
        self._require_square("diag")
        if self.left is not self.right:
            return FVector(self.materialize().diag().tensor)
        with torch.no_grad(), self.left.within():
            mean = Mean.over(self._reference) if self.centered else None
            squares = squared_norms(self.left, EVERYTHING, mean)[""]
        return FVector(self.scale * squares)

    def trace(self, estimator: str | None = None, samples: int = 32, generator: torch.Generator | None = None) -> Any:
        """``tr K``: exact by default, or an :class:`Estimate` with a standard error.

        ``estimator``: ``"hutchinson"`` or ``"hutch++"``, of ``samples`` random vectors by ``generator`` (torch's global
        one by default).
        """
        if estimator is None:
            return self.diag().tensor.sum()
        estimators = {"hutchinson": hutchinson, "hutch++": hutchpp}
        if estimator not in estimators:
            raise ArgumentError(
                f"estimator is {estimator!r}; expected one of {sorted(estimators)}, or None for the exact trace"
            )
        self._require_square("trace")
        return estimators[estimator](
            self._flat(), self.shape[0], samples, torch.empty((), dtype=self.dtype, device=self.device), generator
        )

    def norm(self, kind: str = "fro", samples: int | None = None, generator: torch.Generator | None = None) -> Any:
        """The Frobenius norm (``kind="fro"``): of the dense kernel, or with ``samples`` an :class:`Estimate` from
        products.

        ``generator``: of the random vectors (torch's global one by default).
        """
        if samples is None:
            return self.materialize().norm(kind)
        self._require_square("an estimated norm")
        act = self._flat()
        square = hutchinson(
            lambda z: act(act(z)),
            self.shape[0],
            samples,
            torch.empty((), dtype=self.dtype, device=self.device),
            generator,
        )
        root = square.value.clamp_min(0).sqrt()
        return Estimate(root, square.standard_error / (2 * root))

    def materialize(self, representation: Any = FMatDense) -> Any:
        """The same kernel in a ``representation`` that holds its entries, such as :class:`FMatDense`."""
        if self.centered and self._reference is not self.left:
            return self.T.materialize(representation).T
        with torch.no_grad(), self.left.within():
            right = None if self.left is self.right else self.right
            kernel = build(representation, self.left, right, EVERYTHING, centered=self.centered)[""]
        return self.scale * kernel

    # -- what it solves and estimates ----------------------------------------------------------------------------------

    def _require_symmetric(self, what: str) -> None:
        if self.left is not self.right:
            raise ArgumentError(f"{what} needs a symmetric kernel, of one set of examples; this one is between two")

    def _flat(self, product: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        return lambda z: (product or self.product)(z.unflatten(-1, (self.outputs, self.columns))).flatten(-2)

    def solve(
        self, f: Any, damping: float | Tensor | Damping = 0.0, tol: float = 1e-6, max_iter: int | None = None
    ) -> Any:
        """``(K + damping I)^-1 f`` by conjugate gradients to a relative residual ``tol``.

        ``max_iter``: steps at most (by default ten times the side, at most 10 000). Differentiable in ``f`` and
        ``damping``. Raises :class:`ConvergenceError` when ``tol`` is not reached.
        """
        if isinstance(f, HasColumns):
            return f.map_columns(lambda u: self.solve(u, damping, tol, max_iter))
        self._require_symmetric("solve")
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError(
                "an implicit kernel takes a number as damping: Cutoff needs a factorisation, materialize() first"
            )
        terms = [(self.scale, self._flat(self._unscaled)), (d.value, identity)]
        solver = lambda matrix, x: conjugate_gradient(matrix, x, tol, max_iter)
        x = solution(solver, terms, self.operand(f, self.columns).flatten(-2), self.left.parameters)
        return FVector(x.view(f.shape))

    def inverse(self, damping: float | Tensor | Damping = 0.0) -> FMatDense:
        """``(K + damping I)^-1`` of the dense kernel."""
        self._require_symmetric("inverse")
        return self.materialize().inverse(damping)

    def lanczos(
        self, k: int, steps: int | None = None, tol: float = 1e-6, generator: torch.Generator | None = None
    ) -> tuple[Tensor, FVector]:
        """The ``k`` largest eigenvalues, descending ``(k,)``, and their vectors, a batch of FVectors.

        It goes on until residuals relative to the largest eigenvalue are below ``tol``, or for ``steps`` products where
        given. ``generator``: of the first vector (torch's global one by default).
        """
        self._require_symmetric("lanczos")
        device = generator.device if generator is not None else self.device
        start = torch.randn(self.shape[0], generator=generator, dtype=self.dtype, device=device).to(self.device)
        values, vectors = lanczos(self._flat(), start, k, steps, tol)
        return values, FVector(vectors.view(-1, self.outputs, self.rows))

    def eigh(self) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise self._refuse("eigh()")

    def logdet(self, damping: float | Tensor = 0.0) -> Any:
        """Not offered, whatever the ``damping``; raises :class:`UnsupportedError`."""
        raise self._refuse("logdet()")

    def _refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"an implicit kernel has no {what}; lanczos(k) gives leading eigenpairs, materialize() an FMatDense"
        )

    def __reduce__(self):
        raise UnsupportedError(
            "an implicit kernel holds a model and data, so it is not pickled; materialize() it first"
        )
