"""A kernel known by its products, ``K f = J (J'^T f)``: nothing stored but the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.network import gradients_on
from nngeom.core import memory
from nngeom.core.damping import Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ConvergenceError, UnsupportedError
from nngeom.core.linalg import flat_rows
from nngeom.core.linear import identity, linear, solution
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.estimated import EstimatedKernel
from nngeom.fmat.products import EVERYTHING, Mean, build, squared_norms
from nngeom.fmat.tiles import Side, span
from nngeom.pmat.tangents import at_once_or_not, tangents_or_rows, times_rows
from nngeom.pullback.backward import pull_back
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.solve.iterative import iterative
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


def push(side: Side, v: Tensor) -> Tensor:
    """``J v``: ``[*b, d] -> [*b, c, n]``, by tangents or by rows; differentiable in ``v``."""
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
        one_by_one = lambda: tangents_or_rows(lambda: _by_tangents(side, flat), lambda: _by_rows(side, flat))
        pushed = at_once_or_not(lambda: _at_once(side, flat), one_by_one) if len(flat) > 1 else one_by_one()
    return pushed.view(*v.shape[:-1], *pushed.shape[1:])


def _at_once(side: Side, v: Tensor) -> Tensor:
    """``[b, d] -> [b, c, n]``, all vectors through one graph a batch."""
    parts = []
    for batch in side.run.loader:
        tangents = ManyTangents.of(side.run.network, batch)
        tangents.require_right()
        pushed = [tangents.push(v[lo:hi]) for lo, hi in tangents.pieces(len(v))]
        parts.append(torch.cat(pushed).flatten(2).transpose(1, 2).to(v.dtype))
    return torch.cat(parts, 2)


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
class FMatImplicit(EstimatedKernel):
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

    def exact_diagonal(self) -> Tensor:
        if self.left is not self.right:
            return self.materialize().diag().tensor
        with torch.no_grad(), self.left.within():
            mean = Mean.over(self._reference) if self.centered else None
            return self.scale * squared_norms(self.left, EVERYTHING, mean)[""]

    def materialize(self, representation: Any = FMatDense) -> Any:
        """The same kernel in a ``representation`` that holds its entries, such as :class:`FMatDense`."""
        if self.centered and self._reference is not self.left:
            return self.T.materialize(representation).T
        with torch.no_grad(), self.left.within():
            right = None if self.left is self.right else self.right
            kernel = build(representation, self.left, right, EVERYTHING, centered=self.centered)[""]
        return self.scale * kernel

    # -- what it solves and estimates ----------------------------------------------------------------------------------

    @property
    def is_symmetric(self):
        return self.left is self.right

    def solve(
        self,
        f: FVector,
        damping: float | Tensor | Damping = 0.0,
        tol: float = 1e-6,
        max_steps: int | None = None,
        *,
        x0: FVector | None = None,
        strict: bool = True,
        indefinite: bool = False,
    ) -> FVector:
        """``(K + damping I)^-1 f`` by conjugate gradients to a relative residual ``tol``.

        ``max_steps``: products at most (by default ten times the side, at most 10 000). ``x0``: a first guess, of the
        shape of ``f``. ``indefinite``: by MINRES, for multiples of kernels with negative eigenvalues. Differentiable in
        ``f`` and ``damping``. Raises :class:`ConvergenceError` when ``tol`` is not reached, whose ``iterate`` and
        ``residual`` hold what was; ``strict=False`` returns that instead.
        """
        self.require_symmetric("solve")
        d = as_damping(damping)
        if not isinstance(d, Tikhonov):
            raise ArgumentError(
                "an implicit kernel takes a number as damping: Cutoff needs a factorisation, materialize() first"
            )
        terms = [(self.scale, self.flat_product(self._unscaled)), (d.value, identity)]
        guess = None if x0 is None else self.operand(x0, self.columns).flatten(-2)
        solver = iterative(tol, max_steps, None, guess, strict, indefinite)
        try:
            x = solution(solver, terms, self.operand(f, self.columns).flatten(-2), self.left.parameters)
        except ConvergenceError as error:
            error.iterate = FVector(error.iterate.view(f.shape))
            raise
        return FVector(x.view(f.shape))

    def __reduce__(self):
        raise UnsupportedError(
            "an implicit kernel holds a model and data, so it is not pickled; materialize() it first"
        )
